"""HotFlip with a beam (Ebrahimi et al. 2018, 1712.06751, section 3): several texts are kept from round to round.

Shapes: B documents, W beams of each, M beams in use of all documents, L tokens, P attackable positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isotone.attacks.budget import affordable, forward_tokens, gradient_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance
from isotone.attacks.protocol import Window
from isotone.attacks.search import Pairs, evaluate_pairs, gains_where, share_of_position, top_pairs, unedited


@dataclass(frozen=True)
class BeamHotFlip(DocumentAttack):
    """Replace up to ``flips`` tokens, one a round, keeping the ``width`` best texts of each round.

    Every kept text gets a gradient and an equal share of the round's candidates, which are evaluated exactly; texts
    that are reached twice are evaluated once. What is handed over is the best text seen, the clean one included.

    Attributes:
        flips: most edited tokens (Hamming distance).
        width: texts kept.
        candidates: exactly evaluated texts a round, of all beams together; at least ``width``.
        per_position: as in ``HotFlip``.
        budget_tokens: of a document; its rounds then evaluate as many candidates as it buys. None: no bound.
    """

    name: ClassVar[str] = "hotflip"

    flips: int = 10
    width: int = 4
    candidates: int = 32
    per_position: int = 2
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        if min(self.flips, self.width, self.per_position) < 1 or self.candidates < self.width:
            raise ValueError(f"every number must be at least 1, and candidates at least width, found {self}")

    @property
    def variant(self) -> str:
        """Beam."""
        return "beam"

    def num_rounds(self, length: int) -> int:
        """Return one a flip."""
        return self.flips

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the clean texts, the beams (beams_BWL) and their losses (beam_nats_BW; −∞: a beam not in use)."""
        state = super().start(problem, windows)
        beam_nats_BW = torch.full((len(windows), self.width), -torch.inf, dtype=torch.float64)
        beam_nats_BW[:, 0] = 0  # in use; its loss is not read
        beams_BWL = state["clean_BL"][:, None].repeat(1, self.width, 1)
        return state | {"beams_BWL": beams_BWL, "beam_nats_BW": beam_nats_BW}

    def step(self, problem: Problem, state: State) -> State:
        """Edit one more position of every kept text, and keep the best of what comes out."""
        length, num_documents = problem.protocol.length, len(state["clean_BL"])
        in_use_BW = state["beam_nats_BW"] > -torch.inf
        owner_M = in_use_BW.nonzero()[:, 0]
        texts_ML = state["beams_BWL"][in_use_BW]
        gradient = problem.target.gradient(texts_ML, keep_cache=True)
        if len(state["history_RB2"]) == 0:
            state = state | {"best_B": gradient.nats_B}
        pairs = self._pairs(problem, texts_ML, state["clean_BL"][owner_M], gradient.grad_BLD, owner_M)
        nats = evaluate_pairs(problem, texts_ML, gradient.layers, pairs)

        beams_BWL, beam_nats_BW = state["beams_BWL"].clone(), torch.full_like(state["beam_nats_BW"], -torch.inf)
        finite_B = torch.ones(num_documents, dtype=torch.bool)
        spent_B = torch.zeros(num_documents, dtype=torch.int64)
        for document in range(num_documents):
            own = (owner_M == document).nonzero().flatten().tolist()
            texts_NL = torch.cat([_written(problem, texts_ML[m], pairs[m]) for m in own])
            nats_N = torch.cat([nats[m] for m in own])
            finite_B[document] = bool(nats_N.isfinite().all() & gradient.nats_B[own].isfinite().all())
            spent_B[document] = gradient_tokens(len(own), length) + forward_tokens(len(texts_NL), length)
            order = torch.argsort(nats_N.nan_to_num(nan=-torch.inf), descending=True, stable=True)[: self.width]
            if len(order) == 0:  # nothing left that may be edited: the texts stay as they are
                beam_nats_BW[document] = state["beam_nats_BW"][document]
                continue
            beams_BWL[document, : len(order)] = texts_NL[order]
            beam_nats_BW[document, : len(order)] = nats_N[order].nan_to_num(nan=-1e300)
        state = advance(state, beams_BWL[:, 0].clone(), nats_B=beam_nats_BW[:, 0], spent_B=spent_B, finite_B=finite_B)
        return state | {"beams_BWL": beams_BWL, "beam_nats_BW": beam_nats_BW}

    def _pairs(
        self, problem: Problem, texts_ML: Tensor, clean_ML: Tensor, grad_MLD: Tensor, owner_M: Tensor
    ) -> list[Pairs]:
        """Return every beam's candidates; a text that two beams reach belongs to the first."""
        total = self._num_candidates(problem.protocol.length)
        seen: set[tuple[int, bytes]] = set()
        found = []
        for index, owner in enumerate(owner_M.tolist()):
            count = total // int((owner_M == owner).sum())
            text_L, clean_L = texts_ML[index], clean_ML[index]
            gains_PV = gains_where(problem, grad_MLD[index], text_L, unedited(problem, text_L, clean_L))
            pairs = top_pairs(gains_PV, count, share_of_position(problem, clean_L, count, self.per_position))
            keys = [(owner, text_L.numpy().tobytes()) for text_L in _written(problem, text_L, pairs)]
            new_N = torch.tensor([key not in seen for key in keys], dtype=torch.bool)
            seen.update(keys)
            found.append((pairs[0][new_N], pairs[1][new_N]))
        return found

    def _num_candidates(self, length: int) -> int:
        if self.budget_tokens is None:
            return self.candidates
        num_gradients = 1 + (self.flips - 1) * self.width
        per_candidate, gradients = self.flips * forward_tokens(1, length), gradient_tokens(num_gradients, length)
        least = self.width * per_candidate  # a candidate for each beam
        return self.width - 1 + affordable(self.budget_tokens, per_candidate, gradients + least - per_candidate)


def _written(problem: Problem, text_L: Tensor, pairs: Pairs) -> Tensor:
    """Return the texts that candidates make of one text [N, L]."""
    positions_N, tokens_N = pairs
    texts_NL = text_L.repeat(len(tokens_N), 1)
    texts_NL[torch.arange(len(tokens_N)), positions_N + problem.protocol.attackable.start] = tokens_N
    return texts_NL
