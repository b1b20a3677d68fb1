"""The jobs of an experiment: one a stage and seed, what each waits for, and where each stands."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotone import records
from isotone.cluster import FURTHER_STAGES, Cluster
from isotone.config import Experiment
from isotone.config_io import load_experiment
from isotone.config_recipes import with_recipes
from isotone.errors import UsageError
from isotone.models.describe import kind_of
from isotone.pipeline.graph import DERIVED, Graph
from isotone.pipeline.record import standing
from isotone.pipeline.resolve import as_decided
from isotone.pipeline.run_directory import RunDirectory
from isotone.slurm.script import JobScript

SUMMARY = "summary"
_FILES = {
    "setup": "job_0_setup.sh",
    "constrain": "job_1_monotonicity.sh",
    "evaluate": "job_4_evaluate.sh",
    "triggers": "job_5_uat.sh",
    "hotflip": "job_6_hotflip.sh",
    **{stage: f"job_6_{stage}.sh" for stage in FURTHER_STAGES},
    "aggregate": "job_7_aggregate.sh",
}

Key = tuple[int | None, str]
"""Seed (None: all) and stage."""


@dataclass(frozen=True)
class Link:
    """One job of the chain.

    Attributes:
        job: what its script is made from.
        needs: the jobs that must have ended well before it starts.
        is_complete: the records say that there is nothing left to do.
        submitted: the log of the job ids that it was given.
    """

    job: JobScript
    needs: tuple[Key, ...]
    is_complete: bool
    submitted: records.JsonLines

    @property
    def key(self) -> Key:
        """Seed and stage."""
        return (None if self.job.stage == SUMMARY else self.job.seed, self.job.stage)

    @property
    def last(self) -> dict[str, Any] | None:
        """What was last submitted for it: ``job_id``, ``after`` and, for a summary, ``seeds``."""
        lines = [line for line in self.submitted.read() if line["stage"] == self.job.stage]
        return lines[-1] if lines else None


def script_file(stage: str) -> str:
    """Return the name of a stage's job script."""
    if stage.startswith("train_"):
        arm = stage.removeprefix("train_")
        return f"job_{2 if arm == 'baseline' else 3}_{arm}.sh"
    return _FILES[stage]


def build_chain(experiment: Experiment, cluster: Cluster, seeds: list[int], out: Path) -> list[Link]:
    """Return the jobs of all seeds, each after those it needs; several seeds end in a summary.

    Every seed has a setup of its own, after the one before it, whose packed data it finds: it is done in seconds.

    Raises:
        UsageError: something that is complete was made for another configuration.
    """
    before = dict(zip(seeds[1:], seeds, strict=False))
    links = [link for seed in seeds for link in _links_of_seed(experiment, cluster, seed, before.get(seed), out)]
    if len(seeds) > 1 and experiment.evaluation.split == "test":
        folder = out / experiment.name / "summary" / "jobs"
        job = JobScript(
            name=experiment.name,
            seed=seeds[0],
            stage=SUMMARY,
            number=8,
            file=folder / "job_8_summary.sh",
            log_folder=folder,
            runs=out,
            project=Path.cwd(),
            python=cluster.python or sys.executable,
            seeds=tuple(seeds),
        )
        needs = tuple((seed, "aggregate") for seed in seeds)
        links.append(Link(job, needs, False, submitted_jobs(folder)))
    return links


def submitted_jobs(folder: Path) -> records.JsonLines:
    """Return the log of the jobs that were submitted from a folder of scripts."""
    return records.JsonLines(folder / "submitted.jsonl")


def _links_of_seed(experiment: Experiment, cluster: Cluster, seed: int, before: int | None, out: Path) -> list[Link]:
    run = RunDirectory.of(out, experiment.name, seed)
    graph, complete = Graph(experiment), complete_stages(experiment, run, seed)
    links = []
    for stage, number in graph.stages.items():
        needs = [(seed, needed) for needed in _needed_stages(graph, stage)]
        if stage == "setup" and before is not None:  # one at a time: all write to what they share
            needs = [(before, "setup")]
        job = JobScript(
            name=experiment.name,
            seed=seed,
            stage=stage,
            number=number,
            file=run.jobs / script_file(stage),
            log_folder=run.root / "logs",
            runs=out,
            project=Path.cwd(),
            python=cluster.python or sys.executable,
            is_shared=any(node.kind == "train" for node in graph.nodes if graph.stage_of(node) == stage),
        )
        links.append(Link(job, tuple(needs), stage in complete, submitted_jobs(run.jobs)))
    return links


def complete_stages(experiment: Experiment, run: RunDirectory, seed: int) -> set[str]:
    """Return the stages of a run that are complete.

    Raises:
        UsageError: one is complete for another configuration.
    """
    if not run.config.is_file():
        return set()
    experiment = with_recipes(experiment, lambda: kind_of(experiment.model))
    decided = as_decided(experiment, load_experiment(str(run.config), []))
    graph = Graph(decided)
    incomplete = set()
    for node in graph.nodes:
        now = standing(run, graph, decided, seed, node)
        if now.by_config and node.kind not in DERIVED:
            raise UsageError(
                f"{run.root}: {node} is complete for another configuration ({now.reason}); undo the change, choose "
                f"another --out or name, or set the old result aside: isotone run … --only "
                f"{graph.stage_of(node)} --fresh"
            )
        if now.state != "complete":
            incomplete.add(graph.stage_of(node))
    return set(graph.stages) - incomplete


def _needed_stages(graph: Graph, stage: str) -> list[str]:
    """Return the stages that a stage waits for, without those that another of them waits for anyway."""
    direct = {
        name: {graph.stage_of(n) for node in graph.nodes if graph.stage_of(node) == name for n in graph.needs[node]}
        - {name}
        for name in graph.stages
    }

    def behind(name: str) -> set[str]:
        return direct[name].union(*(behind(needed) for needed in direct[name]))

    implied = set().union(*(behind(needed) for needed in direct[stage]))
    return [name for name in graph.stages if name in direct[stage] - implied]
