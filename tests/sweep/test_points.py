"""Every combination of the axes is a point, or is refused with its reason; a point's id is what decides its figures."""

from pathlib import Path
from typing import Any

import pytest

from isotone.config import Arm, Constraint
from isotone.config_io import load_experiment
from isotone.constraint.recipes import RECIPES, Recipe
from isotone.errors import UsageError
from isotone.pipeline.graph import Graph
from isotone.sweep.cost import format_cost
from isotone.sweep.points import baseline_axes, build_points, require_sweep

from .conftest import AXES, Tiny

WIDE = {"arms": AXES}


def test_every_combination_is_there_and_those_that_do_not_fit_say_why(tiny: Tiny) -> None:
    points = [point for point in build_points(tiny(sweep=WIDE), 1) if point.arm == "monotonic"]
    assert len(points) == 8
    refused = [point for point in points if point.experiment is None]
    assert [list(point.settings.values())[:2] for point in refused] == 2 * [["softplus", "relu"]]
    assert all("relu sets about half of the weights to 0, which softplus cannot reach" in p.refused for p in refused)


def test_a_combination_that_the_schema_refuses_is_listed_with_the_key(tiny: Tiny) -> None:
    axes = {"constraint.parametrization": ["projection", "sign_frozen"], "constraint.enforce": [True, False]}
    _, *points = build_points(tiny(sweep={"arms": {"monotonic": axes}}), 1)
    refused = {tuple(p.settings.values()): p.refused for p in points if p.experiment is None}
    assert refused["sign_frozen", False].startswith("constraint.enforce: false leaves nothing of parametrization")


def test_a_combination_that_a_recipe_refuses_for_the_model_is_listed_with_its_reason(tiny: Tiny) -> None:
    """Found when its run begins, it would be waited for: no attempt is written down before a run is resolved."""
    axes = {"constraint.recipe": ["recommended"], "constraint.calibrate": [True, False]}
    arms = {"baseline": {}, "monotonic": {"constraint": {"recipe": "recommended"}}}

    def points(source: str) -> list[Any]:
        found = build_points(tiny(model={"source": source}, arms=arms, sweep={"arms": {"monotonic": axes}}), 1)
        return [point for point in found if point.arm == "monotonic"]

    calibrated, plain = points("pocket-arcee")
    assert calibrated.experiment is None
    assert "recommended is projection from rotated_nnls here; calibrate: rotated_nnls has" in calibrated.refused
    assert plain.experiment is not None
    with pytest.raises(UsageError, match="no/such/model"):
        points("./no/such/model")


def test_a_point_is_another_one_once_a_recipe_means_something_else(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"baseline": {}, "monotonic": {"constraint": {"recipe": "recommended"}}}
    swept = tiny(arms=arms, sweep={"arms": {"monotonic": {"training.lr": [1e-3]}}})
    _, before = build_points(swept, 1)
    monkeypatch.setitem(RECIPES["recommended"], "layer_norm", Recipe("projection", "shift"))
    _, now = build_points(swept, 1)
    assert now.experiment == before.experiment
    assert now.id != before.id


def test_a_point_is_one_arm_that_ends_on_validation_text(tiny: Tiny) -> None:
    point = next(p for p in build_points(tiny(sweep=WIDE), 1) if p.arm == "monotonic" and p.experiment)
    assert point.experiment is not None
    nodes = [str(node) for node in Graph(point.experiment).nodes]
    assert nodes == ["setup", "constrain.monotonic", "train.monotonic", "evaluate.monotonic"]
    assert point.experiment.evaluation.split == "validation"
    assert point.experiment.arms["monotonic"].training.lr == point.settings["training.lr"]


def test_the_id_changes_with_what_decides_the_figures_and_with_nothing_else(tiny: Tiny) -> None:
    def ids(seed: int = 1, **changed: Any) -> set[str]:
        return {point.id for point in build_points(tiny(**{"sweep": WIDE, **changed}), seed) if point.experiment}

    assert ids(name="other", description="x", cluster={"account": "y"}, runtime={"threads": 2}) == ids()
    fewer = {"monotonic": {**AXES["monotonic"], "constraint.initialization": ["relu"]}}
    assert ids(sweep={"arms": fewer}) & ids()  # the baseline's are others: it is searched less
    training = {"epochs": 0.25, "micro_batch": 4, "accumulation": 1}
    assert not ids(training=training) & ids()
    assert not ids(seed=2) & ids()
    assert not ids(sweep={"arms": AXES, "num_documents": 3}) & ids()


def test_the_baseline_is_searched_as_often_as_the_arm_with_most_points(tiny: Tiny) -> None:
    points = build_points(tiny(sweep=WIDE), 1)
    runnable = [p.arm for p in points if p.experiment]
    assert runnable.count("baseline") == runnable.count("monotonic") == 6
    rates = [p.settings["training.lr"] for p in points if p.arm == "baseline"]
    assert rates == sorted(rates)
    assert {1e-3, 1e-2} < set(rates)


def test_gaps_between_learning_rates_are_filled_widest_first() -> None:
    axes = [{"training.lr": [1e-4, 1e-2, 2e-2], "training.warmup": [0.1, 0.2], "constraint.scope": ["mlp_in"]}]
    assert baseline_axes(axes, 8) == {"training.lr": [1e-4, 1e-3, 1e-2, 2e-2], "training.warmup": [0.1, 0.2]}
    assert baseline_axes([{"constraint.scope": ["mlp_in", "mlp_both"]}], 2) == {}


