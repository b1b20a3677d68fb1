"""Attacks documents in fixed batches, resumes where a log ends, and replays edits on another model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from isotone.attacks.interface import DocumentAttack, Problem, State
from isotone.attacks.judging import Row, judge, judge_perturbed, missing
from isotone.attacks.pgd import spread
from isotone.attacks.protocol import AttackProtocol, PrefixProtocol, Window
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.vocabulary import Vocabulary
from isotone.errors import IsotoneError
from isotone.interruption import StopFlag
from isotone.records import JsonLines

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


def run_documents(
    attack: DocumentAttack,
    model: nn.Module,
    vocabulary: Vocabulary,
    windows: Sequence[Window],
    protocol: AttackProtocol | None = None,
    *,
    log: JsonLines | None = None,
    stop: StopFlag | None = None,
    batch_documents: int = 8,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Row]:
    """Attack documents and judge the results.

    Batches are fixed by the documents' order, so that neither a resume nor a halved batch changes an edit.

    Args:
        attack: what proposes the edits.
        model: causal or encoder-decoder language model, in fp32; frozen meanwhile, then as it was.
        vocabulary: tokens that may be written.
        windows: from ``protocol.cut``.
        protocol: which tokens are attacked and scored.
        log: rows already there are kept, new ones are appended after each batch.
        stop: read between rounds.
        batch_documents: documents attacked together; part of the result, as it fixes the rounding.
        batch_size: sequences in one forward pass; halved when memory runs out.
        progress: called with the documents done and all documents.

    Returns:
        A row for each document, in order.

    Raises:
        Stopped: a stop was requested; finished batches are in the log.
        IsotoneError: the log holds rows of other documents.
    """
    protocol = protocol or PrefixProtocol()
    rows = continue_rows(log, attack.name, attack.variant, windows)
    with frozen(model):
        problem = Problem(Target(model, protocol.scored, batch_size, protocol.pairs), protocol, vocabulary)
        # a log may end inside a batch (its last line was torn): the batch is attacked again, whole
        for first in range(len(rows) // batch_documents * batch_documents, len(windows), batch_documents):
            batch = list(windows[first : first + batch_documents])
            problem = problem.around(batch)
            state = attack.start(problem, batch)
            while not attack.is_done(state):
                if stop is not None:
                    stop.check(f"attack {attack.name} ({attack.variant}) after {len(rows)} of {len(windows)} documents")
                state = attack.step(problem, state)
            fresh = _finish(attack, problem, batch, state, first)[len(rows) - first :]
            if log is not None:
                log.append(*fresh)
            rows += fresh
            if progress is not None:
                progress(len(rows), len(windows))
    return rows


def replay(
    model: nn.Module,
    vocabulary: Vocabulary,
    windows: Sequence[Window],
    edits: Mapping[str, Iterable[Sequence[int]]],
    protocol: AttackProtocol | None = None,
    *,
    name: str = "replay",
    log: JsonLines | None = None,
    stop: StopFlag | None = None,
    batch_documents: int = 8,
    batch_size: int = 16,
) -> list[Row]:
    """Apply edits found on one model to the same documents and judge them on another.

    Args:
        model: the model that is asked.
        vocabulary: for text-space figures.
        windows: the documents.
        edits: for each document's id, (position, old, new) as in a row; a document without an entry is missing.
        protocol: as for ``run_documents``, as are the other arguments.
        name: what the rows call themselves, as attack and variant.

    Raises:
        Stopped: a stop was requested; finished batches are in the log.
        IsotoneError: an edit's old token is not the document's: these are not the documents that were attacked.
    """
    protocol = protocol or PrefixProtocol()
    rows = continue_rows(log, name, name, windows)
    with frozen(model):
        problem = Problem(Target(model, protocol.scored, batch_size, protocol.pairs), protocol, vocabulary)
        for first in range(len(rows) // batch_documents * batch_documents, len(windows), batch_documents):
            if stop is not None:
                stop.check(f"{name} after {len(rows)} of {len(windows)} documents")
            batch = list(windows[first : first + batch_documents])
            problem = problem.around(batch)
            fresh: list[Row] = []
            attacked_BL = torch.stack([edited(window, edits.get(window.id, ())) for window in batch])
            for index, row in enumerate(judge(problem, batch, attacked_BL), first):
                figures = row if windows[index].id in edits else missing("there are no edits to replay")
                head = {"index": index, "id": windows[index].id, "attack": name, "variant": name}
                fresh.append(head | figures)
            fresh = fresh[len(rows) - first :]
            if log is not None:
                log.append(*fresh)
            rows += fresh
    return rows


def _finish(attack: DocumentAttack, problem: Problem, batch: list[Window], state: State, first: int) -> list[Row]:
    rows = []
    for index, figures in enumerate(judged(attack, problem, batch, state)):
        if figures["status"] == "ok" and not bool(state["finite_B"][index]):
            marks = {"upper_bound": True} if attack.upper_bound else {}
            figures = missing("a loss during the attack was not a finite number") | marks
        head = {"index": first + index, "id": batch[index].id, "attack": attack.name, "variant": attack.variant}
        row = head | figures | {"spent_tokens": int(state["spent_B"][index])}
        if figures["status"] == "ok":
            row |= _details(state, index)
        rows.append(row)
    return rows


def judged(attack: DocumentAttack, problem: Problem, batch: list[Window], state: State) -> list[Row]:
    """Return the figures of what an attack hands over, as the one judge sees it."""
    if attack.upper_bound:
        return judge_perturbed(problem, batch, spread(state, "best_perturbation_BKD"))
    return judge(problem, batch, state["best_BL"], attack.edits_scored)


def _details(state: State, index: int) -> dict[str, Any]:
    details: dict[str, Any] = {}
    if bool(state["best_B"][index].isfinite()):
        history = state["history_RB2"][:, index].tolist()
        details["progress"] = [[int(spent), best] for spent, best in history]
    if "draw_deltas_BD" in state:
        details["draw_deltas"] = state["draw_deltas_BD"][index].tolist()
    return details


def continue_rows(log: JsonLines | None, name: str, variant: str, windows: Sequence[Window]) -> list[Row]:
    """Return the rows that a log holds already.

    Raises:
        IsotoneError: they are of other documents or of another attack.
    """
    rows = log.read() if log is not None else []
    expected = [(window.id, name, variant) for window in windows]
    found = [(row.get("id"), row.get("attack"), row.get("variant")) for row in rows]
    if log is not None and found != expected[: len(found)]:
        raise IsotoneError(f"{log.path} holds rows of other documents or of another attack; move it away and run again")
    return rows


def edits_of(rows: Iterable[Row]) -> dict[str, list[list[int]]]:
    """Return by document the edits of an attack, of those that have figures."""
    return {row["id"]: row["edits"] for row in rows if row["status"] == "ok"}


def edited(window: Window, edits: Iterable[Sequence[int]]) -> torch.Tensor:
    """Return a document's tokens [L] with edits (position, old, new) applied.

    Raises:
        IsotoneError: an edit's old token is not the document's.
    """
    tokens_L = torch.from_numpy(window.tokens).clone()
    for position, old, new in edits:
        if int(tokens_L[position]) != old:
            raise IsotoneError(f"document {window.id} has token {int(tokens_L[position])} at {position}, not {old}")
        tokens_L[position] = new
    return tokens_L
