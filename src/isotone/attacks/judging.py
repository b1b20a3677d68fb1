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
        row = _row(
            problem,
            window.tokens.tolist(),
            attacked_BL[index].tolist(),
            (clean.nll_BT[index].double(), attacked.nll_BT[index].double()),
            (clean.correct_BT[index], attacked.correct_BT[index]),
            edits_scored,
        )
        rows.append(row)
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
        nll = clean.nll_BT[index].double(), attacked.nll_BT[index].double()
        if (reason := _not_finite(*nll)) is not None:
            rows.append(missing(reason) | {"upper_bound": True})
            continue
        changes = _changes(problem, nll, (clean.correct_BT[index], attacked.correct_BT[index]))
        row = {"status": "ok", "upper_bound": True, "clean_ids": window.tokens.tolist()}
        rows.append(row | _losses(problem, *nll) | changes)
    return rows


def missing(reason: str) -> Row:
    """Return the figures of a document that has none."""
    return {"status": "missing", "reason": reason}


def _row(
    problem: Problem,
    clean_ids: list[int],
    attacked_ids: list[int],
    nll: tuple[Tensor, Tensor],
    correct: tuple[Tensor, Tensor],
    edits_scored: bool,
) -> Row:
    if (reason := _not_finite(*nll)) is not None:
        return missing(reason)
    clean_T, attacked_T = nll
    protocol = problem.protocol
    edits = [[i, old, new] for i, (old, new) in enumerate(zip(clean_ids, attacked_ids, strict=True)) if old != new]
    if not edits_scored and any(position not in protocol.attackable for position, _, _ in edits):
        raise ValueError(f"an edit lies outside of the attackable positions {protocol.attackable}: {edits}")
    flipped_T = torch.tensor([old != new for old, new in zip(clean_ids[1:], attacked_ids[1:], strict=True)])
    begin = protocol.scored.start - 1
    row: Row = {
        "status": "ok",
        "clean_ids": clean_ids,
        "edits": edits,
        **_losses(problem, clean_T, attacked_T),
        "published_accounting": published_accounting(clean_T, attacked_T, flipped_T),
    }
    if edits_scored:
        return row
    return row | _changes(problem, nll, correct) | _through_text(problem, attacked_ids, clean_T[begin:])


def _not_finite(clean_T: Tensor, attacked_T: Tensor) -> str | None:
    for name, values_T in (("clean", clean_T), ("attacked", attacked_T)):
        if not bool(values_T.isfinite().all()):
            return f"the loss of the {name} text is not a finite number"
    return None


def _losses(problem: Problem, clean_T: Tensor, attacked_T: Tensor) -> Row:
    begin = problem.protocol.scored.start - 1
    return {
        "context_clean_nll": clean_T[:begin].tolist(),
        "context_attacked_nll": attacked_T[:begin].tolist(),
        "clean_nll": clean_T[begin:].tolist(),
        "attacked_nll": attacked_T[begin:].tolist(),
        "scored_tokens": problem.protocol.continuation,
    }


def _changes(problem: Problem, nll: tuple[Tensor, Tensor], correct: tuple[Tensor, Tensor]) -> Row:
    """Return what an attack changed on the scored tokens: nats, by offset, and top-1."""
    begin, change_T = problem.protocol.scored.start - 1, nll[1] - nll[0]
    return {
        "delta_nats": math.fsum(change_T[begin:].tolist()),
        "delta_by_offset": {
            name: {
                "nats": math.fsum(change_T[span.start - 1 : span.stop - 1].tolist()),
                "tokens": span.stop - span.start,
            }
            for name, span in problem.protocol.buckets().items()
        },
        "top1": {"clean": int(correct[0][begin:].sum()), "attacked": int(correct[1][begin:].sum())},
    }


def _through_text(problem: Problem, attacked_ids: list[int], clean_S: Tensor) -> Row:
    """Say whether the attacked text survives decoding and encoding, and score what it becomes if it does not."""
    again = problem.vocabulary.through_text(attacked_ids)
    if again is None:
        return {"round_trip": None, "text_space": None}
    if again == attacked_ids:
        return {"round_trip": True, "text_space": None}
    return {"round_trip": False, "text_space": _text_space(problem, attacked_ids, again, clean_S)}


def _text_space(problem: Problem, attacked_ids: list[int], again: list[int], clean_S: Tensor) -> Row:
    num_scored = problem.protocol.continuation
    if again[-num_scored:] != attacked_ids[-num_scored:] or len(again) <= num_scored:
        return {"missing": "the scored tokens are tokenized differently"}
    target = problem.target.over(slice(len(again) - num_scored, len(again)))
    nats = float(target.nats(torch.tensor([again]))[0])
    if not math.isfinite(nats):
        return {"missing": "the loss is not a finite number"}
    return {"delta_nats": nats - math.fsum(clean_S.tolist())}
