"""A step is the step of the textbook, whatever the micro-batch; what goes wrong in one is said and undone."""

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from isotone import records
from isotone.data.order import batch_rows
from isotone.errors import IsotoneError, UsageError
from isotone.training import Budget, loop
from isotone.training.schedule import learning_rate
from training.tiny_run import RECIPE, RandomRows, outcome, tiny_model, train, trainer


def lines(folder: Path) -> list[dict]:
    return records.JsonLines(folder / "train.arm.jsonl").read()


def test_steps_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    """Against a loop written out by hand: whole batches, torch's loss, clipping and AdamW."""
    recipe = RECIPE.model_copy(update={"eps": 1e-3})  # a bias of keys has no gradient but rounding, which Adam blows up
    a_trainer = trainer(tmp_path, recipe=recipe, dropout=0.0)
    assert a_trainer.run().complete
    model = tiny_model(dropout=0.0)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, foreach=False, fused=False)
    for step in range(11):
        rows = RandomRows().rows("train")[batch_rows(1, 0, 4 * step, 4, 45)]
        ids = torch.from_numpy(rows.astype(np.int64))
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, 11)
        optimizer.step()
    for (name, mine), theirs in zip(a_trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("parametrization", [None, "softplus", "projection"])
def test_the_micro_batch_changes_rounding_only(tmp_path: Path, parametrization: str | None) -> None:
    losses = []
    for micro_batch in (1, 3, 4):
        folder = tmp_path / str(micro_batch)
        train(folder, parametrization, micro_batch=micro_batch, dropout=0.0)
        losses.append([line["loss"] for line in lines(folder) if "loss" in line])
    np.testing.assert_allclose(losses[0], losses[2], rtol=2e-5)
    np.testing.assert_allclose(losses[1], losses[2], rtol=2e-5)


@pytest.mark.parametrize("parametrization", ["softplus", "scaled_softplus", "projection"])
def test_the_constraint_holds_after_every_step(tmp_path: Path, parametrization: str) -> None:
    a_trainer = trainer(tmp_path, parametrization)
    start = {n: p.detach().clone() for n, p in a_trainer.model.named_parameters()}
    held = []
    a_trainer.progress = lambda *_: held.append(a_trainer.constraint.holds())
    a_trainer.run()
    assert held == [True] * 11
    for name, weight in a_trainer.model.named_parameters():
        assert not torch.equal(weight, start[name]), f"{name} did not move"


def test_masters_do_not_decay(tmp_path: Path) -> None:
    """At a rate so small that only decay could be seen, V stays where it is and other matrices shrink."""
    recipe = RECIPE.model_copy(update={"weight_decay": 1e5, "lr": 1e-8})
    a_trainer = trainer(tmp_path, "softplus", recipe=recipe)
    start = {n: p.detach().clone() for n, p in a_trainer.model.named_parameters()}
    a_trainer.run()
    for name, weight in a_trainer.model.named_parameters():
        ratio = (weight.norm() / start[name].norm()).item()
        decays = weight.ndim >= 2 and name not in a_trainer.constraint.names
        assert (ratio < 0.999) == decays, (name, ratio)


def test_metrics_are_one_line_a_step_and_one_a_validation(tmp_path: Path) -> None:
    train(tmp_path)
    steps = [line for line in lines(tmp_path) if "loss" in line]
    validations = [line for line in lines(tmp_path) if "validation_nll" in line]
    assert [line["step"] for line in steps] == list(range(1, 12))
    assert [line["tokens"] for line in steps] == [64 * n for n in range(1, 12)]
    assert [line["step"] for line in validations] == [4, 8, 11]
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens"}
    assert all(line["grad_norm"] > 0 for line in steps)


def test_a_lost_metrics_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, budget=Budget(Fraction("0.5")))
    (tmp_path / "train.arm.jsonl").unlink()
    assert train(tmp_path).complete
    assert "hole" in caplog.text


