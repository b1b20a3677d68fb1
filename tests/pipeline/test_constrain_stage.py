"""A start that was published belongs to the configuration that made it, also before the stage has its record."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from isotone.config import Experiment
from isotone.config_io import experiment_from_dict
from isotone.constraint import constrain
from isotone.errors import UsageError
from isotone.interruption import StopFlag
from isotone.pipeline import context as context_module
from isotone.pipeline.context import Context
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.stages import constrain as stage
from isotone.training.budget import Budget


def _experiment(**constraint: Any) -> Experiment:
    given = {"parametrization": "projection", "initialization": "nnls", **constraint}
    return experiment_from_dict({"name": "x", "arms": {"baseline": {}, "monotonic": {"constraint": given}}}, "test")


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
        return stage.run(Context(experiment, graph, directory, 1, node, StopFlag(), Budget(), lambda line: None))

    monkeypatch.setattr(stage, "start_constrained", started)
    monkeypatch.setattr(context_module, "outputs_hash", lambda run, node: "the same")
    published, _ = run(_experiment())
    before = published.read_bytes()
    assert run(_experiment())[0].read_bytes() == before  # what an interruption left is used
    with pytest.raises(UsageError, match="was made with constraint"):
        run(_experiment(**change))
