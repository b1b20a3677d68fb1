"""What a stage is given: the resolved experiment, the run's folder, its node, and when to stop."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from isotone.config import Arm, Experiment
from isotone.interruption import StopFlag
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.run_directory import RunDirectory
from isotone.progress import ProgressBar, progress


@dataclass
class Allowance:
    """What this process may still spend; shared by all its stages."""

    epochs: Fraction | None = None
    minutes: float | None = None


@dataclass
class Context:
    """One node's view of its run."""

    experiment: Experiment
    graph: Graph
    run: RunDirectory
    seed: int
    node: Node
    stop: StopFlag
    allowance: Allowance = field(default_factory=Allowance)
    say: Callable[[str], None] = print

    @property
    def arm_name(self) -> str:
        """Name of the node's arm."""
        assert self.node.arm is not None
        return self.node.arm

    @property
    def arm(self) -> Arm:
        """The node's arm."""
        return self.experiment.arms[self.arm_name]

    @property
    def device(self) -> str:
        """The resolved device."""
        return self.experiment.runtime.device

    def progress(self, total: int, unit: str) -> AbstractContextManager[ProgressBar]:
        """Show how far the node is: a bar on a terminal, one plain line an interval elsewhere."""
        return progress(
            str(self.node), total=total, unit=unit, interval_s=self.experiment.runtime.log_every_seconds
        )


Stage = Callable[[Context], list[Path]]
"""Does a node's work, resuming what it finds, and returns the files that it put out."""
