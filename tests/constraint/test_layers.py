"""A constraint can be about some blocks only; what it leaves out stays as it is, and the certificate says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_pairs import pair_tokenizer
from typer.testing import CliRunner

from isotone.cli import app
from isotone.constraint import certify, constrain, fold
from isotone.constraint.layers import resolve_layers
from isotone.errors import UsageError
from isotone.models import load_model, save_model


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (None, (0, 1, 2, 3)),
        ([2, 0, 2], (0, 2)),
        ([-1], (3,)),
        ("first:3", (0, 1, 2)),
        ("last:1", (3,)),
        ("1:3", (1, 2)),
        (":", (0, 1, 2, 3)),
        ("-2:", (2, 3)),
    ],
)
def test_every_form_means_the_blocks_that_it_says(layers: Any, found: tuple[int, ...]) -> None:
    assert resolve_layers(layers, 4) == found


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "there is no block 4; the model has 4, 0 to 3"),
        ([-5], "there is no block -5"),
        ("first:5", "the model has 4 blocks"),
        ("first:0", "means no block"),
        ("3:2", "means no block"),
        ([], "means no block"),
        ("odd", "allowed: a list of indices, first:N, last:N, or a slice"),
    ],
)
def test_blocks_that_are_not_there_are_named(layers: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"constraint.layers: .*{message}"):
        resolve_layers(layers, 4)


def test_only_the_named_blocks_are_constrained_certified_and_kept_so(tmp_path: Path) -> None:
    """A real step moves all blocks; block 0 then has negative weights, and the folder's certificate is of block 1."""
    model, free = tiny_model("arcee"), tiny_model("arcee")
    constraint = constrain(model, "mlp_both", "projection", "relu", layers="last:1")
    assert {name.split(".")[2] for name in constraint.names} == {"1"}
    assert torch.equal(
        model.get_parameter("model.layers.0.mlp.up_proj.weight"), free.model.layers[0].mlp.up_proj.weight
    )
    optimizer = torch.optim.AdamW(constraint.trainable(model).values(), lr=0.1)
    constraint.attach(optimizer)
    model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    assert constraint.holds()
    save_model(fold(model), None, tmp_path / "x")
    certificate = certify(tmp_path / "x")
    assert (certificate.verdict, certificate.layers) == ("strict", (1,))
    assert certificate.to_dict()["layers"] == [1]
    everywhere = certify(tmp_path / "x", layers=":")
    assert everywhere.verdict == "violated"
    assert "layers" not in certify(constrain_all()).to_dict()
    tampered = load_model(str(tmp_path / "x"))
    with torch.no_grad():
        tampered.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = -1e-6
    assert certify(tampered).verdict == "violated"


def constrain_all() -> Any:
    model = tiny_model("arcee")
    constrain(model, "mlp_both", "projection", "relu")
    return fold(model)


def test_blocks_of_an_encoder_come_before_those_of_the_decoder() -> None:
    for layers, stacks in (("first:2", {"encoder"}), ("last:2", {"decoder"}), ("1:3", {"encoder", "decoder"})):
        constraint = constrain(tiny_model("t5"), "mlp_both", "projection", "relu", layers=layers)
        assert {name.split(".")[0] for name in constraint.names} == stacks


def test_the_command_line_takes_blocks_and_an_activation(tmp_path: Path) -> None:
    save_model(tiny_model("arcee", hidden_act="silu"), pair_tokenizer(), tmp_path / "model")
    words = ["constrain", str(tmp_path / "model"), "--parametrization", "projection", "--initialization", "relu"]
    words += ["--activation", "relu", "--layers"]
    for layers, found in (("0,-1", (0, 1)), ("last:1", (1,))):
        out = tmp_path / f"x{len(found)}"
        done = CliRunner().invoke(app, [*words, layers, "--out", str(out)])
        assert "strict" in done.output
        assert certify(out).layers == found
    assert "isotone:relu" in (tmp_path / "x1" / "config.json").read_text()


@pytest.mark.parametrize("initialization", ["shift", "calibrated_shift", "nnls"])
def test_initializations_of_the_whole_model_leave_the_other_blocks_alone(initialization: str) -> None:
    model, free = tiny_model("gpt_neox"), tiny_model("gpt_neox")
    rows = torch.arange(48).reshape(3, 16)
    constrain(model, "mlp_both", "projection", initialization, calibration_rows_NL=rows, layers=[0])
    for name, parameter in free.gpt_neox.layers[1].named_parameters():
        assert torch.equal(parameter, model.gpt_neox.layers[1].get_parameter(name)), name
    assert (model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight >= 0).all()
