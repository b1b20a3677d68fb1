"""What a stage is given: the resolved experiment, the run's folder, its node, and when to stop."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from isotone import records
from isotone.config import Arm, Experiment
from isotone.interruption import StopFlag
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.record import outputs_hash
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.slices import config_slice
from isotone.progress import ProgressBar, progress
from isotone.training.budget import Budget
from isotone.training.distributed import ALONE, Team


@dataclass
class Context:
    """One node's view of its run.

    Attributes:
        experiment: resolved: nothing is ``auto``.
        graph: the nodes of the experiment.
        run: the run's folder.
        seed: the run's seed.
        node: the node that is worked on.
        stop: read at every place where the node can stop safely.
        budget: what this process may spend on training, shared by all its nodes.
        say: where lines for the user go.
        team: the processes that train together; one alone for all other nodes.
    """

    experiment: Experiment
    graph: Graph
    run: RunDirectory
    seed: int
    node: Node
    stop: StopFlag
    budget: Budget
    say: Callable[[str], None]
    team: Team = ALONE

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

    @property
    def inputs_hash(self) -> str:
        """Hash of everything that the node is made from: what the nodes that it needs have put out."""
        return records.hash_json(
            {str(needed): outputs_hash(self.run, needed) for needed in self.graph.needs[self.node]}
        )

    @property
    def config_hash(self) -> str:
        """Hash of the part of the configuration that the node depends on."""
        return records.hash_json(config_slice(self.experiment, self.seed, self.node))

    def progress(self, total: int, unit: str) -> AbstractContextManager[ProgressBar]:
        """Show how far the node is: a bar on a terminal, one plain line an interval elsewhere."""
        interval_s = self.experiment.runtime.log_every_seconds
        return progress(str(self.node), total=total, unit=unit, interval_s=interval_s)


Stage = Callable[[Context], list[Path]]
"""Does a node's work, resuming what it finds, and returns the files that it put out."""
