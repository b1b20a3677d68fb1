"""HotFlip as it is written first: one text at a time, each read from its first token to its last for every loss.

The rival of isotone's in benchmarks/attack_speed.py. It makes the same choices and finds the same edits; what it lacks
is batches, the prefix cache, logits where they are scored only, and frozen weights.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn


def once(
    model: nn.Module, tokens_L: torch.Tensor, attackable: range, scored: slice, flips: int
) -> tuple[list[list[int]], float, float]:
    """Return the edits of one text as (position, old, new), all by one gradient, and its loss before and after.

    Five forward units: the clean loss, a forward and a backward pass through weights and embeddings, the attacked text.
    """
    with torch.no_grad():
        clean = float(_nats(model(input_ids=tokens_L[None]).logits[0], tokens_L, scored))
    gains_LV = _gains(model, tokens_L, scored)[0]
    gains_LV[torch.arange(len(tokens_L)), tokens_L] = -torch.inf
    best_P, tokens_P = gains_LV[attackable.start : attackable.stop].max(dim=1)
    text_L = tokens_L.clone()
    for place in best_P.topk(flips).indices.tolist():
        text_L[attackable.start + place] = tokens_P[place]
    with torch.no_grad():
        attacked = float(_nats(model(input_ids=text_L[None]).logits[0], text_L, scored))
    return _edits(tokens_L, text_L), clean, attacked


def iterative(
    model: nn.Module,
    tokens_L: torch.Tensor,
    attackable: range,
    scored: slice,
    flips: int,
    candidates: int,
    per_position: int = 2,
) -> list[list[int]]:
    """Return the edits of one text as (position, old, new).

    Args:
        model: causal language model in eval mode.
        tokens_L: the text.
        attackable: positions that may be edited.
        scored: positions whose loss is maximized.
        flips: rounds, an edit each.
        candidates: evaluated pairs a round.
        per_position: most candidates at one position, more where there are too few positions.
    """
    current_L, edited = tokens_L.clone(), set[int]()
    best_L, best = current_L.clone(), None
    per_position = max(per_position, math.ceil(candidates / len(attackable)))
    for _ in range(flips):
        gains_LV, loss = _gains(model, current_L, scored)
        best = loss if best is None else best
        pairs = []
        for position in set(attackable) - edited:
            gains_V = gains_LV[position]
            gains_V[current_L[position]] = -torch.inf
            for token in gains_V.topk(per_position).indices.tolist():
                pairs.append((-float(gains_V[token]), position, token))
        chosen = None
        for _, position, token in sorted(pairs)[:candidates]:
            text_L = current_L.clone()
            text_L[position] = token
            with torch.no_grad():
                nats = float(_nats(model(input_ids=text_L[None]).logits[0], text_L, scored))
            if chosen is None or nats > chosen[0]:
                chosen = (nats, position, text_L)
        assert chosen is not None
        nats, position, current_L = chosen
        edited.add(position)
        if nats > best:
            best, best_L = nats, current_L.clone()
    return _edits(tokens_L, best_L)


def _gains(model: nn.Module, tokens_L: torch.Tensor, scored: slice) -> tuple[torch.Tensor, float]:
    """Return what each token at each position adds to the loss to first order [L, V], and the loss."""
    embeds = model.get_input_embeddings()(tokens_L[None]).detach().requires_grad_(True)  # type: ignore[operator]
    loss = _nats(model(inputs_embeds=embeds).logits[0], tokens_L, scored)
    model.zero_grad()
    loss.backward()
    weight_VD = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    gains_LV = embeds.grad[0] @ weight_VD.T  # type: ignore[index, operator]
    return (gains_LV - gains_LV.gather(1, tokens_L[:, None])).detach(), loss.item()


def _edits(tokens_L: torch.Tensor, edited_L: torch.Tensor) -> list[list[int]]:
    return [[i, int(tokens_L[i]), int(edited_L[i])] for i in range(len(tokens_L)) if tokens_L[i] != edited_L[i]]


def _nats(logits_LV: torch.Tensor, tokens_L: torch.Tensor, scored: slice) -> torch.Tensor:
    nll_T = F.cross_entropy(logits_LV[:-1].float(), tokens_L[1:], reduction="none")
    return nll_T[scored.start - 1 : scored.stop - 1].sum()
