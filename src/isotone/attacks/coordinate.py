"""Gradient-free coordinate search: candidates evaluated exactly; what a search finds without gradients."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from isotone.attacks.budget import affordable, forward_tokens
from isotone.attacks.interface import DocumentAttack, Problem, State, advance
from isotone.attacks.protocol import Window
from isotone.attacks.search import Pairs, best_edits, changeable, evaluate_pairs, random_pairs, stream, stream_keys
from isotone.attacks.surrogate import Evaluated, promising_pairs


@dataclass(frozen=True)
class CoordinateSearch(DocumentAttack):
    """Try tokens at several positions, and keep the best of a round if it raises the loss.

    A position may be changed again; once ``flips`` positions differ from the text, only those are. No gradient is used,
    so a model that hides its gradient hides nothing from it.

    Attributes:
        flips: most edited tokens (Hamming distance).
        candidates: exactly evaluated (position, token) pairs a round.
        rounds: where no budget is given.
        budget_tokens: of a document; as many rounds as it buys. None: ``rounds``.
        seed: of the draws; a document's depend on it, the document's id and the round.
        proposals: random: every pair is drawn. surrogate: those of the first round are; then a regression on all that
            was evaluated of this document proposes them (surrogate.py).
    """

    name: ClassVar[str] = "coordinate"

    flips: int = 10
    candidates: int = 32
    rounds: int = 40
    budget_tokens: int | None = None
    seed: int = 0
    proposals: Literal["random", "surrogate"] = "random"

    def __post_init__(self) -> None:
        if min(self.flips, self.candidates, self.rounds) < 1:
            raise ValueError(f"flips, candidates and rounds must be at least 1, found {self}")
        if self.proposals not in ("random", "surrogate"):
            raise ValueError(f"proposals: found {self.proposals!r}, allowed are random and surrogate")

    @property
    def variant(self) -> str:
        """Where candidates come from."""
        return self.proposals

    def num_rounds(self, length: int) -> int:
        """Return the rounds asked for, or what the budget buys after the clean text was read."""
        if self.budget_tokens is None:
            return self.rounds
        return affordable(self.budget_tokens, forward_tokens(self.candidates, length), forward_tokens(1, length))

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the clean texts, the keys of their streams (keys_B) and, for the surrogate, what was evaluated.

        That is positions, tokens and gains of N candidates (tried_…_BN; NaN: there was none), and how many of them were
        before the text last changed (before_B).
        """
        state = super().start(problem, windows) | {"keys_B": stream_keys(self.seed, "coordinate search", windows)}
        if self.proposals == "surrogate":
            none_BN = torch.zeros(len(windows), 0, dtype=torch.int64)
            state |= {"tried_positions_BN": none_BN, "tried_tokens_BN": none_BN.clone()}
            state |= {"tried_gains_BN": none_BN.double(), "before_B": torch.zeros(len(windows), dtype=torch.int64)}
        return state

    def step(self, problem: Problem, state: State) -> State:
        """Evaluate a round of candidates.

        The text as it stands is read again for its prefix cache only, which saves time and is not counted; its loss is
        known from the round that made it.
        """
        current_BL, length = state["current_BL"], problem.protocol.length
        current_B, layers = problem.target.read(current_BL)
        spent = 0
        if len(state["history_RB2"]) == 0:
            state, spent = state | {"best_B": current_B}, forward_tokens(1, length)
        pairs = [self._proposed(problem, state, index) for index in range(len(current_BL))]
        nats = evaluate_pairs(problem, current_BL, layers, pairs)
        edited_BL, nats_B, finite_B = best_edits(problem, current_BL, pairs, nats)
        better_B = nats_B > state["best_B"]
        edited_BL = torch.where(better_B[:, None], edited_BL, current_BL)
        if self.proposals == "surrogate":
            state = self._learned(state, pairs, [n - b for n, b in zip(nats, state["best_B"], strict=True)], better_B)
        counts_B = torch.tensor([len(tokens) for _, tokens in pairs])
        return advance(
            state,
            edited_BL,
            nats_B=nats_B,
            spent_B=spent + counts_B * forward_tokens(1, length),
            finite_B=finite_B & current_B.isfinite(),
        )

    def _proposed(self, problem: Problem, state: State, index: int) -> Pairs:
        """Return a document's candidates of this round."""
        current_L = state["current_BL"][index]
        allowed_P = changeable(problem, current_L, state["clean_BL"][index], self.flips)
        if self.proposals == "surrogate" and bool(state["tried_gains_BN"][index].isfinite().any()):
            names = ("tried_positions_BN", "tried_tokens_BN", "tried_gains_BN")
            evaluated = Evaluated(*(state[name][index] for name in names))
            tried_N = ~evaluated.gains_N.isnan()
            tried_N[: int(state["before_B"][index])] = False
            return promising_pairs(
                problem.target.embeddings_VD,
                problem.vocabulary.admissible_V,
                current_L[problem.protocol.attackable.start : problem.protocol.attackable.stop],
                allowed_P,
                evaluated,
                tried=(evaluated.positions_N[tried_N], evaluated.tokens_N[tried_N]),
                count=self.candidates,
            )
        generator = stream(state["keys_B"][index], len(state["history_RB2"]))
        return random_pairs(generator, problem, current_L, allowed_P, self.candidates)

    def _learned(self, state: State, pairs: list[Pairs], gains: list[Tensor], better_B: Tensor) -> State:
        """Return the state with a round's gains; at an edited position they become those against the new token."""
        fresh_BC = torch.zeros(len(pairs), self.candidates, dtype=torch.int64)
        positions_BN = torch.cat([state["tried_positions_BN"], fresh_BC], dim=1)
        tokens_BN = torch.cat([state["tried_tokens_BN"], fresh_BC], dim=1)
        gains_BN = torch.cat(
            [state["tried_gains_BN"], torch.full_like(fresh_BC, torch.nan, dtype=torch.float64)], dim=1
        )
        before = state["tried_gains_BN"].shape[1]
        for index, ((positions_N, tokens_N), gains_N) in enumerate(zip(pairs, gains, strict=True)):
            round_N = slice(before, before + len(tokens_N))
            positions_BN[index, round_N], tokens_BN[index, round_N] = positions_N, tokens_N
            gains_N = torch.where(gains_N.isfinite(), gains_N, -torch.inf)  # tried, and never learned from
            gains_BN[index, round_N] = gains_N
            if bool(better_B[index]):
                best = gains_N.argmax()
                gains_BN[index, positions_BN[index] == positions_N[best]] -= gains_N[best].clone()
        return state | {
            "tried_positions_BN": positions_BN,
            "tried_tokens_BN": tokens_BN,
            "tried_gains_BN": gains_BN,
            "before_B": torch.where(better_B, gains_BN.shape[1], state["before_B"]),
        }
