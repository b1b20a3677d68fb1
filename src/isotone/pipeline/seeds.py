"""Which seeds of an experiment belong together, and whether all of them are complete and alike; needs no torch."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from isotone import records
from isotone.config import Experiment
from isotone.config_io import load_experiment, resolve_seed
from isotone.errors import BlockedError, UsageError
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.record import SCHEMA, different_values, output_problem, outputs_hash, standing
from isotone.pipeline.run_directory import ExperimentDirectory, RunDirectory
from isotone.pipeline.slices import config_slice

AGGREGATE = Node("aggregate")


def chosen_seeds(directory: ExperimentDirectory, given: Sequence[int] = ()) -> list[int]:
    """Return the seeds to summarize, in ascending order.

    They are those given, else those of the summary that is there, else those of the resolved experiment: a summary that
    is made again never leaves out a seed in silence.

    Raises:
        UsageError: a seed is given twice, or none is given and the runs' configurations name different seeds.
    """
    if given:
        return distinct(given)
    if directory.summary_record.is_file():
        return sorted(records.read_json(directory.summary_record)["seeds"])
    configured = {seed: sorted(load_experiment(run.experiment_file).seeds) for seed, run in directory.runs.items()}
    (first, seeds), *others = configured.items()
    for other, others_seeds in others:
        if others_seeds != seeds:
            raise UsageError(
                f"{directory.root}: seeds is {_listed(seeds)} in seed-{first}/config.yaml and {_listed(others_seeds)} "
                f"in seed-{other}/config.yaml; say which to summarize: --seeds N …"
            )
    return seeds


def distinct(seeds: Sequence[int]) -> list[int]:
    """Return seeds in ascending order, so that their order on the command line changes no byte.

    Raises:
        UsageError: one is there twice.
    """
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UsageError(f"--seeds: {seed} is given twice")
    return sorted(seeds)


def seeds_to_run(experiment: Experiment, seed: int | None, seeds: Sequence[int]) -> tuple[Experiment, list[int]]:
    """Return the experiment and the seeds of a command: those of --seeds in their order, else that of ``resolve_seed``.

    With --seeds, they become the experiment's own, so that what comes later knows which seeds belong together.

    Raises:
        UsageError: both options are given, a seed is given twice or is no seed.
    """
    if not seeds:
        return experiment, [resolve_seed(experiment, seed)]
    if seed is not None:
        raise UsageError("give either --seed or --seeds, not both")
    distinct(seeds)
    found = [resolve_seed(experiment, each) for each in seeds]
    return experiment.model_copy(update={"seeds": tuple(found)}), found


def seeds_to_submit(
    experiment: Experiment, seeds: Sequence[int], environment: Mapping[str, str] = os.environ
) -> tuple[Experiment, list[int]]:
    """Return the experiment and the seeds of its jobs: those given, else EXPERIMENT_SEED alone, else all of ``seeds``.

    Raises:
        UsageError: a seed is given twice or is no seed.
    """
    if not seeds and environment.get("EXPERIMENT_SEED", "").strip():
        return experiment, [resolve_seed(experiment, None, environment)]
    return seeds_to_run(experiment, None, seeds or experiment.seeds)


def left_out(directory: ExperimentDirectory, seeds: Sequence[int]) -> list[int]:
    """Return the seeds that have a run but are not among those chosen."""
    return [seed for seed in directory.runs if seed not in seeds]


def require_complete(directory: ExperimentDirectory, seeds: Sequence[int]) -> None:
    """Refuse to go on unless every seed is complete, and all have the same configuration but for the seed.

    Raises:
        BlockedError: a line for each seed that is missing: why, and the command that brings it.
    """
    problems = [line for seed in seeds if (line := _missing(directory, seed))]
    if not problems:
        problems = [line for seed in seeds[1:] if (line := _unlike(directory, seeds[0], seed))]
    if problems:
        raise BlockedError("\n".join(problems))


def _missing(directory: ExperimentDirectory, seed: int) -> str | None:
    """Say why a seed is not complete, and what would bring it."""
    reason = why_incomplete(directory.run(seed), seed)
    if reason is None:
        return None
    runs = directory.runs
    config = (runs.get(seed) or next(iter(runs.values()))).experiment_file
    root = directory.root if directory.root.name else directory.root.resolve()  # "." has no parent of its own
    command = ["isotone", "run", str(config), "--seed", str(seed), "--out", str(root.parent)]
    return f"seed {seed} is missing: {reason}; bring it: {shlex.join(command)}"


def why_incomplete(run: RunDirectory, seed: int) -> str | None:
    """Say which node of a run is not complete, the cause before what waits for it; None if all are."""
    if not run.config.is_file():
        return f"{run.root} has not been started"
    experiment = load_experiment(run.experiment_file)
    graph = Graph(experiment)
    for node in graph.nodes:
        if (now := standing(run, graph, experiment, seed, node)).state != "complete":
            return f"{node} is {now.state} ({now.reason})"
    return None


def _unlike(directory: ExperimentDirectory, first: int, seed: int) -> str | None:
    """Name the first key in which two seeds' configurations differ, of what any of their nodes uses."""
    one, other = (load_experiment(directory.run(s).experiment_file) for s in (first, seed))
    for node in [AGGREGATE, *Graph(one).nodes]:  # equal arms come first: without them the graphs would differ
        for key, a, b in different_values(config_slice(one, 0, node), config_slice(other, 0, node)):
            return (
                f"seed {seed} has another configuration than seed {first}: {key} is {b}, not {a} (used by {node}); "
                f"summarize only seeds of one configuration, or run one of them again in another --out"
            )
    return None


