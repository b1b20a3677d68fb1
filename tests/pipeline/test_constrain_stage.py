"""A start that was published belongs to the configuration that made it, also before the stage has its record."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from tiny_sweep import FRACTIONS, corpus, make_model

from isotone.config import Experiment
from isotone.config_io import experiment_from_dict
from isotone.constraint import constrain
from isotone.constraint.journal import Journal
from isotone.errors import Stopped, UsageError
from isotone.interruption import StopFlag
from isotone.pipeline import context as context_module
from isotone.pipeline.context import Context
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.runner import Request, run_nodes
from isotone.pipeline.stages import constrain as stage
from isotone.training.budget import Budget


def _experiment(**constraint: Any) -> Experiment:
    given = {"parametrization": "projection", "initialization": "nnls", **constraint}
    return experiment_from_dict({"name": "x", "arms": {"baseline": {}, "monotonic": {"constraint": given}}}, "test")


class StopAt(StopFlag):
    """Is requested from its n-th reading on."""

    def __init__(self, number: int):
        self.number, self.count = number, 0

    @property
    def requested(self) -> str | None:  # type: ignore[override]
        self.count += 1
        return "SIGTERM" if self.count >= self.number else None


def test_a_fit_that_is_stopped_again_and_again_publishes_the_same_start(tmp_path: Path) -> None:
    """A signal is noticed within a fit, and the next start goes on behind the last matrix."""
    documents = corpus(tmp_path / "documents.jsonl", {})
    experiment = experiment_from_dict(
        {
            "name": "x",
            "model": {"source": str(make_model(tmp_path / "model"))},
            "data": {"source": str(documents), "sequence_length": 32, "fractions": FRACTIONS},
            "arms": {
                "baseline": {},
                "monotonic": {"constraint": {"parametrization": "projection", "initialization": "nnls"}},
            },
            "runtime": {"threads": 1, "device": "cpu"},
        }
    )

    def published(out: Path, stop: StopFlag) -> dict[str, bytes]:
        run = RunDirectory.of(out, "x", 1)
        run_nodes(Request(experiment, run, 1, until="constrain"), stop, lambda line: None)
        found = [*run.checkpoints("monotonic").rglob("*"), run.node_result(Node("constrain", "monotonic"))]
        return {path.name: path.read_bytes() for path in found if path.is_file()}

    whole, readings, stops = published(tmp_path / "whole", StopFlag()), 40, 0
    while True:
        try:
            assert published(tmp_path / "stopped", StopAt(readings)) == whole
            break
        except Stopped:
            readings, stops = readings + 40, stops + 1
    assert stops > 1
    assert not RunDirectory.of(tmp_path / "stopped", "x", 1).work(Node("constrain", "monotonic")).exists()


@pytest.mark.parametrize("change", [{"calibrate": True}, {"calibration_rows": 8}, {"activation": "monotone_gelu"}])
def test_a_start_of_another_configuration_is_not_taken_over(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the start was published and before the record was, then run again."""

    def started(context: Context, arm: str, journal: Journal) -> Any:
        model = tiny_model("arcee")
        return model, constrain(model, "mlp_both", "projection", "absolute")

    def run(experiment: Experiment) -> list[Path]:
        node = Node("constrain", "monotonic")
        directory = RunDirectory.of(tmp_path, "x", 1)
        graph = Graph(experiment)
        return stage.run(Context(experiment, graph, directory, 1, node, StopFlag(), Budget(), lambda line: None))

    monkeypatch.setattr(stage, "start_constrained", started)
    monkeypatch.setattr(context_module, "outputs_hash", lambda run, node: "the same")
    published, _ = run(_experiment())
    before = published.read_bytes()
    assert run(_experiment())[0].read_bytes() == before  # what an interruption left is used
    with pytest.raises(UsageError, match="was made with constraint"):
        run(_experiment(**change))
