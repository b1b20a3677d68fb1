"""Schedule, budget, optimizer and memory ledger, each on its own."""

import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from isotone.config import Training
from isotone.errors import IsotoneError
from isotone.records import CorruptError
from isotone.training import Budget, MicroBatchLedger, memory
from isotone.training.optimizer import build_optimizer, copy_into, load_optimizer_tensors, optimizer_tensors
from isotone.training.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_rises_to_the_peak_and_falls_to_the_end(schedule: str) -> None:
    recipe = Training(lr=2.0, warmup=0.25, min_lr_ratio=0.1, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(recipe, step, 40) for step in range(40)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0.2 < rates[-1] < 0.4
    assert learning_rate(recipe, 25, 40) == pytest.approx((2.0 + 0.2) / 2)  # half way both are in the middle


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_rate_without_or_with_nothing_but_warmup(warmup: float) -> None:
    rates = [learning_rate(Training(lr=1.0, warmup=warmup), step, 5) for step in range(5)]
    assert rates == sorted(rates, reverse=warmup == 0)
    assert max(rates) == 1.0
    assert min(rates) > 0


def test_shares_of_steps_are_exact() -> None:
    """0.1 of 10 is one step, though 0.1 in binary is a little more than a tenth."""
    assert learning_rate(Training(lr=1.0, warmup=0.1), 0, 10) == 1.0


def test_an_epoch_budget_counts_whole_steps() -> None:
    budget = Budget(Fraction("0.5"))
    made = 0
    while budget.why_exhausted(7, 0.0) is None:
        budget.spend(1, 7)
        made += 1
    assert made == 4


def test_a_shared_budget_is_spent_by_both_arms() -> None:
    budget = Budget(Fraction(1))
    budget.spend(5, 7)
    assert budget.why_exhausted(7, 0.0) is None
    budget.spend(2, 7)
    assert budget.why_exhausted(7, 0.0) == "budget of 1 epochs"


def test_minutes_leave_room_for_a_step_and_a_save() -> None:
    now = [0.0]
    budget = Budget(max_minutes=10, clock=lambda: now[0])
    budget.spend(1, 100)
    now[0] = 600 - 2 * 30.0
    assert budget.why_exhausted(100, 30.0) is None
    now[0] += 0.1
    assert budget.why_exhausted(100, 30.0) == "budget of 10 minutes"


def test_even_a_spent_minute_budget_makes_one_step() -> None:
    now = [0.0]
    budget = Budget(max_minutes=0.001, clock=lambda: now[0])
    now[0] = 60.0
    assert budget.why_exhausted(100, 30.0) is None
    budget.spend(1, 100)
    assert budget.why_exhausted(100, 30.0) is not None


def parameters() -> dict[str, torch.nn.Parameter]:
    return {"w": torch.nn.Parameter(torch.ones(2, 3)), "v": torch.nn.Parameter(torch.ones(2, 3)),
            "b": torch.nn.Parameter(torch.ones(3))}  # fmt: skip


def test_only_unconstrained_matrices_decay() -> None:
    trainable = parameters()
    optimizer = build_optimizer(trainable, Training(weight_decay=0.5), {"v"})
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decayed[id(p)] for name, p in trainable.items()} == {"w": 0.5, "v": 0.0, "b": 0.0}


def test_optimizer_state_is_there_before_the_first_step_and_returns() -> None:
    trainable = parameters()
    optimizer = build_optimizer(trainable, Training())
    assert optimizer_tensors(optimizer, trainable).keys() == {
        f"{n}.{f}" for n in "wvb" for f in ("step", "exp_avg", "exp_avg_sq")
    }
    for parameter in trainable.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = {name: t.clone() for name, t in optimizer_tensors(optimizer, trainable).items()}
    other_trainable = parameters()
    other = build_optimizer(other_trainable, Training())
    load_optimizer_tensors(other, other_trainable, saved)
    for name, tensor in optimizer_tensors(other, other_trainable).items():
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a": torch.zeros(2)}, "b is missing"),
        ({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}, "c is unknown"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "expected"),
        ({"a": torch.zeros(2), "b": torch.zeros(2).half()}, "float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_copied(saved: dict, message: str) -> None:
    targets = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(CorruptError, match=message):
        copy_into(targets, saved, "weights")
    assert torch.equal(targets["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, is_memory: bool) -> None:
    assert memory.is_out_of_memory(error) == is_memory


def test_ledger_remembers_from_which_step_on(tmp_path: Path) -> None:
    ledger = MicroBatchLedger(tmp_path, "baseline")
    assert ledger.halve(3, 8, "why") == 4
    assert MicroBatchLedger(tmp_path, "baseline").halve(7, 4, "why") == 2
    assert [ledger.at(step, 8) for step in (0, 2, 3, 6, 7, 9)] == [8, 8, 4, 4, 2, 2]
    assert MicroBatchLedger(tmp_path, "other").at(9, 8) == 8
    with pytest.raises(IsotoneError, match="one row"):
        ledger.halve(9, 1, "why")


class TestAttempt:
    """An ordinary kill must not change the micro-batch; one for memory must."""

    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kills: int | None = 5
        self.held = 100
        monkeypatch.setattr(memory, "oom_kills", lambda: self.kills)
        monkeypatch.setattr(memory, "memory", lambda: self.held)
        monkeypatch.setattr(memory, "memory_limit", lambda: 1000)

    def died(self, folder: Path, step: int = 3) -> memory.Attempt:
        attempt = memory.Attempt(folder / "attempt.json")
        attempt.begin(step)
        attempt.watch()
        return memory.Attempt(folder / "attempt.json")

    def test_no_attempt_before(self, tmp_path: Path) -> None:
        assert memory.Attempt(tmp_path / "attempt.json").why_last_died_of_memory(0) is None

    def test_ordinary_kill(self, tmp_path: Path) -> None:
        assert self.died(tmp_path).why_last_died_of_memory(3) is None

    def test_kill_counted_by_the_control_group(self, tmp_path: Path) -> None:
        attempt = self.died(tmp_path)
        self.kills = 6
        assert "control group" in (attempt.why_last_died_of_memory(3) or "")

    def test_kill_counted_but_progress_was_made(self, tmp_path: Path) -> None:
        attempt = self.died(tmp_path)
        self.kills = 6
        assert attempt.why_last_died_of_memory(4) is None

    def test_kill_counted_in_another_control_group(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        attempt = self.died(tmp_path)
        self.kills = 6
        monkeypatch.setattr(memory, "control_group", lambda: "another job")
        assert attempt.why_last_died_of_memory(3) is None

    def test_memory_near_the_limit(self, tmp_path: Path) -> None:
        self.held, self.kills = 900, None
        assert self.died(tmp_path).why_last_died_of_memory(3) is not None

    def test_an_attempt_that_ended_on_its_own_leaves_no_trace(self, tmp_path: Path) -> None:
        self.died(tmp_path).end()
        self.kills = 6
        assert memory.Attempt(tmp_path / "attempt.json").why_last_died_of_memory(3) is None


def test_what_the_machine_says_about_memory_is_sane() -> None:
    assert 1e6 < memory.memory() < memory.memory_limit()
    kills = memory.oom_kills()
    assert kills is None or kills >= 0
