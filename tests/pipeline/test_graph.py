from typing import Any

import pytest

from isotone.config import Arm, Attacks, Constraint, Data, Experiment, Frequency, MatchedLoss, Matching, Pgd, Probe
from isotone.errors import UsageError
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.slices import config_slice

PUBLISHED = Constraint(recipe="published")


def _experiment(**arms: Arm) -> Experiment:
    return Experiment(name="x", arms={"baseline": Arm(), "monotonic": Arm(constraint=PUBLISHED), **arms})


def test_two_arms_give_the_eight_founding_stages() -> None:
    graph = Graph(_experiment())
    assert graph.stages == {
        "setup": 0,
        "constrain": 1,
        "train_baseline": 2,
        "train_monotonic": 3,
        "evaluate": 4,
        "triggers": 5,
        "hotflip": 6,
        "aggregate": 7,
    }


def test_founding_edges_hold() -> None:
    needs = Graph(_experiment()).needs
    assert needs[Node("constrain", "monotonic")] == (Node("setup"),)
    assert needs[Node("train", "baseline")] == (Node("setup"),)
    assert Node("constrain", "monotonic") in needs[Node("train", "monotonic")]
    assert Node("train", "monotonic") in needs[Node("hotflip", "monotonic")]
    assert {Node("evaluate", "baseline"), Node("hotflip", "monotonic")} <= set(needs[Node("aggregate")])


def test_every_node_comes_after_what_it_needs() -> None:
    twin = Arm(start="baseline", train=False, constraint=PUBLISHED)
    graph = Graph(_experiment(twin=twin, second=Arm(start="twin")))
    order = graph.nodes
    assert all(order.index(needed) < order.index(node) for node in order for needed in graph.needs[node])


def test_an_untrained_arm_ends_where_it_is_constrained_and_has_its_own_stage() -> None:
    graph = Graph(_experiment(twin=Arm(start="baseline", train=False, constraint=PUBLISHED)))
    assert graph.end_of("twin") == Node("constrain", "twin")
    assert graph.needs[Node("constrain", "twin")] == (Node("setup"), Node("train", "baseline"))
    assert graph.stages["train_twin"] == 3


def test_the_pretrained_model_itself_can_be_an_arm() -> None:
    graph = Graph(_experiment(pretrained_model=Arm(train=False)))
    assert graph.end_of("pretrained_model") == Node("setup")
    assert graph.needs[Node("evaluate", "pretrained_model")] == (Node("setup"),)


def _matched(by: Matching, **more: Any) -> Arm:
    return Arm(start="baseline", train=False, matched_loss=MatchedLoss(to="monotonic", by=by, **more))


def test_a_matched_arm_needs_the_ends_of_both_arms_and_is_a_stage_of_its_own() -> None:
    graph = Graph(_experiment(cold=_matched("temperature")))
    assert graph.end_of("cold") == Node("match", "cold")
    assert graph.needs[Node("match", "cold")] == (Node("setup"), Node("train", "baseline"), Node("train", "monotonic"))
    assert graph.needs[Node("hotflip", "cold")] == (Node("setup"), Node("match", "cold"))
    assert (graph.stage_of(Node("match", "cold")), graph.stages["train_cold"]) == ("train_cold", 3)


def test_an_arm_that_is_named_before_what_it_is_matched_to_comes_after_it() -> None:
    arms = {"cold": _matched("temperature"), "baseline": Arm(), "monotonic": Arm(constraint=PUBLISHED)}
    order = Graph(Experiment(name="x", arms=arms)).nodes
    assert order.index(Node("match", "cold")) > order.index(Node("train", "monotonic"))


def test_a_training_that_is_repeated_needs_its_own_start() -> None:
    second = Arm(start="baseline")
    under = Arm(start="second", train=False, matched_loss=MatchedLoss(to="monotonic", by="undertrained"))
    needs = Graph(_experiment(second=second, under=under)).needs[Node("match", "under")]
    assert set(needs) == {Node("setup"), *(Node("train", arm) for arm in ("second", "monotonic", "baseline"))}


def test_a_constraint_that_is_only_a_start_has_no_node_of_its_own() -> None:
    graph = Graph(_experiment(free=Arm(constraint=Constraint(recipe="published", enforce=False))))
    assert Node("constrain", "free") not in graph.needs
    assert graph.needs[Node("train", "free")] == (Node("setup"),)


@pytest.mark.parametrize(("text", "name"), [("0", "setup"), ("3", "train_monotonic"), ("hotflip", "hotflip")])
def test_a_stage_is_found_by_name_or_number(text: str, name: str) -> None:
    graph = Graph(_experiment(twin=Arm(start="baseline", train=False, constraint=PUBLISHED)))
    assert graph.find_stage(text) == name


def _attacked(**attacks: object) -> Graph:
    return Graph(_experiment().model_copy(update={"attacks": Attacks.model_validate(attacks)}))


def test_further_attacks_add_a_node_per_arm_and_a_stage_of_number_6() -> None:
    graph = _attacked(gcg={}, coordinate={}, pgd={}, frequency={})
    added = {"gcg", "coordinate", "pgd", "frequency"}
    assert {name for name, number in graph.stages.items() if number == 6} == {"hotflip", *added}
    for kind in added:
        assert graph.needs[Node(kind, "monotonic")] == (Node("setup"), Node("train", "monotonic"))
        assert Node(kind, "baseline") in graph.needs[Node("aggregate")]
    assert graph.find_stage("6") == "hotflip"
    assert graph.find_stage("gcg") == "gcg"


