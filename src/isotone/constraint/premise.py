"""Measured beside a certificate: whether edits ever meet its premise, and whether order shows at the model's end.

A certificate speaks of ordered pairs of inputs of one network. *Premise*: tokens of a text are replaced; of the pairs
of network inputs, before and after, that differ, how many are ordered coordinatewise. *Order probes*: something is done
to a text in growing doses; an output moves monotonically if every further dose moves it the same way. Every probe has
a control that does as much without an order, and of the same length: a longer text alone moves outputs. All of it is
measured on texts; nothing is proved.

Shapes: L tokens of a text, D embedding, V outputs (logits of the last token), K doses.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.feed_forward import feed_forwards, in_eval_mode
from isotone.pairs import PairLayout

NUM_DOSES = 4
"""K. Were the signs of differences independent and even, 2 · ½^K of all outputs would be monotone: an eighth."""

MIN_LENGTH = 8
"""Tokens that a text must have."""

LENGTH = 64
"""Tokens of a text that are used, at most; fewer where a model's context has no room for the doses behind them."""

_DOSE = 0.25
"""Size of one raise of an embedding, as a share of the embedding's norm."""


def measure_order(model: PreTrainedModel, texts: Sequence[np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Return the premise rate over one-token edits, and the order probes with their controls, as JSON values.

    Args:
        model: a language model of the table, not changed.
        texts: token ids of documents; those with fewer than ``MIN_LENGTH`` tokens are left out.
        seed: keys positions, tokens and directions.
    """
    longest = min(LENGTH, (getattr(model.config, "max_position_embeddings", None) or 2 * LENGTH) - NUM_DOSES)
    rows = [torch.from_numpy(np.asarray(text[:longest], np.int64)) for text in texts if len(text) >= MIN_LENGTH]
    generator = torch.Generator().manual_seed(seed)
    premise = np.zeros(2, np.int64)
    counts = {name: np.zeros(2, np.int64) for name in _PROBES}
    for ids_L in rows:
        texts_2L = torch.stack([ids_L, _one_token_edit(model, ids_L, generator)]).to(model.device)
        premise += _num_ordered(model, *(_asked(model, text_L[None], None) for text_L in texts_2L))
        for name, (dose, control) in _PROBES.items():
            state = generator.get_state()
            for column, variant in enumerate((dose, control)):
                generator.set_state(state)  # the same place and sizes for both
                counts[name][column] += _num_monotone(model, ids_L, variant, generator)
    outputs = len(rows) * int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
    return {
        "documents": len(rows),
        "premise": _rate(*premise.tolist()),
        "probes": {
            name: {"monotone": int(a) / max(outputs, 1), "control": int(b) / max(outputs, 1), "n": outputs}
            for name, (a, b) in counts.items()
        },
        "chance": 2 * 0.5**NUM_DOSES,
        "kind": "measured, not proved",
    }


# --- the premise -----------------------------------------------------------------------------------------------------


def premise_met(
    model: PreTrainedModel, clean_BL: Sequence[Tensor], attacked_BL: Sequence[Tensor], pairs: PairLayout | None = None
) -> dict[str, Any]:
    """Return how often attacked texts meet a certificate's premise: over texts, tokens and networks, as JSON values.

    Args:
        model: a language model of the table, not changed.
        clean_BL: token ids of texts; rows of pairs, where ``pairs`` says how they are divided.
        attacked_BL: the same texts with some tokens replaced.
        pairs: the encoder then reads the source, and the decoder the target, of both.

    Returns:
        ``pairs`` of network inputs that differ, how many of them are ``ordered``, and their ``rate``; None without one.
    """
    totals = np.zeros(2, np.int64)
    for clean_L, attacked_L in zip(clean_BL, attacked_BL, strict=True):
        layout, clean_1L = pairs.trimmed(clean_L[None]) if pairs else (None, clean_L[None])
        attacked_1L = pairs.trimmed(attacked_L[None])[1] if pairs else attacked_L[None]
        totals += _num_ordered(model, *(_asked(model, ids.to(model.device), layout) for ids in (clean_1L, attacked_1L)))
    return _rate(*totals.tolist())


def _asked(model: PreTrainedModel, ids_1L: Tensor, layout: PairLayout | None) -> dict[str, Any]:
    """Return what the model is called with; a decoder without a target is given its start token alone."""
    return layout.inputs(model, ids_1L) if layout else {"input_ids": ids_1L, **_decoded(model)}


def _one_token_edit(model: PreTrainedModel, ids_L: Tensor, generator: torch.Generator) -> Tensor:
    edited_L = ids_L.clone()
    position = int(torch.randint(1, len(ids_L), (1,), generator=generator))
    edited_L[position] = torch.randint(model.config.vocab_size, (1,), generator=generator)
    return edited_L


def _num_ordered(model: PreTrainedModel, before: dict[str, Any], after: dict[str, Any]) -> tuple[int, int]:
    """Return how many pairs of network inputs differ, and how many of those are ordered."""
    differ = ordered = 0
    for before_Td, after_Td in zip(_inputs(model, before), _inputs(model, after), strict=True):
        change_Td = after_Td - before_Td
        differs_T = (change_Td != 0).any(-1)
        differ += int(differs_T.sum())
        ordered += int((differs_T & ((change_Td >= 0).all(-1) | (change_Td <= 0).all(-1))).sum())
    return differ, ordered


def _rate(differ: int, ordered: int) -> dict[str, Any]:
    return {"pairs": differ, "ordered": ordered, "rate": ordered / differ if differ else None}


def _inputs(model: PreTrainedModel, asked: dict[str, Any]) -> list[Tensor]:
    """Return what each feed-forward network reads."""
    found: list[Tensor] = []
    handles = [
        network.up.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2)))
        for network in feed_forwards(model)
    ]
    try:
        in_eval_mode(model, lambda: model(**asked, use_cache=False).logits)
    finally:
        for handle in handles:
            handle.remove()
    return found


# --- order at the end ------------------------------------------------------------------------------------------------

Variant = Callable[[nn.Module, Tensor, torch.Generator], Iterator[Tensor]]
"""Yields what is read (L, D) after 0, 1, … K doses."""


def _insert_copies(embed: nn.Module, ids_L: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Insert one random token, once, twice, … at one place."""
    return _inserted(embed, ids_L, generator, lambda drawn_KK, _: drawn_KK[0, :1].expand(NUM_DOSES))


def _insert_others(embed: nn.Module, ids_L: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Insert as many, but other random tokens for each dose: the same lengths, and no dose contains another."""
    return _inserted(embed, ids_L, generator, lambda drawn_KK, k: drawn_KK[k - 1])


def _repeat(embed: nn.Module, ids_L: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Repeat the token that is there, once, twice, …"""
    return _inserted(embed, ids_L, generator, None)


def _inserted(
    embed: nn.Module,
    ids_L: Tensor,
    generator: torch.Generator,
    choose_K: Callable[[Tensor, int], Tensor] | None,
) -> Iterator[Tensor]:
    place = int(torch.randint(1, len(ids_L) - 1, (1,), generator=generator))
    drawn_KK = torch.randint(embed.get_parameter("weight").shape[0], (NUM_DOSES, NUM_DOSES), generator=generator)
    for k in range(NUM_DOSES + 1):
        added_K = ids_L[place].expand(NUM_DOSES) if choose_K is None else choose_K(drawn_KK, k)
        yield embed(torch.cat([ids_L[: place + 1], added_K[:k], ids_L[place + 1 :]]).to(embed.weight.device))  # type: ignore[arg-type, union-attr]


def _raise(embed: nn.Module, ids_L: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Add a non-negative vector to one token's embedding, once, twice, …"""
    return _moved(embed, ids_L, generator, lambda direction_D, _: direction_D.abs())


def _scatter(embed: nn.Module, ids_L: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Add a vector of the same size and signs that are not all alike, in the same doses."""
    return _moved(embed, ids_L, generator, lambda direction_D, _: direction_D)


def _moved(
    embed: nn.Module, ids_L: Tensor, generator: torch.Generator, turn: Callable[[Tensor, int], Tensor]
) -> Iterator[Tensor]:
    place = int(torch.randint(1, len(ids_L) - 1, (1,), generator=generator))
    e_LD = embed(ids_L.to(embed.weight.device))  # type: ignore[arg-type, union-attr]
    direction_D = torch.randn(e_LD.shape[1], generator=generator).to(e_LD)
    direction_D *= _DOSE * e_LD[place].norm() / direction_D.norm()
    for k in range(NUM_DOSES + 1):
        moved_LD = e_LD.clone()
        moved_LD[place] += k * turn(direction_D, k)
        yield moved_LD


_PROBES: dict[str, tuple[Variant, Variant]] = {
    "insert": (_insert_copies, _insert_others),
    "repeat": (_repeat, _insert_others),
    "raise": (_raise, _scatter),
}
"""What is done in doses, and its control."""


@torch.no_grad()
def _num_monotone(model: PreTrainedModel, ids_L: Tensor, variant: Variant, generator: torch.Generator) -> int:
    """Return how many outputs every further dose moves the same way."""
    embed = model.get_input_embeddings()
    logits_KV = torch.stack([_last_logits(model, e_LD) for e_LD in variant(embed, ids_L, generator)])
    change_KV = logits_KV.diff(dim=0)
    return int(((change_KV > 0).all(0) | (change_KV < 0).all(0)).sum())


def _last_logits(model: PreTrainedModel, e_LD: Tensor) -> Tensor:
    """Return the logits of the last token; of an encoder-decoder, those of the first token that it would write."""
    more = _decoded(model) or {"logits_to_keep": 1}
    return in_eval_mode(model, lambda: model(inputs_embeds=e_LD[None], use_cache=False, **more).logits[0, -1].float())


def _decoded(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the decoder of an encoder-decoder is given: the token that every text of it starts with."""
    if not model.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": torch.full((1, 1), model.config.decoder_start_token_id, device=model.device)}
