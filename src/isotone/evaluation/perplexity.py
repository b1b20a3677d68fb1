"""Held-out perplexity and bits per byte: every token once, sums in float64, intervals over documents, resumable.

Shapes: B windows, L tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from isotone import records
from isotone.evaluation.batches import resumed
from isotone.evaluation.windows import Document, Window, fixed_batches
from isotone.interruption import StopFlag
from isotone.scoring import token_nll
from isotone.statistics import Estimate, ratio_estimate

Row = dict[str, Any]


def evaluate_perplexity(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
    leading_token: int | None,
    work: records.JsonLines,
    identity: Mapping[str, str],
    stop: StopFlag | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Return one row a document: ``id``, ``nats`` (a sum; None if not finite), ``num_tokens``, ``num_bytes``.

    Batches are fixed by the documents' lengths alone, and each one's result is durable before the next begins: an
    interrupted evaluation gives the same rows, bit for bit.

    Args:
        model: a causal language model in eval mode.
        documents: what is scored.
        context: tokens of a window, the leading token included; at most what the model can read.
        stride: tokens between windows; half the context unless given.
        batch_size: most windows in one forward pass.
        leading_token: what stands before each document's first token; None: that token is not scored.
        work: finished batches; another identity's are set aside.
        identity: what the losses depend on beside the documents and settings, such as the hash of the weights.
        stop: read after each batch.
        report: called with the batches done and in all.

    Raises:
        Stopped: the stop flag asked for it; what is done is in ``work``.
        UsageError: the stride does not fit the context.
    """
    stride = stride or max(1, context // 2)
    lead = 0 if leading_token is None else 1
    lengths = [len(document.tokens) + lead for document in documents]
    batches = fixed_batches(lengths, context, stride, batch_size, model.config.vocab_size)
    settings = {"context": context, "stride": stride, "batch_size": batch_size, "leading_token": leading_token}
    header = {
        "settings": {"task": "texts", **settings},
        "identity": dict(identity),
        "documents": [d.id for d in documents],
    }
    score = partial(_score, model, documents, leading_token)
    return _rows(documents, lengths, batches, resumed(batches, score, work, header, stop, report))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the measures of one model on its documents, each with a 95 % interval.

    ``nll`` is Σ nats/Σ tokens, ``perplexity`` its exponential (as are the interval's ends; None beyond 1e299), and
    ``bits_per_byte`` Σ nats/(Σ bytes·ln 2). The interval is the t interval of the ratio estimator with documents as the
    units (N − 1 degrees of freedom). Rows without a finite loss are listed under ``missing``.
    """
    scored = [row for row in rows if not _why_missing(row)]
    missing = [{"id": row["id"], "reason": _why_missing(row)} for row in rows if _why_missing(row)]
    result: dict[str, Any] = {
        "num_documents": len(scored),
        "num_tokens": sum(row["num_tokens"] for row in scored),
        "num_bytes": sum(row["num_bytes"] for row in scored),
        "missing": missing,
    }
    if not scored:
        return {**result, "nll": None, "perplexity": None, "bits_per_byte": None}
    nats = np.array([[row["nats"] for row in scored]])
    per_token = ratio_estimate(nats, np.array([row["num_tokens"] for row in scored]))
    per_byte = ratio_estimate(nats, np.array([row["num_bytes"] for row in scored]))
    return {
        **result,
        "nll": _measure(per_token, lambda nll: nll, "nats per token"),
        "perplexity": _measure(per_token, _exp, "1"),
        "bits_per_byte": _measure(per_byte, lambda nats: nats / math.log(2), "bits per byte"),
    }


@torch.no_grad()
def _score(
    model: PreTrainedModel, documents: Sequence[Document], leading_token: int | None, windows: Sequence[Window]
) -> list[float | None]:
    """Return each window's sum of nats over the tokens that it scores; None where it is not finite."""
    lead = [] if leading_token is None else [leading_token]
    length = max(w.end - w.start for w in windows)
    ids_BL = torch.zeros(
        len(windows), length, dtype=torch.long
    )  # padding on the right may be any id: it reaches nothing
    for row, w in enumerate(windows):
        tokens = documents[w.document].tokens
        inside = tokens[max(0, w.start - len(lead)) : w.end - len(lead)].tolist()
        ids_BL[row, : w.end - w.start] = torch.tensor((lead if w.start == 0 else []) + inside)
    begin = min(w.first - w.start for w in windows)
    nll_BT = token_nll(model, ids_BL.to(model.device), slice(begin, length)).cpu().double().numpy()
    sums = [
        float(row_T[w.first - w.start - begin : w.end - w.start - begin].sum())
        for row_T, w in zip(nll_BT, windows, strict=True)
    ]
    return [nats if math.isfinite(nats) else None for nats in sums]


def _rows(
    documents: Sequence[Document],
    lengths: Sequence[int],
    batches: Sequence[Sequence[Window]],
    done: Sequence[Sequence[float | None]],
) -> list[Row]:
    parts: list[list[tuple[int, float | None]]] = [[] for _ in documents]
    for windows, sums in zip(batches, done, strict=True):
        for window, total in zip(windows, sums, strict=True):
            parts[window.document].append((window.start, total))
    rows = []
    for document, length, of_document in zip(documents, lengths, parts, strict=True):
        nats = [value for _, value in sorted(of_document, key=lambda part: part[0])]
        finite = [value for value in nats if value is not None]
        rows.append(
            {
                "id": document.id,
                "nats": math.fsum(finite) if len(finite) == len(nats) else None,
                "num_tokens": max(0, length - 1),
                "num_bytes": int(document.num_bytes),
            }
        )
    return rows


def _why_missing(row: Row) -> str:
    if not row["num_tokens"]:
        return "it has no token that can be scored"
    return "the model returned a loss that is not finite" if row["nats"] is None else ""


def _exp(nll: float) -> float | None:
    return math.exp(nll) if nll < 690 else None


def _measure(estimate: Estimate, transform: Callable[[float], float | None], unit: str) -> dict[str, Any]:
    ci95 = estimate.ci95
    return {
        "value": transform(estimate.value),
        "ci95": None if ci95 is None else [transform(end) for end in ci95],
        "unit": unit,
    }