def test_training_learns(tmp_path: Path) -> None:
    train(tmp_path, recipe=RECIPE.model_copy(update={"epochs": 12.0}), dropout=0.0)
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[0] > 4.1
    assert losses[-1] < 3.9


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "without")
    train(tmp_path / "with", recipe=RECIPE.model_copy(update={"gradient_checkpointing": True}))
    expected = outcome(tmp_path / "without")
    assert outcome(tmp_path / "with")["step-00000011/model.safetensors"] == expected["step-00000011/model.safetensors"]


def test_autocast_keeps_masters_in_fp32(tmp_path: Path) -> None:
    a_trainer = trainer(tmp_path, "softplus", autocast=True)
    assert a_trainer.run().complete
    assert {t.dtype for t in a_trainer.trainable.values()} == {torch.float32}


def test_too_few_rows_for_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"46 rows, but there are only 45"):
        trainer(tmp_path, recipe=RECIPE.model_copy(update={"micro_batch": 23}))


def test_a_loss_that_is_not_finite_ends_training_before_the_weights_change(tmp_path: Path) -> None:
    a_trainer = trainer(tmp_path)
    seen = []

    def poison(step: int, text: str) -> None:
        seen.append(step)
        if step == 7:
            with torch.no_grad():
                a_trainer.model.get_output_embeddings().weight.fill_(float("nan"))  # type: ignore[operator]

    a_trainer.progress = poison
    with pytest.raises(IsotoneError, match=r"step 8: loss nan.*lr"):
        a_trainer.run()
    assert train(tmp_path).complete  # from the last checkpoint


# --- memory ----------------------------------------------------------------------------------------------------------


def limit_rows(monkeypatch: pytest.MonkeyPatch, limit: int, from_call: int = 0) -> None:
    """Let the n-th and later forward passes fail over so many rows, as a device does."""
    real, calls = loop.token_nll, []

    def limited(model: torch.nn.Module, ids: torch.Tensor, **labels: Any) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) > from_call and len(ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return real(model, ids, **labels)

    monkeypatch.setattr(loop, "token_nll", limited)


def test_lack_of_memory_halves_the_micro_batch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit_rows(monkeypatch, 1, from_call=11)
    with caplog.at_level(logging.WARNING):
        result = train(tmp_path, dropout=0.0)
    assert result.complete
    assert "micro-batch is now 1" in caplog.text
    assert [(e["micro_batch"], e["reason"]) for e in result.micro_batches] == [(1, "out of memory on cpu")]
    monkeypatch.undo()
    train(tmp_path / "whole", dropout=0.0)
    halved, whole = ([x["loss"] for x in lines(f) if "loss" in x] for f in (tmp_path, tmp_path / "whole"))
    np.testing.assert_allclose(halved, whole, rtol=2e-5)


def test_a_halved_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_rows(monkeypatch, 1, from_call=11)
    train(tmp_path / "once")
    monkeypatch.undo()
    limit_rows(monkeypatch, 1, from_call=11)
    train(tmp_path / "twice", budget=Budget(Fraction("0.7")))
    monkeypatch.undo()
    assert train(tmp_path / "twice").complete  # plenty of memory now: the history decides
    assert outcome(tmp_path / "twice") == outcome(tmp_path / "once")


def test_the_other_arm_takes_the_same_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_rows(monkeypatch, 1)
    train(tmp_path)
    monkeypatch.undo()
    model = tiny_model()
    other = loop.Trainer(
        model,
        RandomRows(),
        RECIPE,
        seed=1,
        folder=tmp_path / "checkpoints" / "other",
        metrics=tmp_path / "other.jsonl",
        stop=loop.StopFlag(),
    )
    result = other.run()
    assert [(e["step"], e["micro_batch"], e["reason"]) for e in result.micro_batches] == [(0, 1, "as for arm arm")]


def test_one_row_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_rows(monkeypatch, 0)
    with pytest.raises(IsotoneError, match="gradient_checkpointing"):
        train(tmp_path)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **labels: object) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "token_nll", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        train(tmp_path)
