"""Held-out loss of an encoder-decoder: every target token once, given the source and the tokens before it; resumable.

Shapes: B pairs, L tokens of a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from isotone import records
from isotone.data.packed import PackedDocument
from isotone.evaluation.batches import resumed
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout
from isotone.scoring import token_nll

Row = dict[str, Any]
T = TypeVar("T")


def evaluate_pairs(
    model: PreTrainedModel,
    documents: Sequence[PackedDocument],
    layout: PairLayout,
    *,
    batch_size: int = 8,
    work: records.JsonLines,
    identity: Mapping[str, str],
    stop: StopFlag | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Return one row a pair, as ``evaluate_perplexity`` does; tokens and bytes are those of the target, EOS counted.

    Args:
        model: an encoder-decoder in eval mode.
        documents: pairs; their tokens are rows.
        layout: how the rows are divided.
        batch_size: pairs in one forward pass.
        work: finished batches; another identity's are set aside.
        identity: what the losses depend on beside the documents and settings, such as the hash of the weights.
        stop: read after each batch.
        report: called with the batches done and in all.

    Raises:
        Stopped: the stop flag asked for it; what is done is in ``work``.
    """
    batches = batches_of_pairs(documents, layout, batch_size)

    @torch.no_grad()
    def score(batch: list[int]) -> list[float | None]:
        ids_BL = rows_of(documents, batch)
        sums_B = token_nll(model, ids_BL.to(model.device), pairs=layout.around(ids_BL)).double().sum(1)
        return [nats if math.isfinite(nats) else None for nats in sums_B.tolist()]

    settings = {"task": "pairs", "batch_size": batch_size, "documents": [d.id for d in documents]}
    header = {"settings": settings, "identity": dict(identity)}
    nats = by_index(batches, resumed(batches, score, work, header, stop, report))
    return [
        {
            "id": document.id,
            "nats": nats[index],
            "num_tokens": layout.num_scored(torch.from_numpy(document.tokens)[None]),
            "num_bytes": int(document.num_bytes),
        }
        for index, document in enumerate(documents)
    ]


def batches_of_pairs(documents: Sequence[PackedDocument], layout: PairLayout, batch_size: int) -> list[list[int]]:
    """Return the documents' indices in batches of like length, the longest first, that depend on nothing else."""
    lengths = [int((document.tokens != layout.pad).sum()) for document in documents]
    order = sorted(range(len(documents)), key=lambda index: (-lengths[index], index))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def rows_of(documents: Sequence[PackedDocument], batch: Sequence[int]) -> Tensor:
    """Return the rows of some documents, int64 [B, L]."""
    return torch.from_numpy(np.stack([documents[index].tokens for index in batch]))


def by_index(batches: Sequence[list[int]], results: Sequence[Sequence[T]]) -> list[T]:
    """Return what was computed in batches of indices in the order of the indices."""
    found = {
        index: result
        for batch, of_batch in zip(batches, results, strict=True)
        for index, result in zip(batch, of_batch, strict=True)
    }
    return [found[index] for index in range(len(found))]
