"""ROUGE of what an encoder-decoder writes: beam search without chance, resumable, with intervals over documents.

Scores are F-measures of Google's rouge-score (Lin 2004, "ROUGE: A package for automatic evaluation of summaries"), with
its stemmer. ROUGE-Lsum takes each line for a sentence, so texts are cut into lines behind ``.``, ``!`` and ``?``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from isotone import records
from isotone.config import Rouge
from isotone.data.packed import PackedDocument
from isotone.errors import UsageError
from isotone.evaluation.batches import resumed
from isotone.evaluation.pairs import batches_of_pairs, by_index, rows_of
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout

ROUGE = ("rouge1", "rouge2", "rougeLsum")
"""Names of the measures, as rouge-score has them."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_BOOTSTRAP_SEED = 0


def require_rouge_score() -> None:
    """Check, before anything is computed, that the package is there.

    Raises:
        UsageError: it is not.
    """
    try:
        import rouge_score  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "evaluation.rouge: the package rouge-score is missing; install isotone[seq2seq], or set it to null"
        ) from error


def write_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[PackedDocument],
    layout: PairLayout,
    settings: Rouge,
    *,
    work: records.JsonLines,
    identity: Mapping[str, str],
    stop: StopFlag | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Return what a model writes for each source, by beam search.

    Args:
        model: an encoder-decoder in eval mode.
        tokenizer: the model's.
        documents: pairs; their tokens are rows.
        layout: how the rows are divided.
        settings: of the search.
        work: finished batches; another identity's are set aside.
        identity: what the texts depend on beside the documents and settings, such as the hash of the weights.
        stop: read after each batch.
        report: called with the batches done and in all.

    Raises:
        Stopped: the stop flag asked for it; what is done is in ``work``.
    """
    longest = settings.max_tokens or int(documents[0].tokens.size - layout.source if documents else 1)
    search = GenerationConfig(
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram,
        max_new_tokens=longest,
        do_sample=False,
        use_cache=True,
        pad_token_id=layout.pad,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=_start_token(model),
    )

    @torch.no_grad()
    def write(batch: list[int]) -> list[str]:
        of_batch, ids_BL = layout.trimmed(rows_of(documents, batch))
        source_BS = of_batch.sides(ids_BL)[0].to(model.device)
        mask_BS = (source_BS != layout.pad).long()
        ids_BT = _generate(model, search, source_BS, mask_BS)
        return [text.strip() for text in tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]

    header = {
        "settings": settings.model_dump(exclude={"resamples"}),
        "longest": longest,
        "identity": dict(identity),
        "documents": [d.id for d in documents],
    }
    batches = batches_of_pairs(documents, layout, settings.batch_size)
    return by_index(batches, resumed(batches, write, work, header, stop, report))


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-Lsum of a text, F-measures from 0 to 1."""
    scores = _scorer().score(_lines(reference), _lines(prediction))
    return {metric: float(scores[metric].fmeasure) for metric in ROUGE}


def summarize_rouge(rows: Sequence[Mapping[str, float]], resamples: int) -> dict[str, Any]:
    """Return the mean of each measure over documents, with the 95 % interval of a bootstrap over documents.

    All measures are resampled together: the same documents are drawn for each.
    """
    if not rows:
        return dict.fromkeys(ROUGE)
    scores_DM = np.array([[row[metric] for metric in ROUGE] for row in rows])
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    drawn_RD = rng.integers(len(rows), size=(resamples, len(rows)))
    means_RM = np.array([scores_DM[drawn_D].mean(axis=0) for drawn_D in drawn_RD])
    ends_2M = np.percentile(means_RM, [2.5, 97.5], axis=0)
    return {
        metric: {"value": float(scores_DM[:, k].mean()), "ci95": ends_2M[:, k].tolist(), "unit": "F1"}
        for k, metric in enumerate(ROUGE)
    }


@cache
def _scorer() -> Any:
    require_rouge_score()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


def _lines(text: str) -> str:
    return _SENTENCE_END.sub("\n", text.strip())


def _generate(model: PreTrainedModel, search: GenerationConfig, source_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return tokens by a search that has nothing of the model's own, which otherwise fills what is left open."""
    own, generate = model.generation_config, cast(Any, model.generate)
    model.generation_config = search
    try:
        ids_BT: Tensor = generate(input_ids=source_BS, attention_mask=mask_BS, generation_config=search)
    finally:
        model.generation_config = own
    return ids_BT


def _start_token(model: PreTrainedModel) -> int:
    start = getattr(model.config, "decoder_start_token_id", None)
    return int(model.config.pad_token_id if start is None else start)
