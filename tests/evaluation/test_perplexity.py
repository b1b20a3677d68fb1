"""Every token of the test text is scored exactly once, and an interrupted evaluation gives the same rows."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from isotone import records
from isotone.errors import Stopped, UsageError
from isotone.evaluation import evaluate_perplexity, summarize, windows
from isotone.interruption import StopFlag


@dataclass
class Text:
    id: str
    tokens: np.ndarray
    num_bytes: int


def texts(*lengths: int) -> list[Text]:
    generator = np.random.default_rng(0)
    return [Text(f"d{i}", generator.integers(1, 60, n).astype(np.int64), 4 * n) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    return GPTNeoXForCausalLM(config).eval()


def rows_of(model: Any, documents: list[Text], path: Path, **given: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"context": 16, "leading_token": 0, "batch_size": 3, "identity": {"weights": "w"}} | given
    return evaluate_perplexity(model, documents, work=records.JsonLines(path / "work.jsonl"), **options)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 70), st.integers(2, 20), st.data())
def test_every_token_is_scored_once_with_context_before_it(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored: list[int] = []
    for window in windows.windows_of(0, length, context, stride):
        assert window.start < window.first < window.end <= window.start + context
        scored += range(window.first, window.end)
    assert scored == list(range(1, length))


def test_a_short_document_scores_as_the_model_says(model: GPTNeoXForCausalLM, tmp_path: Path) -> None:
    [row] = rows_of(model, texts(9), tmp_path)
    ids = torch.tensor([[0, *texts(9)[0].tokens.tolist()]])
    with torch.no_grad():
        mean = model(input_ids=ids, labels=ids).loss
    assert row == {"id": "d0", "nats": pytest.approx(9 * float(mean), rel=1e-5), "num_tokens": 9, "num_bytes": 36}


def test_windows_score_what_their_own_context_says(model: GPTNeoXForCausalLM, tmp_path: Path) -> None:
    [document] = texts(20)
    ids = [0, *document.tokens.tolist()]
    expected = 0.0
    for start, first, end in [(0, 1, 10), (4, 10, 14), (8, 14, 18), (12, 18, 21)]:
        log_p = model(input_ids=torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
        expected -= sum(float(log_p[t - start - 1, ids[t]].detach()) for t in range(first, end))
    [row] = rows_of(model, [document], tmp_path, context=10, stride=4)
    assert row["nats"] == pytest.approx(expected, rel=1e-5)


def test_without_a_leading_token_the_first_goes_unscored(model: GPTNeoXForCausalLM, tmp_path: Path) -> None:
    rows = rows_of(model, texts(9, 1, 0), tmp_path, leading_token=None)
    assert [row["num_tokens"] for row in rows] == [8, 0, 0]
    assert [entry["reason"] for entry in summarize(rows)["missing"]] == ["it has no token that can be scored"] * 2


def test_batches_and_padding_do_not_change_a_document(model: GPTNeoXForCausalLM, tmp_path: Path) -> None:
    documents = texts(5, 40, 17, 16, 3, 90)
    alone = [rows_of(model, [d], tmp_path / d.id)[0]["nats"] for d in documents]
    together = [row["nats"] for row in rows_of(model, documents, tmp_path)]
    assert together == pytest.approx(alone, rel=1e-6)


def test_large_vocabularies_make_batches_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "LOGIT_ELEMENTS", 100)
    assert [len(b) for b in windows.fixed_batches([6] * 5, 8, 4, 8, vocab_size=10)] == [2, 2, 1]
    assert [len(b) for b in windows.fixed_batches([6] * 3, 8, 4, 8, vocab_size=1000)] == [1, 1, 1]


def test_a_stopped_evaluation_continues_to_the_same_rows(model: GPTNeoXForCausalLM, tmp_path: Path) -> None:
    documents = texts(*random.Random(0).choices(range(2, 60), k=12))
    whole = rows_of(model, documents, tmp_path / "whole")
    rounds = 0
    while True:
        rounds += 1
        stop = StopFlag()
        try:
            parts = rows_of(
                model,
                documents,
                tmp_path / "parts",
                stop=stop,
                report=lambda done, _, stop=stop, at=2 * rounds: stop.request("USR1") if done >= at else None,
            )
        except Stopped:
            with open(tmp_path / "parts" / "work.jsonl", "a") as file:
                file.write('{"batch": 99, "na')  # torn by a kill
            continue
        break
    assert rounds > 3
    assert parts == whole


def test_another_models_batches_are_set_aside(model: GPTNeoXForCausalLM, tmp_path: Path) -> None:
    documents = texts(9, 30)
    mine = rows_of(model, documents, tmp_path)
    rows_of(model, documents, tmp_path, identity={"weights": "other"})
    assert (tmp_path / "work.jsonl.set-aside-1").exists()
    assert rows_of(model, documents, tmp_path) == mine


def test_a_model_that_returns_nan_is_missing_and_not_a_figure(tmp_path: Path) -> None:
    class Broken(nn.Module):
        config = SimpleNamespace(vocab_size=64)
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            logits = torch.zeros(*input_ids.shape, 64)
            logits[input_ids == 7] = torch.nan
            return SimpleNamespace(logits=logits[:, logits_to_keep])

    documents = texts(30, 5)  # of the first, only one of several windows is broken
    for document in documents:
        document.tokens[document.tokens == 7] = 8
    documents[0].tokens[2] = 7
    summary = summarize(rows_of(Broken(), documents, tmp_path))
    assert summary["missing"] == [{"id": "d0", "reason": "the model returned a loss that is not finite"}]
    assert (summary["num_documents"], summary["num_tokens"]) == (1, 5)
    assert summary["perplexity"]["value"] == pytest.approx(64)


def test_a_measure_is_a_ratio_of_sums_with_its_interval() -> None:
    rows = [
        {"id": "a", "nats": 20.0, "num_tokens": 10, "num_bytes": 50},
        {"id": "b", "nats": 90.0, "num_tokens": 30, "num_bytes": 100},
        {"id": "c", "nats": 50.0, "num_tokens": 20, "num_bytes": 80},
    ]
    summary = summarize(rows)
    assert summary["nll"]["value"] == pytest.approx(160 / 60)
    assert summary["perplexity"]["value"] == pytest.approx(math.exp(160 / 60))
    assert summary["bits_per_byte"]["value"] == pytest.approx(160 / 230 / math.log(2))
    low, high = summary["nll"]["ci95"]
    assert low < 160 / 60 < high
    assert summary["perplexity"]["ci95"] == pytest.approx([math.exp(low), math.exp(high)])


def test_nothing_scored_gives_no_figure() -> None:
    summary = summarize([{"id": "a", "nats": None, "num_tokens": 3, "num_bytes": 9}])
    assert summary["nll"] is None
    assert summary["perplexity"] is None
    assert len(summary["missing"]) == 1


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 9), (1, 1)])
def test_a_stride_that_leaves_tokens_without_context_is_refused(context: int, stride: int) -> None:
    with pytest.raises(UsageError, match=r"evaluation\.stride"):
        windows.fixed_batches([20], context, stride, 4, 64)
