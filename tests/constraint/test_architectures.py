import subprocess
import sys

import pytest
import torch
from tiny_models import LAYER_NORM, MODELS, tiny_model

from isotone.constraint import ARCHITECTURES, constrain, resolve_recipe
from isotone.constraint.architectures import SCOPES
from isotone.constraint.feed_forward import bias_of, constrained_modules, feed_forwards, probe_tokens
from isotone.constraint.tracing import Norm, require_claimed_maps, trace_norms
from isotone.errors import UsageError


@pytest.mark.parametrize("name", MODELS)
def test_table_agrees_with_the_models_of_transformers(name: str) -> None:
    """Norm kind, gate, biases and activation key, as the table says them, are what a forward pass finds."""
    model = tiny_model(name)
    row = ARCHITECTURES[model.config.model_type]
    networks = feed_forwards(model)
    assert len(networks) == 2
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
    row = ARCHITECTURES[model.config.model_type]
    for scope in SCOPES:
        if scope in row.scopes:
            assert len(constrained_modules(model, scope)) == 2 * len(row.scopes[scope])
        else:
            with pytest.raises(UsageError, match=f"'{scope}' matches nothing.*allowed: {', '.join(row.scopes)}"):
                constrain(model, scope)


def test_unknown_architecture_lists_the_known_ones() -> None:
    model = tiny_model("gpt2")
    model.config.model_type = "mamba"
    with pytest.raises(UsageError, match=r"'mamba' is not known; known are arcee, .*phi, qwen2"):
        constrain(model)


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
    assert resolve_recipe("recommended", "rms_norm").parametrization == "projection"
    with pytest.raises(UsageError, match="allowed: published, published_bf16, recommended"):
        resolve_recipe("publishd", "layer_norm")


def test_table_and_recipes_load_without_torch() -> None:
    code = "import sys; from isotone.constraint import ARCHITECTURES, resolve_recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
