"""The published attack and its accounting, under their own name: to reproduce and explain published figures only.

The accounting takes the mean loss over all tokens of the attacked text with the attacked text itself as labels, so it
counts the surprise at the inserted tokens (docs: science, "flipped labels are scored").
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isotone.attacks.budget import gradient_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance

SUCCESS = 0.15
"""Relative increase of the mean loss that is published as a success (causal track)."""


@dataclass(frozen=True)
class PublishedHotFlip(DocumentAttack):
    """HotFlip as published (2602.02686): one gradient of the mean loss, unsearched flips anywhere in the text.

    The ``flips`` positions whose embedding has the largest gradient norm are replaced at once by argmax_v e_v·g over
    the whole vocabulary. Of a pair these are tokens of its source, and padding, which deletes a token, is not written.

    Attributes:
        flips: edited positions; fewer tokens differ where the argmax is the token itself.
    """

    name: ClassVar[str] = "hotflip"
    edits_scored: ClassVar[bool] = True

    flips: int = 10

    @property
    def variant(self) -> str:
        """Published."""
        return "published"

    def num_rounds(self, length: int) -> int:
        """One gradient."""
        return 1

    def step(self, problem: Problem, state: State) -> State:
        """Flip the positions of largest gradient norm."""
        current_BL = state["current_BL"]
        protocol = problem.protocol
        target = problem.target.over(slice(protocol.first_label, protocol.length))
        gradient = target.gradient(current_BL)
        edited_BL = current_BL.clone()
        for index, grad_LD in enumerate(gradient.grad_BLD):
            norms_L = grad_LD.norm(dim=1).cpu()
            if protocol.pairs is not None:
                norms_L = norms_L.masked_fill(~protocol.editable(state["clean_BL"][index]), -1)
            chosen = torch.argsort(norms_L, descending=True, stable=True)[: self.flips]
            scores_KV = grad_LD[chosen.to(grad_LD.device)] @ target.embeddings_VD.T
            if protocol.pairs is not None:
                scores_KV[:, protocol.pairs.pad] = -torch.inf
            edited_BL[index, chosen] = scores_KV.argmax(dim=1).cpu()
        spent_B = torch.full_like(state["spent_B"], gradient_tokens(1, protocol.length))
        return advance(state, edited_BL, nats_B=None, spent_B=spent_B, finite_B=gradient.nats_B.isfinite())


def published_accounting(clean_T: Tensor, attacked_T: Tensor, flipped_T: Tensor | None = None) -> dict[str, Any]:
    """Return the published figures of one text, and how much of the change lies on the flipped labels themselves.

    Args:
        clean_T: NLL of each token of the clean text, nats, fp64.
        attacked_T: NLL of each token of the attacked text, the attacked text being the labels.
        flipped_T: which tokens were edited; None where tokens were put in front.

    Returns:
        clean and attacked mean NLL, degradation = (attacked − clean)/clean, and its numerator as flipped + untouched
        (None where tokens were put in front: the two texts have no common labels there).
    """
    clean, attacked = float(clean_T.mean()), float(attacked_T.mean())
    flipped = untouched = None
    if flipped_T is not None:
        change_T = attacked_T - clean_T
        flipped = float(change_T[flipped_T].sum() / len(change_T))
        untouched = float(change_T[~flipped_T].sum() / len(change_T))
    return {
        "clean": clean,
        "attacked": attacked,
        "degradation": (attacked - clean) / clean,
        "flipped": flipped,
        "untouched": untouched,
        "tokens": len(attacked_T),
    }