def test_training_as_a_whole_is_an_axis_of_the_baseline_too(tiny: Tiny) -> None:
    wholes = [{"lr": 1e-3}, {"lr": 1e-2, "warmup": 0.2}]
    points = build_points(tiny(sweep={"arms": {"monotonic": {"training": wholes}}}), 1)
    for arm in ("baseline", "monotonic"):
        assert [p.settings["training"] for p in points if p.arm == arm] == wholes
    axes = baseline_axes([{"training.warmup": [0.1]}, {"training": wholes}], 2)
    assert list(axes) == ["training", "training.warmup"]  # the other way round would undo the warmup


def test_a_search_of_its_own_is_the_baselines(tiny: Tiny) -> None:
    arms = {**AXES, "baseline": {"training.lr": [3e-3]}}
    points = build_points(tiny(sweep={"arms": arms}), 1)
    assert [p.settings for p in points if p.arm == "baseline"] == [{"training.lr": 3e-3}]


def test_every_key_of_an_arm_may_be_an_axis_without_being_named_here(tiny: Tiny) -> None:
    """Keys that are added to constraint or training later need no word in the sweep."""
    keys = [f"constraint.{key}" for key in Constraint.model_fields]
    keys += [f"training.{key}" for key in Arm.model_fields["training"].annotation.model_fields]  # type: ignore[union-attr]
    for key in keys:
        with pytest.raises(UsageError, match=rf"sweep\.arms\.monotonic\.{key}: found .*allowed"):
            tiny(sweep={"arms": {"monotonic": {key: [{"no": "such value"}]}}})


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"monotonc": {"training.lr": [1e-3]}}, r"sweep\.arms\.monotonc: there is no such arm; allowed: baseline, mon"),
        ({"monotonic": {"training.rate": [1]}}, r"sweep\.arms\.monotonic\.training\.rate: unknown key of an arm; all"),
        ({"monotonic": {"training.lr": ["fast"]}}, r"monotonic\.training\.lr: found \"fast\", allowed: a valid number"),
        ({"monotonic": {"training.lr": [-1]}}, r"sweep\.arms\.monotonic\.training\.lr: found -1, allowed: greater"),
        ({"monotonic": {"constraint.scope": ["mlp"]}}, r"constraint\.scope: found \"mlp\", allowed: 'mlp_in', "),
        ({"monotonic": {"training.lr": [1, 1]}}, r"training\.lr: 1 is there twice"),
        ({"monotonic": {"training.lr": []}}, r"sweep\.arms\.monotonic\.training\.lr: found \[\], allowed: at least 1"),
        ({"monotonic": {"training.lr": 1}}, r"sweep\.arms\.monotonic\.training\.lr: found 1, allowed: a list"),
        (
            {"monotonic": {"training.lr": [1e-4], "training": [{"lr": 1e-3}]}},
            r"training\.lr: training is an axis, too, and has a value for it already",
        ),
        ({"monotonic": {"start": ["baseline"]}}, r"sweep\.arms\.monotonic\.start: cannot be an axis"),
        ({"baseline": {"constraint.scope": ["mlp_in"]}}, r"the baseline's training is searched, and nothing else"),
        ({}, r"sweep\.arms: found \{\}, allowed: at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_axis_is_said_with_file_and_key(tiny: Tiny, arms: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"^experiment: .*{said}"):
        tiny(sweep={"arms": arms})


def test_an_arm_that_is_made_from_another_cannot_be_swept(tiny: Tiny, tree: dict[str, Any]) -> None:
    arms = tree["arms"] | {"twin": {"start": "baseline", "training": {"lr": 1e-4}}}
    with pytest.raises(UsageError, match=r"sweep\.arms\.twin: the arm is made from the end of baseline"):
        tiny(arms=arms, sweep={"arms": {"twin": {"training.lr": [1e-3]}}})


@pytest.mark.parametrize("baseline", [{}, {"baseline": {"train": False}}])
def test_without_a_baseline_that_is_trained_there_is_nothing_to_compare_with(tiny: Tiny, baseline: Any) -> None:
    arms = baseline | {"free": {}}
    with pytest.raises(UsageError, match=r"sweep: points are compared with the baseline's, .*; give arms\.baseline"):
        tiny(arms=arms, evaluation={"split": "validation"}, sweep={"arms": {"free": {"training.lr": [1e-3]}}})


def test_an_experiment_without_axes_says_how_to_give_them() -> None:
    with pytest.raises(UsageError, match=r"experiment pocket: sweep is missing; give axes, such as sweep: \{arms"):
        require_sweep(load_experiment("pocket"))


def test_the_cost_lists_every_point_and_one_setup(tiny: Tiny, tmp_path: Path) -> None:
    shown = format_cost(tiny(sweep=WIDE), 1, None, tmp_path)
    assert all(point.id in shown for point in build_points(tiny(sweep=WIDE), 1))
    assert "14 points (baseline 6, monotonic 8), 2 of them refused already" in shown
    assert not list(tmp_path.iterdir())
