"""What every attack on documents promises, whichever it is: one table over all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY
from transformers import PreTrainedModel

from isotone.attacks import (
    GCG,
    BeamHotFlip,
    CoordinateSearch,
    DocumentAttack,
    EmbeddingPGD,
    FrequencyEdits,
    HotFlip,
    PublishedHotFlip,
    RandomEdits,
    ShuffledHotFlip,
    Vocabulary,
    run_documents,
)
from isotone.attacks.interface import Problem, State
from isotone.attacks.judging import Row
from isotone.attacks.running import judged
from isotone.attacks.scoring import Target, frozen
from isotone.errors import UsageError
from isotone.records import JsonLines, tensors_from_file, tensors_to_bytes

from .conftest import PROTOCOL, make_windows, reactive_model

FLIPS, LENGTH = 3, PROTOCOL.length
BUDGET = 60 * LENGTH
COUNTS_V = np.random.default_rng(0).integers(1, 9, VOCABULARY).astype(float)

ATTACKS: dict[str, tuple[DocumentAttack, int]] = {
    "once": (HotFlip(flips=FLIPS, method="once"), 3),
    "iterative": (HotFlip(flips=FLIPS, candidates=6), 3 * (3 + 6)),
    "beam": (BeamHotFlip(flips=FLIPS, width=2, candidates=6), 3 * (1 + 2 + 2) + 3 * 6),
    "shuffled": (ShuffledHotFlip(flips=FLIPS, candidates=6), 3 * (3 + 6)),
    "gcg": (GCG(flips=FLIPS, top_k=8, candidates=6, steps=5), 5 * (3 + 6)),
    "coordinate": (CoordinateSearch(flips=FLIPS, candidates=6, rounds=5), 1 + 5 * 6),
    "surrogate": (CoordinateSearch(flips=FLIPS, candidates=6, rounds=5, proposals="surrogate"), 1 + 5 * 6),
    "random": (RandomEdits(flips=FLIPS, draws=4), 4),
    "frequency": (FrequencyEdits(flips=FLIPS, draws=4, counts_V=COUNTS_V), 4),
    "pgd": (EmbeddingPGD(flips=FLIPS, steps=5), 5 * 3),
    "published": (PublishedHotFlip(flips=FLIPS), 3),
}
"""Each attack, and how often the length of a text it spends on a document."""

SEARCHES = ("iterative", "beam", "shuffled", "gcg", "coordinate", "surrogate", "pgd")
"""Those that hand over the best they saw, the clean text included."""

BUDGETED = ("iterative", "beam", "shuffled", "gcg", "coordinate", "surrogate", "pgd")
ON_TEXT = [name for name in ATTACKS if name not in ("pgd", "published")]

every_attack = pytest.mark.parametrize("name", ATTACKS)


def rows_of(attack: DocumentAttack, model: PreTrainedModel, count: int = 5, **more: Any) -> list[Row]:
    vocabulary = more.pop("vocabulary", Vocabulary.all_ids(VOCABULARY))
    return run_documents(attack, model, vocabulary, make_windows(count), PROTOCOL, **more)


def found(rows: list[Row]) -> list[Any]:
    """Return what was found: edits, or what the perturbation did where there are none."""
    return [row["edits"] if "edits" in row else pytest.approx(row["delta_nats"], abs=1e-3) for row in rows]


@pytest.mark.parametrize("name", ON_TEXT)
def test_only_admissible_tokens_at_attackable_positions_within_the_distance(name: str, model: PreTrainedModel) -> None:
    allowed_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed_V[10:40] = True
    windows = make_windows(5)
    rows = rows_of(ATTACKS[name][0], model, vocabulary=Vocabulary(allowed_V))
    assert any(row["edits"] for row in rows)
    for row, window in zip(rows, windows, strict=True):
        assert len({position for position, _, _ in row["edits"]}) == len(row["edits"]) <= FLIPS
        for position, old, new in row["edits"]:
            assert position in PROTOCOL.attackable
            assert old == window.tokens[position] != new
            assert 10 <= new < 40


@every_attack
def test_spent_tokens_are_those_of_the_account(name: str, model: PreTrainedModel) -> None:
    attack, lengths = ATTACKS[name]
    rows = rows_of(attack, model)
    spent = [row["spent_tokens"] for row in rows]
    if name == "beam":  # a text that two beams reach is evaluated and counted once
        assert max(spent) == lengths * LENGTH
        assert {tokens % LENGTH for tokens in spent} == {0}
    else:
        assert set(spent) == {lengths * LENGTH}
    if name in SEARCHES:
        assert [row["progress"][-1][0] for row in rows] == spent


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_never_exceeded_and_less_than_a_round_of_it_is_left(name: str, model: PreTrainedModel) -> None:
    attack = replace(ATTACKS[name][0], budget_tokens=BUDGET)  # type: ignore[type-var, call-arg]
    for row in rows_of(attack, model, count=2):
        rounds = np.diff([0, *(spent for spent, _ in row["progress"])])
        assert BUDGET - rounds.max() < row["spent_tokens"] <= BUDGET
    poor = replace(attack, budget_tokens=2 * LENGTH)  # type: ignore[type-var, call-arg]
    with pytest.raises(UsageError, match=r"attacks.budget_tokens: 48 tokens a document do not buy one round; at least"):
        rows_of(poor, model, count=1)


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_handed_over_is_never_below_the_clean_text_and_is_the_best_that_was_seen(name: str) -> None:
    rows = rows_of(ATTACKS[name][0], reactive_model(seed=1), count=8)
    for row in rows:
        best = [nats for _, nats in row["progress"]]
        assert best == sorted(best)
        assert best[-1] == pytest.approx(sum(row["attacked_nll"]), abs=1e-3)
        assert row["delta_nats"] > -1e-4
    assert max(row["delta_nats"] for row in rows) > 0.1


@every_attack
def test_an_interrupted_state_goes_on_to_the_same_end(
    name: str, model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    attack, path = ATTACKS[name][0], tmp_path / "state.safetensors"

    def finish(through_file: bool) -> State:
        state = attack.start(problem, make_windows(3))
        while not attack.is_done(state):
            state = attack.step(problem, state)
            if through_file:
                path.write_bytes(tensors_to_bytes(state))
                state = tensors_from_file(path)
        return state

    with frozen(model):
        problem = Problem(Target(model, PROTOCOL.scored), PROTOCOL, vocabulary)
        plain, written = finish(False), finish(True)
    assert plain.keys() == written.keys()
    assert all(torch.equal(plain[key].nan_to_num(), written[key].nan_to_num()) for key in plain)


@every_attack
def test_a_step_leaves_the_state_given_as_it_was(name: str, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    attack = ATTACKS[name][0]
    with frozen(model):
        problem = Problem(Target(model, PROTOCOL.scored), PROTOCOL, vocabulary)
        state = attack.start(problem, make_windows(2))
        before = {key: tensor.clone() for key, tensor in state.items()}
        attack.step(problem, state)
    assert all(torch.equal(state[key].nan_to_num(), before[key].nan_to_num()) for key in before)


@every_attack
def test_batches_of_any_size_and_a_second_run_find_the_same(name: str, model: PreTrainedModel) -> None:
    attack = ATTACKS[name][0]
    first = rows_of(attack, model, batch_size=16)
    assert rows_of(attack, model, batch_size=16) == first
    assert found(rows_of(attack, model, batch_size=1)) == found(first)


@every_attack
def test_a_resume_by_document_gives_the_same_rows(
    name: str, model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    rows = rows_of(ATTACKS[name][0], model, log=log, batch_documents=2)
    log.truncate(lambda row: row["index"] < 3)
    assert rows_of(ATTACKS[name][0], model, log=log, batch_documents=2) == rows == log.read()


@every_attack
def test_no_edit_changes_nothing_exactly(name: str, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    attack, windows = ATTACKS[name][0], make_windows(3)
    with frozen(model):
        problem = Problem(Target(model, PROTOCOL.scored), PROTOCOL, vocabulary)
        for row in judged(attack, problem, windows, attack.start(problem, windows)):
            assert row.get("edits", []) == []
            assert row["clean_nll"] == row["attacked_nll"]
            assert row.get("delta_nats", 0) == 0


@pytest.mark.parametrize("name", [n for n in ON_TEXT if n not in ("random", "frequency")])
def test_where_nothing_may_be_written_nothing_is(name: str, model: PreTrainedModel) -> None:
    only_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    only_V[7] = True
    windows = make_windows(2)
    for window in windows:
        window.tokens[:] = 7
    rows = run_documents(ATTACKS[name][0], model, Vocabulary(only_V), windows, PROTOCOL)
    assert [(row["edits"], row["delta_nats"]) for row in rows] == [([], 0)] * 2


@every_attack
def test_a_model_that_returns_nan_leaves_every_document_missing(name: str, model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = torch.nan
    for row in rows_of(ATTACKS[name][0], model):
        assert row["status"] == "missing"
        assert "not a finite number" in row["reason"]
        assert "delta_nats" not in row


@pytest.mark.parametrize("name", ON_TEXT)
def test_text_attacks_say_all_that_results_need(name: str, model: PreTrainedModel) -> None:
    for row in rows_of(ATTACKS[name][0], model, count=2):
        assert {
            "delta_nats",
            "delta_by_offset",
            "top1",
            "round_trip",
            "text_space",
            "published_accounting",
        } <= row.keys()
        assert "upper_bound" not in row


def test_the_upper_bound_is_marked_and_has_no_text(model: PreTrainedModel) -> None:
    for row in rows_of(ATTACKS["pgd"][0], model):
        assert row["upper_bound"] is True
        assert {"delta_nats", "delta_by_offset", "top1", "clean_nll", "attacked_nll"} <= row.keys()
        assert not {"edits", "round_trip", "text_space", "published_accounting"} & row.keys()
        assert row["delta_nats"] > 0


def test_gradient_ranked_edits_beat_those_with_shuffled_gradients_here(model: PreTrainedModel) -> None:
    few = replace(ATTACKS["iterative"][0], candidates=2), replace(ATTACKS["shuffled"][0], candidates=2)  # type: ignore
    ranked, shuffled = (sum(row["delta_nats"] for row in rows_of(attack, model, count=12)) for attack in few)
    assert ranked > shuffled


def test_a_beam_of_one_is_iterative_hotflip(model: PreTrainedModel) -> None:
    beam = BeamHotFlip(flips=FLIPS, width=1, candidates=6)
    assert found(rows_of(beam, model)) == found(rows_of(ATTACKS["iterative"][0], model))


def test_frequency_matched_edits_write_tokens_as_often_as_they_occur(model: PreTrainedModel) -> None:
    counts_V = np.zeros(VOCABULARY)
    counts_V[[3, 5, 9]] = 90, 9, 1
    attack = FrequencyEdits(flips=9, draws=1, counts_V=counts_V)
    written = [new for row in rows_of(attack, model, count=40) for _, _, new in row["edits"]]
    assert set(written) <= {3, 5, 9}
    assert 0.8 < written.count(3) / len(written) < 0.97
    with pytest.raises(UsageError, match="fewer than two admissible tokens"):
        rows_of(replace(attack, counts_V=counts_V * (counts_V == 90)), model)
