"""What the attack suite found of the chosen points, once best.yaml was run; read after the choice, never for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Experiment
from isotone.config_io import load_experiment
from isotone.config_recipes import with_recipes
from isotone.models.describe import kind_of
from isotone.pipeline.run_directory import ExperimentDirectory
from isotone.result_models import SweepRemainder, SweepResults
from isotone.sweep.points import BASELINE, Point, SweepDirectory, best_of


def with_remainders(
    results: SweepResults, directory: SweepDirectory, experiment: Experiment, points: Sequence[Point]
) -> SweepResults:
    """Return the results with the remainders of the chosen points, as far as best.yaml was run beside the sweep."""
    if not results.chosen:
        return results
    best = best_of(experiment, results.chosen, points)
    runs = ExperimentDirectory(directory.root.parent.parent / best.name)
    path = runs.summary / "final_results.json"
    if not path.is_file():
        path = runs.run(results.seed).results / "final_results.json"
    if not path.is_file() or not _is_of(best, runs):
        return results
    by_arm: dict[str, Any] = {found["arm"]: found["against"] for found in records.read_json(path).get("verdicts", [])}
    chosen = {point: by_arm.get(arm, []) for arm, point in results.chosen.items() if arm != BASELINE}
    return results.model_copy(
        update={
            "points": [
                point.model_copy(update={"remainders": [_remainder(entry) for entry in chosen.get(point.id, [])]})
                for point in results.points
            ]
        }
    )


def _is_of(best: Experiment, runs: ExperimentDirectory) -> bool:
    """Tell whether every run beside the sweep has the arms that were chosen now, and not those of an earlier choice."""

    def asked(experiment: Experiment) -> Any:
        training = experiment.training.model_dump(exclude={"precision"})  # resolved in a run
        return experiment.arms, training, experiment.model.source, experiment.data

    wanted = asked(with_recipes(best, lambda: kind_of(best.model)))  # as a run resolves it
    return all(asked(load_experiment(Path(run.experiment_file))) == wanted for run in runs.runs.values())


def _remainder(entry: dict[str, Any]) -> SweepRemainder:
    return SweepRemainder(control=entry["control"], value=entry["remainder"]["value"], ci95=entry["remainder"]["ci95"])
