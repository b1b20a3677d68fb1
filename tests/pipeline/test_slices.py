"""A node's record answers for what the node uses, and for nothing else."""

from typing import Any

import pytest

from isotone.config import Experiment
from isotone.config_io import experiment_from_dict
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.slices import config_slice

ARMS: dict[str, Any] = {"baseline": {}, "monotonic": {"constraint": {"recipe": "published"}}}
CONTROLS: dict[str, Any] = {
    "shifted_twin": {
        "start": "baseline",
        "train": False,
        "constraint": {"parametrization": "projection", "initialization": "shift"},
    },
    "edit_trained": {"training": {"random_prefix": 0.1}},
    "reparametrized": {"constraint": {"recipe": "published", "enforce": False}},
    "sign_frozen": {"constraint": {"parametrization": "sign_frozen", "initialization": "unchanged"}},
    **{
        f"matched_{by}": {"start": "baseline", "train": False, "matched_loss": {"to": "monotonic", "by": by}}
        for by in ("temperature", "noise", "undertrained")
    },
}


def _experiment(arms: dict[str, Any], **more: Any) -> Experiment:
    return experiment_from_dict({"name": "x", "arms": arms, **more}, "test")


def _slices(experiment: Experiment) -> dict[Node, Any]:
    return {node: config_slice(experiment, 1, node) for node in Graph(experiment).nodes}


@pytest.mark.parametrize("name", CONTROLS)
def test_adding_a_control_changes_nothing_that_stands(name: str) -> None:
    before, after = _slices(_experiment(ARMS)), _slices(_experiment({**ARMS, name: CONTROLS[name]}))
    assert {n: s for n, s in after.items() if n in before and n != Node("aggregate")} == {
        n: s for n, s in before.items() if n != Node("aggregate")
    }
    graph, wide = Graph(_experiment(ARMS)), Graph(_experiment({**ARMS, name: CONTROLS[name]}))
    assert all(wide.needs[node] == graph.needs[node] for node in before if node != Node("aggregate"))


@pytest.mark.parametrize(
    ("node", "change", "changes"),
    [
        ("match.matched_noise", {"attacks": {"hotflip": {"flips": 3}}}, False),
        ("match.matched_noise", {"attacks": {"num_documents": 3}}, True),
        ("match.matched_noise", {"attacks": {"num_search_documents": 3}}, False),
        ("match.matched_noise", {"attacks": {"protocol": {"prefix": 32}}}, True),
        ("match.matched_noise", {"training": {"lr": 1}}, False),  # its inputs answer for that
        ("match.matched_undertrained", {"training": {"lr": 1}}, True),
        ("match.matched_undertrained", {"training": {"keep_last": 9}}, False),
        ("train.edit_trained", {"attacks": {"protocol": {"prefix": 32}}}, True),
        ("train.baseline", {"attacks": {"protocol": {"prefix": 32}}}, False),
    ],
)
def test_a_control_depends_on_what_it_is_made_with(node: str, change: dict[str, Any], changes: bool) -> None:
    kind, arm = node.split(".")
    arms = ARMS | CONTROLS
    before, after = _slices(_experiment(arms))[Node(kind, arm)], _slices(_experiment(arms, **change))[Node(kind, arm)]
    assert (before != after) == changes


@pytest.mark.parametrize("node", ["match.cold", "triggers.baseline", "probe.baseline", "hotflip.baseline"])
def test_of_pairs_the_number_of_flips_decides_which_are_attacked(node: str) -> None:
    """A source needs as many tokens, so the first N pairs that are attacked, or matched on, are others."""
    kind, arm = node.split(".")
    arms = ARMS | {
        "cold": {"start": "baseline", "train": False, "matched_loss": {"to": "monotonic", "by": "temperature"}}
    }
    found = []
    for flips in (3, 4):
        attacks = {"hotflip": {"flips": flips}, "probe": {"edits": 9}}
        given = {"model": {"source": "pocket-t5"}, "data": {"source": "bible-pairs"}, "attacks": attacks}
        found.append(_slices(_experiment(arms, **given))[Node(kind, arm)])
    assert found[0] != found[1]


def test_what_was_matched_on_search_documents_is_stale() -> None:
    node = Node("match", "matched_noise")
    assert _slices(_experiment(ARMS | CONTROLS))[node]["measured_on"] == "attack_test"


def test_the_start_of_a_free_arm_and_the_scope_of_noise_are_part_of_it() -> None:
    wide, narrow = ARMS | CONTROLS, ARMS | CONTROLS
    narrow = narrow | {"monotonic": {"constraint": {"recipe": "published", "scope": "mlp_in"}}}
    narrow |= {"reparametrized": {"constraint": {"recipe": "published", "scope": "mlp_in", "enforce": False}}}
    one, other = _slices(_experiment(wide)), _slices(_experiment(narrow))
    for node in (Node("train", "reparametrized"), Node("match", "matched_noise")):
        assert one[node] != other[node]
