"""The start by layer-wise non-negative least squares: against scipy, its conditions of optimality, and on models."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import MODELS, logits, tiny_model, tokens

from isotone.constraint import constrain, fold
from isotone.constraint.calibration import read
from isotone.constraint.constraint import Constraint
from isotone.constraint.feed_forward import affine, architecture_of_model, bias_of, feed_forwards, matrix
from isotone.constraint.nnls import TOLERANCE, solve
from isotone.errors import UsageError
from isotone.pairs import PairLayout

ROWS = tokens(24, seed=3).clamp_min(1)  # 0 is padding


def fitted(model: Any, scope: str = "mlp_both") -> Constraint:
    """Start from a fit on ``ROWS``; an encoder-decoder reads half of each row on either side."""
    pairs = PairLayout(source=6, pad=0) if model.config.is_encoder_decoder else None
    return constrain(model, scope, "projection", "nnls", calibration_rows_NL=ROWS, pairs=pairs)


def problem(n: int = 70, m: int = 9, num_tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets that need both signs; two inputs never fire and two are the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, n, dtype=torch.float64, generator=generator).relu()
    x[:, 3:5] = 0
    x[:, 8] = x[:, 9]
    w = torch.randn(m, n, dtype=torch.float64, generator=generator)
    return x, x @ w.T + torch.randn(num_tokens, m, dtype=torch.float64, generator=generator)


def solved(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    return solve(x.T @ x, y.T @ x, y.square().sum(0), torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype))


def test_solution_has_the_least_squares_of_scipy_for_every_output() -> None:
    from scipy.optimize import nnls as reference

    x, y = problem()
    w, _, _ = solved(x, y)
    assert (w >= 0).all()
    assert (w[:, 3:5] == 0).all()
    for column, weights in zip(y.T, w, strict=True):
        _, best = reference(x.numpy(), column.numpy())
        assert float((x @ weights - column).norm()) == pytest.approx(best, rel=1e-4)


def test_conditions_of_optimality_hold_as_far_as_is_said() -> None:
    """No weight above 0 has a slope, none at 0 a slope down: measured anew from the data."""
    x, y = problem()
    w, kkt, sweeps = solved(x, y)
    slope = (x @ w.T - y).T @ x
    missed = torch.where(w > 0, slope, slope.clamp_max(0)).abs()
    unit = y.norm(dim=0)[:, None] * x.norm(dim=0).clamp_min(1e-30)
    assert kkt <= TOLERANCE
    assert float((missed / unit).max()) == pytest.approx(kkt, abs=1e-4)
    assert sweeps < 100


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_and_scope_starts_inside_the_constraint(name: str) -> None:
    for scope in architecture_of_model(tiny_model(name)).scopes:
        model = tiny_model(name)
        constraint = fitted(model, scope)
        assert constraint.holds()
        assert set(constraint.fits) == {weight.removesuffix(".weight") for weight in constraint.names}
        for fit in constraint.fits.values():
            assert 0 <= fit.residual <= 1
            assert fit.kkt <= 5 * TOLERANCE  # behind a norm whose outputs lie in a plane the last digits come slowly
        assert torch.isfinite(logits(model)).all()


def test_a_network_that_is_non_negative_already_is_found_again() -> None:
    """|W| is made the original: the fit must give back what it puts out, layer after layer."""
    model = tiny_model("arcee", mlp_bias=True)
    constrain(model, "mlp_both", "projection", "absolute")
    before = logits(fold(model), ROWS)
    constraint = fitted(model)
    assert max(fit.residual for fit in constraint.fits.values()) < 1e-3
    assert (logits(model, ROWS) - before).abs().max() <= 0.05 * before.std()


def test_reported_residual_is_that_of_the_stored_weights_on_what_they_read() -> None:
    """The target is what the original network makes of the same inputs."""
    original = tiny_model("arcee", mlp_bias=True)
    model = copy.deepcopy(original)
    constraint = fitted(model)
    for network, old in zip(feed_forwards(model), feed_forwards(original), strict=True):
        found = [read(model, row[None], {"up": network.up, "down": network.down}) for row in ROWS]
        u = torch.cat([f["up"][0] for f in found])
        for role, target in (("up", affine(old.up, u).double()), ("down", old(u).double())):
            output = torch.cat([f[role][1] for f in found]).double()
            residual = (output - target).square().sum() / (target - target.mean(0)).square().sum()
            assert float(residual) == pytest.approx(constraint.fits[network.names[role]].residual, rel=1e-3)
            assert (output - target).mean(0).abs().max() < 1e-5  # what an intercept is for


def test_fit_disturbs_less_than_dropping_the_negative_weights() -> None:
    change = {}
    for initialization in ("nnls", "relu", "absolute"):
        model = tiny_model("arcee", mlp_bias=True, initializer_range=0.3)
        before = logits(model, ROWS)
        constrain(model, "mlp_both", "projection", initialization, calibration_rows_NL=ROWS)
        change[initialization] = float((logits(model, ROWS) - before).square().mean())
    assert change["nnls"] < 0.5 * change["relu"]
    assert change["nnls"] < 0.5 * change["absolute"]


def test_modules_without_a_bias_get_none_and_those_out_of_scope_stay() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    constraint = fitted(model, "gated_updown")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == set(constraint.names)
    assert all(bias_of(network.up) is None for network in feed_forwards(model))


def test_bits_are_the_same_twice() -> None:
    first, second = tiny_model("gpt2"), tiny_model("gpt2")
    fitted(first)
    fitted(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_reading_ends_at_what_is_asked_for_and_leaves_no_hook() -> None:
    model = tiny_model("gpt_neox")
    network, later = feed_forwards(model)
    later.up.register_forward_hook(lambda *_: pytest.fail("read on past the module"))
    found = read(model, ROWS[:1], {"up": network.up})["up"]
    assert found[0].shape == (12, 16)
    assert torch.allclose(found[1], torch.nn.functional.linear(found[0], matrix(network.up), bias_of(network.up)))
    assert not network.up._forward_hooks


@pytest.mark.parametrize("initialization", ["nnls", "calibrated_shift"])
def test_text_that_is_too_short_is_refused_with_what_is_needed(initialization: str) -> None:
    model = tiny_model("gpt2", n_inner=100)
    state = copy.deepcopy(model.state_dict())
    short = r"constraint.calibration_rows .*: .* 96 tokens \(8 rows\) .*mlp.c_proj with its 100 inputs needs at"
    with pytest.raises(UsageError, match=rf"{short} least 101; give longer text, or, .*, set it to 9 or more"):
        constrain(model, "mlp_both", "projection", initialization, calibration_rows_NL=tokens(8))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_nothing_is_fitted_where_weights_follow() -> None:
    model = tiny_model("arcee")
    constraint = constrain(model, "mlp_both", "projection", "nnls", weights_follow=True)
    assert (constraint.initialization, constraint.fits) == ("nnls", {})
    with pytest.raises(UsageError, match="nnls needs calibration_rows_NL"):
        constrain(tiny_model("arcee"), "mlp_both", "projection", "nnls")


def test_padding_of_pairs_is_not_fitted_on() -> None:
    """The same texts in rows with more padding give the same weights."""
    narrow, wide = tiny_model("t5"), tiny_model("t5")
    padding = torch.zeros(len(ROWS), 3, dtype=torch.long)
    padded = torch.cat([ROWS[:, :6], padding, ROWS[:, 6:], padding], dim=1)
    fitted(narrow)
    constrain(wide, "mlp_both", "projection", "nnls", calibration_rows_NL=padded, pairs=PairLayout(source=9, pad=0))
    assert all(torch.equal(a, b) for a, b in zip(narrow.parameters(), wide.parameters(), strict=True))


def test_targets_are_those_of_the_original_activation_where_another_takes_its_place() -> None:
    """A GELU model made a ReLU one: the second projection answers for the difference."""
    original = tiny_model("arcee", hidden_act="gelu", mlp_bias=True)
    model = copy.deepcopy(original)
    constraint = constrain(model, "mlp_both", "projection", "nnls", calibration_rows_NL=ROWS, activation="relu")
    network, old = feed_forwards(model)[0], feed_forwards(original)[0]
    found = [read(model, row[None], {"up": network.up, "down": network.down}) for row in ROWS]
    target = old(torch.cat([f["up"][0] for f in found]))
    output = torch.cat([f["down"][1] for f in found])
    residual = (output - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(residual) == pytest.approx(constraint.fits[network.names["down"]].residual, rel=1e-3)
