"""A request with nothing left open, and where it is carried out: documents, attacks, logs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from isotone import records
from isotone.attacks import AttackProtocol, Window
from isotone.attacks.interface import DocumentAttack
from isotone.config import Experiment
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout
from isotone.pipeline.arms import protocol_of
from isotone.pipeline.graph import Node
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.stages.further_attacks import SEARCH, further_attack
from isotone.pipeline.stages.hotflip import attacks as hotflip_attacks
from isotone.progress import ProgressBar, progress
from isotone.results import BASELINE
from isotone.suite.documents import Documents
from isotone.suite.request import FURTHER, Request

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A request with nothing left open, and where it is carried out.

    Attributes:
        request: resolved.
        seed: of every random stream.
        tokenizer: of all models alike.
        first_token: BOS where the tokenizer itself puts it before a text.
        documents: split.
        folder: names of logs and results, as in a run.
        stop: read at every place where the work can stop safely.
    """

    request: Request
    seed: int
    tokenizer: PreTrainedTokenizerBase
    first_token: int | None
    documents: Documents
    folder: RunDirectory
    stop: StopFlag

    @property
    def experiment(self) -> Experiment:
        """The resolved experiment."""
        return self.request.experiment

    @property
    def protocol(self) -> AttackProtocol:
        """Which tokens are attacked and which are scored."""
        return protocol_of(self.experiment, self.tokenizer)

    @property
    def pairs(self) -> PairLayout | None:
        """How the documents' rows are divided; None where documents are texts."""
        data = self.experiment.data
        return PairLayout(data.source_length, self.tokenizer.pad_token_id) if data.pairs else None

    def windows(self, split: str, first: bool = True) -> list[Window]:
        """Return a split cut to the protocol, as edits (with BOS, where there is one) or triggers see it."""
        return self.documents.windows(split, self.protocol, self.first_token if first else None)

    def rows(self, node: Node, variant: str | None = None) -> list[Row]:
        """Return the rows of a log."""
        return records.JsonLines(self.folder.documents(node, variant)).read()

    def attacks(self, arm: str, num_embeddings: int = 0) -> Iterator[tuple[Node, str | None, str, DocumentAttack]]:
        """Yield the attacks on an arm's documents: node and variant of the log, split, and attack."""
        asked, config = self.request.attacks, self.experiment.attacks
        for variant, (split, attack) in hotflip_attacks(self.experiment, self.seed, arm).items():
            if variant == "random_search":  # τ, which is the baseline's
                due = arm == BASELINE
            else:
                due = ("random" if variant == "random" else "hotflip") in asked
            if due:
                yield Node("hotflip", arm), variant, split, attack
        for kind in (kind for kind in FURTHER if kind in asked):
            attack = further_attack(config, kind, self.seed, self.documents.search, num_embeddings, self.pairs)
            yield Node(kind, arm), None, "attack_test", attack
            if arm == BASELINE and not attack.upper_bound:
                yield Node(kind, arm), SEARCH, "attack_search", attack

    def show(self, title: str, total: int, unit: str) -> AbstractContextManager[ProgressBar]:
        """Show how far one piece of work is."""
        interval_s = self.experiment.runtime.log_every_seconds
        return progress(title, total=total, unit=unit, interval_s=interval_s)
