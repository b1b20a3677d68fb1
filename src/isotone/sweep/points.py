"""The points of a sweep: every combination of its axes, each an experiment of one arm that ends on validation text."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Arm, Experiment, Runtime, Sweep
from isotone.config_io import dump_yaml, experiment_from_dict, load_experiment, resolve_seed
from isotone.config_recipes import with_recipes
from isotone.config_sweep import with_settings
from isotone.constraint.recipes import ModelKind
from isotone.errors import UsageError
from isotone.models.describe import kind_of
from isotone.pipeline.graph import Graph
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.slices import config_slice

BASELINE = "baseline"
_LR = "training.lr"
_NOT_OF_A_POINT = ("sweep", "arms", "description", "analysis")
"""Parts of the experiment that say what is tried, or what is concluded in the end."""

Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Point:
    """One combination.

    Attributes:
        id: the arm's name and a hash of all that decides the point's figures: the same wherever the combination is
            named, another one as soon as anything else would come out.
        arm: the arm that is tried.
        settings: values by axis.
        experiment: of this arm alone, scored on validation text; None where the configuration refuses the combination.
        refused: why it does.
    """

    id: str
    arm: str
    settings: dict[str, Any]
    experiment: Experiment | None
    refused: str = ""


@dataclass(frozen=True)
class SweepDirectory:
    """The folder of a sweep, runs/NAME/sweep: a run for each point, over one setup, and what was chosen."""

    root: Path

    @classmethod
    def of(cls, out: Path, name: str) -> "SweepDirectory":
        """Return the folder of an experiment's sweep."""
        return cls(out / name / "sweep")

    @classmethod
    def find(cls, folder: Path) -> "SweepDirectory | None":
        """Return the sweep that a folder is, or the one in an experiment's folder that holds no run beside it."""
        if cls(folder).experiment_file.is_file() and not (folder / "config.yaml").is_file():
            return cls(folder)
        inner = cls(folder / "sweep")
        return inner if inner.experiment_file.is_file() and not any(folder.glob("seed-*")) else None

    @property
    def experiment_file(self) -> Path:
        """The experiment with its axes, and the seed of its points."""
        return self.root / "experiment.yaml"

    @property
    def table(self) -> Path:
        """What was found, as data; ``sweep.md`` and ``sweep.svg`` lie beside it."""
        return self.root / "sweep.json"

    @property
    def best(self) -> Path:
        """An experiment with the best setting of every arm."""
        return self.root / "best.yaml"

    @property
    def jobs(self) -> Path:
        """Slurm's job scripts, and which were submitted."""
        return self.root / "jobs"

    def run(self, point: Point, seed: int) -> RunDirectory:
        """Return the run of a point."""
        return RunDirectory(self.root / f"{point.id}-seed-{seed}")

    def load(self) -> Experiment:
        """Return the experiment that is swept."""
        return load_experiment(self.experiment_file)

    def keep(self, experiment: Experiment) -> None:
        """Write down what is swept, for ``isotone status`` and jobs."""
        text = dump_yaml(experiment)
        if not self.experiment_file.is_file() or self.experiment_file.read_text(encoding="utf-8") != text:
            records.make_folder(self.root)
            records.write_text(self.experiment_file, text)


def require_sweep(experiment: Experiment) -> Sweep:
    """Return the experiment's sweep.

    Raises:
        UsageError: it has none.
    """
    if experiment.sweep is None:
        raise UsageError(
            f"experiment {experiment.name}: sweep is missing; give axes, such as "
            f"sweep: {{arms: {{monotonic: {{training.lr: [1e-4, 5e-4]}}}}}}"
        )
    return experiment.sweep


def seed_of_points(experiment: Experiment) -> int:
    """Return the seed that all points have, unless another one is asked for."""
    given = experiment.sweep.seed if experiment.sweep else None
    return experiment.seeds[0] if given is None else given


def resolve_seed_of_points(experiment: Experiment, seed: int | None = None) -> int:
    """Return the seed that was asked for, else EXPERIMENT_SEED, else the experiment's for its points.

    Raises:
        UsageError: it is not a whole number from 0 to 2^63 - 1.
    """
    return resolve_seed(experiment.model_copy(update={"seeds": (seed_of_points(experiment),)}), seed)


def with_seed_of_points(experiment: Experiment, seed: int) -> Experiment:
    """Return the experiment that says itself which seed its points have; its own seeds stay, for what is best.

    Raises:
        UsageError: the experiment has no sweep.
    """
    return experiment.model_copy(update={"sweep": require_sweep(experiment).model_copy(update={"seed": seed})})


