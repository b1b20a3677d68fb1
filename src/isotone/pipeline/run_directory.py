"""Where everything of a run lies: runs/NAME/seed-N, runs/NAME/setup for what all seeds share, and their summary."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from isotone.errors import UsageError
from isotone.pipeline.graph import Node


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, and the names in it. Nothing in it knows where it lies: it moves with its parent."""

    root: Path

    @classmethod
    def of(cls, out: Path, name: str, seed: int) -> "RunDirectory":
        """Return the run of an experiment's name and a seed below ``out``."""
        return cls(out / name / f"seed-{seed}")

    @classmethod
    def find(cls, folder: Path) -> "RunDirectory":
        """Return the run that a folder is, or the only one in it.

        Raises:
            UsageError: the folder holds no run, or several; they are named.
        """
        if cls(folder).experiment_file.is_file():
            return cls(_with_its_setup(folder))
        runs = sorted(p for p in folder.glob("seed-*") if cls(p).experiment_file.is_file())
        if len(runs) == 1:
            return cls(runs[0])
        if runs:
            raise UsageError(f"{folder} holds several runs; name one of: {', '.join(map(str, runs))}")
        raise UsageError(f"{folder} is not a run: it has no config.yaml (a run is runs/NAME/seed-N)")

    @property
    def config(self) -> Path:
        """The resolved experiment."""
        return self.root / "config.yaml"

    @property
    def experiment_file(self) -> Path:
        """The experiment: as resolved, or as it was submitted where no job has begun."""
        return self.config if self.config.is_file() else self.jobs / "experiment.yaml"

    @property
    def setup(self) -> Path:
        """What all seeds share: packed data and the pinned model."""
        return self.root.parent / "setup"

    @property
    def data(self) -> Path:
        """The packed data set."""
        return self.setup / "data"

    @property
    def pinned_model(self) -> Path:
        """Which model files, with which hashes, the run starts from."""
        return self.setup / "model.json"

    @property
    def results(self) -> Path:
        """Result files."""
        return self.root / "results"

    @property
    def jobs(self) -> Path:
        """Slurm's job scripts, and which were submitted."""
        return self.root / "jobs"

    @property
    def attempts(self) -> Path:
        """One line for each time a node was started, and how it ended."""
        return self.root / "logs" / "attempts.jsonl"

    @property
    def micro_batches(self) -> Path:
        """The history of micro-batch sizes."""
        return self.root / "micro_batch.json"

    def record(self, node: Node) -> Path:
        """The record that says a node is complete."""
        return self.root / "records" / f"{node}.json"

    def lease(self, node: Node) -> Path:
        """The lease of whoever works on a node; setup's is shared by all seeds."""
        return (self.setup if node.kind == "setup" else self.root) / "leases" / f"{node}.json"

    def checkpoints(self, arm: str) -> Path:
        """The checkpoints of an arm."""
        return self.root / "checkpoints" / arm

    def metrics(self, node: Node) -> Path:
        """The metrics of a node, one JSON object a line."""
        return self.root / "metrics" / f"{node}.jsonl"

    def node_result(self, node: Node) -> Path:
        """What one node found."""
        return self.results / "by_arm" / f"{node}.json"

    def documents(self, node: Node, variant: str | None = None) -> Path:
        """What one node (one variant of its attack) found for each document, one JSON object a line."""
        return self.results / "documents" / (f"{node}.{variant}.jsonl" if variant else f"{node}.jsonl")

    def start(self, arm: str) -> Path:
        """The starting point of an arm, which stage 1 puts out, or training where nothing is constrained."""
        return self.checkpoints(arm) / "step-00000000"

    def found_by(self, node: Node) -> list[Path]:
        """What is there of a node's results, but for checkpoints and setup."""
        documents = [self.documents(node), *sorted((self.results / "documents").glob(f"{node}.*.jsonl"))]
        places = [*documents, self.node_result(node), self.metrics(node), self.work(node)]
        return [path for path in places if path.exists()]

    def work(self, node: Node) -> Path:
        """State of an unfinished node, removed when it is complete."""
        return self.root / "work" / str(node)

    def relative(self, path: Path) -> str:
        """Return a path as records name it: relative to the folder that all seeds share."""
        return (
            path.relative_to(self.root.parent).as_posix()
            if path.is_relative_to(self.setup)
            else path.relative_to(self.root).as_posix()
        )

    def resolve(self, name: str) -> Path:
        """Return the path that ``relative`` named."""
        return self.root.parent / name if name.startswith("setup/") else self.root / name


@dataclass(frozen=True)
class ExperimentDirectory:
    """The folder of an experiment, runs/NAME: a run a seed, and the summary over them."""

    root: Path

    @classmethod
    def find(cls, folder: Path) -> "ExperimentDirectory":
        """Return the experiment whose folder this is.

        Raises:
            UsageError: it holds no run.
        """
        found = cls(folder)
        if not found.runs:
            one = (folder / "config.yaml").is_file()
            hint = f"; it is one run: give {folder.resolve().parent}" if one else " (an experiment is runs/NAME)"
            raise UsageError(f"{folder} holds no run: there is no seed-N/config.yaml in it{hint}")
        return found

    @property
    def runs(self) -> dict[int, RunDirectory]:
        """The runs that have begun or were submitted, by seed in ascending order."""
        named = [(re.fullmatch(r"seed-(\d+)", path.name), RunDirectory(path)) for path in self.root.glob("seed-*")]
        return dict(sorted((int(name[1]), run) for name, run in named if name and run.experiment_file.is_file()))

    def run(self, seed: int) -> RunDirectory:
        """The run of a seed, begun or not."""
        return RunDirectory(self.root / f"seed-{seed}")

    @property
    def summary(self) -> Path:
        """The results over seeds."""
        return self.root / "summary"

    @property
    def summary_record(self) -> Path:
        """What says that the summary is complete, and from what it was made."""
        return self.summary / "record.json"


def _with_its_setup(folder: Path) -> Path:
    """Return the folder under the name whose parent holds the setup: ``.`` and links have other parents, or none."""
    named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
    return named if (named.parent / "setup").is_dir() or not named.is_symlink() else named.resolve()
