"""What attacks by exact evaluation share: which positions may be changed, candidates, and the best of each document's.

A candidate is a pair (position, token). Positions are counted from the first attackable one.
Shapes: B documents, M texts, L tokens, P attackable positions, N candidates, V vocabulary, D embedding.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isotone.attacks.interface import Problem
from isotone.attacks.protocol import Window
from isotone.attacks.random_edits import random_tokens
from isotone.attacks.scoring import Layers
from isotone.determinism import stream_key

Pairs = tuple[Tensor, Tensor]
"""Positions and tokens of one text's candidates."""


def stream_keys(seed: int, purpose: str, windows: Sequence[Window]) -> Tensor:
    """Return a key for each document's random stream, of its id alone, int64 [B]: part of an attack's state."""
    return torch.tensor([stream_key(seed, f"{purpose} of {window.id}") for window in windows])


def stream(key: Tensor, round_index: int) -> np.random.Generator:
    """Return a document's random stream in one round."""
    return np.random.default_rng([int(key), round_index])


def changeable(problem: Problem, current_L: Tensor, clean_L: Tensor, flips: int) -> Tensor:
    """Return where a token may be written so that at most ``flips`` differ from the clean text, bool [P].

    Everywhere that is editable, while fewer do; then only where one differs already.
    """
    edited_P = (current_L != clean_L)[problem.protocol.attackable.start : problem.protocol.attackable.stop]
    return problem.protocol.editable(clean_L) if int(edited_P.sum()) < flips else edited_P


def unedited(problem: Problem, current_L: Tensor, clean_L: Tensor) -> Tensor:
    """Return where a token may be written that stands as it stood in the clean text, bool [P]."""
    positions = slice(problem.protocol.attackable.start, problem.protocol.attackable.stop)
    return (current_L == clean_L)[positions] & problem.protocol.editable(clean_L)


def share_of_position(problem: Problem, clean_L: Tensor, count: int, least: int) -> int:
    """Return how many of a text's candidates one position may have, so that its positions can take them all."""
    return max(least, math.ceil(count / int(problem.protocol.editable(clean_L).sum())))


def gains_where(problem: Problem, grad_LD: Tensor, current_L: Tensor, allowed_P: Tensor) -> Tensor:
    """Return the first-order gains at the allowed positions, −∞ elsewhere [P, V]."""
    target, positions = problem.target, slice(problem.protocol.attackable.start, problem.protocol.attackable.stop)
    admissible_V = problem.vocabulary.admissible_V.to(target.device)
    gains_PV = first_order_gains(
        grad_LD[positions], target.embeddings_VD, current_L[positions].to(target.device), admissible_V
    )
    return gains_PV.masked_fill(~allowed_P.to(target.device)[:, None], -torch.inf)


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
            columns = largest(gains_V, per_row)
            kept_PV[row, columns] = gains_V[columns]
        gains_PV = kept_PV
    best = largest(gains_PV.flatten(), count).cpu()
    return best // gains_PV.shape[1], best % gains_PV.shape[1]


def largest(values_N: Tensor, count: int) -> Tensor:
    """Return the indices of the largest finite values, largest first, ties (``topk`` orders none) in index order."""
    count = min(count, int((values_N > -torch.inf).sum()))
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values_N.device)
    bar = values_N.topk(count).values[-1]
    among = (values_N >= bar).nonzero().flatten()  # ascending; more than count where the last place is shared
    return among[torch.argsort(values_N[among], descending=True, stable=True)[:count]]


def random_pairs(
    generator: np.random.Generator, problem: Problem, current_L: Tensor, allowed_P: Tensor, count: int
) -> Pairs:
    """Return candidates at random allowed positions with random admissible tokens, none the token that stands there."""
    ids = problem.vocabulary.ids_N.numpy()
    current_P = current_L[problem.protocol.attackable.start : problem.protocol.attackable.stop].numpy()
    positions = np.flatnonzero(allowed_P.numpy())
    if len(ids) == 1:
        positions = positions[current_P[positions] != ids[0]]
    if len(positions) == 0:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    chosen = generator.choice(positions, count)
    return torch.from_numpy(chosen), torch.from_numpy(random_tokens(generator, ids, current_P[chosen]))


def evaluate_pairs(
    problem: Problem, texts_ML: Tensor, layers: Layers | None, pairs: Sequence[Pairs]
) -> tuple[Tensor, ...]:
    """Return Σ_S NLL of every text's candidates, fp64; all texts' candidates share the batches."""
    counts = [len(tokens) for _, tokens in pairs]
    nats_N = problem.target.candidates(
        texts_ML,
        layers,
        sequences_N=torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(counts)),
        positions_N=torch.cat([positions for positions, _ in pairs]) + problem.protocol.attackable.start,
        tokens_N=torch.cat([tokens for _, tokens in pairs]),
    )
    return nats_N.split(counts)


def best_edits(
    problem: Problem, current_BL: Tensor, pairs: Sequence[Pairs], nats: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Write each document's best candidate, ties to the first.

    Returns:
        The texts (as they were where there is no candidate), their Σ_S NLL (−∞ there), and whether every loss was a
        number.
    """
    edited_BL = current_BL.clone()
    nats_B = torch.full((len(pairs),), -torch.inf, dtype=torch.float64)
    finite_B = torch.ones(len(pairs), dtype=torch.bool)
    for index, ((positions_N, tokens_N), nats_N) in enumerate(zip(pairs, nats, strict=True)):
        if len(tokens_N) == 0:
            continue
        finite_B[index] = bool(nats_N.isfinite().all())
        best = int(torch.argsort(nats_N.nan_to_num(nan=-torch.inf), descending=True, stable=True)[0])
        edited_BL[index, positions_N[best] + problem.protocol.attackable.start] = tokens_N[best]
        nats_B[index] = nats_N[best].nan_to_num(nan=-torch.inf)
    return edited_BL, nats_B, finite_B
