"""A constraint that comes step by step: λ is a function of the step, and from the share's end on nothing is below 0."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits, tiny_model

from isotone import records
from isotone.config import Distill
from isotone.constraint import certify, constrain, fold
from isotone.errors import UsageError
from isotone.training import read_checkpoint
from training.test_resume import ticking
from training.tiny_run import RECIPE, in_child, outcome, train, train_in_budgets, trainer, was_killed
from training.tiny_run import tiny_model as tiny_model_of_run

RECIPE_2 = RECIPE.model_copy(update={"epochs": 2, "keep_last": 30, "save_every_steps": 1})
OPTIONS: dict[str, Any] = {"parametrization": "projection", "recipe": RECIPE_2, "anneal": 0.5}  # 11 of 22 steps


def annealed(name: str = "arcee", share: float = 0.5) -> tuple[Any, Any]:
    model = tiny_model(name)
    return model, constrain(model, "mlp_both", "projection", "unchanged", anneal=share)


def test_hooks_that_do_not_know_the_step_are_refused() -> None:
    model, constraint = annealed()
    with pytest.raises(UsageError, match="call advance"):
        constraint.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_it_starts_from_the_model_as_it_is() -> None:
    model, constraint = annealed()
    assert torch.equal(logits(model), logits(tiny_model("arcee")))
    assert constraint.slack == 1
    assert constraint.holds()  # there is no side yet


@pytest.mark.parametrize("name", ["arcee", "gpt2", "t5"])
def test_weights_that_nothing_else_moves_follow_lambda(name: str) -> None:
    """W = W⁺ − λW⁻ at every step, and exactly W⁺ from step 4 of 8 on."""
    model, constraint = annealed(name)
    before = {weight: model.get_parameter(weight).detach().clone() for weight in constraint.names}
    for step in range(1, 9):
        constraint.advance(step, 8)
        slack = max(0.0, 1 - step / 4)
        assert constraint.slack == slack
        for weight, w in before.items():
            expected = w.clamp_min(0) + slack * w.clamp_max(0)
            torch.testing.assert_close(model.get_parameter(weight), expected, rtol=1e-6, atol=0)
            assert slack or torch.equal(model.get_parameter(weight), w.clamp_min(0))
    assert certify(fold(model)).verdict == ("vacuous" if name == "gpt2" else "strict")


def test_lambda_is_where_it_should_be_at_every_real_step_and_strict_behind_it(tmp_path: Path) -> None:
    a_trainer = trainer(tmp_path, **OPTIONS)
    seen: list[tuple[float, bool]] = []

    def look(step: int, text: str) -> None:
        lowest = min(w.min() for w in a_trainer.constraint.parameters())
        seen.append((a_trainer.constraint.slack, bool(lowest < 0)))
        assert a_trainer.constraint.holds()

    a_trainer.progress = look
    a_trainer.run()
    assert [slack for slack, _ in seen] == pytest.approx([1 - k / 11 for k in range(1, 11)] + [0.0] * 12)
    assert [below for _, below in seen] == [True] * 10 + [False] * 12


def test_lambda_is_stored_and_interruptions_change_no_bit(tmp_path: Path) -> None:
    assert train(tmp_path / "whole", **OPTIONS).complete
    train_in_budgets(tmp_path / "pieces", "1/11", **OPTIONS)
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")
    for step, slack in ((3, 1 - 3 / 11), (10, 1 - 10 / 11), (11, 0.0), (22, 0.0)):
        checkpoint = read_checkpoint(tmp_path / "whole" / "checkpoints" / "arm" / f"step-{step:08d}")
        scales = [t for name, t in checkpoint.weights().items() if name.endswith(".scale")]
        assert scales
        assert all(float(scale) == pytest.approx(slack) for scale in scales)
        assert checkpoint.state["constraint"]["anneal"] == 0.5


def test_no_checkpoint_is_the_best_before_the_constraint_holds(tmp_path: Path) -> None:
    """Validation losses before it are those of another model, however low."""
    a_trainer = trainer(tmp_path, **OPTIONS)
    result = a_trainer.run()
    lines = records.JsonLines(tmp_path / "train.arm.jsonl").read()
    validated = {line["step"]: line["validation_nll"] for line in lines if "validation_nll" in line}
    assert min(validated) < 11
    late = {step: nll for step, nll in validated.items() if step >= 11}
    assert result.best_step == min(late, key=lambda step: late[step])
    a_trainer.history.insert(0, {"step": 4, "nll": 0.0})
    best = a_trainer._best()
    assert best is not None
    assert best["step"] == result.best_step


def test_an_annealed_training_is_another_one_than_projection_at_once(tmp_path: Path) -> None:
    train(tmp_path / "annealed", **OPTIONS)
    with pytest.raises(UsageError, match=r"was saved with constraint .*'anneal': 0.5"):
        train(tmp_path / "annealed", **OPTIONS | {"anneal": 0.25})


@pytest.mark.parametrize(
    ("parametrization", "initialization", "anneal"),
    [("softplus", "unchanged", 0.5), ("projection", "relu", 0.5), ("projection", "unchanged", 1.5)],
)
def test_what_cannot_be_annealed_is_refused(parametrization: str, initialization: str, anneal: float) -> None:
    with pytest.raises(UsageError, match=r"constraint.anneal: .* projection and initialization unchanged; found"):
        constrain(tiny_model("arcee"), "mlp_both", parametrization, initialization, anneal=anneal)
    with pytest.raises(UsageError, match="unchanged leaves negative weights"):
        constrain(tiny_model("arcee"), "mlp_both", "projection", "unchanged")


@pytest.mark.integration
def test_random_kills_change_no_bit_of_a_recovery(tmp_path: Path) -> None:
    """Distilled and annealed at once: SIGKILL in saves and in steps, at boundaries of phases and elsewhere."""
    options = OPTIONS | {
        "recipe": RECIPE.model_copy(update={"epochs": 2, "distill": Distill(blocks=0.3, logits=0.4)}),
        "teacher": tiny_model_of_run,
    }
    assert train(tmp_path / "whole", **options).complete
    rng, kills = random.Random(5), 0
    for number in range(6):
        folder = tmp_path / str(number)
        for _ in range(3):
            in_save, count = rng.random() < 0.4, rng.randint(1, 60)
            kills += was_killed(in_child(lambda: killed(folder, in_save, count, options)))  # noqa: B023
        assert train(folder, **options).complete
        assert outcome(folder) == outcome(tmp_path / "whole")
    assert kills >= 10


def killed(folder: Path, in_save: bool, number: int, options: dict[str, Any]) -> None:
    """Train, and die at the n-th system call of the store, or at the n-th module (in tens) that computes."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == number * (1 if in_save else 10):
            os.kill(os.getpid(), signal.SIGKILL)

    a_trainer = trainer(folder, **options)
    if in_save:
        for name in ("write", "fsync", "rename", "unlink", "mkdir"):
            setattr(os, name, ticking(getattr(os, name), tick))
    else:
        torch.nn.modules.module.register_module_forward_hook(lambda *_: tick())
    a_trainer.run()
