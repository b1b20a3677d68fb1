"""A trigger is searched resumably within its budget, and judged on other documents, against controls."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY
from transformers import PreTrainedModel

from isotone.attacks import UniversalTriggers, Vocabulary, Window, evaluate_trigger, search_trigger, summarize_triggers
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.triggers import SKIPPED, TriggerLayout
from isotone.errors import IsotoneError, Stopped, UsageError
from isotone.records import JsonLines

from .conftest import Bigram, make_windows, reactive_model
from .test_running import StopAfter

LENGTH = 30
ATTACK = UniversalTriggers(length=3, candidates=12, iterations=5, restarts=2, batch_documents=3, seed=1)
SURROGATE = replace(ATTACK, proposals="surrogate")

either = pytest.mark.parametrize("attack", [ATTACK, SURROGATE], ids=["gradient", "surrogate"])


@pytest.fixture
def search() -> list[Window]:
    return make_windows(7, LENGTH, seed=1)


@pytest.fixture
def held_out() -> list[Window]:
    return [Window(f"held-out-{i}", window.tokens) for i, window in enumerate(make_windows(5, LENGTH, seed=2))]


@either
def test_the_search_finds_a_trigger_that_is_better_than_its_start(
    attack: UniversalTriggers, model: PreTrainedModel, vocabulary: Vocabulary, search: list[Window]
) -> None:
    found = search_trigger(attack, model, vocabulary, search)
    for restart in found["finished"]:
        assert restart["search_nll"] > restart["initial_search_nll"]
        assert len(restart["trigger_ids"]) == 3
    losses = [restart["search_nll"] for restart in found["finished"]]
    assert losses[found["best"]] == max(losses)
    assert found["finished"][0]["initial_ids"] != found["finished"][1]["initial_ids"]


@either
def test_resumed_search_equals_uninterrupted_search(
    attack: UniversalTriggers, model: PreTrainedModel, vocabulary: Vocabulary, search: list[Window], tmp_path: Path
) -> None:
    whole = search_trigger(attack, model, vocabulary, search, state_path=tmp_path / "whole.json")
    stops = 0
    while True:  # one step in each process
        try:
            found = search_trigger(
                attack, model, vocabulary, search, state_path=tmp_path / "state.json", stop=StopAfter(1)
            )
            break
        except Stopped:
            stops += 1
    assert stops == 2 * (5 + 2) - 1
    assert found == whole
    assert (tmp_path / "state.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert search_trigger(attack, model, vocabulary, search, state_path=tmp_path / "state.json") == whole


def test_the_state_of_another_search_is_refused(
    model: PreTrainedModel, vocabulary: Vocabulary, search: list[Window], tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(Stopped):
        search_trigger(ATTACK, model, vocabulary, search, state_path=path, stop=StopAfter(1))
    with pytest.raises(IsotoneError, match="belongs to another trigger search"):
        search_trigger(UniversalTriggers(length=4), model, vocabulary, search, state_path=path)
    with pytest.raises(IsotoneError, match="belongs to another trigger search"):
        search_trigger(ATTACK, model, vocabulary, search[1:], state_path=path)


@pytest.mark.parametrize(("attack", "standing"), [(ATTACK, 3), (SURROGATE, 1)], ids=["gradient", "surrogate"])
def test_spent_tokens_are_those_of_the_formula_and_stay_within_the_budget(
    attack: UniversalTriggers, standing: int, model: PreTrainedModel, vocabulary: Vocabulary, search: list[Window]
) -> None:
    length = 3 + LENGTH
    iteration, ends = (standing + 12) * 3 * length, 2 * 7 * length
    assert search_trigger(attack, model, vocabulary, search)["spent_tokens"] == 2 * (ends + 5 * iteration)
    bounded = replace(attack, budget_tokens=2 * (ends + 3 * iteration) - 1)
    found = search_trigger(bounded, model, vocabulary, search)
    assert [restart["iterations"] for restart in found["finished"]] == [2, 2]
    assert found["spent_tokens"] == 2 * (ends + 2 * iteration)
    with pytest.raises(UsageError, match=f"at least {2 * (ends + iteration)} are needed"):
        search_trigger(replace(attack, budget_tokens=1), model, vocabulary, search)


@either
def test_triggers_are_admissible(attack: UniversalTriggers, model: PreTrainedModel, search: list[Window]) -> None:
    allowed_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed_V[20:30] = True
    found = search_trigger(attack, model, Vocabulary(allowed_V), search)
    for restart in found["finished"]:
        assert all(20 <= token < 30 for token in restart["trigger_ids"] + restart["initial_ids"])


def test_held_out_rows_are_what_the_scorer_says(
    model: PreTrainedModel, vocabulary: Vocabulary, search: list[Window], held_out: list[Window]
) -> None:
    found = search_trigger(ATTACK, model, vocabulary, search)
    rows = evaluate_trigger(ATTACK, found, model, vocabulary, held_out, batch_documents=2)
    trigger = found["finished"][found["best"]]["trigger_ids"]
    with frozen(model):
        for row, window in zip(rows, held_out, strict=True):
            text = window.tokens.tolist()
            clean = Target(model, slice(SKIPPED, LENGTH)).nats(torch.tensor([text]))[0]
            attacked = Target(model, slice(3 + SKIPPED, 3 + LENGTH)).nats(torch.tensor([trigger + text]))[0]
            assert row["delta_nats"] == pytest.approx(float(attacked - clean), abs=1e-4)
            assert sum(row["clean_nll"]) == pytest.approx(float(clean), abs=1e-4)
            assert row["scored_tokens"] == len(row["attacked_nll"]) == LENGTH - SKIPPED
            everything = Target(model, slice(1, 3 + LENGTH)).nats(torch.tensor([trigger + text]))[0]
            assert row["published_accounting"]["attacked"] == pytest.approx(float(everything) / (2 + LENGTH), rel=1e-5)
            assert len(row["shift_deltas"]) == len(row["random_deltas"]) == 8
            offsets = row["delta_by_offset"].values()
            assert sum(part["nats"] for part in offsets) == pytest.approx(row["delta_nats"])


def test_evaluation_resumes_by_batch_to_the_same_bytes(
    model: PreTrainedModel, vocabulary: Vocabulary, search: list[Window], held_out: list[Window], tmp_path: Path
) -> None:
    found = search_trigger(ATTACK, model, vocabulary, search)
    whole, log = JsonLines(tmp_path / "whole.jsonl"), JsonLines(tmp_path / "log.jsonl")
    rows = evaluate_trigger(ATTACK, found, model, vocabulary, held_out, log=whole, batch_documents=2)
    with pytest.raises(Stopped):
        evaluate_trigger(ATTACK, found, model, vocabulary, held_out, log=log, batch_documents=2, stop=StopAfter(1))
    assert len(log.read()) == 2
    assert evaluate_trigger(ATTACK, found, model, vocabulary, held_out, log=log, batch_documents=2) == rows
    assert log.path.read_bytes() == whole.path.read_bytes()


def test_snippets_come_from_other_documents_only(
    model: PreTrainedModel, vocabulary: Vocabulary, search: list[Window], held_out: list[Window]
) -> None:
    other = Window("one token only", np.full(LENGTH, 7))
    found = search_trigger(ATTACK, model, vocabulary, search)
    row = evaluate_trigger(ATTACK, found, model, vocabulary, [held_out[0], other])[0]
    with frozen(model):
        shifted = torch.tensor([[7] * 3 + held_out[0].tokens.tolist()])
        nats = float(Target(model, slice(3 + SKIPPED, 3 + LENGTH)).nats(shifted)[0])
    assert row["shift_deltas"] == pytest.approx([(nats - sum(row["clean_nll"])) / (LENGTH - SKIPPED)] * 8, abs=1e-5)
    alone = evaluate_trigger(ATTACK, found, model, vocabulary, held_out[:1])[0]
    assert alone["shift_deltas"] == []
    assert alone["random_deltas"] == row["random_deltas"]


def test_what_stands_before_a_text_changes_nothing_for_a_model_without_memory(
    vocabulary: Vocabulary, held_out: list[Window]
) -> None:
    table_VV = torch.full((VOCABULARY, VOCABULARY), 1 / VOCABULARY)
    model = Bigram(table_VV)
    found = search_trigger(ATTACK, model, vocabulary, held_out)
    for row in evaluate_trigger(ATTACK, found, model, vocabulary, held_out):
        assert row["shift_deltas"] == row["random_deltas"] == [0] * 8
        assert row["delta_nats"] == row["initial_delta"] == 0


class BeginsTexts:
    bos_token_id = 9

    def decode(self, ids: list[int], **unused: object) -> str:
        return " ".join(map(str, ids))


def test_bos_stands_before_trigger_and_text() -> None:
    texts_BT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    layout = TriggerLayout(bos=9, trigger_tokens=2, text_tokens=3)
    assert layout.join(torch.tensor([[10, 11]]), texts_BT).tolist() == [[9, 10, 11, 1, 2, 3], [9, 10, 11, 5, 6, 7]]
    assert layout.join(torch.empty(1, 0, dtype=torch.int64), texts_BT).tolist() == [[9, 1, 2, 3], [9, 5, 6, 7]]
    layout = TriggerLayout(bos=9, trigger_tokens=2, text_tokens=LENGTH)
    assert layout.scored(2) == slice(1 + 2 + SKIPPED, 1 + 2 + LENGTH)


def test_texts_are_cut_so_that_a_trigger_fits_the_context(model: PreTrainedModel) -> None:
    vocabulary = Vocabulary(torch.ones(VOCABULARY, dtype=torch.bool), BeginsTexts())
    layout = TriggerLayout.for_model(model, vocabulary, 3, make_windows(2, 200))
    assert layout.text_tokens == model.config.max_position_embeddings - 3 - 1
    with pytest.raises(UsageError, match="have none to score"):
        TriggerLayout.for_model(model, vocabulary, 3, make_windows(2, SKIPPED))


def test_a_search_without_finite_losses_leaves_documents_missing(
    vocabulary: Vocabulary, search: list[Window], held_out: list[Window]
) -> None:
    model = reactive_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = torch.nan
    found = search_trigger(ATTACK, model, vocabulary, search)
    assert found["best"] is None
    rows = evaluate_trigger(ATTACK, found, model, vocabulary, held_out)
    assert {row["status"] for row in rows} == {"missing"}
    entry = summarize_triggers(rows, found, vocabulary)
    assert entry["n"] == 0
    assert entry["delta_nll"] is entry["delta_shift"] is entry["trigger_ids"] is None
    json.dumps(entry, allow_nan=False)


def test_the_entry_compares_with_the_controls(
    model: PreTrainedModel, search: list[Window], held_out: list[Window]
) -> None:
    vocabulary = Vocabulary(torch.ones(VOCABULARY, dtype=torch.bool), BeginsTexts())
    found = search_trigger(ATTACK, model, vocabulary, search)
    rows = evaluate_trigger(ATTACK, found, model, vocabulary, held_out)
    entry = summarize_triggers(rows, found, vocabulary, threshold=0.0)
    assert entry["delta_random"] == pytest.approx(np.mean([np.mean(row["random_deltas"]) for row in rows]))
    assert entry["delta_minus_shift"] == pytest.approx(entry["delta_nll"] - entry["delta_shift"])
    assert entry["spent_tokens"] == found["spent_tokens"]
    assert entry["trigger_text"] == " ".join(map(str, entry["trigger_ids"]))
    assert [restart["restart"] for restart in entry["restarts"]] == [0, 1]
    assert entry["edits_per_document"] is None
    json.dumps(entry, allow_nan=False)
