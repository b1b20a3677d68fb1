"""The one place where losses come from: the negative log-likelihood of single tokens, in nats and fp32.

Shapes: B sequences, L tokens of a sequence, T scored tokens, V vocabulary, D hidden size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from isotone.pairs import PairLayout

CHUNK_ELEMENTS = 1 << 24
"""Logits that are raised to fp32 at a time; rows are independent, so the number changes memory only."""


class TokenScores(NamedTuple):
    """What the model says about each scored token.

    Attributes:
        nll_BT: negative log-likelihood in nats, fp32.
        correct_BT: whether the token is the most likely one (ties go to the lowest id), bool.
    """

    nll_BT: Tensor  # noqa: N815 - shape suffixes
    correct_BT: Tensor  # noqa: N815


def token_nll(
    model: nn.Module,
    input_ids_BL: Tensor,
    positions: slice | Tensor | None = None,
    past: Any = None,
    inputs_embeds_BLD: Tensor | None = None,
    labels_BL: Tensor | None = None,
    pairs: PairLayout | None = None,
) -> Tensor:
    """Return −ln p(x_t | x_<t) of the tokens at ``positions``, nats, fp32 [B, T]; gradients flow to the embeddings.

    Logits are computed only where they are needed, as the model returns them (a head's scaling or capping included);
    the softmax is in fp32. Sequences of different length are padded on the right: in a causal model what follows a
    token does not reach it, so no mask is needed.

    Args:
        model: a causal language model with the call signature of transformers.
        input_ids_BL: token ids; also the labels, unless ``labels_BL`` is given, and where ``inputs_embeds_BLD`` is.
        positions: indices into L of the scored tokens, each at least 1, the same for all sequences;
            None: all but the first.
        past: key/value cache of what precedes ``input_ids_BL``. The model extends it in place: hand over a copy.
        inputs_embeds_BLD: what the model reads instead of the embeddings of ``input_ids_BL``.
        labels_BL: the true tokens, where those that the model reads were edited.
        pairs: the model is an encoder-decoder and the rows are laid out so. Only the target is scored, all of it where
            ``positions`` is None; the loss of its padding is 0. ``inputs_embeds_BLD`` is of the source alone.

    Raises:
        ValueError: a position is 0 or outside the sequence, or in the source of a pair.
    """
    index_T = _index(positions, input_ids_BL, pairs)
    asked_T, logits_BTV = _logits(model, input_ids_BL, index_T, past, inputs_embeds_BLD, pairs)
    labels_BT = (input_ids_BL if labels_BL is None else labels_BL)[:, index_T[asked_T]]
    return _with_padding(nll_of_logits(logits_BTV, labels_BT, pairs), asked_T)


def nll_of_logits(logits_BTV: Tensor, labels_BT: Tensor, pairs: PairLayout | None = None) -> Tensor:
    """Return −ln p of the labels, nats, fp32 [B, T], as ``token_nll`` does, of logits that are there."""
    parts = [
        F.cross_entropy(rows_CV.float(), labels_C, reduction="none", ignore_index=_ignored(pairs))
        for rows_CV, labels_C in _chunks(logits_BTV, labels_BT.flatten())
    ]
    return torch.cat(parts).view(logits_BTV.shape[:2])


def token_kl(logits_BTV: Tensor, reference_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return τ² KL(p*‖p) of every token, nats, fp32 [B, T]: p and p* are the softmax of logits and reference over τ."""
    parts = []
    for rows_CV, reference_CV in _chunks(logits_BTV, reference_BTV.flatten(0, 1)):
        log_p_CV, log_q_CV = ((each.float() / temperature).log_softmax(-1) for each in (rows_CV, reference_CV))
        parts.append(temperature**2 * F.kl_div(log_p_CV, log_q_CV, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts).view(logits_BTV.shape[:2])


@torch.no_grad()
def token_scores(
    model: nn.Module,
    input_ids_BL: Tensor,
    positions: slice | Tensor | None = None,
    past: Any = None,
    inputs_embeds_BLD: Tensor | None = None,
    pairs: PairLayout | None = None,
) -> TokenScores:
    """Return loss and top-1 correctness of the tokens at ``positions``; arguments and errors as for ``token_nll``.

    Padding of a pair's target has loss 0 and is never correct.
    """
    index_T = _index(positions, input_ids_BL, pairs)
    asked_T, logits_BTV = _logits(model, input_ids_BL, index_T, past, inputs_embeds_BLD, pairs)
    labels_N = input_ids_BL[:, index_T[asked_T]].flatten()
    nll, correct = [], []
    for rows_CV, labels_C in _chunks(logits_BTV, labels_N):
        nll.append(F.cross_entropy(rows_CV.float(), labels_C, reduction="none", ignore_index=_ignored(pairs)))
        correct.append(_is_top(rows_CV, labels_C) & (labels_C != _ignored(pairs)))
    shape = logits_BTV.shape[:2]
    return TokenScores(*(_with_padding(torch.cat(part).view(shape), asked_T) for part in (nll, correct)))


def leading_token(tokenizer: Any) -> int | None:
    """Return the id put before a document's first token: BOS, else EOS, else None (the first token goes unscored)."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _index(positions: slice | Tensor | None, input_ids_BL: Tensor, pairs: PairLayout | None) -> Tensor:
    """Return the scored positions as indices [T] on the device of the ids."""
    length, first = input_ids_BL.shape[1], 1 if pairs is None else pairs.source
    if isinstance(positions, Tensor):
        index_T = positions.to(input_ids_BL.device)
    else:
        wanted = slice(first, None) if positions is None else positions
        index_T = torch.arange(length, device=input_ids_BL.device)[wanted]
    if index_T.numel() == 0 or int(index_T.min()) < first or int(index_T.max()) >= length:
        raise ValueError(
            f"positions must lie in {first}…{length - 1} of a sequence of {length} tokens, and not be empty"
        )
    return index_T


def _ignored(pairs: PairLayout | None) -> int:
    """Return the label that has no loss."""
    return -100 if pairs is None else pairs.pad


def _logits(
    model: nn.Module,
    input_ids_BL: Tensor,
    index_T: Tensor,
    past: Any,
    inputs_embeds_BLD: Tensor | None,
    pairs: PairLayout | None,
) -> tuple[Tensor, Tensor]:
    """Return which of the tokens at ``index_T`` are asked for, bool [T], and their logits [B, asked, V].

    All are, but for columns of pairs that hold no text (``PairLayout.text``).
    """
    if pairs is not None:  # such models compute the logits of every target token
        layout, ids_BL = (pairs, input_ids_BL) if pairs.text is None else pairs.trimmed(input_ids_BL)
        embeds_BSD = None if inputs_embeds_BLD is None else inputs_embeds_BLD[:, : layout.source]
        logits_BTV = model(**layout.inputs(model, ids_BL, embeds_BSD), use_cache=False).logits
        column_T = index_T - pairs.source
        asked_T = column_T < logits_BTV.shape[1]
        return asked_T, logits_BTV[:, column_T[asked_T]]
    inputs: dict[str, Any] = (
        {"input_ids": input_ids_BL} if inputs_embeds_BLD is None else {"inputs_embeds": inputs_embeds_BLD}
    )
    if past is not None:
        inputs["past_key_values"] = past
    logits_BTV = model(**inputs, use_cache=past is not None, logits_to_keep=index_T - 1).logits
    return torch.ones_like(index_T, dtype=torch.bool), logits_BTV


def _with_padding(asked_BT: Tensor, asked_T: Tensor) -> Tensor:
    """Put 0 (or False) between the columns that were asked for."""
    if asked_BT.shape[1] == len(asked_T):
        return asked_BT
    whole_BT = asked_BT.new_zeros(len(asked_BT), len(asked_T))
    return whole_BT.index_copy(1, asked_T.nonzero().flatten(), asked_BT)


def _chunks(logits_BTV: Tensor, others_N: Tensor) -> zip:
    """Return rows of logits, a chunk at a time, with what belongs to them: labels, or other logits."""
    num_rows = max(1, CHUNK_ELEMENTS // logits_BTV.shape[-1])
    return zip(logits_BTV.flatten(0, 1).split(num_rows), others_N.split(num_rows), strict=True)


def _is_top(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Return whether each label is the lowest index of its row's maximum (``argmax`` promises no order among ties)."""
    top_C = logits_CV.gather(1, labels_C[:, None])[:, 0] == logits_CV.amax(dim=-1)
    reached = top_C.nonzero().flatten()  # few rows: only they are looked through for a lower index
    shared_RV = logits_CV[reached] == logits_CV[reached].gather(1, labels_C[reached, None])
    lower_V = torch.arange(logits_CV.shape[-1], device=logits_CV.device)
    top_C[reached] = ~(shared_RV & (lower_V < labels_C[reached, None])).any(dim=-1)
    return top_C
