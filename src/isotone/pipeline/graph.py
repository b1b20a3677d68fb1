"""The graph of a run: nodes are (kind, arm), edges say what must be complete before what.

The eight numbered stages are a view of the graph: a stage is a group of nodes that a job runs together.
"""

from dataclasses import dataclass
from functools import cached_property

from isotone.config import NO_ARMS, Experiment
from isotone.errors import UsageError

PER_ARM_MEASURES = ("evaluate", "triggers", "hotflip")
"""Kinds that measure every arm; they may run side by side."""

FURTHER_ATTACKS = ("gcg", "coordinate", "pgd", "frequency")
"""Kinds that measure every arm where ``attacks`` has a part of that name."""

PROBE = "probe"
"""Kind that asks an arm how much its gradients tell, where ``attacks.probe`` is there."""

DERIVED = frozenset({"aggregate", "transfer"})
"""Kinds that are made anew from what others found: stale ones are simply redone."""

MEASURES = (*PER_ARM_MEASURES, *FURTHER_ATTACKS, PROBE, "transfer")
"""All kinds that measure an arm."""

_NUMBERS = {"setup": 0, "constrain": 1, "evaluate": 4, "triggers": 5, "hotflip": 6, "aggregate": 7}
_NUMBERS |= dict.fromkeys((*FURTHER_ATTACKS, PROBE, "transfer"), _NUMBERS["hotflip"])


@dataclass(frozen=True, order=True)
class Node:
    """One unit of work with one record: a kind and, except for setup and aggregate, an arm."""

    kind: str
    arm: str | None = None

    def __str__(self) -> str:
        return self.kind if self.arm is None else f"{self.kind}.{self.arm}"


def further_attacks(experiment: Experiment) -> tuple[str, ...]:
    """Return the kinds of ``FURTHER_ATTACKS`` that an experiment asks for."""
    return tuple(kind for kind in FURTHER_ATTACKS if getattr(experiment.attacks, kind) is not None)


def probed_arms(experiment: Experiment) -> tuple[str, ...]:
    """Return the arms that are probed, where asked for: of those at matched loss no sign of masking is read."""
    if experiment.attacks.probe is None:
        return ()
    return tuple(name for name, arm in experiment.arms.items() if not arm.matched_loss)


class Graph:
    """The nodes of an experiment, in an order in which each comes after all it needs."""

    def __init__(self, experiment: Experiment):
        self._arms = experiment.arms
        self.needs: dict[Node, tuple[Node, ...]] = {Node("setup"): ()}
        for name in self._arms_in_order():
            arm, before = self._arms[name], self._start_node(name)
            if arm.matched_loss:
                self._add(Node("match", name), *(self.end_of(other) for other in arm.needs), *self._retrained(name))
                continue
            if arm.held:
                self._add(Node("constrain", name), before)
                before = Node("constrain", name)
            if arm.train:
                self._add(Node("train", name), before)
        if experiment.evaluation.split == "validation":  # choices are made on it, and nothing is concluded
            self.needs |= {Node("evaluate", name): (Node("setup"), self.end_of(name)) for name in self._arms}
            return
        further = further_attacks(experiment)
        for kind in (*PER_ARM_MEASURES, *further):
            for name in self._arms:
                self._add(Node(kind, name), self.end_of(name))
        measures = [Node(kind, name) for kind in (*PER_ARM_MEASURES, *further) for name in self._arms]
        for name in probed_arms(experiment):
            self._add(Node(PROBE, name), self.end_of(name))
            measures.append(Node(PROBE, name))
        if experiment.attacks.transfer:
            replayed = [node for node in measures if node.kind in ("triggers", "hotflip", "gcg", "coordinate")]
            for name in self._arms:
                ends = dict.fromkeys((Node("setup"), self.end_of(name)))
                self.needs[Node("transfer", name)] = (*ends, *replayed)
            measures += [Node("transfer", name) for name in self._arms]
        self.needs[Node("aggregate")] = (Node("setup"), *measures)

    @cached_property
    def nodes(self) -> list[Node]:
        """All nodes, by stage number, each after what it needs."""
        return sorted(self.needs, key=lambda node: self.stage_number(node))

    def end_of(self, arm: str) -> Node:
        """Return the node whose completion gives the arm's final weights."""
        config = self._arms[arm]
        if config.matched_loss:
            return Node("match", arm)
        if config.train:
            return Node("train", arm)
        return Node("constrain", arm) if config.held else self._start_node(arm)

    def stage_of(self, node: Node) -> str:
        """Return the name of the stage that runs a node: an arm that starts from another one is all one stage."""
        if node.kind in ("train", "match") or (
            node.kind == "constrain" and self._arms[node.arm or ""].start not in NO_ARMS
        ):
            return f"train_{node.arm}"
        return node.kind

    def stage_number(self, node: Node) -> int:
        """Return the founding number of the stage that runs a node; all trained arms but the baseline are number 3."""
        stage = self.stage_of(node)
        return _NUMBERS.get(stage, 2 if stage == "train_baseline" else 3)

    @property
    def stages(self) -> dict[str, int]:
        """Names and numbers of the stages, in order."""
        return {self.stage_of(node): self.stage_number(node) for node in self.nodes}

    def find_stage(self, text: str) -> str:
        """Return the name of the stage that a name or number means.

        Raises:
            UsageError: no such stage; lists what there is.
        """
        if text in self.stages:
            return text
        named = [name for name, number in self.stages.items() if text == str(number)]
        for number, founding in (("3", "train_monotonic"), ("6", "hotflip")):
            if text == number and founding in named:
                return founding
        if len(named) == 1:
            return named[0]
        known = ", ".join(f"{number} {name}" for name, number in self.stages.items())
        raise UsageError(f"there is no stage {text!r}; this experiment has: {known}")

    def find_nodes(self, text: str) -> list[Node]:
        """Return the nodes of the stage that a name or number means, or the one node of that name, as logs give it.

        Raises:
            UsageError: no such stage or node; lists what there is.
        """
        if named := [node for node in self.nodes if str(node) == text]:
            return named
        kind, dot, _ = text.partition(".")
        if dot and (alike := [str(node) for node in self.nodes if node.kind == kind]):
            raise UsageError(f"there is no {text!r}; this experiment has: {', '.join(alike)}")
        stage = self.find_stage(text)
        return [node for node in self.nodes if self.stage_of(node) == stage]

    def _add(self, node: Node, *before: Node) -> None:
        self.needs[node] = tuple(dict.fromkeys((Node("setup"), *before)))

    def _retrained(self, arm: str) -> tuple[Node, ...]:
        """Return where the training began that an undertrained arm repeats."""
        config = self._arms[arm]
        again = config.matched_loss and config.matched_loss.by == "undertrained"
        return (self._start_node(config.start),) if again else ()

    def _start_node(self, arm: str) -> Node:
        start = self._arms[arm].start
        return Node("setup") if start in NO_ARMS else self.end_of(start)

    def _arms_in_order(self) -> list[str]:
        """Return the arms with each one after those that it is made from (circles were refused by the schema)."""

        def depth(name: str) -> int:
            return max((1 + depth(other) for other in self._arms[name].needs), default=0)

        return sorted(self._arms, key=depth)
