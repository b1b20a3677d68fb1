"""Stage 6: what edits and triggers found on every other arm do to one arm: its column of the transfer matrix."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from isotone import records
from isotone.attacks import evaluate_trigger, replay
from isotone.attacks.running import edits_of
from isotone.config import Experiment
from isotone.data.packed import open_packed
from isotone.pipeline.arms import attack_protocol, attack_vocabulary, attacked_windows, first_token, load_end
from isotone.pipeline.context import Context
from isotone.pipeline.graph import Node, further_attacks
from isotone.pipeline.stages.triggers import trigger_search

Row = dict[str, Any]


def run(context: Context) -> list[Path]:
    """Replay every other arm's attacks, one after the other; each continues where its log ends."""
    asked = _Asked(context)
    rows: list[Row] = []
    others = [arm for arm in context.experiment.arms if arm != context.arm_name]
    replayed = [(source, attack) for source in others for attack in sources(context.experiment, source)]
    with context.progress(len(replayed) + len(others), "attack") as bar:
        for done, (source, (node, variant)) in enumerate(replayed):
            bar.update(done, str(node))
            rows += asked.edits(node, variant, source)
        for done, source in enumerate(others, len(replayed)):
            bar.update(done, str(Node("triggers", source)))
            rows += asked.trigger(source)
    path = context.run.documents(context.node)
    records.write_bytes(path, records.dump_json_lines(rows))
    return [path]


def sources(experiment: Experiment, arm: str) -> Iterator[tuple[Node, str | None]]:
    """Yield the searches on an arm whose edits are replayed, as node and variant of their rows.

    Random edits are the same on every arm, and the published attack edits scored tokens: neither says anything here.
    """
    for method in experiment.attacks.hotflip.methods:
        yield Node("hotflip", arm), method
    for kind in further_attacks(experiment):
        if kind in ("gcg", "coordinate"):
            yield Node(kind, arm), None


def from_source(replayed: Iterable[Row], found: Iterable[Row], source: str) -> list[Row]:
    """Return replayed rows under name and budget of the attack whose edits they are, with the arm that it was on."""
    own = {row["id"]: {key: row[key] for key in ("attack", "variant", "spent_tokens")} for row in found}
    return [{**row, **own[row["id"]], "source": source} for row in replayed]


class _Asked:
    """The arm that is asked, loaded once for all that is replayed on it."""

    def __init__(self, context: Context):
        self.context = context
        self.config = context.experiment.attacks
        self.model = load_end(context, context.arm_name, self.config.checkpoint)
        self.vocabulary = attack_vocabulary(context, self.model)

    @cached_property
    def data(self) -> Any:
        return open_packed(self.context.run.data)

    def edits(self, node: Node, variant: str | None, source: str) -> list[Row]:
        """Return a row a document: the edits of one attack on another arm."""
        context = self.context
        windows, _ = attacked_windows(context, self.data, "attack_test", first_token(context))
        found = records.JsonLines(context.run.documents(node, variant)).read()
        rows = replay(
            self.model,
            self.vocabulary,
            windows,
            edits_of(found),
            attack_protocol(context),
            log=self._log(node, variant),
            stop=context.stop,
            batch_documents=self.config.batch_documents,
        )
        return from_source(rows, found, source)

    def trigger(self, source: str) -> list[Row]:
        """Return a row a document: the trigger of another arm, without controls."""
        context, node = self.context, Node("triggers", source)
        windows, _ = attacked_windows(context, self.data, "attack_test")
        rows = evaluate_trigger(
            trigger_search(self.config.triggers, context.seed),
            records.read_json(context.run.node_result(node))["search"],
            self.model,
            self.vocabulary,
            windows,
            attack_protocol(context),
            controls=False,
            log=self._log(node, None),
            stop=context.stop,
            batch_documents=self.config.batch_documents,
        )
        return [{**row, "source": source} for row in rows]

    def _log(self, node: Node, variant: str | None) -> records.JsonLines:
        name = f"{node}.{variant}" if variant else str(node)
        return records.JsonLines(self.context.run.work(self.context.node) / f"{name}.jsonl")
