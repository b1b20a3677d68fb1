"""A monotone activation in the place of a model's own: certified, and taken for no other one by whoever loads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from isotone.constraint import certify, constrain, fold
from isotone.constraint.activations import MONOTONE, MonotoneGELU, monotonicity_of
from isotone.constraint.feed_forward import architecture_of_model
from isotone.constraint.replacement import MARK, activations_of, replace_activation
from isotone.errors import IsotoneError, UsageError
from isotone.models import load_model, save_model

NAMES = ("gpt_neox", "gpt2", "opt", "arcee", "llama", "gemma2", "t5", "t5_gated")
"""Every name of the key in config.json, with and without a gate."""


def plain(model: Any) -> Any:
    """What transformers loads such a model with."""
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_monotone_gelu_is_gelu_right_of_its_minimum_and_never_falls(dtype: torch.dtype) -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64).to(dtype)
    y = MonotoneGELU()(x)
    assert (y.diff() >= 0).all()
    right = x >= -0.75
    assert torch.equal(y[right], nn.functional.gelu(x[right]))
    assert float(y[0]) == pytest.approx(-0.17, abs=1e-3)
    assert (y[~right] == y[0]).all()
    minimum = torch.tensor(-0.7517915, dtype=torch.float64)
    assert minimum <= MonotoneGELU.FROM  # else a decreasing piece would be left


@pytest.mark.parametrize("name", MONOTONE)
def test_offered_activations_are_certified_on_all_of_r(name: str) -> None:
    assert monotonicity_of(MONOTONE[name]()).everywhere


@pytest.mark.parametrize("name", NAMES)
def test_relu_in_all_blocks_needs_no_isotone(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    constrain(model, architecture_of_model(model).widest_scope, "projection", "relu", activation="relu")
    expected = logits(fold(model))
    save_model(model, None, tmp_path / "x")
    assert torch.equal(logits(plain(model).from_pretrained(tmp_path / "x")), expected)
    assert not (tmp_path / "x" / "README.md").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("activation", "layers"), [("monotone_gelu", None), ("monotone_gelu", [1]), ("relu", [0])])
def test_what_transformers_has_no_name_for_is_refused_by_it_and_read_by_isotone(
    name: str, activation: str, layers: list[int] | None, tmp_path: Path
) -> None:
    model = tiny_model(name)
    if activation == "relu" and activations_of(model)[0] is nn.ReLU:
        return
    scope = architecture_of_model(model).widest_scope
    constrain(model, scope, "projection", "relu", layers=layers, activation=activation)
    expected = logits(fold(model))
    save_model(model, None, tmp_path / "x")
    with pytest.raises(KeyError, match=f"isotone:{activation}"):
        plain(model).from_pretrained(tmp_path / "x")
    assert "isotone.load_model" in (tmp_path / "x" / "README.md").read_text()
    reloaded = load_model(str(tmp_path / "x"))
    assert activations_of(reloaded) == activations_of(model)
    assert torch.equal(logits(reloaded), expected)
    save_model(reloaded, None, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "x" / "config.json").read_bytes()


def test_a_smooth_activation_becomes_strict_by_being_replaced(tmp_path: Path) -> None:
    verdicts = {}
    for activation in (None, "monotone_gelu", "relu"):
        model = tiny_model("arcee", hidden_act="gelu")
        constrain(model, "mlp_both", "projection", "relu", activation=activation)
        save_model(fold(model), None, tmp_path / str(activation))
        verdicts[activation] = certify(tmp_path / str(activation)).verdict
    assert verdicts == {None: "local", "monotone_gelu": "strict", "relu": "strict"}


def test_architectures_whose_configuration_cannot_say_it_are_refused() -> None:
    with pytest.raises(UsageError, match=r"constraint.activation: the activation of bloom is fixed in its code"):
        constrain(tiny_model("bloom"), activation="relu")


def test_a_refused_initialization_leaves_activation_and_configuration_as_they_were() -> None:
    model = tiny_model("arcee", hidden_act="gelu")
    before, config = activations_of(model), model.config.to_dict()
    with pytest.raises(UsageError, match="RMSNorm"):
        constrain(model, "mlp_both", "projection", "shift", activation="monotone_gelu")
    assert (activations_of(model), model.config.to_dict()) == (before, config)


def test_two_different_replacements_in_one_model_are_refused_and_equal_ones_add_up() -> None:
    model = tiny_model("gpt2")
    replace_activation(model, "monotone_gelu", [0])
    with pytest.raises(UsageError, match=r"starts from a model with monotone_gelu in blocks \[0\]"):
        replace_activation(model, "relu", [1])
    replace_activation(model, "monotone_gelu", [1])
    assert getattr(model.config, MARK) == {"name": "monotone_gelu", "layers": None, "elsewhere": "gelu_new"}
    replace_activation(model, "relu")
    assert not hasattr(model.config, MARK)
    assert model.config.activation_function == "relu"


def test_an_export_with_another_activation_than_the_model_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2")
    replace_activation(model, "monotone_gelu")
    for network in model.transformer.h:
        network.mlp.act = nn.ReLU()
    with pytest.raises(IsotoneError, match="the activations are others"):
        save_model(model, None, tmp_path / "x")
    assert not list(tmp_path.iterdir())
