"""HotFlip (Ebrahimi et al. 2018, 1712.06751): edits ranked by the gradient at the input embeddings.

Shapes: B documents, L tokens, P attackable positions, V vocabulary, D embedding.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from isotone.attacks.budget import affordable, forward_tokens, gradient_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance
from isotone.attacks.search import best_edits, evaluate_pairs, gains_where, share_of_position, top_pairs, unedited


@dataclass(frozen=True)
class HotFlip(DocumentAttack):
    """Replace up to ``flips`` tokens of the prefix, one a position, by what the gradient says raises the loss most.

    ``once``: one gradient; the ``flips`` best positions take their best admissible token together, unsearched.
    ``iterative``: each round takes a gradient at the text so far, evaluates the ``candidates`` best (position, token)
    pairs exactly and keeps the best of them, also if it lowers the loss; what is handed over is the best text seen, the
    clean one included.

    Attributes:
        flips: most edited tokens (Hamming distance).
        method: once or iterative.
        candidates: exactly evaluated pairs a round; iterative only.
        per_position: most candidates at one position, so that one large gradient does not take them all; more where
            there are too few positions. It decides little: on the 24 search documents of the pocket run's baseline (8
            candidates) 1 found 2.9 % more, 2 1.0 % less and 4 3.3 % less than no bound; every interval of the
            difference includes 0 (benchmarks/hotflip_candidates.py).
        budget_tokens: of a document; its rounds then evaluate as many candidates as it buys, whatever ``candidates``
            says. None: no bound. ``once`` is reported at its own cost.
    """

    name: ClassVar[str] = "hotflip"

    flips: int = 10
    method: Literal["once", "iterative"] = "iterative"
    candidates: int = 32
    per_position: int = 2
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.method not in ("once", "iterative"):
            raise ValueError(f"method: found {self.method!r}, allowed are once and iterative")
        if min(self.flips, self.candidates, self.per_position) < 1:
            raise ValueError(f"flips, candidates and per_position must be at least 1, found {self}")

    @property
    def variant(self) -> str:
        """The method."""
        return self.method

    def num_rounds(self, length: int) -> int:
        """Return one for ``once``, else a flip a round."""
        return 1 if self.method == "once" else self.flips

    def step(self, problem: Problem, state: State) -> State:
        """Take a gradient, and edit every document: all flips at once, or the best evaluated one."""
        return self._all_at_once(problem, state) if self.method == "once" else self._best_of(problem, state)

    def _all_at_once(self, problem: Problem, state: State) -> State:
        current_BL = state["current_BL"]
        gradient = problem.target.gradient(current_BL)
        edited_BL = current_BL.clone()
        for index, gains_PV in enumerate(_gains(problem, gradient.grad_BLD, state)):
            best_P, tokens_P = _lowest_max(gains_PV)
            chosen = torch.argsort(best_P, descending=True, stable=True)[: self.flips]
            chosen = chosen[best_P[chosen] > -torch.inf]
            edited_BL[index, chosen + problem.protocol.attackable.start] = tokens_P[chosen]
        return advance(
            state,
            edited_BL,
            nats_B=None,
            spent_B=torch.full_like(state["spent_B"], gradient_tokens(1, problem.protocol.length)),
            finite_B=gradient.nats_B.isfinite(),
        )

    def _best_of(self, problem: Problem, state: State) -> State:
        current_BL, length = state["current_BL"], problem.protocol.length
        gradient = problem.target.gradient(current_BL, keep_cache=True)
        if len(state["history_RB2"]) == 0:
            state = state | {"best_B": gradient.nats_B}
        count = self._num_candidates(length)
        gains = _gains(problem, self._ranking_gradient(problem, gradient.grad_BLD, state), state)
        pairs = [
            top_pairs(gains_PV, count, share_of_position(problem, clean_L, count, self.per_position))
            for gains_PV, clean_L in zip(gains, state["clean_BL"], strict=True)
        ]
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

    def _num_candidates(self, length: int) -> int:
        if self.budget_tokens is None:
            return self.candidates
        gradients = self.flips * gradient_tokens(1, length)
        return affordable(self.budget_tokens, self.flips * forward_tokens(1, length), gradients)

    def _ranking_gradient(self, problem: Problem, grad_BLD: Tensor, state: State) -> Tensor:
        """Return the gradient that candidates are ranked by."""
        return grad_BLD


def _gains(problem: Problem, grad_BLD: Tensor, state: State) -> list[Tensor]:
    """Return each document's first-order gains at its attackable positions that are not edited yet."""
    return [
        gains_where(problem, grad_LD, current_L, unedited(problem, current_L, clean_L))
        for grad_LD, current_L, clean_L in zip(grad_BLD, state["current_BL"], state["clean_BL"], strict=True)
    ]


def _lowest_max(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maximum and the lowest column that has it, on the CPU."""
    values_RC = values_RC.cpu()
    best_R = values_RC.amax(dim=1)
    columns_C = torch.arange(values_RC.shape[1])
    at_R = torch.where(values_RC == best_R[:, None], columns_C, values_RC.shape[1]).amin(dim=1)
    return best_R, at_R
