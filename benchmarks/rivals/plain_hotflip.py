"""Iterative HotFlip as it is written first: one text at a time, every candidate read from its first token to its last.

The rival of isotone's in benchmarks/attack_speed.py. It makes the same choices and finds the same edits; what it lacks
is batches of candidates, the prefix cache, logits where they are scored only, and frozen weights.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn


def attack(
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
    weight_VD = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    for _ in range(flips):
        embeds = model.get_input_embeddings()(current_L[None]).detach().requires_grad_(True)  # type: ignore[operator]
        loss = _nats(model(inputs_embeds=embeds).logits[0], current_L, scored)
        model.zero_grad()
        loss.backward()
        best = loss.item() if best is None else best
        gains_LV = embeds.grad[0] @ weight_VD.T  # type: ignore[index, operator]
        gains_LV = (gains_LV - gains_LV.gather(1, current_L[:, None])).detach()
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
    return [[i, int(tokens_L[i]), int(best_L[i])] for i in range(len(tokens_L)) if tokens_L[i] != best_L[i]]


def _nats(logits_LV: torch.Tensor, tokens_L: torch.Tensor, scored: slice) -> torch.Tensor:
    nll_T = F.cross_entropy(logits_LV[:-1].float(), tokens_L[1:], reduction="none")
    return nll_T[scored.start - 1 : scored.stop - 1].sum()
