"""Random edits with tokens as frequent as in text: uniform draws are mostly rare tokens, which alone raise a loss."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from isotone.attacks.interface import Problem
from isotone.attacks.protocol import Document
from isotone.attacks.random_edits import RandomEdits
from isotone.errors import UsageError
from isotone.pairs import PairLayout


@dataclass(frozen=True)
class FrequencyEdits(RandomEdits):
    """Random edits whose tokens are drawn by their frequency in documents, admissible ones only.

    Attributes:
        counts_V: how often each id occurs; 0: never drawn.
    """

    counts_V: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)  # noqa: N815

    @property
    def variant(self) -> str:
        """By frequency over tokens, uniform over positions."""
        return "frequency"

    def _replacements(self, generator: np.random.Generator, problem: Problem, current: np.ndarray) -> np.ndarray:
        weights_V = self.counts_V * problem.vocabulary.admissible_V.numpy()[: len(self.counts_V)]
        if np.count_nonzero(weights_V) < 2:
            raise UsageError("attacks.frequency: fewer than two admissible tokens occur in the search documents")
        drawn = []
        for token in current.tolist():
            others_V = weights_V.copy()
            if token < len(others_V):
                others_V[token] = 0
            drawn.append(generator.choice(len(others_V), p=others_V / others_V.sum()))
        return np.array(drawn)


def token_counts(documents: Iterable[Document], num_embeddings: int, pairs: PairLayout | None = None) -> np.ndarray:
    """Return how often each id occurs in documents, fp64 [V]; of pairs, in their sources, padding included."""
    counts_V = np.zeros(num_embeddings)
    for document in documents:
        tokens = document.tokens if pairs is None else document.tokens[: pairs.source]
        counts_V += np.bincount(tokens, minlength=num_embeddings)[:num_embeddings]
    return counts_V
