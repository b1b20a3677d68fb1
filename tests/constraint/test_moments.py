"""Calibration of means and variances: after any start, units and outputs vary as they did."""

import copy

import pytest
import torch
from tiny_models import tiny_model, tokens

from isotone.constraint import constrain
from isotone.constraint.calibration import read
from isotone.constraint.feed_forward import affine, feed_forwards, matrix
from isotone.errors import UsageError

ROWS = tokens(24, seed=3)


@pytest.mark.parametrize(
    ("parametrization", "initialization"),
    [("scaled_softplus", "absolute"), ("projection", "relu"), ("magnitude", "nnls"), ("square", "calibrated_shift")],
)
def test_units_and_outputs_have_the_mean_and_variance_of_the_original(
    parametrization: str, initialization: str
) -> None:
    original = tiny_model("arcee", mlp_bias=True)
    model = copy.deepcopy(original)
    constraint = constrain(model, "mlp_both", parametrization, initialization, calibration_rows_NL=ROWS, calibrate=True)
    assert constraint.holds()
    for network, old in zip(feed_forwards(model), feed_forwards(original), strict=True):
        found = [read(model, row[None], {"up": network.up, "down": network.down}) for row in ROWS]
        u = torch.cat([f["up"][0] for f in found])
        for role, target in (("up", affine(old.up, u)), ("down", old(u))):
            output = torch.cat([f[role][1] for f in found])
            torch.testing.assert_close(output.mean(0), target.mean(0), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(output.std(0), target.std(0), rtol=1e-3, atol=1e-6)


def test_without_a_bias_only_the_variance_is_matched() -> None:
    original = tiny_model("llama")
    model = copy.deepcopy(original)
    constrain(model, "gated_all", "projection", "absolute", calibration_rows_NL=ROWS, calibrate=True)
    network, old = feed_forwards(model)[0], feed_forwards(original)[0]
    assert network.gate is not None
    assert old.gate is not None
    found = [read(model, row[None], {"gate": network.gate})["gate"] for row in ROWS]
    target = affine(old.gate, torch.cat([u for u, _ in found]))
    torch.testing.assert_close(torch.cat([y for _, y in found]).std(0), target.std(0), rtol=1e-3, atol=1e-6)


def test_directions_of_rows_are_kept_and_constant_outputs_left_alone() -> None:
    plain, model = tiny_model("arcee", mlp_bias=True), tiny_model("arcee", mlp_bias=True)
    for each in (plain, model):
        with torch.no_grad():
            each.get_parameter("model.layers.0.mlp.up_proj.weight")[3] = 0
    constrain(plain, "mlp_both", "projection", "absolute")
    constrain(model, "mlp_both", "projection", "absolute", calibration_rows_NL=ROWS, calibrate=True)
    before, after = matrix(feed_forwards(plain)[0].up), matrix(feed_forwards(model)[0].up)
    assert (after[3] == 0).all()
    kept = torch.nn.functional.cosine_similarity(before, after)
    assert (kept[torch.arange(32) != 3] > 1 - 1e-5).all()


def test_calibrating_without_text_is_refused_and_changes_nothing() -> None:
    model = tiny_model("arcee")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="calibrate needs calibration_rows_NL"):
        constrain(model, "mlp_both", "projection", "absolute", calibrate=True)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
