"""What a trigger is worth on documents that it was not searched on, against other tokens in its place.

Shapes: B documents, R sequences put before a text, K tokens of each, T tokens of a text, S scored ones.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isotone.attacks.judging import Row, missing
from isotone.attacks.protocol import OFFSETS, AttackProtocol, Window
from isotone.attacks.published import published_accounting
from isotone.attacks.running import Progress, continue_rows
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.triggers import SourceTriggerLayout, TriggerLayout, UniversalTriggers, layout_for
from isotone.attacks.vocabulary import Vocabulary
from isotone.determinism import stream_key
from isotone.interruption import StopFlag
from isotone.records import JsonLines
from isotone.scoring import TokenScores

Layout = TriggerLayout | SourceTriggerLayout

NUM_CONTROLS = 8
"""Snippets of other documents, and random triggers, that a trigger is compared with."""


def evaluate_trigger(
    attack: UniversalTriggers,
    found: Mapping[str, Any],
    model: nn.Module,
    vocabulary: Vocabulary,
    windows: Sequence[Window],
    protocol: AttackProtocol | None = None,
    *,
    controls: bool = True,
    log: JsonLines | None = None,
    stop: StopFlag | None = None,
    batch_documents: int = 8,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Row]:
    """Put the best trigger before held-out documents.

    Beside it: the snippets of other documents, random triggers (the same for all documents and arms) and the start of
    the best restart.

    Args:
        attack: the search.
        found: what ``search_trigger`` returned.
        model: the model that was searched on, or another one; frozen meanwhile, then as it was.
        vocabulary: as in the search.
        windows: held-out documents.
        protocol: as in the search.
        controls: compare with snippets and random triggers too.
        log: rows already there are kept, new ones are appended after each batch.
        stop: read between batches.
        batch_documents: documents evaluated together.
        batch_size: sequences in one forward pass; halved when memory runs out.
        progress: called with the documents done and all documents.

    Returns:
        A row for each document, in order.

    Raises:
        Stopped: a stop was requested; finished batches are in the log.
        IsotoneError: the log holds rows of other documents.
    """
    rows = continue_rows(log, attack.name, attack.variant, windows)
    layout = layout_for(model, vocabulary, attack.length, windows, protocol)
    best = None if found["best"] is None else found["finished"][found["best"]]
    random_RK = _random_triggers(attack, vocabulary)[: NUM_CONTROLS if controls else 0]
    with frozen(model):
        target = Target(model, layout.scored(attack.length), batch_size, layout.pairs)
        for first in range(len(rows) // batch_documents * batch_documents, len(windows), batch_documents):
            if stop is not None:
                stop.check(f"trigger evaluation after {len(rows)} of {len(windows)} documents")
            batch = list(windows[first : first + batch_documents])
            snippets = [_snippets(attack, layout, window, windows if controls else ()) for window in batch]
            fresh = [
                {"index": first + index, "id": window.id, "attack": attack.name, "variant": attack.variant}
                | (missing("no restart found a trigger with a finite loss") if best is None else figures)
                | {"spent_tokens": found["spent_tokens"]}  # one search serves all documents
                for index, (window, figures) in enumerate(
                    zip(batch, _judge(target, layout, best, batch, snippets, random_RK), strict=True)
                )
            ][len(rows) - first :]
            if log is not None:
                log.append(*fresh)
            rows += fresh
            if progress is not None:
                progress(len(rows), len(windows))
    return rows


def _judge(
    target: Target,
    layout: Layout,
    best: Mapping[str, Any] | None,
    batch: list[Window],
    snippets: list[Tensor],
    random_RK: Tensor,
) -> list[Row]:
    if best is None:
        return [{}] * len(batch)
    texts_BT = layout.texts(batch)
    none_1K = torch.empty(1, 0, dtype=torch.int64)
    with_trigger_BL = layout.join(torch.tensor([best["trigger_ids"]]), texts_BT)
    target = target.around(with_trigger_BL)
    clean = target.scores(layout.join(none_1K, texts_BT))
    attacked = target.scores(with_trigger_BL)
    initial_B = target.nats(layout.join(torch.tensor([best["initial_ids"]]), texts_BT))
    random_BR = target.nats(layout.join(random_RK, texts_BT)).view(len(random_RK), len(batch)).T
    rows = []
    for index, text_T in enumerate(texts_BT):
        shift_R = target.nats(layout.join(snippets[index], text_T[None])) if len(snippets[index]) else torch.empty(0)
        controls = {"shift_deltas": shift_R, "random_deltas": random_BR[index], "initial_delta": initial_B[index]}
        of_clean = _of(clean, index, layout.num_labels(text_T, 0))
        of_attacked = _of(attacked, index, layout.num_labels(text_T, layout.trigger_tokens))
        rows.append(_row(layout.num_scored(text_T), of_clean, of_attacked, controls))
    return rows


def _row(num_scored: int, clean: TokenScores, attacked: TokenScores, controls: Mapping[str, Tensor]) -> Row:
    clean_T, attacked_T = clean.nll_BT.double(), attacked.nll_BT.double()
    if not all(bool(values.isfinite().all()) for values in (clean_T, attacked_T, *controls.values())):
        return missing("a loss with the trigger, without it or with a control in its place is not a finite number")
    clean_S, attacked_S = clean_T[-num_scored:], attacked_T[-num_scored:]
    clean_nats, change_S = math.fsum(clean_S.tolist()), attacked_S - clean_S
    return {
        "status": "ok",
        "clean_nll": clean_S.tolist(),
        "attacked_nll": attacked_S.tolist(),
        "scored_tokens": num_scored,
        "delta_nats": math.fsum(change_S.tolist()),
        "delta_by_offset": {
            name: {"nats": math.fsum(change_S[begin:end].tolist()), "tokens": len(change_S[begin:end])}
            for name, (begin, end) in OFFSETS.items()
            if begin < num_scored
        },
        "top1": {
            "clean": int(clean.correct_BT[-num_scored:].sum()),
            "attacked": int(attacked.correct_BT[-num_scored:].sum()),
        },
        **{name: ((nats - clean_nats) / num_scored).tolist() for name, nats in controls.items()},
        "published_accounting": published_accounting(clean_T, attacked_T),
    }


def _of(scores: TokenScores, index: int, num_labels: int) -> TokenScores:
    return TokenScores(scores.nll_BT[index, :num_labels], scores.correct_BT[index, :num_labels])


def _random_triggers(attack: UniversalTriggers, vocabulary: Vocabulary) -> Tensor:
    ids = vocabulary.ids_N.numpy()
    streams = [np.random.default_rng(stream_key(attack.seed, "random trigger", draw)) for draw in range(NUM_CONTROLS)]
    return torch.from_numpy(np.stack([stream.choice(ids, attack.length) for stream in streams]))


def _snippets(attack: UniversalTriggers, layout: Layout, window: Window, windows: Sequence[Window]) -> Tensor:
    """Return token runs of other documents, as long as the trigger [R, K]; none if no other document is so long."""
    texts = [layout.snippets(other) for other in windows if other.id != window.id]
    others = [tokens for tokens in texts if len(tokens) >= attack.length]
    found = []
    for draw in range(NUM_CONTROLS if others else 0):
        stream = np.random.default_rng(stream_key(attack.seed, f"snippet for {window.id}", draw))
        tokens = others[int(stream.integers(len(others)))]
        start = int(stream.integers(len(tokens) - attack.length + 1))
        found.append(torch.from_numpy(tokens[start : start + attack.length]))
    return torch.stack(found) if found else torch.empty(0, attack.length, dtype=torch.int64)
