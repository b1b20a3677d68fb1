"""The sizes that a plan counts with are those of the real models, to the last parameter."""

from pathlib import Path

import pytest
from tiny_models import MODELS, tiny_model

from isotone import records
from isotone.config import Model
from isotone.config_io import list_presets, load_experiment
from isotone.constraint import constrain
from isotone.constraint.feed_forward import architecture_of_model
from isotone.errors import UsageError
from isotone.planning.shape import read_shape, shape_of

PUBLISHED = {
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "google-t5/t5-small": 60_506_624,
    "google-t5/t5-base": 222_903_552,
    "google-t5/t5-large": 737_668_096,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_models_have_their_published_number_of_parameters(name: str) -> None:
    assert read_shape(Model(source=name)).num_parameters == PUBLISHED[name]


def test_every_preset_can_be_planned_without_a_network() -> None:
    assert all(read_shape(load_experiment(preset.name).model).layers for preset in list_presets())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_torch_counts_them(name: str) -> None:
    model = tiny_model(name)
    shape = shape_of(name, model.config.to_dict(), "test")
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "qwen2", "t5", "t5_gated"])
def test_constrained_weights_are_counted_as_constrain_takes_them(name: str) -> None:
    for scope in architecture_of_model(tiny_model(name)).scopes:
        model = tiny_model(name)
        shape = shape_of(name, model.config.to_dict(), "test")
        constraint = constrain(model, scope, "softplus", "absolute")
        assert shape.constrained(scope) == sum(master.numel() for master in constraint.parameters())


def test_an_unknown_model_is_answered_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"hf download nobody/knows config\.json"):
        read_shape(Model(source="nobody/knows"))


def test_a_folder_is_read(tmp_path: Path) -> None:
    records.write_json(tmp_path / "config.json", tiny_model("llama").config.to_dict())
    assert read_shape(Model(source=str(tmp_path))).model_type == "llama"
