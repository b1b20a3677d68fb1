"""HotFlip (Ebrahimi et al. 2018, 1712.06751): edits ranked by the gradient at the input embeddings.

Shapes: B documents, L tokens, P attackable positions, V vocabulary, D embedding.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from isotone.attacks.budget import forward_tokens, gradient_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance


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
    """

    name: ClassVar[str] = "hotflip"

    flips: int = 10
    method: Literal["once", "iterative"] = "iterative"
    candidates: int = 32
    per_position: int = 2

    def __post_init__(self) -> None:
        if self.method not in ("once", "iterative"):
            raise ValueError(f"method: found {self.method!r}, allowed are once and iterative")
        if min(self.flips, self.candidates, self.per_position) < 1:
            raise ValueError(f"flips, candidates and per_position must be at least 1, found {self}")

    @property
    def variant(self) -> str:
        """The method."""
        return self.method

    @property
    def num_rounds(self) -> int:
        """One for ``once``, else a flip a round."""
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
        per_row = max(self.per_position, math.ceil(self.candidates / len(problem.protocol.attackable)))
        pairs = [
            top_pairs(gains_PV, self.candidates, per_row) for gains_PV in _gains(problem, gradient.grad_BLD, state)
        ]
        counts_B = torch.tensor([len(tokens) for _, tokens in pairs])
        sequences_N = torch.repeat_interleave(torch.arange(len(pairs)), counts_B)
        positions_N = torch.cat([positions for positions, _ in pairs]) + problem.protocol.attackable.start
        tokens_N = torch.cat([tokens for _, tokens in pairs])
        nats_N = problem.target.candidates(current_BL, gradient.layers, sequences_N, positions_N, tokens_N)

        edited_BL, nats_B, finite_B = current_BL.clone(), state["best_B"].clone(), gradient.nats_B.isfinite()
        offset = 0
        for index, count in enumerate(counts_B.tolist()):
            if count == 0:  # nothing left that may be edited
                continue
            own = slice(offset, offset + count)
            offset += count
            finite_B[index] &= bool(nats_N[own].isfinite().all())
            best, at = _lowest_max(nats_N[None, own].nan_to_num(nan=-torch.inf))
            edited_BL[index, positions_N[own][at]] = tokens_N[own][at]
            nats_B[index] = best[0]
        spent_B = gradient_tokens(1, length) + counts_B * forward_tokens(1, length)
        return advance(state, edited_BL, nats_B=nats_B, spent_B=spent_B, finite_B=finite_B)


def first_order_gains(grad_PD: Tensor, embeddings_VD: Tensor, current_P: Tensor, admissible_V: Tensor) -> Tensor:
    """Return g_p·(e_v − e_current), the linear estimate of what writing token v at p adds to the loss [P, V].

    Inadmissible tokens, the current token and what is not a number get −∞.
    """
    gains_PV = grad_PD @ embeddings_VD.T
    gains_PV = gains_PV - gains_PV.gather(1, current_P[:, None])
    gains_PV = gains_PV.masked_fill(~admissible_V, -torch.inf).scatter(1, current_P[:, None], -torch.inf)
    return gains_PV.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def top_pairs(gains_PV: Tensor, count: int, per_row: int | None = None) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the ``count`` largest finite entries, best first, ties in index order, on the CPU.

    Args:
        gains_PV: −∞ where an entry is not to be taken.
        count: at most so many.
        per_row: take only so many of each row, or None.
    """
    if per_row is not None:
        kept_PV = torch.full_like(gains_PV, -torch.inf)
        for row, gains_V in enumerate(gains_PV):
            columns = _largest(gains_V, per_row)
            kept_PV[row, columns] = gains_V[columns]
        gains_PV = kept_PV
    best = _largest(gains_PV.flatten(), count).cpu()
    return best // gains_PV.shape[1], best % gains_PV.shape[1]


def _largest(values_N: Tensor, count: int) -> Tensor:
    """Return the indices of the largest finite values, largest first, ties (``topk`` orders none) in index order."""
    count = min(count, int((values_N > -torch.inf).sum()))
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values_N.device)
    bar = values_N.topk(count).values[-1]
    among = (values_N >= bar).nonzero().flatten()  # ascending; more than count where the last place is shared
    return among[torch.argsort(values_N[among], descending=True, stable=True)[:count]]


def _gains(problem: Problem, grad_BLD: Tensor, state: State) -> list[Tensor]:
    """Return each document's first-order gains at its attackable positions that are not edited yet."""
    target, positions = problem.target, slice(problem.protocol.attackable.start, problem.protocol.attackable.stop)
    admissible_V = problem.vocabulary.admissible_V.to(target.device)
    gains = []
    for grad_LD, current_L, clean_L in zip(grad_BLD, state["current_BL"], state["clean_BL"], strict=True):
        current_P = current_L[positions].to(target.device)
        gains_PV = first_order_gains(grad_LD[positions], target.embeddings_VD, current_P, admissible_V)
        edited_P = (current_L != clean_L)[positions].to(target.device)
        gains.append(gains_PV.masked_fill(edited_P[:, None], -torch.inf))
    return gains


def _lowest_max(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maximum and the lowest column that has it, on the CPU."""
    values_RC = values_RC.cpu()
    best_R = values_RC.amax(dim=1)
    columns_C = torch.arange(values_RC.shape[1])
    at_R = torch.where(values_RC == best_R[:, None], columns_C, values_RC.shape[1]).amin(dim=1)
    return best_R, at_R
