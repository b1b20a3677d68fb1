"""What all of a plan's arithmetic starts from, the sizes of an experiment, and what it comes to, amounts of work."""

import math
from dataclasses import dataclass, fields

from isotone.config import NO_ARMS, Experiment, Training, epochs_as_fraction
from isotone.constraint.recipes import ROTATED
from isotone.planning.corpus import CorpusSize
from isotone.planning.shape import ModelShape


@dataclass(frozen=True)
class Work:
    """What a node has to do.

    Attributes:
        train: operations of forward and backward passes over weights.
        evaluate: operations of forward passes that score whole texts.
        attack: operations of attacks on a frozen model.
        optimizer: entries that optimizer steps update, and entries that a constraint maps around them.
        loaded: bytes of weights read into memory, in fp32.
        saved: bytes written to checkpoints and read back, those saved by the clock left out.
        packed: bytes of text that are tokenized, compared and packed.
        tokenizers: times that a tokenizer is loaded.
        vocabularies: times that what attacks may write is found out.
        constant_s: seconds that depend on nothing of this.
    """

    train: float = 0
    evaluate: float = 0
    attack: float = 0
    optimizer: float = 0
    loaded: float = 0
    saved: float = 0
    packed: float = 0
    tokenizers: float = 0
    vocabularies: float = 0
    constant_s: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, factor: float) -> "Work":
        return Work(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


@dataclass(frozen=True)
class Sizes:
    """What all of a plan's arithmetic starts from."""

    experiment: Experiment
    shape: ModelShape
    corpus: CorpusSize

    def constrained(self, arm: str) -> int:
        """Return the constrained weights that have masters beside them; none where the weights are projected."""
        constraint = self.experiment.arms[arm].held
        if constraint is None or constraint.anneal or constraint.parametrization in ("projection", "sign_frozen"):
            return 0
        return self.shape.constrained(constraint.scope, constraint.layers)

    def rotated(self, arm: str) -> bool:
        """Return whether an arm starts in another basis of the stream."""
        constraint = self.experiment.arms[arm].constraint
        return constraint is not None and constraint.initialization == ROTATED

    def parameters(self, arm: str) -> int:
        """Return an arm's parameters; what rotates a model, or divides its logits, gives a tied head its own matrix."""
        own = self.experiment.arms[arm]
        divided = own.matched_loss is not None and own.matched_loss.by == "temperature"
        if self.shape.tied and (divided or self.rotated(arm)):
            return self.shape.num_parameters + self.shape.head_weights
        return self.shape.num_parameters if own.start in NO_ARMS else self.parameters(own.start)

    def weight_bytes(self, arm: str) -> int:
        """Return the bytes of all of an arm's weights as they are trained and saved."""
        return self.parameters(arm) * (2 if self.experiment.training_of(arm).precision == "pure_bf16" else 4)

    def steps(self, recipe: Training) -> int:
        """Return the optimizer steps of a training."""
        rows = int(self.corpus.train_tokens) // self.experiment.data.row_length
        per_epoch = max(1, rows // (recipe.micro_batch * recipe.accumulation))
        return math.ceil(epochs_as_fraction(recipe.epochs) * per_epoch)

    def num_documents(self, split: str, limit: int | None, length: int = 1) -> int:
        """Return how many documents of a split are taken: those long enough, at most ``limit``."""
        enough = int((self.corpus.document_tokens[split] >= length).sum())
        return enough if limit is None else min(enough, limit)
