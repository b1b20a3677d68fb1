import copy
from typing import Any

import pytest
import torch
from tiny_models import LAYER_NORM, MODELS, logits, tiny_model, tokens

from isotone.constraint import constrain
from isotone.constraint.calibration import LEAST, least_disturbing_direction
from isotone.constraint.feed_forward import constrained_modules, feed_forwards, matrix, probe_tokens
from isotone.constraint.shift import shift
from isotone.constraint.tracing import Norm, trace_norms
from isotone.errors import UsageError


def gains(model: Any) -> list[torch.nn.Parameter]:
    """Return the weights of the norms that feed the feed-forward networks."""
    norms = trace_norms(model, feed_forwards(model), probe_tokens(model))
    return [norm.module.get_parameter("weight") for norm in norms if isinstance(norm, Norm)]


@pytest.mark.parametrize("scope", ["mlp_in", "mlp_both", "mlp_in_attn_out"])
@pytest.mark.parametrize("parametrization", ["projection", "scaled_softplus"])
@pytest.mark.parametrize("name", LAYER_NORM)
def test_shifted_model_is_the_same_function_with_non_negative_weights(
    name: str, parametrization: str, scope: str
) -> None:
    """The theorem, in fp64: random gains, random norm biases, every layout of norm and residual."""
    model = tiny_model(name, torch.float64)
    before = logits(model)
    constraint = constrain(model, scope, parametrization, "shift")
    assert constraint.holds()
    assert (logits(model) - before).abs().max() <= 1e-9
    assert before.std() > 1e-3  # otherwise the line above says nothing


@pytest.mark.parametrize("name", LAYER_NORM)
def test_negative_and_mixed_gains_are_shifted_or_refused_never_wrong(name: str) -> None:
    """All negative: the shift runs along 1/|γ|. Mixed: γ is folded into every reader, unless the stream is one."""
    for signs in ("negative", "mixed"):
        model = tiny_model(name, torch.float64)
        with torch.no_grad():
            for gain in gains(model):
                gain[slice(None) if signs == "negative" else slice(0, 3)] *= -1
        before = logits(model)
        if name == "opt_post_norm" and signs == "mixed":
            state = copy.deepcopy(model.state_dict())
            with pytest.raises(UsageError, match="changed the logits"):
                constrain(model, "mlp_both", "projection", "shift")
            assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
            continue
        assert constrain(model, "mlp_both", "projection", "shift").holds()
        assert (logits(model) - before).abs().max() <= 1e-9


def test_zero_gain_is_folded() -> None:
    model = tiny_model("gpt_neox", torch.float64)
    with torch.no_grad():
        for gain in gains(model):
            gain[2] = 0
    before = logits(model)
    assert constrain(model, "mlp_both", "projection", "shift").holds()
    assert (logits(model) - before).abs().max() <= 1e-9


@pytest.mark.parametrize("margin", [0.5, 20.0])
def test_any_larger_shift_is_the_same_function_too(margin: float) -> None:
    """The theorem holds for every c and d, not for the smallest alone."""
    model = tiny_model("gpt_neox", torch.float64)
    before = logits(model)
    modules = constrained_modules(model, "mlp_both")
    shift(model, feed_forwards(model), modules, margin)
    assert all(float(matrix(m).min()) > 0.3 * margin * 0.02 for m in modules.values())  # weights have a spread of .02
    assert (logits(model) - before).abs().max() <= 1e-9


def test_fp32_shift_keeps_the_loss_per_token() -> None:
    model = tiny_model("gpt_neox")
    before = logits(model).log_softmax(-1)
    constrain(model, "mlp_both", "scaled_softplus", "shift")
    assert (logits(model).log_softmax(-1) - before).abs().max() <= 1e-5


def test_margin_keeps_every_weight_where_softplus_has_a_slope() -> None:
    model = tiny_model("gpt_neox")
    constraint = constrain(model, "mlp_both", "softplus", "shift")
    for name in constraint.names:
        w = model.get_parameter(name)
        assert w.min() >= 0.03 * w.std()


@pytest.mark.parametrize("name", [n for n in MODELS if n not in LAYER_NORM])
def test_shift_is_refused_on_rms_norm_and_gates_with_the_reason(name: str) -> None:
    model = tiny_model(name)
    plain = name in ("arcee", "t5")
    scope = "mlp_both" if plain else "gated_all"
    reason = "is an RMSNorm: the mean stays" if plain else "are gated"
    with pytest.raises(UsageError, match=f"shift is not exact here: .*{reason}"):
        constrain(model, scope, "projection", "shift")


def refused(model: Any, reason: str, **arguments: Any) -> None:
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=f"shift is not exact here: .*{reason}"):
        constrain(model, "mlp_both", "projection", "shift", **arguments)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not hasattr(model, "isotone_constraint")


def test_shift_is_refused_without_a_final_norm() -> None:
    """OPT checkpoints of before transformers 4.20.1 have none: the head would read the mean."""
    refused(tiny_model("opt", _remove_final_layer_norm=True), "reads the residual stream without subtracting its mean")


