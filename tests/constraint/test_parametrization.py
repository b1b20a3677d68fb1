import pytest
import torch

from isotone.constraint.parametrization import FLOOR, PARAMETRIZATIONS, Parametrization, Scale

EVERY = pytest.mark.parametrize("chosen", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)


def mapped(chosen: Parametrization, v: torch.Tensor, scale: Scale) -> torch.Tensor:
    w = v.clone()
    chosen.apply_(v, w, scale)
    return w


@EVERY
@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0, 40.0])
def test_inverse_is_within_2e_6_over_ten_decades(
    chosen: Parametrization, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is the one of a matrix with this spread; the weights cover 1e-8…1e2."""
    scale = 1.0 if chosen.name == "sign_frozen" else chosen.scale_for(torch.randn(1000) * spread)
    monkeypatch.setattr(type(chosen), "scale_for", lambda self, w: scale)
    w = 10 ** torch.linspace(-8, 2, 300_001)
    v, used = chosen.inverse(w.clone())
    assert torch.equal(torch.as_tensor(used), torch.as_tensor(scale))
    assert ((mapped(chosen, v, used) - w) / w).abs().max() <= 2e-6


@EVERY
def test_pull_back_is_the_vector_jacobian_product_of_the_map(chosen: Parametrization) -> None:
    """Checked against central differences in fp64, which know nothing of the hand-written derivative."""
    v, grad = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    if chosen.name in ("projection", "sign_frozen"):
        v = v.abs()  # W itself: inside the cone the map is the identity
    pulled, step = grad.clone(), 1e-6
    chosen.pull_back_(pulled, v, 4.0)
    slope = (mapped(chosen, v + step, 4.0) - mapped(chosen, v - step, 4.0)) / (2 * step)
    torch.testing.assert_close(pulled, grad * slope, rtol=1e-6, atol=1e-7)


@EVERY
def test_map_ends_inside_its_own_membership_test(chosen: Parametrization) -> None:
    assert chosen.contains(mapped(chosen, torch.randn(50, 50), 2.0))
    for wrong in (-1e-30, float("nan"), float("inf")):
        assert not chosen.contains(torch.tensor([1.0, wrong]))


@EVERY
def test_zero_is_reached_or_floored_as_declared(chosen: Parametrization) -> None:
    v, scale = chosen.inverse(torch.zeros(4))
    assert torch.isfinite(v).all()
    w = mapped(chosen, v, scale)
    assert (w == 0).all() if chosen.contains_zero else torch.allclose(w, torch.full((4,), FLOOR), rtol=2e-6)


@pytest.mark.parametrize("name", [n for n, p in PARAMETRIZATIONS.items() if p.contains_zero])
def test_zeros_revive_only_where_declared(name: str) -> None:
    chosen = PARAMETRIZATIONS[name]
    grad = -torch.ones(3)
    chosen.pull_back_(grad, torch.zeros(3), 1.0)
    assert bool((grad != 0).all()) == chosen.revives_zero


def test_scale_is_a_power_of_two_near_the_inverse_spread() -> None:
    scale = PARAMETRIZATIONS["scaled_softplus"].scale_for(torch.randn(100, 100) * 0.02)
    assert scale == 64.0


def test_scaled_softplus_has_a_slope_of_order_one_where_softplus_has_none() -> None:
    """What the published map lacks: at weights of size .02 its slope is .02 (science: slow parametrization)."""
    w = torch.full((100,), 0.02)
    slopes = {}
    for name, scale in (("softplus", 1.0), ("scaled_softplus", 64.0)):
        grad = torch.ones(100)
        PARAMETRIZATIONS[name].pull_back_(grad, torch.log(torch.expm1(w * scale)) / scale, scale)
        slopes[name] = float(grad.mean())
    assert slopes["softplus"] == pytest.approx(0.0198, abs=1e-4)
    assert slopes["scaled_softplus"] > 0.5


def test_a_frozen_sign_projects_each_entry_to_its_own_side() -> None:
    chosen = PARAMETRIZATIONS["sign_frozen"]
    signs = chosen.scale_for(torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0]))
    w = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    assert not chosen.contains(w, signs)
    chosen.apply_(w, w, signs)
    assert w.tolist() == [1, 0, 0, -1, 0]  # what starts at 0 counts as positive
    assert chosen.contains(w, signs)


@pytest.mark.parametrize("name", ["square", "magnitude", "scaled_softplus"])
def test_a_matched_step_takes_no_small_weight_far_the_wrong_way(name: str) -> None:
    """Downwards from 1e-6 by 1e-3 there is nothing beyond 0 but less than the step."""
    chosen, lr = PARAMETRIZATIONS[name], 1e-3
    w = torch.tensor([0.0, 1e-8, 1e-6, 1e-4, 1e-3, 0.02])
    before, scale = chosen.inverse(w.clone())
    v = before - lr
    chosen.match_step_(before, v, scale)
    assert (mapped(chosen, v, scale) <= torch.maximum(w, torch.tensor(lr))).all()


def test_matched_steps_of_square_are_those_of_projection_from_either_root() -> None:
    chosen, w = PARAMETRIZATIONS["square"], torch.tensor([0.0, 1e-6, 0.01, 0.5])
    for sign in (1.0, -1.0):
        for change in (-1e-3, 1e-3):
            before = sign * w.sqrt()
            v = before + change
            chosen.match_step_(before, v, 1.0)
            torch.testing.assert_close(mapped(chosen, v, 1.0), (w + change).clamp_min(0), rtol=1e-4, atol=1e-8)
            assert (v * before >= 0).all()
