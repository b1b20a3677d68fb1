"""Several processes train what one trains: the same rows, the same curve, at any number, through any interruption."""

import logging
import os
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isotone import records
from isotone.config import Distill
from isotone.constraint import constrain
from isotone.errors import DiskFullError
from isotone.interruption import StopFlag
from isotone.training import Budget, load_weights, loop, read_checkpoint
from isotone.training.distributed import BUCKET_BYTES, Team, _buckets
from training.processes import together
from training.tiny_run import RECIPE, outcome, tiny_model, train, trainer

pytestmark = pytest.mark.integration
ARMS = [None, "scaled_softplus", "projection", "sign_frozen"]
RECIPES = {parallel: RECIPE.model_copy(update={"parallel": parallel}) for parallel in ("ddp", "fsdp")}
HALF = Fraction("0.5")


def curve(folder: Path) -> list[dict[str, float]]:
    return records.JsonLines(folder / "train.arm.jsonl").read()


def assert_same_curve(folder: Path, expected: Path, rtol: float = 1e-5) -> None:
    found, wanted = curve(folder), curve(expected)
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for name in ("step", "loss", "grad_norm", "lr", "validation_nll"):
        mine, theirs = ([line[name] for line in lines if name in line] for lines in (found, wanted))
        np.testing.assert_allclose(mine, theirs, rtol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Folders in which one process trained each arm."""
    folders = {arm: tmp_path_factory.mktemp(str(arm)) for arm in ARMS}
    for arm, folder in folders.items():
        assert train(folder, arm).complete
    return folders


@pytest.mark.parametrize("parallel", RECIPES)
@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_have_the_loss_curve_of_one(
    tmp_path: Path, alone: dict[str | None, Path], arm: str | None, parallel: str
) -> None:
    def work(team: Team) -> None:
        a_trainer = trainer(tmp_path, arm, RECIPES[parallel], team=team)
        assert a_trainer.run().complete
        assert a_trainer.constraint is None or a_trainer.constraint.holds()

    assert together(2, work) == [0, 0]
    assert_same_curve(tmp_path, alone[arm])


@pytest.mark.parametrize("parallel", RECIPES)
def test_two_processes_anneal_what_one_does(tmp_path: Path, parallel: str) -> None:
    def work(team: Team) -> None:
        a_trainer = trainer(tmp_path / "two", "projection", RECIPES[parallel], team=team, anneal=0.5)
        assert a_trainer.run().complete
        assert a_trainer.constraint.slack == 0
        assert a_trainer.constraint.holds()

    train(tmp_path / "one", "projection", anneal=0.5)
    assert together(2, work) == [0, 0]
    assert_same_curve(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("parallel", RECIPES)
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_two_processes_distill_what_one_does(tmp_path: Path, parallel: str, weight: float) -> None:
    """At weight 1 the head learns nothing while blocks are matched; the teacher is divided where the model is."""
    distill = Distill(blocks=0.3, logits=0.4, weight=weight)
    recipe = RECIPES[parallel].model_copy(update={"distill": distill})
    options: dict[str, Any] = {"recipe": recipe, "teacher": lambda: tiny_model(dropout=0.0)}
    train(tmp_path / "one", "projection", **options)
    assert together(2, lambda team: train(tmp_path / "two", "projection", team=team, **options)) == [0, 0]
    assert_same_curve(tmp_path / "two", tmp_path / "one", rtol=1e-4)
    for name in ("blocks", "logits"):
        ours, theirs = ([line[name] for line in curve(tmp_path / at) if name in line] for at in ("two", "one"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("parallel", RECIPES)
def test_more_processes_than_micro_batches_change_rounding_only(tmp_path: Path, parallel: str) -> None:
    """Four processes with one row each, where a micro-batch has two; and a validation that does not divide by four."""
    train(tmp_path / "one", dropout=0.0)
    options: dict[str, Any] = {"recipe": RECIPES[parallel], "dropout": 0.0}
    assert together(4, lambda team: train(tmp_path / "four", team=team, **options)) == [0, 0, 0, 0]
    assert_same_curve(tmp_path / "four", tmp_path / "one", rtol=1e-4)


@pytest.mark.parametrize("parallel", RECIPES)
def test_one_then_two_then_one_process_see_the_same_rows(
    tmp_path: Path, alone: dict[str | None, Path], parallel: str
) -> None:
    def part(name: str, budget: Budget | None = None) -> Callable[[Team], None]:
        def work(team: Team) -> None:
            a_trainer = trainer(tmp_path, "scaled_softplus", RECIPES[parallel], team=team, budget=budget)
            note_rows(a_trainer, tmp_path / f"{name}.rows.{team.rank}")
            a_trainer.run()

        return work

    assert together(1, part("first", Budget(Fraction("0.3")))) == [0]
    assert together(2, part("second", Budget(Fraction("0.4")))) == [0, 0]
    assert together(1, part("third")) == [0]
    assert_same_curve(tmp_path, alone["scaled_softplus"])
    history = records.JsonLines(tmp_path / "checkpoints" / "micro_batch.arm.jsonl").read()
    assert [(line["step"], line["processes"], line["parallel"]) for line in history] == [(4, 2, parallel), (9, 1, None)]
    expected = [[step, row] for step in range(11) for row in trainer(tmp_path).batches.at(step).tolist()]
    assert noted(tmp_path) == sorted(expected)


def note_rows(a_trainer: loop.Trainer, path: Path) -> None:
    """Write down, in a process of its own, which rows each pass of training reads."""
    real = loop.token_nll

    def noting(model: torch.nn.Module, ids_BL: torch.Tensor, **labels: Any) -> torch.Tensor:
        if model.training:
            records.JsonLines(path).append({"read": [[a_trainer.step, row] for row in ids_BL.tolist()]})
        return real(model, ids_BL, **labels)

    loop.token_nll = noting  # type: ignore[assignment]


def noted(folder: Path) -> list[list[Any]]:
    lines = [line for path in folder.glob("*.rows.*") for line in records.JsonLines(path).read()]
    return sorted(row for line in lines for row in line["read"])


@pytest.mark.parametrize("arm", ["scaled_softplus", "projection", "sign_frozen"])
def test_one_process_loads_what_two_wrote_in_parts(tmp_path: Path, arm: str) -> None:
    def work(team: Team) -> None:
        a_trainer = trainer(tmp_path, arm, RECIPES["fsdp"], team=team)
        a_trainer.run()
        optimizer = loop.optimizer_tensors(a_trainer.optimizer, a_trainer.trainable)
        tensors = {**dict(a_trainer.model.named_parameters()), **optimizer}
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
        if team.is_first:
            (tmp_path / "whole").write_bytes(records.tensors_to_bytes(whole))

    assert together(2, work) == [0, 0]
    whole, model = records.tensors_from_file(tmp_path / "whole"), tiny_model()
    last = tmp_path / "checkpoints" / "arm" / "step-00000011"
    load_weights(last, model, constrain(model, "mlp_both", arm, "unchanged" if arm == "sign_frozen" else "absolute"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.pop(name)), name
    optimizer = read_checkpoint(last).optimizer()
    assert optimizer.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in optimizer.items())
    assert len(list(last.rglob("*.safetensors"))) == 4  # two kinds, two processes
    assert not [p for p in last.rglob("*") if p.is_file() and p.suffix not in (".safetensors", ".json")]


def test_large_shards_are_split_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotone.training.checkpoint.SHARD_BYTES", 5000)
    recipe = RECIPES["fsdp"]
    assert together(2, lambda team: train(tmp_path, recipe=recipe, team=team, budget=Budget(HALF))) == [0, 0]
    assert len(list(tmp_path.glob("checkpoints/arm/step-00000006/model/*.safetensors"))) > 4
    assert train(tmp_path).complete


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", RECIPES)
def test_a_killed_process_ends_the_others_and_all_continue(
    tmp_path: Path, alone: dict[str | None, Path], parallel: str
) -> None:
    def killed(team: Team) -> None:
        def kill(step: int, text: str) -> None:
            if (team.rank, step) == (1, 7):
                os.kill(os.getpid(), signal.SIGKILL)

        train(tmp_path, recipe=RECIPES[parallel], team=team, progress=kill)

    assert together(2, killed) == [75, -signal.SIGKILL]
    newest = sorted(p.name for p in (tmp_path / "checkpoints" / "arm").glob("step-*"))[-1]
    assert newest == "step-00000006"
    assert (
        tmp_path / "checkpoints/arm/attempt.json"
    ).exists()  # it may have been killed for memory: the next start looks
    assert together(2, lambda team: train(tmp_path, recipe=RECIPES[parallel], team=team)) == [0, 0]
    assert_same_curve(tmp_path, alone[None])


@pytest.mark.parametrize(
    ("parallel", "at", "saved"),
    [("ddp", 5, "step-00000005"), ("fsdp", 5, "step-00000005"), ("ddp", 4, "step-00000004.unvalidated")],
)
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path, parallel: str, at: int, saved: str) -> None:
    """Between two steps, and when a validation begins."""

    def signalled(team: Team) -> None:
        stop = StopFlag()
        stop.install()

        def signal_myself(step: int, text: str) -> None:
            if (team.rank, step) == (1, at):
                os.kill(os.getpid(), signal.SIGUSR1)

        result = train(tmp_path, recipe=RECIPES[parallel], team=team, stop=stop, progress=signal_myself)
        assert (result.complete, result.step, result.checkpoints["last"]) == (False, at, saved)

    assert together(2, signalled) == [0, 0]


@pytest.mark.parametrize("parallel", RECIPES)
def test_interrupted_processes_end_as_uninterrupted_ones_bit_for_bit(tmp_path: Path, parallel: str) -> None:
    def part(folder: str, budget: Budget | None = None) -> list[int]:
        arguments: dict[str, Any] = {"recipe": RECIPES[parallel], "budget": budget}
        return together(2, lambda team: train(tmp_path / folder, "scaled_softplus", team=team, **arguments))

    assert part("once") == [0, 0]
    for _ in range(2):
        assert part("twice", Budget(HALF)) == [0, 0]
    last = Path("checkpoints/arm/step-00000011")
    for file in (tmp_path / "once" / last).rglob("*.*"):
        if file.is_file():
            twin = tmp_path / "twice" / file.relative_to(tmp_path / "once")
            assert file.read_bytes() == twin.read_bytes(), file.name
    assert curve(tmp_path / "once") == curve(tmp_path / "twice")


def test_a_full_disk_in_one_process_loses_nothing(tmp_path: Path, alone: dict[str | None, Path]) -> None:
    def full(team: Team) -> None:
        real = records.write_part

        def write(path: Path, data: Any) -> dict[str, Any]:
            if team.rank == 1 and ".step-00000006" in str(path):
                raise DiskFullError("no space left")
            return real(path, data)

        records.write_part = write  # type: ignore[assignment]
        train(tmp_path, recipe=RECIPES["fsdp"], team=team)

    assert together(2, full) == [75, 75]
    assert together(2, lambda team: train(tmp_path, recipe=RECIPES["fsdp"], team=team)) == [0, 0]
    assert_same_curve(tmp_path, alone[None])


def test_a_corrupted_shard_is_named_and_the_checkpoint_before_it_used(
    tmp_path: Path, alone: dict[str | None, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert together(2, lambda team: train(tmp_path, recipe=RECIPES["fsdp"], team=team, budget=Budget(HALF))) == [0, 0]
    shard = sorted(tmp_path.glob("checkpoints/arm/step-00000006/optimizer/*"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path).complete
    assert shard.name in caplog.text
    assert_same_curve(tmp_path, alone[None])


# --- memory, and what must not happen silently -----------------------------------------------------------------------


def limit_rows(limit: int, from_call: int = 0) -> None:
    """Let the n-th and later forward passes of this process fail over so many rows."""
    real, calls = loop.token_nll, []

    def limited(model: torch.nn.Module, ids: torch.Tensor, **labels: Any) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) > from_call and len(ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return real(model, ids, **labels)

    loop.token_nll = limited  # type: ignore[assignment]


@pytest.mark.parametrize("from_call", [0, 4, 5])
def test_lack_of_memory_in_one_process_halves_the_micro_batch_of_all(tmp_path: Path, from_call: int) -> None:
    """In the first pass of a step, and in the first of a validation (which is the fifth, at step 4)."""
    train(tmp_path / "whole", dropout=0.0)

    def work(team: Team) -> None:
        if team.rank == 1:
            limit_rows(1, from_call)
        result = train(tmp_path / "halved", dropout=0.0, team=team)
        assert [line["micro_batch"] for line in result.micro_batches] == [2, 1]

    assert together(2, work) == [0, 0]
    assert_same_curve(tmp_path / "halved", tmp_path / "whole", rtol=1e-4)


def test_lack_of_memory_of_a_divided_model_is_recorded_and_the_next_start_has_less(tmp_path: Path) -> None:
    """The others wait within a pass and cannot be told: they end, and all start again with half the micro-batch."""

    def work(team: Team) -> None:
        limit_rows(1, 5 if team.rank == 1 else 99)
        train(tmp_path, recipe=RECIPES["fsdp"], team=team)

    def again(team: Team) -> None:
        limit_rows(1)
        assert train(tmp_path, recipe=RECIPES["fsdp"], team=team).complete

    codes = together(2, work)
    assert codes[1] == 75
    assert codes[0] in (1, 75)
    assert together(2, again) == [0, 0]


def test_replicas_that_differ_are_noticed_before_anything_is_saved(tmp_path: Path) -> None:
    def work(team: Team) -> None:
        a_trainer = trainer(tmp_path, team=team)

        def disturb(step: int, text: str) -> None:
            if (team.rank, step) == (1, 4):
                with torch.no_grad():
                    next(a_trainer.model.parameters())[0, 0] += 1e-3

        a_trainer.progress = disturb
        a_trainer.run()

    assert together(2, work) == [1, 1]
    assert not (tmp_path / "checkpoints/arm/step-00000006").exists()


def test_a_number_of_processes_that_does_not_divide_a_batch_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert together(3, lambda team: train(tmp_path, team=team)) == [2, 2, 2]
    said = capfd.readouterr().out
    assert "training.micro_batch × training.accumulation is 4 rows, which 3 processes cannot share evenly" in said


def test_gradients_travel_in_order_in_messages_of_bounded_size() -> None:
    sizes = [BUCKET_BYTES // 16, BUCKET_BYTES // 8, BUCKET_BYTES // 2, 1, 1]
    gradients = [torch.empty(size, device="meta") for size in sizes] + [torch.empty(1, dtype=torch.bfloat16)]
    assert [len(bucket) for bucket in _buckets(gradients)] == [2, 1, 2, 1]
    assert [g for bucket in _buckets(gradients) for g in bucket][2] is gradients[2]


def test_a_single_process_makes_no_group(tmp_path: Path) -> None:
    train(tmp_path)
    assert not torch.distributed.is_initialized()
    assert outcome(tmp_path)
    assert not (tmp_path / "checkpoints" / "micro_batch.arm.jsonl").exists()
