"""Training that is interrupted, anywhere and as often as you like, equals training that is not, bit for bit."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import StopAt

from isotone.errors import DiskFullError
from isotone.training import loop
from training.tiny_run import (
    RECIPE,
    STEPS_PER_EPOCH,
    in_child,
    outcome,
    tiny_model,
    train,
    train_in_budgets,
    trainer,
    was_killed,
)

ARMS = [None, "softplus", "scaled_softplus", "projection", "sign_frozen"]
RECIPE_2 = RECIPE.model_copy(update={"epochs": 2})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, dict[str, str]]:
    """What two epochs end in, for each arm."""
    outcomes = {}
    for arm in ARMS:
        folder = tmp_path_factory.mktemp(str(arm))
        assert train(folder, arm, recipe=RECIPE_2).complete
        outcomes[arm] = outcome(folder)
    return outcomes


def test_two_runs_are_equal_and_arms_differ(tmp_path: Path, uninterrupted: dict) -> None:
    train(tmp_path, recipe=RECIPE_2)
    assert outcome(tmp_path) == uninterrupted[None]
    assert len({str(sorted(o.items())) for o in uninterrupted.values()}) == len(ARMS)


@pytest.mark.parametrize("arm", [None, "scaled_softplus"])
@pytest.mark.parametrize(
    ("epochs", "processes"), [("0.1", 11), ("0.25", 8), ("0.5", 4), ("1", 2), ("1.7", 2), ("2", 1)]
)
def test_budgets_do_not_change_a_bit(
    tmp_path: Path, uninterrupted: dict, arm: str | None, epochs: str, processes: int
) -> None:
    assert train_in_budgets(tmp_path, epochs, arm, recipe=RECIPE_2) == processes
    assert outcome(tmp_path) == uninterrupted[arm]


@pytest.mark.parametrize(("epochs", "processes"), [("1", 1), ("0.5", 2), ("0.25", 4), ("0.2", 5), ("0.1", 10)])
def test_n_budgets_of_one_nth_finish_an_epoch(tmp_path: Path, epochs: str, processes: int) -> None:
    assert STEPS_PER_EPOCH % 2 == 1  # so that half an epoch is no whole number of steps
    assert train_in_budgets(tmp_path, epochs) <= processes


def test_twenty_resumes_in_one_epoch(tmp_path: Path, uninterrupted: dict) -> None:
    """A stop is noticed at each of its readings in turn: between steps, within accumulation, within validation."""
    resumes = 0
    for number in [*range(1, 8)] * 10:
        if train(tmp_path, recipe=RECIPE_2, stop=StopAt(number)).complete:
            break
        resumes += 1
    assert resumes >= 20
    assert outcome(tmp_path) == uninterrupted[None]


def test_stopping_twice_within_one_validation(tmp_path: Path, uninterrupted: dict) -> None:
    def stop_in_validation(folder: Path) -> str:
        a_trainer = trainer(folder, recipe=RECIPE_2)
        model: Any = a_trainer.model
        model.eval = lambda: a_trainer.stop.request("SIGTERM")  # the first thing that a validation calls
        return a_trainer.run().checkpoints["last"]

    assert stop_in_validation(tmp_path) == "step-00000004.unvalidated"
    assert stop_in_validation(tmp_path) == "step-00000004.unvalidated"
    assert train(tmp_path, recipe=RECIPE_2).complete
    assert outcome(tmp_path) == uninterrupted[None]
    assert not list(tmp_path.rglob("*.unvalidated"))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_loses_nothing(tmp_path: Path, uninterrupted: dict, number: int) -> None:
    a_trainer = trainer(tmp_path, recipe=RECIPE_2)
    publish, tries = a_trainer.checkpoints.publish, []

    def fill(step: int, *args: Any) -> Path:
        tries.append(step)
        if len(tries) > number:
            raise DiskFullError("no space left")
        return publish(step, *args)

    a_trainer.checkpoints.publish = fill  # type: ignore[method-assign, assignment]
    with pytest.raises(DiskFullError):
        a_trainer.run()
    assert a_trainer.checkpoints.paths()[-1].name == f"step-{tries[-2]:08d}"
    assert train(tmp_path, recipe=RECIPE_2).complete
    assert outcome(tmp_path) == uninterrupted[None]


@pytest.mark.integration
@pytest.mark.parametrize("arm", [None, "softplus"])
def test_random_kills_do_not_change_a_bit(tmp_path: Path, uninterrupted: dict, arm: str | None) -> None:
    """SIGKILL at a random system call of the store or at a random place of a step, several times a training."""
    rng = random.Random(str(arm))
    kills = in_saves = 0
    for number in range(10):
        folder = tmp_path / str(number)
        for _ in range(rng.randint(1, 3)):
            in_save = rng.random() < 1 / 3
            status = in_child(lambda: killed_run(folder, arm, in_save, rng.randint(1, 60)))  # noqa: B023
            kills += was_killed(status)
            in_saves += was_killed(status) and in_save
        assert train(folder, arm, recipe=RECIPE_2).complete
        assert outcome(folder) == uninterrupted[arm]
    assert kills >= 10
    assert in_saves >= 3


def ticking(real: Callable, tick: Callable[[], None]) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        tick()
        return real(*args, **kwargs)

    return call


def killed_run(folder: Path, arm: str | None, in_save: bool, number: int) -> None:
    """Train, and die at the n-th system call of the store, or at the n-th module that computes."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == number * (1 if in_save else 10):
            os.kill(os.getpid(), signal.SIGKILL)

    a_trainer = trainer(folder, arm, recipe=RECIPE_2)
    if in_save:
        for name in ("write", "fsync", "rename", "unlink", "mkdir"):
            real = getattr(os, name)
            setattr(os, name, ticking(real, tick))
    else:
        torch.nn.modules.module.register_module_forward_hook(lambda *_: tick())
    a_trainer.run()


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_a_checkpoint_without_a_moment_is_noticed(
    tmp_path: Path, uninterrupted: dict, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """A mutant that drops part of the optimizer from checkpoints must not pass the comparison above."""
    real = loop.optimizer_tensors

    def dropping(*args: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(t) if name.endswith("." + lost) else t for name, t in real(*args).items()}

    train(tmp_path, recipe=RECIPE_2, stop=StopAt(12))
    train(tmp_path, recipe=RECIPE_2, stop=StopAt(12))
    monkeypatch.setattr(loop, "optimizer_tensors", dropping)
    train(tmp_path, recipe=RECIPE_2, stop=StopAt(12))
    monkeypatch.undo()
    assert train(tmp_path, recipe=RECIPE_2).complete
    assert outcome(tmp_path) != uninterrupted[None]


def test_global_streams_do_not_matter(tmp_path: Path, uninterrupted: dict) -> None:
    torch.manual_seed(123)
    tiny_model()
    train(tmp_path, recipe=RECIPE_2, progress=lambda *_: torch.rand(3))
    assert outcome(tmp_path) == uninterrupted[None]


def test_a_complete_training_is_complete_at_once(tmp_path: Path, uninterrupted: dict) -> None:
    first = train(tmp_path, recipe=RECIPE_2)
    assert train(tmp_path, recipe=RECIPE_2) == first
    assert outcome(tmp_path) == uninterrupted[None]