def test_transfer_waits_for_the_edits_and_triggers_of_all_arms() -> None:
    graph = _attacked(gcg={}, pgd={}, transfer=True)
    needed = set(graph.needs[Node("transfer", "baseline")])
    assert needed == {Node("setup"), Node("train", "baseline")} | {
        Node(kind, arm) for kind in ("hotflip", "triggers", "gcg") for arm in ("baseline", "monotonic")
    }
    assert graph.stages["transfer"] == 6
    order = graph.nodes
    assert all(order.index(n) < order.index(node) for node in order for n in graph.needs[node])
    assert Node("transfer", "baseline") not in _attacked(gcg={}).needs


def test_arms_are_probed_but_for_those_at_matched_loss() -> None:
    arms = _experiment(cold=_matched("temperature"))
    graph = Graph(arms.model_copy(update={"attacks": Attacks.model_validate({"probe": {}, "transfer": True})}))
    assert graph.needs[Node("probe", "monotonic")] == (Node("setup"), Node("train", "monotonic"))
    assert Node("probe", "cold") not in graph.needs
    assert Node("probe", "baseline") in graph.needs[Node("aggregate")]
    assert Node("probe", "baseline") not in graph.needs[Node("transfer", "monotonic")]
    assert (graph.find_stage("probe"), graph.stages["probe"]) == ("probe", 6)
    assert graph.find_stage("6") == "hotflip"


def test_a_probe_makes_nothing_else_stale_and_depends_on_no_attack() -> None:
    plain = Experiment(name="x", attacks=Attacks(transfer=True))
    probed = Experiment(name="x", attacks=Attacks(transfer=True, probe=Probe(edits=9)))
    for node in Graph(plain).nodes:
        assert node.kind == "aggregate" or config_slice(plain, 1, node) == config_slice(probed, 1, node)
    node = Node("probe", "baseline")
    assert config_slice(probed, 1, node)["attacks"] == {"probe": {"edits": 9}}
    changes: dict[str, bool] = {}
    for key, value in {"budget_tokens": 10**6, "num_documents": 7, "batch_documents": 2, "checkpoint": "best"}.items():
        other = Experiment(name="x", attacks=Attacks.model_validate({"probe": {"edits": 9}, key: value}))
        changes[key] = config_slice(other, 1, node) != config_slice(probed, 1, node)
    assert changes == {"budget_tokens": False, "num_documents": True, "batch_documents": False, "checkpoint": True}


def test_asking_for_another_attack_makes_no_other_attack_stale() -> None:
    plain, more = (
        _experiment(),
        _experiment().model_copy(
            update={"attacks": Attacks.model_validate({"gcg": {"steps": 3}, "pgd": {}, "transfer": True})}
        ),
    )
    for kind in ("evaluate", "triggers", "hotflip"):
        node = Node(kind, "baseline")
        assert config_slice(plain, 1, node) == config_slice(more, 1, node)
    assert config_slice(more, 1, Node("gcg", "baseline"))["attacks"] == {"gcg": {"steps": 3}}
    assert config_slice(more, 1, Node("pgd", "baseline"))["attacks"] == {"pgd": {}}


def test_a_budget_makes_attacks_on_documents_stale_and_nothing_else() -> None:
    plain, more = _experiment(), _experiment().model_copy(update={"attacks": Attacks(budget_tokens=9000)})
    stale = {
        kind
        for kind in ("evaluate", "triggers", "hotflip")
        if config_slice(plain, 1, Node(kind, "baseline")) != config_slice(more, 1, Node(kind, "baseline"))
    }
    assert stale == {"hotflip"}


def test_an_unknown_stage_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no stage 'train'.*2 train_baseline"):
        Graph(_experiment()).find_stage("train")


def test_one_node_is_found_by_the_name_that_logs_give_it() -> None:
    graph = Graph(_experiment())
    assert graph.find_nodes("hotflip.monotonic") == [Node("hotflip", "monotonic")]
    assert graph.find_nodes("hotflip") == [Node("hotflip", "baseline"), Node("hotflip", "monotonic")]
    assert graph.find_nodes("2") == [Node("train", "baseline")]
    with pytest.raises(UsageError, match=r"no 'hotflip\.monotone'; this experiment has: hotflip\.baseline, hotflip\.m"):
        graph.find_nodes("hotflip.monotone")
    with pytest.raises(UsageError, match=r"no stage 'flip\.baseline'.*6 hotflip"):
        graph.find_nodes("flip.baseline")


def test_which_documents_are_taken_is_in_the_slice_of_all_that_measure_them() -> None:
    """The packed data are the same for every data.shuffle_seed; those of other documents must not pass for them."""
    first = Experiment(name="x", attacks=Attacks(transfer=True))
    other = Experiment(name="x", attacks=Attacks(transfer=True), data=Data(shuffle_seed=1))
    changed = {str(node) for node in Graph(first).nodes if config_slice(first, 1, node) != config_slice(other, 1, node)}
    measured = {f"{kind}.{arm}" for kind in ("evaluate", "hotflip", "triggers", "transfer") for arm in first.arms}
    assert changed == {"setup"} | measured


def test_an_attack_that_is_not_replayed_leaves_the_transfer_matrix_as_it_is() -> None:
    first, node = Experiment(name="x", attacks=Attacks(transfer=True)), Node("transfer", "baseline")
    more = Experiment(name="x", attacks=Attacks(transfer=True, pgd=Pgd(), frequency=Frequency()))
    assert config_slice(first, 1, node) == config_slice(more, 1, node)
