"""Losing the context costs what it costs: every token that may be edited is another document's, and nothing else is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from isotone.attacks import SourceProtocol, Vocabulary, Window
from isotone.attacks.exchange import exchange_contexts
from isotone.attacks.random_edits import editable_positions
from isotone.attacks.running import edited
from isotone.errors import Stopped
from isotone.interruption import StopFlag
from isotone.records import JsonLines

from .conftest import PROTOCOL, make_windows


def test_each_document_is_given_the_context_of_the_next(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    windows = make_windows(5)
    rows = exchange_contexts(model, vocabulary, windows, PROTOCOL, batch_documents=2)
    assert {(row["attack"], row["variant"], row["status"]) for row in rows} == {("exchanged", "exchanged", "ok")}
    for window, donor, row in zip(windows, [*windows[1:], windows[0]], rows, strict=True):
        text_L, at = edited(window, row["edits"]).numpy(), editable_positions(PROTOCOL, window)
        assert (text_L[at] == donor.tokens[at]).all()
        rest = np.delete(np.arange(len(text_L)), at)
        assert (text_L[rest] == window.tokens[rest]).all()
        losses = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(text_L)[None]).logits[0, :-1], torch.from_numpy(text_L)[1:], reduction="none"
        )
        assert row["attacked_nll"] == pytest.approx(losses[-row["scored_tokens"] :].tolist(), abs=1e-5)


def test_a_model_that_reads_nothing_loses_nothing(vocabulary: Vocabulary) -> None:
    model = tiny_model("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.zero_()
    assert all(row["delta_nats"] == 0 for row in exchange_contexts(model, vocabulary, make_windows(4), PROTOCOL))


def test_a_document_alone_has_nothing_to_exchange(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    [row] = exchange_contexts(model, vocabulary, make_windows(1), PROTOCOL)
    assert row["status"] == "missing"


def test_a_stop_changes_no_row(model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path) -> None:
    windows, log, stop = make_windows(5), JsonLines(tmp_path / "rows.jsonl"), StopFlag()
    log.append(*exchange_contexts(model, vocabulary, windows, PROTOCOL, batch_documents=2)[:3])
    stop.request("test")
    with pytest.raises(Stopped):
        exchange_contexts(model, vocabulary, windows, PROTOCOL, log=log, stop=stop, batch_documents=2)
    resumed = exchange_contexts(model, vocabulary, windows, PROTOCOL, log=log, batch_documents=2)
    assert resumed == exchange_contexts(model, vocabulary, windows, PROTOCOL, batch_documents=2)


def test_a_source_is_filled_with_another_ones_tokens_from_its_start_again(vocabulary: Vocabulary) -> None:
    pad, eos = 0, 1
    protocol = SourceProtocol(source=8, target=4, pad=pad, eos=eos, least=2)
    pairs = [[2, 3, 4, 5, 6, eos, pad, pad], [7, 8, eos, *[pad] * 5]]
    windows = [Window(f"pair-{i}", np.array([*source, 9, 10, eos, pad])) for i, source in enumerate(pairs)]
    long, short = exchange_contexts(tiny_model("t5"), vocabulary, windows, protocol)
    assert [(at, new) for at, _, new in long["edits"]] == [(0, 7), (1, 8), (2, 7), (3, 8), (4, 7)]
    assert [(at, new) for at, _, new in short["edits"]] == [(0, 2), (1, 3)]
