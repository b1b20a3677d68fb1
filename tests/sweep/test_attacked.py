"""Where best.yaml was run, the chosen points show what was measured; a run of other settings shows nothing."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from isotone import records
from isotone.config import Experiment
from isotone.config_io import dump_yaml
from isotone.config_recipes import with_recipes
from isotone.result_models import Ratio, SweepResults, SweptPoint
from isotone.sweep.attacked import with_remainders
from isotone.sweep.figure import sweep_figure
from isotone.sweep.points import Point, SweepDirectory, best_of, build_points

from .conftest import Tiny

AGAINST = [
    {"control": "cooler", "remainder": {"value": 0.02, "ci95": [-0.01, 0.05]}},
    {"control": "noisy", "remainder": {"value": -0.01, "ci95": None}},
]


@pytest.fixture
def points(tiny: Tiny) -> list[Point]:
    return build_points(tiny(), 7)


def found(points: list[Point]) -> SweepResults:
    """Return results in which the first point of each arm was chosen."""
    swept = [
        SweptPoint(
            id=p.id,
            arm=p.arm,
            settings=p.settings,
            state="complete",
            reason="",
            ratio=Ratio(value=1.1, ci95=[1.0, 1.2], n=4),
        )
        for p in points
        if p.experiment
    ]
    chosen = {arm: next(p.id for p in swept if p.arm == arm) for arm in ("baseline", "monotonic")}
    values: dict[str, Any] = {"experiment": "tiny", "seed": 7, "checkpoint": "last", "searched": {}, "notes": []}
    return SweepResults(points=swept, chosen=chosen, found={}, **values)


def run_best(out: Path, experiment: Experiment) -> None:
    run = out / "tiny-best/seed-7"
    records.write_text(run / "config.yaml", dump_yaml(experiment, defaults=True))
    verdicts = [{"arm": "monotonic", "against": AGAINST}]
    records.write_json(run / "results/final_results.json", {"verdicts": verdicts})


def test_the_chosen_point_shows_the_remainder_beside_every_control(
    tiny: Tiny, points: list[Point], tmp_path: Path
) -> None:
    results = found(points)
    run_best(tmp_path, best_of(tiny(), results.chosen, points))
    shown = with_remainders(results, SweepDirectory.of(tmp_path, "tiny"), tiny(), points)
    by_id = {p.id: [r.control for r in p.remainders] for p in shown.points if p.remainders}
    assert by_id == {results.chosen["monotonic"]: ["cooler", "noisy"]}


def test_what_a_recipe_adds_when_best_is_run_is_no_other_choice(
    tiny: Tiny, tree: dict[str, Any], tmp_path: Path
) -> None:
    experiment = tiny(
        training=tree["training"] | {"distill": {"logits": 0.1}},
        arms={"baseline": {}, "monotonic": {"constraint": {"recipe": "published"}}},
        sweep={"arms": {"monotonic": {"training.lr": [1e-3, 1e-2]}}},
    )
    points = build_points(experiment, 7)
    results = found(points)
    best = best_of(experiment, results.chosen, points)
    resolved = with_recipes(best, lambda: "layer_norm")
    assert resolved != best
    run_best(tmp_path, resolved)
    shown = with_remainders(results, SweepDirectory.of(tmp_path, "tiny"), experiment, points)
    assert [p.id for p in shown.points if p.remainders] == [results.chosen["monotonic"]]


def test_a_run_of_another_choice_shows_nothing(tiny: Tiny, points: list[Point], tmp_path: Path) -> None:
    results = found(points)
    run_best(tmp_path, tiny().model_copy(update={"name": "tiny-best", "sweep": None}))
    assert with_remainders(results, SweepDirectory.of(tmp_path, "tiny"), tiny(), points) == results


def test_the_figure_is_a_file_of_its_own_with_and_without_remainders(
    tiny: Tiny, points: list[Point], tmp_path: Path
) -> None:
    results = found(points)
    plain = sweep_figure(results)
    run_best(tmp_path, best_of(tiny(), results.chosen, points))
    full = sweep_figure(with_remainders(results, SweepDirectory.of(tmp_path, "tiny"), tiny(), points))
    assert plain
    assert full
    for svg in (plain, full):
        ElementTree.fromstring(svg.encode())
        assert {f"var({name})" for name in re.findall(r"(--[\w-]+):", svg)} >= set(re.findall(r"var\(--[\w-]+\)", svg))
        assert ">baseline</text>" in svg
    assert "beside cooler" in full
    assert "remainder" not in plain
    assert sweep_figure(results.model_copy(update={"points": []})) is None