def build_points(experiment: Experiment, seed: int) -> list[Point]:
    """Return the points of a sweep: the baseline's first, then each arm's, in the order of their values.

    Raises:
        UsageError: the experiment has no sweep.
    """
    sweep = require_sweep(experiment)
    points = {
        arm: [_point(experiment, seed, arm, settings) for settings in _combinations(axes)]
        for arm, axes in sweep.arms.items()
    }
    if BASELINE not in points:
        wanted = max(sum(point.experiment is not None for point in of_arm) for of_arm in points.values())
        combinations = _combinations(baseline_axes(sweep.arms.values(), wanted))
        points[BASELINE] = [_point(experiment, seed, BASELINE, settings) for settings in combinations]
    baseline = points.pop(BASELINE)
    return list({point.id: point for of_arm in (baseline, *points.values()) for point in of_arm}.values())


def best_of(experiment: Experiment, chosen: Mapping[str, str], points: Sequence[Point]) -> Experiment:
    """Return the experiment with the settings of chosen points, given by arm, in the place of its own."""
    of_points = {point.id: point.experiment for point in points}
    arms = dict(experiment.arms)
    for arm, point in chosen.items():
        found = of_points[point]
        assert found is not None  # a point that the configuration refuses is not chosen
        arms[arm] = found.arms[arm]
    return experiment.model_copy(update={"name": f"{experiment.name}-best", "arms": arms, "sweep": None})


def baseline_axes(swept: Sequence[Axes] | Any, wanted: int) -> dict[str, list[Any]]:
    """Return the baseline's axes: those of training that arms are tried on, as many points as the arm with most has.

    Where the arms have more, by axes of their constraint, learning rates are added between those given: the middle of
    the widest gap, as a ratio, first. Without two learning rates the baseline has fewer points, and the table says so.
    """
    axes: dict[str, list[Any]] = {}
    for of_arm in swept:  # training as a whole may be one: as the first it does not undo the others
        for key, values in of_arm.items():
            if key.partition(".")[0] == "training":
                axes[key] = [*axes.get(key, []), *(v for v in values if v not in axes.get(key, []))]
    axes = dict(sorted(axes.items(), key=lambda axis: axis[0] != "training"))
    rates = sorted(float(v) for v in axes.get(_LR, []) if v is not None)
    others = math.prod(len(values) for key, values in axes.items() if key != _LR)
    while len(rates) > 1 and len(rates) * others < wanted:
        low, high = max(itertools.pairwise(rates), key=lambda pair: pair[1] / pair[0])
        rates = sorted({*rates, middle := float(f"{math.sqrt(low * high):.3g}")})
        if middle in (low, high):
            break
    return axes | ({_LR: rates} if len(rates) > 1 else {})


def _combinations(axes: Axes) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _point(experiment: Experiment, seed: int, arm: str, settings: dict[str, Any]) -> Point:
    tree = experiment.model_dump(mode="json", exclude_defaults=True, exclude=set(_NOT_OF_A_POINT))
    changed = with_settings(experiment.arms[arm].model_dump(mode="json", exclude_defaults=True), settings)
    assert experiment.sweep is not None
    scored = {
        "split": "validation",
        "num_documents": experiment.sweep.num_documents,
        "checkpoints": [experiment.attacks.checkpoint],
        "rouge": None,  # generation takes longer than a short training, and the loss decides
    }
    tree |= {"evaluation": {**tree.get("evaluation", {}), **scored}, "seeds": [seed], "arms": {arm: changed}}
    try:
        found = experiment_from_dict(tree, "sweep")
    except UsageError as error:
        reason = str(error).splitlines()[0].removeprefix(f"sweep: arms.{arm}.")
        return Point(_id(arm, {"refused": changed}), arm, settings, None, reason)
    if reason := _unfit_pair(found.arms[arm]) or _unfit_recipe(found):
        return Point(_id(arm, {"refused": changed}), arm, settings, None, reason)
    # the machine decides bits, too, but is found when a run begins: it must not make another point
    free = found.model_copy(update={"runtime": Runtime()})
    meant = with_recipes(free, lambda: kind_of(free.model))
    parts = {node.kind: config_slice(meant, seed, node) for node in Graph(free).nodes}
    return Point(_id(arm, parts), arm, settings, found)


def _unfit_recipe(experiment: Experiment) -> str:
    """Say why an arm's keys do not fit what its recipe means for the model.

    Raises:
        UsageError: the model cannot be read.
    """
    unread: list[UsageError] = []

    def find() -> ModelKind:
        try:
            return kind_of(experiment.model)
        except UsageError as error:
            unread.append(error)
            raise

    try:
        with_recipes(experiment, find)
    except UsageError as error:
        if error in unread:
            raise
        return str(error)
    return ""


def _unfit_pair(arm: Arm) -> str:
    """Say why parametrization and initialization do not fit, where both are given; what a model refuses comes later."""
    if not arm.constraint or not arm.constraint.parametrization or not arm.constraint.initialization:
        return ""
    from isotone.constraint.initialization import require_pair

    try:
        require_pair(arm.constraint.parametrization, arm.constraint.initialization, arm.constraint.anneal)
    except UsageError as error:
        return str(error)
    return ""


def _id(arm: str, content: Mapping[str, Any]) -> str:
    return f"{arm}-{records.hash_json(content)[:12]}"
