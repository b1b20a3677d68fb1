"""The one judge: what an attacked text does to a model, asked again, the same way for every attack and arm.

Shapes: B documents, L tokens; T = L − 1 tokens have a loss, token t at index t − 1.
"""

import math
from typing import Any

import torch
from torch import Tensor

from isotone.attacks.interface import Problem
from isotone.attacks.protocol import Window
from isotone.attacks.published import published_accounting
from isotone.scoring import TokenScores

Row = dict[str, Any]


def judge(problem: Problem, windows: list[Window], attacked_BL: Tensor, edits_scored: bool = False) -> list[Row]:
    """Score clean and attacked texts of a batch.

    Both go through the model in the same batches and positions, so that no edit gives a change of exactly 0.

    Args:
        problem: model, protocol and vocabulary.
        windows: the documents.
        attacked_BL: their attacked texts.
        edits_scored: scored tokens may have been edited; then only losses and the published accounting are given.

    Returns:
        A row for each document: ``status`` ok with all figures, or missing with the ``reason``.
    """
    clean_BL = torch.stack([torch.from_numpy(window.tokens) for window in windows])
    clean, attacked = problem.target.score_both(clean_BL, attacked_BL)
    rows = []
    for index, window in enumerate(windows):
        own = _of(problem, window, clean, index), _of(problem, window, attacked, index)
        rows.append(_row(problem, window.tokens.tolist(), attacked_BL[index].tolist(), *own, edits_scored))
    return rows


def judge_perturbed(problem: Problem, windows: list[Window], perturbation_BLD: Tensor) -> list[Row]:
    """Score clean texts without and with a perturbation of their input embeddings, as ``judge`` scores attacked texts.

    Returns:
        A row for each document, marked ``upper_bound``: no text belongs to it, so it has no edits and no accounting.
    """
    clean_BL = torch.stack([torch.from_numpy(window.tokens) for window in windows])
    clean, attacked = problem.target.score_perturbed(clean_BL, perturbation_BLD)
    rows: list[Row] = []
    for index, window in enumerate(windows):
        own = _of(problem, window, clean, index), _of(problem, window, attacked, index)
        if (reason := _not_finite(*own)) is not None:
            rows.append(missing(reason) | {"upper_bound": True})
            continue
        ids = window.tokens.tolist()
        row = {"status": "ok", "upper_bound": True, "clean_ids": ids, **problem.protocol.marks(ids)}
        rows.append(row | _losses(problem, *own) | _changes(problem, *own))
    return rows


def missing(reason: str) -> Row:
    """Return the figures of a document that has none."""
    return {"status": "missing", "reason": reason}


def _of(problem: Problem, window: Window, scores: TokenScores, index: int) -> TokenScores:
    """Return the scores of the tokens of one document that have a loss, fp64."""
    num_labels = problem.protocol.num_labels(window.tokens.tolist())
    return TokenScores(scores.nll_BT[index, :num_labels].double(), scores.correct_BT[index, :num_labels])


def _row(
    problem: Problem,
    clean_ids: list[int],
    attacked_ids: list[int],
    clean: TokenScores,
    attacked: TokenScores,
    edits_scored: bool,
) -> Row:
    if (reason := _not_finite(clean, attacked)) is not None:
        return missing(reason)
    clean_T, attacked_T = clean.nll_BT, attacked.nll_BT
    protocol = problem.protocol
    edits = [[i, old, new] for i, (old, new) in enumerate(zip(clean_ids, attacked_ids, strict=True)) if old != new]
    if not edits_scored and any(position not in protocol.attackable for position, _, _ in edits):
        raise ValueError(f"an edit lies outside of the attackable positions {protocol.attackable}: {edits}")
    first, end = protocol.first_label, protocol.first_label + len(clean_T)
    flipped_T = torch.tensor([a != b for a, b in zip(clean_ids[first:end], attacked_ids[first:end], strict=True)])
    row: Row = {
        "status": "ok",
        "clean_ids": clean_ids,
        **protocol.marks(clean_ids),
        "edits": edits,
        **_losses(problem, clean, attacked),
        "published_accounting": published_accounting(clean_T, attacked_T, flipped_T),
    }
    if edits_scored:
        return row
    begin = protocol.scored.start - first
    return row | _changes(problem, clean, attacked) | _through_text(problem, attacked_ids, clean_T[begin:])


def _not_finite(clean: TokenScores, attacked: TokenScores) -> str | None:
    for name, scores in (("clean", clean), ("attacked", attacked)):
        if not bool(scores.nll_BT.isfinite().all()):
            return f"the loss of the {name} text is not a finite number"
    return None


def _losses(problem: Problem, clean: TokenScores, attacked: TokenScores) -> Row:
    protocol = problem.protocol
    begin = protocol.scored.start - protocol.first_label
    return {
        "context_clean_nll": clean.nll_BT[:begin].tolist(),
        "context_attacked_nll": attacked.nll_BT[:begin].tolist(),
        "clean_nll": clean.nll_BT[begin:].tolist(),
        "attacked_nll": attacked.nll_BT[begin:].tolist(),
        "scored_tokens": len(clean.nll_BT) - begin,
    }


def _changes(problem: Problem, clean: TokenScores, attacked: TokenScores) -> Row:
    """Return what an attack changed on the scored tokens: nats, by offset, and top-1."""
    protocol, change_T = problem.protocol, attacked.nll_BT - clean.nll_BT
    begin = protocol.scored.start - protocol.first_label
    of_offset = {
        name: change_T[span.start - protocol.first_label : span.stop - protocol.first_label]
        for name, span in protocol.buckets().items()
    }
    return {
        "delta_nats": math.fsum(change_T[begin:].tolist()),
        "delta_by_offset": {
            name: {"nats": math.fsum(of_bucket_T.tolist()), "tokens": len(of_bucket_T)}
            for name, of_bucket_T in of_offset.items()
            if len(of_bucket_T)  # of a short target only the first ones are there
        },
        "top1": {"clean": int(clean.correct_BT[begin:].sum()), "attacked": int(attacked.correct_BT[begin:].sum())},
    }


def _through_text(problem: Problem, attacked_ids: list[int], clean_S: Tensor) -> Row:
    """Say whether the attacked text survives decoding and encoding, and score what it becomes if it does not."""
    text = problem.protocol.text(attacked_ids)
    again = problem.vocabulary.through_text(text)
    if again is None:
        return {"round_trip": None, "text_space": None}
    if again == text:
        return {"round_trip": True, "text_space": None}
    return {"round_trip": False, "text_space": _text_space(problem, attacked_ids, again, clean_S)}


def _text_space(problem: Problem, attacked_ids: list[int], again: list[int], clean_S: Tensor) -> Row:
    reread = problem.protocol.reread(attacked_ids, again)
    if isinstance(reread, str):
        return {"missing": reread}
    nats = float(problem.target.over(reread.scored, reread.pairs).nats(torch.tensor([reread.ids]))[0])
    if not math.isfinite(nats):
        return {"missing": "the loss is not a finite number"}
    return {"delta_nats": nats - math.fsum(clean_S.tolist())}
