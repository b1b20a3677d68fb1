"""Gradient-free coordinate search: random candidates, evaluated exactly; what a search finds without gradients."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from isotone.attacks.budget import affordable, forward_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance
from isotone.attacks.protocol import Window
from isotone.attacks.search import best_edits, changeable, evaluate_pairs, random_pairs, stream, stream_keys


@dataclass(frozen=True)
class CoordinateSearch(DocumentAttack):
    """Try random tokens at random positions, and keep the best of a round if it raises the loss.

    A position may be changed again; once ``flips`` positions differ from the text, only those are. No gradient is used,
    so a model that hides its gradient hides nothing from it.

    Attributes:
        flips: most edited tokens (Hamming distance).
        candidates: exactly evaluated (position, token) pairs a round.
        rounds: where no budget is given.
        budget_tokens: of a document; as many rounds as it buys. None: ``rounds``.
        seed: of the draws; a document's depend on it, the document's id and the round.
    """

    name: ClassVar[str] = "coordinate"

    flips: int = 10
    candidates: int = 32
    rounds: int = 40
    budget_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.flips, self.candidates, self.rounds) < 1:
            raise ValueError(f"flips, candidates and rounds must be at least 1, found {self}")

    @property
    def variant(self) -> str:
        """Random candidates."""
        return "random"

    def num_rounds(self, length: int) -> int:
        """Return the rounds asked for, or what the budget buys after the clean text was read."""
        if self.budget_tokens is None:
            return self.rounds
        return affordable(self.budget_tokens, forward_tokens(self.candidates, length), forward_tokens(1, length))

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the clean texts and the keys of their streams (keys_B)."""
        return super().start(problem, windows) | {"keys_B": stream_keys(self.seed, "coordinate search", windows)}

    def step(self, problem: Problem, state: State) -> State:
        """Evaluate a round of random candidates.

        The text as it stands is read again for its prefix cache only, which saves time and is not counted; its loss is
        known from the round that made it.
        """
        current_BL, length, round_index = state["current_BL"], problem.protocol.length, len(state["history_RB2"])
        current_B, layers = problem.target.read(current_BL)
        spent = 0
        if round_index == 0:
            state, spent = state | {"best_B": current_B}, forward_tokens(1, length)
        pairs = [
            random_pairs(
                stream(key, round_index), problem, current_L, changeable(problem, current_L, clean_L, self.flips),
                self.candidates,
            )
            for key, current_L, clean_L in zip(state["keys_B"], current_BL, state["clean_BL"], strict=True)
        ]  # fmt: skip
        nats = evaluate_pairs(problem, current_BL, layers, pairs)
        edited_BL, nats_B, finite_B = best_edits(problem, current_BL, pairs, nats)
        edited_BL = torch.where((nats_B > state["best_B"])[:, None], edited_BL, current_BL)
        counts_B = torch.tensor([len(tokens) for _, tokens in pairs])
        return advance(
            state,
            edited_BL,
            nats_B=nats_B,
            spent_B=spent + counts_B * forward_tokens(1, length),
            finite_B=finite_B & current_B.isfinite(),
        )
