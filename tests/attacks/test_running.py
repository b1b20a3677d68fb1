"""A run that is interrupted goes on to the same rows; a broken model is missing, never a success or a failure."""

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from isotone.attacks import (
    DocumentAttack,
    HotFlip,
    PublishedHotFlip,
    RandomEdits,
    Vocabulary,
    Window,
    replay,
    run_documents,
    success_threshold,
)
from isotone.attacks.interface import Problem, State
from isotone.attacks.judging import Row
from isotone.constraint import constrain, fold
from isotone.errors import IsotoneError, Stopped
from isotone.interruption import StopFlag
from isotone.records import JsonLines, tensors_from_file, tensors_to_bytes

from .conftest import PROTOCOL, make_windows, reactive_model

ATTACKS: list[DocumentAttack] = [
    HotFlip(flips=3, method="iterative", candidates=6),
    HotFlip(flips=3, method="once"),
    PublishedHotFlip(flips=3),
    RandomEdits(flips=3, draws=4),
]


class StopAfter(StopFlag):
    """Asks for a stop at the n-th place where a stop is possible."""

    def __init__(self, checks: int):
        super().__init__()
        self.left = checks

    def check(self, what: str) -> None:
        self.left -= 1
        if self.left < 0:
            self.request("test")
        super().check(what)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_resumed_run_equals_uninterrupted_run(
    attack: DocumentAttack, model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    windows = make_windows(7)
    whole = JsonLines(tmp_path / "whole.jsonl")
    rows = run_documents(attack, model, vocabulary, windows, PROTOCOL, log=whole, batch_documents=2)
    log = JsonLines(tmp_path / "resumed.jsonl")
    stops = 0
    for allowed in range(1, 100):
        try:
            resumed = run_documents(
                attack, model, vocabulary, windows, PROTOCOL, log=log, batch_documents=2, stop=StopAfter(allowed)
            )
            break
        except Stopped:
            stops += 1
            assert len(log.read()) % 2 == 0
    assert stops > 0
    assert resumed == rows == whole.read()
    assert log.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("num_bytes", [1, 900, 5000])
def test_a_log_torn_anywhere_is_completed_to_the_same_bytes(
    num_bytes: int, model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    attack, windows, log = HotFlip(flips=2, candidates=4), make_windows(5), JsonLines(tmp_path / "log.jsonl")
    run_documents(attack, model, vocabulary, windows, PROTOCOL, log=log, batch_documents=2)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-num_bytes])
    run_documents(attack, model, vocabulary, windows, PROTOCOL, log=log, batch_documents=2)
    assert log.path.read_bytes() == whole


class Recording(HotFlip):
    """Remembers which documents were attacked together: batches fix the rounding."""

    batches: ClassVar[list[list[str]]] = []

    def start(self, problem: Problem, windows: list[Window]) -> State:
        self.batches.append([window.id for window in windows])
        return super().start(problem, windows)


