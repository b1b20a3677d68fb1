"""Projected gradient ascent on embeddings (Madry et al. 2018, 1706.06083): what edits of k positions might do at most.

Shapes: B documents, L tokens, K perturbed positions, P attackable ones, D embedding, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isotone.attacks.budget import affordable, gradient_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance
from isotone.attacks.protocol import Window

_STEP = 2.5
"""A step is this times the radius over the number of steps, so that the border is reached and can be followed."""


@dataclass(frozen=True)
class EmbeddingPGD(DocumentAttack):
    """Move the input embeddings of ``flips`` positions uphill, within an L2 ball around each; no text results.

    The positions are those of the largest gradient norm at the clean text. A position's ball has ``radius`` times the
    median distance from its token's embedding to those of the admissible tokens: at 1 it holds half of what an edit
    could write there, and all that lies between. Its result is where attacks on texts end, not an attack on a text: an
    estimate of an upper bound, as ascent finds no more than a local maximum, and only at the chosen positions.

    Attributes:
        flips: perturbed positions.
        steps: where no budget is given.
        radius: of the ball, as above.
        budget_tokens: of a document; as many steps as it buys. None: ``steps``.
    """

    name: ClassVar[str] = "pgd"
    upper_bound: ClassVar[bool] = True

    flips: int = 10
    steps: int = 20
    radius: float = 1.0
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        if min(self.flips, self.steps) < 1 or self.radius < 0:
            raise ValueError(f"flips and steps must be at least 1, and radius not negative, found {self}")

    @property
    def variant(self) -> str:
        """The norm of the balls."""
        return "l2"

    def num_rounds(self, length: int) -> int:
        """Return the steps asked for, or what the budget buys."""
        return self.steps if self.budget_tokens is None else affordable(self.budget_tokens, gradient_tokens(1, length))

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the clean texts, the positions, their balls' radii and the perturbations, now and best so far."""
        shape = (len(windows), min(self.flips, len(problem.protocol.attackable)))
        none_BKD = torch.zeros(*shape, problem.target.embeddings_VD.shape[1])
        return super().start(problem, windows) | {
            "positions_BK": torch.zeros(shape, dtype=torch.int64),
            "radii_BK": torch.zeros(shape),
            "perturbation_BKD": none_BKD,
            "best_perturbation_BKD": none_BKD.clone(),
        }

    def step(self, problem: Problem, state: State) -> State:
        """Read the perturbed texts, keep the best perturbation, and take a step."""
        clean_BL, length = state["clean_BL"], problem.protocol.length
        gradient = problem.target.gradient(clean_BL, perturbation_BLD=spread(state, "perturbation_BKD"))
        if len(state["history_RB2"]) == 0:
            state = state | {"best_B": gradient.nats_B} | self._places(problem, clean_BL, gradient.grad_BLD.cpu())
        better_B = gradient.nats_B > state["best_B"]
        best_BKD = torch.where(
            better_B[:, None, None], state["perturbation_BKD"], state["best_perturbation_BKD"]
        ).contiguous()
        moved_BKD = self._moved(state, gradient.grad_BLD.cpu(), self.num_rounds(length))
        spent_B = torch.full_like(state["spent_B"], gradient_tokens(1, length))
        finite_B = gradient.nats_B.isfinite()
        state = advance(state, clean_BL.clone(), nats_B=gradient.nats_B, spent_B=spent_B, finite_B=finite_B)
        return state | {"perturbation_BKD": moved_BKD, "best_perturbation_BKD": best_BKD}

    def _places(self, problem: Problem, clean_BL: Tensor, grad_BLD: Tensor) -> State:
        """Return positions and radii of every document."""
        attackable, target = problem.protocol.attackable, problem.target
        editable_BP = torch.stack([problem.protocol.editable(clean_L) for clean_L in clean_BL])
        norms_BP = grad_BLD[:, attackable.start : attackable.stop].norm(dim=2).nan_to_num(nan=0)
        norms_BP = norms_BP.masked_fill(~editable_BP, -1)
        order_BP = torch.argsort(norms_BP, dim=1, descending=True, stable=True)
        positions_BK = order_BP[:, : self.flips].contiguous() + attackable.start
        admissible_ND = target.embeddings_VD[problem.vocabulary.ids_N.to(target.device)]
        tokens_M = clean_BL.gather(1, positions_BK).flatten().to(target.device)
        medians = [(admissible_ND - target.embeddings_VD[token]).norm(dim=1).median() for token in tokens_M]
        return {
            "positions_BK": positions_BK,
            "radii_BK": self.radius * torch.stack(medians).view_as(positions_BK).cpu().nan_to_num(nan=0),
        }

    def _moved(self, state: State, grad_BLD: Tensor, num_steps: int) -> Tensor:
        """Return the perturbations after a step along the normed gradient, back inside their balls."""
        positions_BK, radii_BK1 = state["positions_BK"], state["radii_BK"][:, :, None]
        grad_BKD = grad_BLD.gather(1, positions_BK[:, :, None].expand_as(state["perturbation_BKD"])).nan_to_num()
        direction_BKD = grad_BKD / grad_BKD.norm(dim=2, keepdim=True).clamp_min(1e-30)
        moved_BKD = state["perturbation_BKD"] + direction_BKD * radii_BK1 * (_STEP / num_steps)
        norms_BK1 = moved_BKD.norm(dim=2, keepdim=True).clamp_min(1e-30)
        return moved_BKD * (radii_BK1 / norms_BK1).clamp_max(1)


def spread(state: State, key: str) -> Tensor:
    """Return perturbations of positions as one of the whole texts [B, L, D]."""
    values_BKD, length = state[key], state["clean_BL"].shape[1]
    spread_BLD = torch.zeros(len(values_BKD), length, values_BKD.shape[2])
    return spread_BLD.scatter(1, state["positions_BK"][:, :, None].expand_as(values_BKD), values_BKD)
