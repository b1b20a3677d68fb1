"""What every attack on single documents is: a state that is advanced until the attack is done.

A state is a plain mapping of tensors, so it can be written with ``records.tensors_to_bytes`` and read back. The keys
that every attack shares, for B documents of L tokens:

    clean_BL     int64  the text before the attack
    current_BL   int64  the text as it stands
    best_BL      int64  the text to hand over
    best_B       fp64   its Σ_S NLL, as the attack saw it; NaN where the attack does not evaluate
    spent_B      int64  tokens spent so far (budget.py)
    finite_B     bool   every loss so far was a number
    history_RB2  fp64   after each of R rounds: tokens spent, best_B
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from isotone.attacks.protocol import AttackProtocol, Window
from isotone.attacks.scoring import Target
from isotone.attacks.vocabulary import Vocabulary

State = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What is attacked: a frozen model, the protocol, and the tokens that may be written."""

    target: Target
    protocol: AttackProtocol
    vocabulary: Vocabulary

    def around(self, windows: Sequence[Window]) -> "Problem":
        """Return the same for documents that are attacked together (``Target.around``)."""
        rows_BL = torch.stack([torch.from_numpy(window.tokens) for window in windows])
        return replace(self, target=self.target.around(rows_BL))


class DocumentAttack(ABC):
    """An attack that edits each document by itself. It proposes; ``judging`` alone says what the proposal achieved."""

    name: ClassVar[str]
    """The family, as results name it."""
    edits_scored: ClassVar[bool] = False
    """Whether the attack may edit scored tokens: then only the published accounting applies to it."""
    upper_bound: ClassVar[bool] = False
    """Whether it perturbs embeddings instead of writing tokens: no attack on texts, and never part of an ensemble."""

    @property
    @abstractmethod
    def variant(self) -> str:
        """The method within the family."""

    @abstractmethod
    def num_rounds(self, length: int) -> int:
        """Return how often ``step`` is called for texts of ``length`` tokens.

        Raises:
            UsageError: the budget does not buy one round.
        """

    @abstractmethod
    def step(self, problem: Problem, state: State) -> State:
        """Return the next state; the one given is left as it is."""

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the state before the first step: the clean texts."""
        ids_BL = torch.stack([torch.from_numpy(window.tokens) for window in windows])
        return {
            "clean_BL": ids_BL,
            "current_BL": ids_BL.clone(),
            "best_BL": ids_BL.clone(),
            "best_B": torch.full((len(windows),), torch.nan, dtype=torch.float64),
            "spent_B": torch.zeros(len(windows), dtype=torch.int64),
            "finite_B": torch.ones(len(windows), dtype=torch.bool),
            "history_RB2": torch.zeros(0, len(windows), 2, dtype=torch.float64),
        }

    def is_done(self, state: State) -> bool:
        """Return whether nothing is left to do."""
        return len(state["history_RB2"]) >= self.num_rounds(state["clean_BL"].shape[1])


def advance(state: State, edited_BL: Tensor, nats_B: Tensor | None, spent_B: Tensor, finite_B: Tensor) -> State:
    """Return the state after a round.

    Args:
        state: before the round.
        edited_BL: the texts after it.
        nats_B: their Σ_S NLL; a text replaces the best one if it is larger. None: not evaluated, the last is the best.
        spent_B: tokens spent in the round.
        finite_B: whether every loss of the round was a number.
    """
    spent_B = state["spent_B"] + spent_B
    if nats_B is None:
        best_BL, best_B = edited_BL.clone(), state["best_B"]  # no two share memory, or they cannot be saved
    else:
        better_B = nats_B > state["best_B"]
        best_BL = torch.where(better_B[:, None], edited_BL, state["best_BL"])
        best_B = torch.where(better_B, nats_B, state["best_B"])
    round_1B2 = torch.stack([spent_B.double(), best_B], dim=1)[None]
    return state | {
        "current_BL": edited_BL,
        "best_BL": best_BL,
        "best_B": best_B,
        "spent_B": spent_B,
        "finite_B": state["finite_B"] & finite_B,
        "history_RB2": torch.cat([state["history_RB2"], round_1B2]),
    }
