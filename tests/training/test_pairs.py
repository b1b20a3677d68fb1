"""Training on pairs does what a plain loop does: the loss is the mean over a step's target tokens, however cut up."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from isotone import records
from isotone.config import Training
from isotone.constraint import constrain
from isotone.data.order import batch_rows
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout
from isotone.training import Budget, Trainer, TrainResult
from isotone.training.schedule import learning_rate

from .processes import together
from .tiny_run import outcome

S, T, PAD, EOS = 10, 6, 0, 1
RECIPE = Training(epochs=1, micro_batch=2, accumulation=2, lr=1e-2, save_every_steps=2, validate_every_steps=3)


class PairRows:
    """22 pairs to train on, 5 to validate on, of very different lengths."""

    fingerprint = "pairs"

    def rows(self, split: str) -> np.ndarray:
        rng = np.random.default_rng(0 if split == "train" else 1)
        rows = np.full((22 if split == "train" else 5, S + T), PAD, np.uint16)
        for row in rows:
            for first, length in ((0, S), (S, T)):
                count = rng.integers(1, length)
                row[first : first + count] = rng.integers(2, 64, count)
                row[first + count] = EOS
        return rows


def trainer(folder: Path, parametrization: str | None = None, recipe: Training = RECIPE, **options: Any) -> Trainer:
    model = tiny_model("t5", dropout_rate=options.pop("dropout", 0.1))
    constraint = constrain(model, "mlp_both", parametrization, "absolute") if parametrization else None
    defaults: dict[str, Any] = {"seed": 1, "stop": StopFlag(), "identity": {"configuration": "c"}}
    return Trainer(
        model,
        PairRows(),
        recipe,
        constraint=constraint,
        folder=folder / "checkpoints" / "arm",
        metrics=folder / "train.arm.jsonl",
        pairs=PairLayout(S, PAD),
        **defaults | options,
    )


def train(folder: Path, **options: Any) -> TrainResult:
    return trainer(folder, **options).run()


def labels_of(rows_BL: torch.Tensor) -> torch.Tensor:
    target_BT = rows_BL[:, S:]
    return target_BT.masked_fill(target_BT == PAD, -100)


def test_training_equals_a_plain_loop(tmp_path: Path) -> None:
    trained = trainer(tmp_path, dropout=0.0)
    trained.run()
    model, rows = tiny_model("t5").train(), PairRows().rows("train")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": RECIPE.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
    )
    for step in range(5):
        chosen = batch_rows(1, 0, 4 * step, 4, len(rows))
        ids_BL = torch.from_numpy(rows[chosen].astype(np.int64))
        loss = model(
            input_ids=ids_BL[:, :S], attention_mask=(ids_BL[:, :S] != PAD).long(), labels=labels_of(ids_BL)
        ).loss  # transformers' mean over all target tokens of the whole batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(RECIPE, step, 5)
        optimizer.step()
    for mine, plain in zip(trained.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=2e-5)


def test_the_micro_batch_changes_rounding_only(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", dropout=0.0, micro_batch=4)
    single = trainer(tmp_path / "single", dropout=0.0, micro_batch=1)
    first, second = whole.run(), single.run()
    assert first.best_validation_nll == pytest.approx(second.best_validation_nll, abs=1e-4)
    for a, b in zip(whole.model.parameters(), single.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_validation_is_the_mean_over_target_tokens(tmp_path: Path) -> None:
    done = trainer(tmp_path, dropout=0.0)
    result = done.run()
    rows_BL = torch.from_numpy(PairRows().rows("validation").astype(np.int64))
    with torch.no_grad():
        output = done.model.eval()(
            input_ids=rows_BL[:, :S], attention_mask=(rows_BL[:, :S] != PAD).long(), labels=labels_of(rows_BL)
        )
    assert done.history[-1]["nll"] == pytest.approx(float(output.loss), abs=1e-5)
    assert result.step == 5


@pytest.mark.parametrize("parametrization", [None, "scaled_softplus"])
def test_resumed_training_equals_uninterrupted_training(parametrization: str | None, tmp_path: Path) -> None:
    train(tmp_path / "whole", parametrization=parametrization)
    while not train(tmp_path / "parts", parametrization=parametrization, budget=Budget(Fraction("0.3"))).complete:
        pass
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_lack_of_memory_halves_the_micro_batch_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = trainer(tmp_path, dropout=0.0, micro_batch=4)
    forward: Callable[..., Any] = limited.model.forward  # type: ignore[assignment]

    def scarce(*args: Any, **inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise MemoryError("out of memory")
        return forward(*args, **inputs)

    monkeypatch.setattr(limited.model, "forward", scarce)
    result = limited.run()
    assert [entry["micro_batch"] for entry in result.micro_batches] == [2]
    free = trainer(tmp_path / "free", dropout=0.0, micro_batch=2)
    assert free.run().best_validation_nll == pytest.approx(result.best_validation_nll, abs=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("parametrization", [None, "scaled_softplus"])
def test_two_processes_train_on_pairs_what_one_does(tmp_path: Path, parallel: str, parametrization: str | None) -> None:
    """Their shares have different numbers of target tokens; each is weighed as the whole batch weighs it."""
    recipe = RECIPE.model_copy(update={"parallel": parallel})
    train(tmp_path / "one", parametrization=parametrization)
    done = together(2, lambda team: train(tmp_path / "two", parametrization=parametrization, recipe=recipe, team=team))
    assert done == [0, 0]
    ours, theirs = (records.JsonLines(tmp_path / at / "train.arm.jsonl").read() for at in ("two", "one"))
    for name in ("loss", "grad_norm", "validation_nll"):
        mine, wanted = ([line[name] for line in lines if name in line] for lines in (ours, theirs))
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, err_msg=name)
