"""Random edits: what the same number of edits does without any search; they set the bar of success."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from isotone.attacks.budget import forward_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance
from isotone.attacks.protocol import AttackProtocol, Window
from isotone.determinism import stream_key


@dataclass(frozen=True)
class RandomEdits(DocumentAttack):
    """Replace ``flips`` random tokens of the prefix by random admissible ones; the first of ``draws`` is handed over.

    Attributes:
        flips: edited tokens (Hamming distance, exactly).
        draws: independent edits of each document; their losses are in the rows as ``draw_deltas``.
        seed: of the draws; a document's draws depend on it and on the document's id.
    """

    name: ClassVar[str] = "random_edits"

    flips: int = 10
    draws: int = 20
    seed: int = 0

    @property
    def variant(self) -> str:
        """Uniform over positions and admissible tokens."""
        return "uniform"

    def num_rounds(self, length: int) -> int:
        """All draws in one round."""
        return 1

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the clean texts and, beside them, all drawn texts (drawn_BDL)."""
        drawn = [[self._draw(problem, window, draw) for draw in range(self.draws)] for window in windows]
        return super().start(problem, windows) | {"drawn_BDL": torch.from_numpy(np.array(drawn))}

    def step(self, problem: Problem, state: State) -> State:
        """Evaluate all draws; adds draw_deltas_BD, nats per scored token."""
        drawn_BDL = state["drawn_BDL"]
        clean_B = problem.target.nats(state["clean_BL"])
        drawn_BD = problem.target.nats(drawn_BDL.flatten(0, 1)).view(drawn_BDL.shape[:2])
        scored_B = torch.tensor([problem.protocol.num_scored(ids) for ids in state["clean_BL"].tolist()])
        deltas_BD = (drawn_BD - clean_B[:, None]) / scored_B[:, None]
        spent_B = torch.full_like(state["spent_B"], forward_tokens(self.draws, problem.protocol.length))
        finite_B = deltas_BD.isfinite().all(dim=1)
        state = advance(state, drawn_BDL[:, 0], nats_B=None, spent_B=spent_B, finite_B=finite_B)
        return state | {"draw_deltas_BD": deltas_BD}

    def _draw(self, problem: Problem, window: Window, draw: int) -> np.ndarray:
        generator = np.random.default_rng(stream_key(self.seed, f"random edits of {window.id}", draw))
        positions = generator.choice(editable_positions(problem.protocol, window), self.flips, replace=False)
        tokens = window.tokens.copy()
        tokens[positions] = self._replacements(generator, problem, tokens[positions])
        return tokens

    def _replacements(self, generator: np.random.Generator, problem: Problem, current: np.ndarray) -> np.ndarray:
        return random_tokens(generator, problem.vocabulary.ids_N.numpy(), current)


def editable_positions(protocol: AttackProtocol, window: Window) -> np.ndarray:
    """Return the positions of a document that may be edited, ascending."""
    return np.array(protocol.attackable)[protocol.editable(torch.from_numpy(window.tokens)).numpy()]


def random_tokens(generator: np.random.Generator, ids: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Return uniformly drawn ids, none equal to the token it replaces.

    Args:
        generator: the stream.
        ids: admissible ids, ascending, at least two.
        current: the tokens that are replaced.
    """
    at = np.searchsorted(ids, current)
    present = ids[np.minimum(at, len(ids) - 1)] == current
    drawn = generator.integers(0, len(ids) - present)
    return ids[drawn + (present & (drawn >= at))]
