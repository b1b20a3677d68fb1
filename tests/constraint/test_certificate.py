import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LAYER_NORM, logits, tiny_model, tokens

from isotone.constraint import certify, constrain, fold
from isotone.constraint.activations import MonotoneGELU, monotonicity_of
from isotone.constraint.feed_forward import feed_forwards, matrix, probe_tokens
from isotone.constraint.tracing import Norm, trace_norms
from isotone.constraint.witness import find_witness
from isotone.errors import UsageError
from isotone.models import save_model


def monotone(name: str, scope: str = "mlp_both", **changes: Any) -> Any:
    """Return a folded model whose constrained weights are |W|, of a size that drives units into an activation's dip."""
    changes = {"init_std" if name.startswith("opt") else "initializer_range": 0.5} | changes
    model = tiny_model(name, **changes)
    constrain(model, scope, "projection", "absolute")
    return fold(model)


def mixed_gains(model: Any) -> Any:
    """Give the norms before the networks gains of both signs, so that their outputs are no antichain."""
    with torch.no_grad():
        for norm in trace_norms(model, feed_forwards(model), probe_tokens(model)):
            assert isinstance(norm, Norm)
            norm.module.get_parameter("weight")[::3] *= -1  # unbalanced: the signs alone sum to no 0
    return model


def test_relu_network_with_non_negative_weights_is_strict() -> None:
    certificate = certify(monotone("arcee"))
    assert certificate.verdict == "strict"
    assert certificate.weights == "nonneg"
    assert certificate.activation == {"name": "ReLU", "non_decreasing_on": "ℝ"}
    assert certificate.order == "basis-dependent"
    assert certificate.map == "u ↦ W2 σ(W1 u + b1) + b2"
    assert certificate.domain == "ℝ^d"


def test_squared_relu_is_strict() -> None:
    assert certify(monotone("arcee", hidden_act="relu2")).verdict == "strict"


@pytest.mark.parametrize("name", LAYER_NORM)
def test_layer_norm_model_is_vacuous(name: str) -> None:
    certificate = certify(monotone(name))
    assert (certificate.verdict, certificate.order, certificate.weights) == ("vacuous", "vacuous", "nonneg")
    assert "constrained or not" in certificate.reasons[0]


