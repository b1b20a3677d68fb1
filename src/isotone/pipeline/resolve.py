"""What is decided once: device, threads and precision are resolved at the first start of a run and kept.

They decide bits. A resume that would change one is refused; a resume that says ``auto`` takes what was decided.
"""

from typing import Any

from isotone import records
from isotone.config import Experiment
from isotone.config_io import dump_yaml, load_experiment
from isotone.config_recipes import with_recipes
from isotone.errors import UsageError
from isotone.models.describe import kind_of
from isotone.pipeline.run_directory import RunDirectory

_DECIDED = (("runtime", "device"), ("runtime", "threads"), ("training", "precision"), ("model", "attention"))


def resolve(experiment: Experiment, run: RunDirectory, *, computes: bool = True) -> Experiment:
    """Return the experiment with nothing left open, and write it to the run's config.yaml.

    Stages that compute side by side agree: whichever comes first decides, the others follow.

    Args:
        experiment: as it was given.
        run: the run's folder.
        computes: False for stages whose results do not depend on the machine: a setup on a node without a GPU must not
            decide that training does without one. What is open then stays open.

    Raises:
        UsageError: a value given now differs from the one decided when the run began; names the key and both values.
    """
    with records.locked(run.root / ".config.lock"):
        experiment = with_recipes(experiment, lambda: kind_of(experiment.model))
        if run.config.is_file():
            experiment = as_decided(experiment, load_experiment(str(run.config), []))
        if computes:
            experiment = _resolved_here(experiment)
        text = dump_yaml(experiment, defaults=True)
        if not run.config.is_file() or run.config.read_text(encoding="utf-8") != text:
            records.write_text(run.config, text)
    return experiment


def as_decided(experiment: Experiment, before: Experiment) -> Experiment:
    """Return the experiment with what an earlier start has decided.

    Raises:
        UsageError: a value given now differs from it.
    """
    decided: dict[tuple[str, str], Any] = {}
    for part, key in _DECIDED:
        now, was = getattr(getattr(experiment, part), key), getattr(getattr(before, part), key)
        if now in (None, "auto"):
            decided[part, key] = was
        elif was not in (None, "auto") and now != was:
            raise UsageError(
                f"{part}.{key} is {now}, but this run was started with {was}, and it decides the bits of the results; "
                f"leave it out, or start another run with --out"
            )
    return _with(experiment, decided)


def _resolved_here(experiment: Experiment) -> Experiment:
    from isotone.determinism import resolve_device, resolve_precision, resolve_threads

    device = resolve_device(experiment.runtime.device)
    threads = resolve_threads(experiment.runtime.threads)
    precision = resolve_precision(experiment.training.precision, device)
    return _with(
        experiment,
        {("runtime", "device"): device, ("runtime", "threads"): threads, ("training", "precision"): precision},
    )


def _with(experiment: Experiment, values: dict[tuple[str, str], Any]) -> Experiment:
    parts: dict[str, dict[str, Any]] = {}
    for (part, key), value in values.items():
        parts.setdefault(part, {})[key] = value
    return experiment.model_copy(
        update={part: getattr(experiment, part).model_copy(update=changed) for part, changed in parts.items()}
    )
