import subprocess
import sys

import pytest
import torch
from tiny_models import LAYER_NORM, MODELS, tiny_model
from transformers import PreTrainedModel, T5EncoderModel

from isotone.constraint import certify, constrain, resolve_recipe
from isotone.constraint.architectures import SCOPES
from isotone.constraint.feed_forward import (
    architecture_of_model,
    bias_of,
    constrained_modules,
    feed_forwards,
    probe_tokens,
)
from isotone.constraint.tracing import Norm, require_claimed_maps, trace_norms
from isotone.errors import UsageError


def num_networks(model: PreTrainedModel) -> int:
    """Return how many blocks a tiny model has, an encoder's included."""
    return model.config.num_hidden_layers + (model.config.num_decoder_layers if model.config.is_encoder_decoder else 0)


@pytest.mark.parametrize("name", MODELS)
def test_table_agrees_with_the_models_of_transformers(name: str) -> None:
    """Norm kind, gate, biases and activation key, as the table says them, are what a forward pass finds."""
    model = tiny_model(name)
    row = architecture_of_model(model)
    networks = feed_forwards(model)
    assert len(networks) == num_networks(model)
    for network, norm in zip(networks, trace_norms(model, networks, probe_tokens(model)), strict=True):
        assert isinstance(norm, Norm), norm
        assert norm.kind == row.norm
        assert norm.name.startswith(network.block)
        assert (network.gate is not None) == row.gated
        expected = {"always": True, "never": False}.get(row.bias, getattr(model.config, row.bias, None))
        assert (bias_of(network.up) is not None) == (bias_of(network.down) is not None) == expected
    assert hasattr(model.config, row.activation_key) or row.model_type == "bloom"
    require_claimed_maps(model, networks, probe_tokens(model))


@pytest.mark.parametrize("name", MODELS)
def test_traced_gain_includes_the_convention_of_the_norm(name: str) -> None:
    """γ is 1 + weight in Gemma and weight elsewhere; found from outputs, not from the class."""
    model = tiny_model(name)
    for norm in trace_norms(model, feed_forwards(model), probe_tokens(model)):
        assert isinstance(norm, Norm)
        assert norm.one_plus_weight == name.startswith("gemma")
        stored = norm.module.get_parameter("weight").detach().double()
        torch.testing.assert_close(norm.gain, stored + 1 if norm.one_plus_weight else stored)


@pytest.mark.parametrize("name", MODELS)
def test_each_scope_of_an_architecture_matches_and_the_others_are_listed(name: str) -> None:
    model = tiny_model(name)
    row = architecture_of_model(model)
    for scope in SCOPES:
        if scope in row.scopes:
            assert len(constrained_modules(model, scope)) == num_networks(model) * len(row.scopes[scope])
        else:
            with pytest.raises(UsageError, match=f"'{scope}' matches nothing.*allowed: {', '.join(row.scopes)}"):
                constrain(model, scope)


def test_unknown_architecture_lists_the_known_ones() -> None:
    model = tiny_model("gpt2")
    model.config.model_type = "mamba"
    with pytest.raises(UsageError, match=r"'mamba' is not known; known are arcee, .*phi, qwen2, t5, t5_gated"):
        constrain(model)


def test_a_t5_without_the_expected_networks_is_named_with_what_was_expected() -> None:
    gated = tiny_model("t5_gated")
    gated.config.feed_forward_proj = "relu"
    with pytest.raises(
        UsageError, match=r"not laid out like an encoder-decoder t5 .*`wi`.*layer\.2\.DenseReluDense\.wi,"
    ):
        constrain(gated)
    with pytest.raises(UsageError, match=r"T5EncoderModel is not laid out .*decoder"):
        constrain(T5EncoderModel(tiny_model("t5").config))


def test_both_sides_of_a_t5_are_constrained_and_only_the_ungated_one_is_proved_monotone() -> None:
    plain, gated = tiny_model("t5"), tiny_model("t5_gated")
    names = constrain(plain, "mlp_both").names
    assert names[0] == "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    assert names[-1] == "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    constrain(gated, "gated_all")
    assert (certify(plain).verdict, certify(plain).order) == ("strict", "basis-dependent")
    assert certify(gated).verdict == "violated"
    with torch.no_grad():
        plain.encoder.block[1].layer[1].DenseReluDense.wo.weight[3, 5] = -1e-4
    assert certify(plain).reasons[0].startswith("encoder.block.1.layer.1.DenseReluDense.wo.weight has 1 of 512")


def test_a_network_that_computes_something_else_is_refused() -> None:
    model = tiny_model("gpt_neox")
    networks = feed_forwards(model)
    networks[1].down.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(UsageError, match=r"layers\.1 does not compute what a gpt_neox computes"):
        require_claimed_maps(model, networks, probe_tokens(model))


@pytest.mark.parametrize("name", LAYER_NORM)
def test_shared_norms_name_all_their_readers(name: str) -> None:
    model = tiny_model(name)
    norm = trace_norms(model, feed_forwards(model), probe_tokens(model))[0]
    assert isinstance(norm, Norm)
    assert len(norm.readers) == (4 if name in ("phi", "gptj") else 1)


def test_recipes_mean_what_the_documents_say() -> None:
    published = resolve_recipe("published", "layer_norm")
    assert (published.parametrization, published.initialization, published.pure_bf16) == ("softplus", "absolute", False)
    assert resolve_recipe("published_bf16", "rms_norm").pure_bf16
    assert resolve_recipe("recommended", "layer_norm").initialization == "shift"
    for kind, initialization in (("rms_norm", "nnls"), ("rotatable", "rotated_nnls")):
        recommended = resolve_recipe("recommended", kind)  # type: ignore[arg-type]
        assert (recommended.parametrization, recommended.initialization) == ("projection", initialization)
    with pytest.raises(UsageError, match="allowed: published, published_bf16, recommended"):
        resolve_recipe("publishd", "layer_norm")


def test_table_and_recipes_load_without_torch() -> None:
    code = "import sys; from isotone.constraint import ARCHITECTURES, resolve_recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
