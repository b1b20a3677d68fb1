"""A start that was published belongs to the configuration that made it, also before the stage has its record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopping import StopAt
from tiny_models import tiny_model
from tiny_sweep import FRACTIONS, corpus, make_model

from isotone.config import Experiment
from isotone.config_io import experiment_from_dict
from isotone.constraint import constrain
from isotone.errors import BlockedError, Stopped, UsageError
from isotone.interruption import StopFlag
from isotone.pipeline import context as context_module
from isotone.pipeline.context import Context
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.lease import lease
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.runner import Request, run_nodes
from isotone.pipeline.stages import constrain as constrain_stage
from isotone.training.budget import Budget


def _experiment(**constraint: Any) -> Experiment:
    given = {"parametrization": "projection", "initialization": "nnls", **constraint}
    return experiment_from_dict({"name": "x", "arms": {"baseline": {}, "monotonic": {"constraint": given}}}, "test")


Published = Callable[..., dict[str, bytes]]


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """Return a function that runs setup and the node that fits an arm in a folder, and returns what was published."""
    documents, model = corpus(tmp_path / "documents.jsonl", {}), make_model(tmp_path / "model")

    def run(
        out: str, stop: StopFlag, stage: str = "constrain", fresh: bool = False, **constraint: Any
    ) -> dict[str, bytes]:
        fitted = {"parametrization": "projection", "initialization": "nnls", **constraint}
        experiment = experiment_from_dict(
            {
                "name": "x",
                "model": {"source": str(model)},
                "data": {"source": str(documents), "sequence_length": 32, "fractions": FRACTIONS},
                "training": {"epochs": 0.2, "micro_batch": 4, "accumulation": 1},
                "arms": {"baseline": {}, "monotonic": {"constraint": fitted}},
                "runtime": {"threads": 1, "device": "cpu"},
            }
        )
        directory = RunDirectory.of(tmp_path / out, "x", 1)
        node = Node(stage.split("_")[0], "monotonic")
        run_nodes(Request(experiment, directory, 1, until="setup"), StopFlag(), lambda line: None)
        run_nodes(Request(experiment, directory, 1, only=stage, fresh=fresh), stop, lambda line: None)
        assert not directory.work(node).exists()
        found = [*directory.checkpoints("monotonic").rglob("*"), directory.node_result(node)]
        return {path.name: path.read_bytes() for path in found if path.is_file() and path.name != "timing.jsonl"}

    return run


@pytest.mark.parametrize(("stage", "enforce"), [("constrain", True), ("train_monotonic", False)])
def test_a_fit_that_is_stopped_again_and_again_publishes_the_same_start(
    stage: str, enforce: bool, published: Published
) -> None:
    """A signal is noticed within a fit, in stage 1 or as a training begins, and the next start goes on behind it."""
    whole = published("whole", StopFlag(), stage, enforce=enforce)
    for _ in range(3):  # each process comes one step further
        with pytest.raises(Stopped, match="what is fitted is kept"):
            published("stopped", StopAt(10), stage, enforce=enforce)
    assert published("stopped", StopFlag(), stage, enforce=enforce) == whole


def test_a_training_is_done_over_from_the_start_that_stands(published: Published, tmp_path: Path) -> None:
    """--only train_monotonic --fresh sets a training aside, and not what stage 1 has fitted."""
    published("fresh", StopFlag())
    first, again = (published("fresh", StopFlag(), stage="train_monotonic", fresh=fresh) for fresh in (False, True))
    assert first == again
    aside = RunDirectory.of(tmp_path / "fresh", "x", 1).checkpoints("monotonic.set-aside-1")
    assert [path.name for path in aside.glob("step-*")] == ["step-00000004"]


def test_nothing_is_set_aside_under_who_works_on_it(published: Published, tmp_path: Path) -> None:
    """--fresh in a second terminal took the checkpoints of the first, and then said that it is at work."""
    before = published("worked", StopFlag(), stage="constrain")
    at_work = RunDirectory.of(tmp_path / "worked", "x", 1).lease(Node("constrain", "monotonic"))
    with lease(at_work, "constrain.monotonic"), pytest.raises(BlockedError, match="is being worked on by process"):
        published("worked", StopFlag(), fresh=True)
    assert not list(tmp_path.rglob("*set-aside*"))
    assert published("worked", StopFlag(), fresh=True) == before


@pytest.mark.parametrize("change", [{"calibration_rows": 4}, {"initialization": "calibrated_shift"}])
def test_what_a_stopped_fit_has_made_serves_no_other_one(change: dict[str, Any], published: Published) -> None:
    with pytest.raises(Stopped):
        published("changed", StopAt(10))
    assert published("changed", StopFlag(), **change) == published("fresh", StopFlag(), **change)


@pytest.mark.parametrize("change", [{"calibrate": True}, {"calibration_rows": 8}, {"activation": "monotone_gelu"}])
def test_a_start_of_another_configuration_is_not_taken_over(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the start was published and before the record was, then run again."""

    def started(context: Context, arm: str) -> Any:
        model = tiny_model("arcee")
        return model, constrain(model, "mlp_both", "projection", "absolute")

    def run(experiment: Experiment) -> list[Path]:
        node = Node("constrain", "monotonic")
        directory = RunDirectory.of(tmp_path, "x", 1)
        graph = Graph(experiment)
        return constrain_stage.run(
            Context(experiment, graph, directory, 1, node, StopFlag(), Budget(), lambda line: None)
        )

    monkeypatch.setattr(constrain_stage, "start_constrained", started)
    monkeypatch.setattr(context_module, "outputs_hash", lambda run, node: "the same")
    published, _ = run(_experiment())
    before = published.read_bytes()
    assert run(_experiment())[0].read_bytes() == before  # what an interruption left is used
    with pytest.raises(UsageError, match="was made with constraint"):
        run(_experiment(**change))