def test_shift_is_refused_where_the_head_reads_past_the_norm() -> None:
    model = tiny_model("gpt_neox")
    model.gpt_neox.final_layer_norm = torch.nn.Identity()
    refused(model, "reads the residual stream without subtracting its mean")


def test_shift_is_refused_where_a_bias_of_the_norm_cannot_be_compensated() -> None:
    refused(tiny_model("opt", enable_bias=False), "has a bias and .*fc1 has none")


@pytest.mark.parametrize(
    ("name", "key", "place"),
    [
        ("gpt2", "resid_pdrop", "mlp.dropout"),
        ("opt", "dropout", "layers.0"),
        ("gpt_neox", "hidden_dropout", "post_attention_dropout"),
        ("phi", "resid_pdrop", "resid_dropout"),
        ("bloom", "hidden_dropout", "layers|h.0"),
    ],
)
def test_shift_is_refused_for_training_with_dropout_but_not_without_training(name: str, key: str, place: str) -> None:
    changes: Any = {key: 0.1}
    refused(tiny_model(name, **changes), f"{place}.* has dropout 0.1 in training")
    model = tiny_model(name, torch.float64, **changes)
    before = logits(model)
    constrain(model, "mlp_both", "projection", "shift", will_train=False)
    assert (logits(model) - before).abs().max() <= 1e-9


def test_shift_is_refused_in_bf16() -> None:
    refused(tiny_model("gpt_neox").to(torch.bfloat16), "bfloat16, too coarse; load in float32")


def test_shift_is_refused_when_something_else_feeds_the_network() -> None:
    model = tiny_model("gpt_neox")
    model.gpt_neox.layers[1].post_attention_layernorm = torch.nn.Identity()
    refused(model, "is fed by no single module|is fed by .*Identity")


def test_a_wrong_shift_does_not_pass_the_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant leaves the bias alone, as a shift on a norm without β would."""
    monkeypatch.setattr("isotone.constraint.shift.bias_of", lambda module: None)
    model = tiny_model("gpt_neox", torch.float64)
    with pytest.raises(UsageError, match=r"changed the logits|has none to compensate"):
        shift(model, feed_forwards(model), constrained_modules(model, "mlp_both"))


def test_calibrated_shift_nears_the_exact_shift_on_layer_norm() -> None:
    """Where the mean is removed, the least disturbing direction is 1/γ, and W1's shift changes nothing."""
    model = tiny_model("gpt_neox", torch.float64)
    before = logits(model)
    constraint = constrain(model, "mlp_in", "projection", "calibrated_shift", calibration_rows_NL=tokens(32))
    assert constraint.holds()
    assert (logits(model) - before).abs().max() <= 1e-3 * before.std()


def test_calibrated_shift_finds_the_direction_that_an_rms_norm_model_never_uses() -> None:
    """The stream of this RMSNorm model is made free of a mean: 1/γ is such a direction, and the fit must find it."""
    change = {}
    for initialization in ("absolute", "calibrated_shift"):
        model = tiny_model("arcee", torch.float64)
        with torch.no_grad():
            model.get_input_embeddings().weight.sub_(model.get_input_embeddings().weight.mean(1, keepdim=True))
            for network in feed_forwards(model):
                for writer in (network.down, network.attention_out):
                    matrix(writer).sub_(matrix(writer).mean(0))
        before = logits(model)
        rows = tokens(64, seed=3)
        constraint = constrain(model, "mlp_in", "projection", initialization, calibration_rows_NL=rows)
        assert constraint.holds()
        change[initialization] = float((logits(model) - before).abs().max() / before.std())
    assert change["calibrated_shift"] < 1e-2 * change["absolute"]


def test_calibrated_shift_without_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="needs calibration_rows_NL"):
        constrain(tiny_model("arcee"), "mlp_both", "projection", "calibrated_shift")


def test_least_disturbing_direction_solves_its_problem() -> None:
    """Against scipy's general solver on the same constraints."""
    from scipy.optimize import minimize

    a = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spread = a.T @ a / 40
    v = least_disturbing_direction(spread)
    assert float(v.min()) >= LEAST - 1e-12
    assert float(v.mean()) == pytest.approx(1)
    s = spread.numpy()
    best = minimize(
        lambda x: x @ s @ x,
        [1.0] * 6,
        bounds=[(LEAST, None)] * 6,
        constraints={"type": "eq", "fun": lambda x: x.mean() - 1},
        options={"ftol": 1e-12},
    )
    assert float(v @ spread @ v) == pytest.approx(best.fun, rel=1e-6)


def test_calibration_moments_match_a_direct_computation() -> None:
    """The shifted matrix is W + c vᵀ with one v for all rows."""
    model = tiny_model("gpt_neox", torch.float64)
    module = feed_forwards(model)[0].up
    before = matrix(module).clone()
    constrain(model, "mlp_in", "projection", "calibrated_shift", calibration_rows_NL=tokens(8))
    difference = matrix(module) - before
    ratio = difference / difference.sum(1, keepdim=True)
    assert (ratio - ratio[0]).abs().max() < 1e-9