def test_a_resume_attacks_the_same_documents_together(
    model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    attack, windows, log = Recording(flips=1, method="once"), make_windows(5), JsonLines(tmp_path / "log.jsonl")
    run_documents(attack, model, vocabulary, windows, PROTOCOL, log=log, batch_documents=2)
    whole = list(attack.batches)
    for num_rows in range(5):
        attack.batches.clear()
        log.truncate(lambda row, num_rows=num_rows: row["index"] < num_rows)  # type: ignore[misc]
        run_documents(attack, model, vocabulary, windows, PROTOCOL, log=log, batch_documents=2)
        assert attack.batches == whole[num_rows // 2 :]


def test_a_log_of_other_documents_or_attacks_is_refused(
    model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    log, windows = JsonLines(tmp_path / "log.jsonl"), make_windows(3)
    run_documents(HotFlip(flips=2, method="once"), model, vocabulary, windows, PROTOCOL, log=log)
    with pytest.raises(IsotoneError, match="other documents or of another attack"):
        run_documents(HotFlip(flips=2, method="once"), model, vocabulary, windows[::-1], PROTOCOL, log=log)
    with pytest.raises(IsotoneError, match="other documents or of another attack"):
        run_documents(HotFlip(flips=2), model, vocabulary, windows, PROTOCOL, log=log)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_a_state_survives_being_written_and_read(
    attack: DocumentAttack, model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    from isotone.attacks.scoring import Target, frozen

    def finish(state: State, through_file: bool) -> State:
        while not attack.is_done(state):
            state = attack.step(problem, state)
            if through_file:
                (tmp_path / "state.safetensors").write_bytes(tensors_to_bytes(state))
                state = tensors_from_file(tmp_path / "state.safetensors")
        return state

    with frozen(model):
        problem = Problem(Target(model, PROTOCOL.scored), PROTOCOL, vocabulary)
        plain, written = (finish(attack.start(problem, make_windows(3)), flag) for flag in (False, True))
    assert plain.keys() == written.keys()
    assert all(torch.equal(plain[key].nan_to_num(), written[key].nan_to_num()) for key in plain)


def test_a_model_without_finite_losses_leaves_documents_missing(vocabulary: Vocabulary) -> None:
    model, windows = reactive_model(), make_windows(4)
    unused = next(v for v in range(VOCABULARY) if all(v not in window.tokens for window in windows[1:]))
    windows[0].tokens[3] = unused
    with torch.no_grad():
        model.get_parameter("gpt_neox.embed_in.weight")[unused] = torch.nan
    allowed_V = torch.ones(VOCABULARY, dtype=torch.bool)
    allowed_V[unused] = False
    for attack in ATTACKS:
        rows = run_documents(attack, model, Vocabulary(allowed_V), windows, PROTOCOL)
        statuses = [row["status"] for row in rows]
        if isinstance(attack, PublishedHotFlip):  # it writes any token, that one too
            assert statuses[0] == "missing"
            continue
        assert statuses == ["missing", "ok", "ok", "ok"]
        assert "not a finite number" in rows[0]["reason"]
        assert "delta_nats" not in rows[0]


def test_a_loss_that_is_no_number_during_the_search_leaves_the_document_missing(vocabulary: Vocabulary) -> None:
    model, windows = reactive_model(), make_windows(2)
    unused = next(v for v in range(VOCABULARY) if all(v not in window.tokens for window in windows))
    with torch.no_grad():
        model.get_parameter("gpt_neox.embed_in.weight")[unused] = torch.inf
    everything = HotFlip(flips=1, candidates=10**6)
    rows = run_documents(everything, model, vocabulary, windows, PROTOCOL)
    assert all(row["status"] == "ok" for row in rows)  # an infinite embedding has no first-order gain: never tried
    rows = run_documents(RandomEdits(flips=9, draws=60), model, vocabulary, windows, PROTOCOL)
    assert [row["reason"] for row in rows] == ["a loss during the attack was not a finite number"] * 2


def test_the_model_comes_back_as_it_was(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_documents(HotFlip(flips=2, candidates=4), model, vocabulary, make_windows(2), PROTOCOL)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_counts_documents(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    seen: list[tuple[int, int]] = []
    attack = HotFlip(flips=1, method="once")
    run_documents(
        attack, model, vocabulary, make_windows(5), PROTOCOL, batch_documents=2, progress=lambda *at: seen.append(at)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_random_edits_change_exactly_as_many_tokens_and_do_not_depend_on_other_documents(
    model: PreTrainedModel, vocabulary: Vocabulary
) -> None:
    attack, windows = RandomEdits(flips=4, draws=5, seed=3), make_windows(6)
    rows = run_documents(attack, model, vocabulary, windows, PROTOCOL)
    alone = run_documents(attack, model, vocabulary, windows[4:5], PROTOCOL)
    assert [len(row["edits"]) for row in rows] == [4] * 6
    assert alone[0]["edits"] == rows[4]["edits"]
    assert len({tuple(map(tuple, row["edits"])) for row in rows}) == 6
    assert [len(row["draw_deltas"]) for row in rows] == [5] * 6
    assert rows[0]["draw_deltas"][0] == pytest.approx(rows[0]["delta_nats"] / PROTOCOL.continuation, abs=1e-5)
    other = run_documents(RandomEdits(flips=4, draws=5, seed=4), model, vocabulary, windows, PROTOCOL)
    assert other[0]["edits"] != rows[0]["edits"]


def test_random_edits_never_write_the_token_that_stands_there(model: PreTrainedModel) -> None:
    allowed_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed_V[[3, 5]] = True
    windows = [Window("a", np.full(PROTOCOL.length, 5)), Window("b", np.full(PROTOCOL.length, 4))]
    rows = run_documents(RandomEdits(flips=9, draws=1), model, Vocabulary(allowed_V), windows, PROTOCOL)
    assert {new for _, _, new in rows[0]["edits"]} == {3}
    assert {new for _, _, new in rows[1]["edits"]} == {3, 5}


def test_the_threshold_is_the_95th_percentile_of_all_draws() -> None:
    rows: list[Row] = [
        {"status": "ok", "draw_deltas": [i / 100 for i in range(50)]},
        {"status": "ok", "draw_deltas": [i / 100 for i in range(50, 101)]},
        {"status": "missing", "reason": "x"},
    ]
    assert success_threshold(rows) == pytest.approx(0.95)
    assert success_threshold(rows[2:]) is None


def test_a_twin_of_the_same_function_replays_to_the_same_losses(vocabulary: Vocabulary) -> None:
    baseline, twin = (tiny_model("gpt_neox", initializer_range=0.2) for _ in range(2))
    constrain(twin, "mlp_both", "projection", "shift")
    fold(twin)
    assert not torch.equal(
        baseline.gpt_neox.layers[0].mlp.dense_h_to_4h.weight, twin.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
    )
    windows = make_windows(4)
    rows = run_documents(HotFlip(flips=3, candidates=8), baseline, vocabulary, windows, PROTOCOL)
    again = replay(twin, vocabulary, windows, {row["id"]: row["edits"] for row in rows}, PROTOCOL)
    for row, replayed in zip(rows, again, strict=True):
        assert replayed["edits"] == row["edits"] != []
        assert abs(replayed["delta_nats"] - row["delta_nats"]) / PROTOCOL.continuation < 1e-3
        assert math.isclose(sum(replayed["clean_nll"]), sum(row["clean_nll"]), abs_tol=1e-3 * PROTOCOL.continuation)


def test_replay_on_the_same_model_gives_the_same_figures(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    windows = make_windows(5)
    rows = run_documents(HotFlip(flips=3, candidates=8), model, vocabulary, windows, PROTOCOL, batch_documents=2)
    edits = {row["id"]: row["edits"] for row in rows[:4]}
    again = replay(model, vocabulary, windows, edits, PROTOCOL, batch_documents=2)
    for row, replayed in zip(rows[:4], again, strict=False):
        assert replayed["attacked_nll"] == row["attacked_nll"]
    assert again[4]["status"] == "missing"


def test_replay_refuses_edits_of_another_text(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    windows = make_windows(1)
    wrong = (int(windows[0].tokens[2]) + 1) % VOCABULARY
    with pytest.raises(IsotoneError, match="document document-0 has token"):
        replay(model, vocabulary, windows, {"document-0": [[2, wrong, 0]]}, PROTOCOL)


def test_an_interrupted_replay_goes_on_to_the_same_rows(
    model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    windows, log = make_windows(5), JsonLines(tmp_path / "log.jsonl")
    rows = run_documents(HotFlip(flips=2, candidates=4), model, vocabulary, windows, PROTOCOL)
    edits = {row["id"]: row["edits"] for row in rows}
    whole = replay(model, vocabulary, windows, edits, PROTOCOL, batch_documents=2)
    with pytest.raises(Stopped):
        replay(model, vocabulary, windows, edits, PROTOCOL, log=log, stop=StopAfter(1), batch_documents=2)
    assert len(log.read()) == 2
    assert replay(model, vocabulary, windows, edits, PROTOCOL, log=log, batch_documents=2) == whole == log.read()