def inputs_hashes(directory: ExperimentDirectory, seeds: Sequence[int]) -> dict[str, str]:
    """Return what a summary of these seeds is made from: the hash of each seed's aggregated outputs."""
    return {f"seed-{seed}": outputs_hash(directory.run(seed), AGGREGATE) for seed in seeds}


def summary_status(directory: ExperimentDirectory) -> dict[str, Any]:
    """Return how the summary stands: complete, stale, blocked or waiting, with the reason and the seeds it is over."""
    path = directory.summary_record
    if path.is_file():
        record = records.read_json(path)
        reason = _why_stale(directory, record)
        return {"state": "stale" if reason else "complete", "reason": reason or "", "seeds": record["seeds"]}
    seeds = planned_seeds(directory)
    if open_seeds := [seed for seed in seeds if why_incomplete(directory.run(seed), seed)]:
        return {"state": "blocked", "reason": f"needs {named(open_seeds)}", "seeds": seeds}
    return {"state": "waiting", "reason": f"isotone summarize {directory.root}", "seeds": seeds}


def planned_seeds(directory: ExperimentDirectory) -> list[int]:
    """Return the seeds that belong to an experiment: those begun, and those of the summary or the configurations."""
    seeds = set(directory.runs)
    if directory.summary_record.is_file():
        return sorted(seeds | set(records.read_json(directory.summary_record)["seeds"]))
    return sorted(seeds.union(*(load_experiment(run.experiment_file).seeds for run in directory.runs.values())))


def _why_stale(directory: ExperimentDirectory, record: dict[str, Any]) -> str | None:
    if record.get("schema") != SCHEMA:
        return f"its record has schema {record.get('schema')!r}, this isotone writes {SCHEMA}"
    for seed in record["seeds"]:
        if reason := why_incomplete(directory.run(seed), seed):
            return f"seed {seed}, which it was made from: {reason}"
        if record["inputs"][f"seed-{seed}"] != outputs_hash(directory.run(seed), AGGREGATE):
            return f"seed {seed}, which it was made from, has changed"
    problems = (output_problem(directory.summary / name, found) for name, found in record["outputs"].items())
    return next(filter(None, problems), None)


def experiment_of(directory: ExperimentDirectory, seed: int) -> Experiment:
    """Return the resolved experiment of a seed's run."""
    return load_experiment(directory.run(seed).experiment_file)


def named(seeds: Sequence[int]) -> str:
    """Return seeds in words: seed 42; seeds 42, 1337."""
    return f"seed{'s' if len(seeds) != 1 else ''} {_listed(seeds)}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