def test_tampered_sign_is_violated_and_named() -> None:
    model = monotone("arcee")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 4] = -1e-12
    certificate = certify(model)
    assert (certificate.verdict, certificate.weights) == ("violated", "mixed")
    assert certificate.reasons == (
        "model.layers.1.mlp.down_proj.weight has 1 of 512 entries that are negative or not finite",
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weight_that_is_no_number_is_violated(wrong: float) -> None:
    model = monotone("arcee")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = wrong
    assert certify(model).verdict == "violated"


def test_unconstrained_model_is_violated_even_where_the_order_is_vacuous() -> None:
    certificate = certify(tiny_model("gpt_neox"))
    assert (certificate.verdict, certificate.order) == ("violated", "vacuous")


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_new", "quick_gelu"])
def test_activation_that_dips_is_refuted_by_an_ordered_pair(activation: str) -> None:
    """All weights are non-negative; a pre-activation around the dip makes an output fall."""
    certificate = certify(monotone("arcee", hidden_act=activation))
    assert certificate.verdict == "violated"
    assert certificate.weights == "nonneg"
    assert "falls by" in certificate.reasons[-1]


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("scope", ["gated_updown", "gated_all"])
def test_gated_network_is_refuted_by_an_ordered_pair(scope: str, activation: str) -> None:
    """SwiGLU, and a ReLU gate: the ungated factor is negative somewhere."""
    certificate = certify(monotone("llama", scope, hidden_act=activation))
    assert certificate.verdict == "violated"
    assert certificate.scope == scope
    assert "gated product" in certificate.reasons[0]


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_layer_norm_with_gains_of_both_signs_is_judged_by_its_activation(activation: str) -> None:
    certificate = certify(mixed_gains(monotone("gpt_neox", hidden_act=activation)))
    assert certificate.order == "binding"
    assert certificate.verdict == ("strict" if activation == "relu" else "violated")


def test_gain_of_zero_makes_the_order_binding() -> None:
    model = monotone("gpt_neox", hidden_act="relu")
    with torch.no_grad():
        model.gpt_neox.layers[1].post_attention_layernorm.weight[5] = 0
    certificate = certify(model)
    assert (certificate.verdict, certificate.order) == ("strict", "binding")


@pytest.mark.parametrize("name", ["arcee", "gpt_neox", "t5"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_new"])
def test_units_that_cannot_reach_the_dip_are_certified_locally(name: str, activation: str) -> None:
    """Biases lift every reachable pre-activation over the dip; the bound is attained, so a little less will not do."""
    if name == "t5":
        model = monotone(name, feed_forward_proj=activation)
        certificate = certify(model)
        assert certificate.verdict == "violated"  # no bias lifts anything: x̂ = −√d w/‖w‖ is reached
        return
    changes: Any = {"mlp_bias": True} if name == "arcee" else {}
    model = monotone(name, hidden_act=activation, **changes)
    if name == "gpt_neox":
        mixed_gains(model)
    networks = feed_forwards(model)
    norms = trace_norms(model, networks, probe_tokens(model))
    with torch.no_grad():
        for network, norm in zip(networks, norms, strict=True):
            assert isinstance(norm, Norm)
            scaled = matrix(network.up).double() * norm.gain
            if norm.kind == "layer_norm":
                scaled = scaled - scaled.mean(1, keepdim=True)
            lowest = matrix(network.up).double() @ norm.offset - len(norm.gain) ** 0.5 * scaled.norm(dim=1)
            network.up.get_parameter("bias").copy_(-0.7 - lowest)
    certificate = certify(model)
    assert (certificate.verdict, certificate.weights) == ("local", "nonneg")
    assert certificate.domain == "outputs of the norm: γ ⊙ x̂ + β with ‖x̂‖ ≤ √d"
    with torch.no_grad():
        networks[1].up.get_parameter("bias")[0] -= 0.7 if activation == "silu" else 0.1
    assert certify(model).verdict in ("violated", "empirical")


def test_a_negative_weight_is_violated_even_where_units_stay_right_of_the_dip() -> None:
    model = monotone("arcee", hidden_act="gelu", mlp_bias=True)
    with torch.no_grad():
        for network in feed_forwards(model):
            network.up.get_parameter("bias").fill_(100.0)
        assert certify(model).verdict == "local"
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = -1e-9
    assert certify(model).verdict == "violated"


def test_a_local_certificate_survives_export_and_reload(tmp_path: Path) -> None:
    model = monotone("arcee", hidden_act="gelu", mlp_bias=True)
    with torch.no_grad():
        for network in feed_forwards(model):
            network.up.get_parameter("bias").fill_(100.0)
    save_model(model, None, tmp_path / "exported")
    assert certify(tmp_path / "exported") == certify(model)
    assert certify(model).fields["domain"].startswith("outputs of the norm")


def test_unknown_activation_proves_nothing() -> None:
    class Custom(torch.nn.ReLU):
        """A subclass may compute anything."""

    model = monotone("arcee")
    for layer in model.model.layers:
        layer.mlp.act_fn = Custom()
    certificate = certify(model)
    assert certificate.verdict == "empirical"
    assert certificate.activation["non_decreasing_on"] == "no"


def test_one_network_with_another_activation_is_noticed() -> None:
    model = monotone("arcee")
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert certify(model).verdict == "violated"


def test_networks_with_different_activations_are_strict_where_all_are_non_decreasing() -> None:
    model = monotone("arcee", hidden_act="gelu")
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    weak = certify(model)
    assert (weak.verdict, weak.activation) == (
        "violated",
        {"name": "GELUActivation, ReLU", "non_decreasing_on": "[-0.7517, ∞)"},
    )
    model.model.layers[0].mlp.act_fn = MonotoneGELU()
    strict = certify(model)
    assert (strict.verdict, strict.activation) == ("strict", {"name": "MonotoneGELU, ReLU", "non_decreasing_on": "ℝ"})


def test_scope_mlp_in_claims_the_hidden_units_only() -> None:
    certificate = certify(monotone("arcee", "mlp_in"))
    assert (certificate.verdict, certificate.map) == ("strict", "u ↦ σ(W1 u + b1)")
    assert certify(monotone("arcee", "mlp_in"), scope="mlp_both").verdict == "violated"


@pytest.mark.parametrize(
    ("name", "scope"), [("gpt_neox", "mlp_both"), ("gpt2", "mlp_both"), ("arcee", "mlp_in"), ("llama", "gated_updown")]
)
def test_exported_folder_certifies_the_same_from_disk(name: str, scope: str, tmp_path: Path) -> None:
    """The scope is read from the folder; the hash is over the same bytes."""
    model = tiny_model(name)
    constrain(model, scope, "scaled_softplus", "absolute")
    save_model(fold(model), None, tmp_path / "exported")
    from_disk = certify(tmp_path / "exported")
    assert from_disk == certify(model)
    assert from_disk.scope == scope
    assert json.loads(json.dumps(from_disk.to_dict()))["verdict"] == from_disk.verdict


def test_hash_changes_with_any_examined_number() -> None:
    model = monotone("arcee")
    first = certify(model).weights_hash
    assert certify(model).weights_hash == first
    with torch.no_grad():
        model.get_parameter("model.layers.0.post_attention_layernorm.weight")[0] += 1e-3
    assert certify(model).weights_hash != first


def test_certifying_changes_nothing() -> None:
    model = monotone("llama", "gated_all").train()
    before = logits(model.eval())
    model.train()
    certify(model)
    assert model.training
    assert torch.equal(logits(model.eval()), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["arcee", "gpt_neox"])
def test_witness_is_an_ordered_reachable_pair_that_falls(name: str) -> None:
    """Checked here from scratch: the order, the norm's range, and the drop."""
    model = monotone(name, hidden_act="gelu")
    if name == "gpt_neox":
        mixed_gains(model)
    network = feed_forwards(model)[0]
    norm = trace_norms(model, [network], tokens())[0]
    assert isinstance(norm, Norm)
    found = find_witness(network, norm, 16)
    assert found is not None
    assert (found.upper >= found.lower).all()
    for u in (found.lower, found.upper):
        x = (u - norm.offset) / norm.gain
        assert x.norm() < 16**0.5
        if norm.kind == "layer_norm":
            assert x.sum().abs() < 1e-9
    fall = network(found.lower)[found.output] - network(found.upper)[found.output]
    assert float(fall) == pytest.approx(found.drop, rel=1e-6)
    assert found.drop > 0


def test_intervals_of_activations_hold_numerically() -> None:
    from transformers.activations import ACT2FN
    from transformers.models.bloom.modeling_bloom import BloomGelu

    names = ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu", "silu", "swish"]
    for activation in [BloomGelu().eval(), *(ACT2FN[name] for name in names)]:
        least = monotonicity_of(activation).least
        assert least is not None
        assert (activation(torch.linspace(least, 12, 200_001, dtype=torch.float64)).diff() >= 0).all()
        left = activation(torch.tensor([least - 0.05, least - 0.01], dtype=torch.float64))
        assert left[1] < left[0]
    for name in ("relu", "relu2", "relu6", "sigmoid", "tanh", "linear"):
        assert monotonicity_of(ACT2FN[name]).everywhere
        assert (ACT2FN[name](torch.linspace(-12, 12, 100_001, dtype=torch.float64)).diff() >= 0).all()


# --- what must not be mistaken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [1.0, 0.03, 1e-4])
@pytest.mark.parametrize(("name", "kind"), [("arcee", "rms_norm"), ("llama", "rms_norm"), ("gpt_neox", "layer_norm")])
def test_norms_are_told_apart_in_any_precision_and_at_any_size_of_their_gains(
    name: str, kind: str, gain: float, dtype: torch.dtype
) -> None:
    """An RMSNorm that is taken for a LayerNorm would be certified vacuous, whatever its network does."""
    model = tiny_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.mul_(gain)
    model.to(dtype)
    for norm in trace_norms(model, feed_forwards(model), probe_tokens(model)):
        assert isinstance(norm, Norm)
        assert norm.kind == kind
        assert torch.equal(norm.gain, norm.module.get_parameter("weight").double())


def test_what_is_certified_is_what_is_stored_whatever_the_configuration_says(tmp_path: Path) -> None:
    """-1e-9 is -0 in fp16, which transformers would load here; evaluations and attacks read fp32."""
    model = monotone("arcee")
    with torch.no_grad():
        matrix(feed_forwards(model)[0].up)[0] = -1e-9
    save_model(model, None, tmp_path / "exported")
    (tmp_path / "exported" / "manifest.json").unlink()
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    (tmp_path / "exported" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert certify(tmp_path / "exported").verdict == "violated"


def test_a_half_precision_model_has_one_hash_in_memory_and_from_disk(tmp_path: Path) -> None:
    model = monotone("arcee").to(torch.bfloat16)
    save_model(model, None, tmp_path / "exported")
    assert certify(tmp_path / "exported").weights_hash == certify(model).weights_hash


def test_a_hook_that_turns_an_activation_around_is_refused() -> None:
    model = monotone("arcee")
    feed_forwards(model)[1].activation.register_forward_hook(lambda module, inputs, output: -output)
    with pytest.raises(UsageError, match=r"a hook on model\.layers\.1\.mlp\.act_fn may change what it computes"):
        certify(model)


def test_a_bias_that_is_not_finite_is_violated_and_named() -> None:
    model = monotone("arcee", mlp_bias=True)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.bias")[2] = float("-inf")
    certificate = certify(model)
    assert certificate.verdict == "violated"
    assert certificate.reasons == ("model.layers.0.mlp.up_proj.bias has 1 of 32 entries that are not finite",)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.post_attention_layernorm.weight", "lm_head.weight"]
)
def test_a_model_that_is_broken_elsewhere_is_refused_by_name(name: str) -> None:
    model = tiny_model("arcee")
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = float("nan")
    for refused in (lambda: certify(model), lambda: constrain(model, "mlp_both", "projection", "absolute")):
        with pytest.raises(UsageError, match=f"{name} has 1 of .* entries that are not finite"):
            refused()
    assert not hasattr(model, "isotone_constraint")


@pytest.mark.parametrize("recorded", ["x", {"layers": 3}, {"layers": [0.5]}, {"scope": ["mlp_in"]}])
def test_a_record_that_was_never_written_is_refused(recorded: Any) -> None:
    model = monotone("arcee")
    model.config.isotone = recorded
    with pytest.raises(UsageError, match=r"which isotone never wrote|whole numbers"):
        certify(model)
