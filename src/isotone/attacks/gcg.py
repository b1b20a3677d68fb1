"""Greedy coordinate gradient (Zou et al. 2023, 2307.15043), within a Hamming distance of the text."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from isotone.attacks.budget import affordable, forward_tokens, gradient_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance
from isotone.attacks.protocol import Window
from isotone.attacks.search import (
    Pairs,
    best_edits,
    changeable,
    evaluate_pairs,
    gains_where,
    stream,
    stream_keys,
    top_pairs,
)


@dataclass(frozen=True)
class GCG(DocumentAttack):
    """Draw candidates at random from the ``top_k`` tokens by gradient of every position, and go to the best of them.

    A position may be changed again, and its own token written back; once ``flips`` positions differ from the text, only
    those are changed. As published the search goes on from the best candidate also if it lowers the loss; what is
    handed over is the best text seen, the clean one included.

    Attributes:
        flips: most edited tokens (Hamming distance).
        top_k: tokens of a position that may be drawn.
        candidates: exactly evaluated (position, token) pairs a step, drawn without repetition; the search width.
        steps: where no budget is given.
        budget_tokens: of a document; as many steps as it buys. None: ``steps``.
        seed: of the draws; a document's depend on it, the document's id and the step.
    """

    name: ClassVar[str] = "gcg"

    flips: int = 10
    top_k: int = 64
    candidates: int = 64
    steps: int = 20
    budget_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.flips, self.top_k, self.candidates, self.steps) < 1:
            raise ValueError(f"flips, top_k, candidates and steps must be at least 1, found {self}")

    @property
    def variant(self) -> str:
        """Drawn from the top tokens of each position."""
        return "top_k"

    def num_rounds(self, length: int) -> int:
        """Return the steps asked for, or what the budget buys."""
        if self.budget_tokens is None:
            return self.steps
        return affordable(self.budget_tokens, gradient_tokens(1, length) + forward_tokens(self.candidates, length))

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the clean texts and the keys of their streams (keys_B)."""
        return super().start(problem, windows) | {"keys_B": stream_keys(self.seed, "gcg", windows)}

    def step(self, problem: Problem, state: State) -> State:
        """Take a gradient, and go to the best of the drawn candidates."""
        current_BL, length = state["current_BL"], problem.protocol.length
        gradient = problem.target.gradient(current_BL, keep_cache=True)
        if len(state["history_RB2"]) == 0:
            state = state | {"best_B": gradient.nats_B}
        pairs = [self._drawn(problem, state, index, grad_LD) for index, grad_LD in enumerate(gradient.grad_BLD)]
        nats = evaluate_pairs(problem, current_BL, gradient.layers, pairs)
        edited_BL, nats_B, finite_B = best_edits(problem, current_BL, pairs, nats)
        counts_B = torch.tensor([len(tokens) for _, tokens in pairs])
        return advance(
            state,
            edited_BL,
            nats_B=nats_B,
            spent_B=gradient_tokens(1, length) + counts_B * forward_tokens(1, length),
            finite_B=finite_B & gradient.nats_B.isfinite(),
        )

    def _drawn(self, problem: Problem, state: State, index: int, grad_LD: torch.Tensor) -> Pairs:
        current_L, clean_L = state["current_BL"][index], state["clean_BL"][index]
        allowed_P = changeable(problem, current_L, clean_L, self.flips)
        gains_PV = gains_where(problem, grad_LD, current_L, allowed_P)
        positions, tokens = top_pairs(gains_PV, self.top_k * len(allowed_P), self.top_k)
        generator = stream(state["keys_B"][index], len(state["history_RB2"]))
        chosen = torch.from_numpy(generator.permutation(len(tokens))[: self.candidates])
        return positions[chosen], tokens[chosen]
