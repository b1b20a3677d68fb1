"""Where everything of a run lies: runs/NAME/seed-N, and runs/NAME/setup for what all seeds share."""

import os
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
        if (folder / "config.yaml").is_file():
            return cls(_with_its_setup(folder))
        runs = sorted(p.parent for p in folder.glob("seed-*/config.yaml"))
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


def _with_its_setup(folder: Path) -> Path:
    """Return the folder under the name whose parent holds the setup: ``.`` and links have other parents, or none."""
    named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
    return named if (named.parent / "setup").is_dir() or not named.is_symlink() else named.resolve()
