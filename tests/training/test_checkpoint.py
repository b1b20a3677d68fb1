"""A checkpoint is used only if it is what was written and belongs to what is asked for; what is needed is kept."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from isotone import records
from isotone.constraint import constrain
from isotone.errors import IsotoneError, UsageError
from isotone.training import checkpoint as checkpoint_module
from isotone.training import load_weights, read_checkpoint, save_initial
from training.tiny_run import RECIPE, outcome, tiny_model, train, trainer


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run's folder after one epoch."""
    train(tmp_path)
    return tmp_path


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints" / "arm").glob("step-*"))


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_corrupted_newest_checkpoint_is_named_and_the_one_before_it_used(
    trained: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    before, expected = checkpoints(trained), outcome(trained)
    corrupt(trained / "checkpoints" / "arm" / "step-00000011" / name)
    with caplog.at_level(logging.WARNING):
        assert train(trained).complete
    assert "step-00000011" in caplog.text
    assert name in caplog.text
    assert checkpoints(trained) == [*before, "step-00000011.set-aside-1"]
    assert outcome(trained) == expected


def test_no_valid_checkpoint_is_an_error_and_stays_one(trained: Path) -> None:
    for path in (trained / "checkpoints" / "arm").glob("step-*"):
        corrupt(path / "model.safetensors")
    for _ in range(2):  # a second start must not take the emptied folder for a new one
        with pytest.raises(IsotoneError, match="--fresh"):
            train(trained)


def test_leftovers_of_kills_are_swept(trained: Path) -> None:
    arm = trained / "checkpoints" / "arm"
    shutil.copytree(arm / "step-00000011", arm / ".step-00000012.tmp")
    shutil.copytree(arm / "step-00000011", arm / ".step-00000003.removed")
    assert train(trained).complete
    assert not list(arm.glob(".step*"))


def test_the_last_two_the_best_and_the_start_are_kept(tmp_path: Path) -> None:
    values = {"lr": 0.3, "warmup": 1.0, "save_every_steps": 1, "validate_every_steps": 1}
    result = train(tmp_path, recipe=RECIPE.model_copy(update=values))  # the rate rises, and with it the loss
    assert result.best_step is not None
    assert result.best_step < 10
    assert checkpoints(tmp_path) == ["step-00000000", f"step-{result.best_step:08d}", "step-00000010", "step-00000011"]
    assert result.checkpoints == {"last": "step-00000011", "best": f"step-{result.best_step:08d}"}
    validations = [line for line in records.JsonLines(tmp_path / "train.arm.jsonl").read() if "validation_nll" in line]
    assert result.best_validation_nll == min(line["validation_nll"] for line in validations)


def test_keeping_only_named_ones_keeps_the_start(trained: Path) -> None:
    trainer(trained).checkpoints.keep_only({"step-00000011"})
    assert checkpoints(trained) == ["step-00000000", "step-00000011"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"identity": {"configuration": "another"}}, "configuration"),
        ({"identity": {}}, "configuration"),
        ({"seed": 2}, "seed"),
        ({"micro_batch": 1}, "micro-batch"),
        ({"autocast": True}, "autocast"),
        ({"recipe": RECIPE.model_copy(update={"epochs": 2.0})}, "steps"),
    ],
)
def test_a_resume_that_would_change_the_result_is_refused(trained: Path, options: dict, key: str) -> None:
    with pytest.raises(UsageError, match=f"made with {key}"):
        train(trained, **options)


def test_how_often_to_save_may_change(trained: Path) -> None:
    assert train(trained, recipe=RECIPE.model_copy(update={"save_every_steps": 1, "keep_last": 5})).complete


def test_another_constraint_is_refused(trained: Path) -> None:
    with pytest.raises(UsageError, match="constraint"):
        train(trained, "softplus")


def test_other_random_numbers_behind_the_same_seed_are_noticed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotone.training.batches.streams_fingerprint", lambda: "another generator")
    with pytest.raises(UsageError, match="other random numbers"):
        train(trained)


@pytest.mark.parametrize("parametrization", [None, "softplus", "scaled_softplus", "projection"])
def test_weights_are_loaded_into_another_model(tmp_path: Path, parametrization: str | None) -> None:
    a_trainer = trainer(tmp_path, parametrization)
    result = a_trainer.run()
    model = tiny_model()
    constraint = constrain(model, "mlp_both", parametrization, "absolute") if parametrization else None
    with torch.no_grad():  # whatever stood there before
        for parameter in model.parameters():
            parameter.add_(1)
    load_weights(tmp_path / "checkpoints" / "arm" / result.checkpoints["last"], model, constraint)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), a_trainer.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_start_is_where_training_begins(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    arm = tmp_path / "checkpoints" / "arm"
    path = save_initial(arm, model, identity={"stage": "constrain"})
    assert save_initial(arm, model, identity={"stage": "constrain"}) == path
    train(tmp_path)
    first = records.JsonLines(tmp_path / "train.arm.jsonl").read()[0]
    assert first["loss"] == pytest.approx(torch.tensor(64.0).log().item(), abs=1e-6)  # a uniform guess of 64 tokens
    with pytest.raises(UsageError, match="stage"):
        save_initial(arm, model, identity={"stage": "another"})


def test_a_corrupted_start_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_initial(tmp_path, tiny_model())
    corrupt(path / "model.safetensors")
    assert save_initial(tmp_path, tiny_model()) == path
    assert "set aside" in caplog.text
    assert read_checkpoint(path).state["step"] == 0


def test_large_tensors_are_split_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 5000)
    path = save_initial(tmp_path, model)
    assert len(list(path.glob("model*.safetensors"))) > 3
    other = tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_weights(path, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save_initial(tmp_path, tiny_model())
    model = tiny_model()
    model.set_output_embeddings(torch.nn.Linear(16, 65, bias=False))
    with pytest.raises(records.CorruptError, match=r"lm_head\.weight"):
        load_weights(path, model)


def test_a_checkpoint_holds_tensors_and_json_only(trained: Path) -> None:
    for path in (trained / "checkpoints" / "arm" / "step-00000011").iterdir():
        assert path.suffix in (".safetensors", ".json")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # pickles and torch.save's archives
