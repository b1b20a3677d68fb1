"""The clean loss of a matched control is the one that was asked for, and its damage is the one that its name says."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits, tiny_model, tokens

from isotone.matching import TOLERANCE, Interpolation, Noise, Temperature, clean_nll, divide_logits, match
from isotone.models import load_model, save_model

IDS, SCORED = tokens(6, 16), slice(8, 16)


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_loss_that_is_found_is_within_the_tolerance() -> None:
    found = match(lambda p: p**2, target=7.0, first=0.0, step=0.25)
    assert abs(found.reached - 7.0) <= TOLERANCE  # type: ignore[operator]
    assert found.parameter == pytest.approx(math.sqrt(7), abs=1e-3)
    assert not found.reason


def test_what_is_matched_already_stays_as_it_is() -> None:
    found = match(lambda p: 3.0 + p, target=2.995, first=1.0 - 1.0, step=1.0)
    assert (found.parameter, found.reason, found.evaluations) == (0.0, "", 1)


@pytest.mark.parametrize(
    ("loss", "target", "reason"),
    [
        (lambda p: 5.0 + p, 3.0, "the loss is 5.0000 before anything is changed"),
        (lambda p: 5.0 - 1 / (1 + p), 6.0, "the loss stays at"),
        (lambda p: 1.0 if p < 0.3 else 9.0, 6.0, "the loss jumps past it near a parameter of 0.3"),
        (lambda p: 1.0 if p < 0.3 else math.nan, 6.0, "the loss jumps past it"),
        (lambda p: p, math.nan, "not a finite number"),
    ],
)
def test_a_loss_that_cannot_be_reached_is_said_to_be(loss, target: float, reason: str) -> None:  # type: ignore[no-untyped-def]
    found = match(loss, target, first=0.0, step=1 / 64)
    assert reason in found.reason
    assert found.reached is not None


# --- the damages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "gptj", "gemma2", "opt_post_norm"])
def test_a_temperature_divides_the_logits_also_after_export(name: str, tmp_path: Path) -> None:
    """A plain head, a tied one, one with a bias, a capped one, and one behind a projection."""
    changes: dict[str, Any] = {"final_logit_softcapping": 0.05} if name == "gemma2" else {}  # a cap that is felt
    model = tiny_model(name, **changes)
    expected, embeddings = logits(model) / 3.7, model.get_input_embeddings().weight.detach().clone()
    divide_logits(model, 3.7)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    save_model(model, None, tmp_path / "exported")
    assert torch.equal(logits(load_model(str(tmp_path / "exported"))), logits(model))


def test_a_temperature_can_be_set_again() -> None:
    model = tiny_model("gpt2")
    expected = logits(model)
    temperature = Temperature(model)
    for value in (5.0, 1.0):
        temperature.apply(value)
    assert torch.equal(logits(model), expected)


def test_noise_reaches_only_the_scope_and_is_the_same_for_its_draw() -> None:
    before = _parameters(tiny_model("gpt_neox"))

    def damaged(seed: int, draw: int, strength: float) -> dict[str, torch.Tensor]:
        model = tiny_model("gpt_neox")
        Noise(model, "mlp_in", seed, draw).apply(strength)
        return _parameters(model)

    once = damaged(1, 1, 0.5)
    changed = {name for name in before if not torch.equal(before[name], once[name])}
    assert changed == {f"gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight" for i in range(2)}
    again, draw, seed = damaged(1, 1, 0.5), damaged(1, 2, 0.5), damaged(2, 1, 0.5)
    assert all(torch.equal(once[n], again[n]) for n in before)
    for name in changed:
        assert not torch.equal(once[name], draw[name])
        assert not torch.equal(once[name], seed[name])
        noise = once[name] - before[name]
        assert float(noise.std() / before[name].std()) == pytest.approx(0.5, rel=0.15)
        torch.testing.assert_close(damaged(1, 1, 1.0)[name] - before[name], 2 * noise)
    assert all(torch.equal(before[n], w) for n, w in damaged(1, 1, 0.0).items())


def test_an_interpolation_ends_in_the_checkpoints_themselves() -> None:
    model, earlier, later = tiny_model("gpt2"), _parameters(tiny_model("gpt2", seed=1)), _parameters(tiny_model("gpt2"))
    between = Interpolation(model, earlier, later)
    for share, expected in ((1.0, earlier), (0.0, later)):
        between.apply(share)
        assert all(torch.equal(expected[n], w) for n, w in model.named_parameters())
    between.apply(0.25)
    assert all(torch.allclose(0.25 * earlier[n] + 0.75 * later[n], w, atol=1e-6) for n, w in model.named_parameters())


@pytest.mark.parametrize("kind", ["temperature", "noise"])
def test_a_real_model_is_brought_to_a_loss(kind: str) -> None:
    """The model is one that has something to lose: it was trained on what is scored."""
    model = tiny_model("gpt_neox")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(60):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    damage = Temperature(model) if kind == "temperature" else Noise(model, "mlp_both", 0, 1)

    def loss(parameter: float) -> float:
        damage.apply(parameter)
        return clean_nll(model, IDS, SCORED, 4)

    target = loss(damage.first) + 0.8
    found = match(loss, target, damage.first, damage.step)
    assert not found.reason
    assert loss(found.parameter) == found.reached == pytest.approx(target, abs=TOLERANCE)


def test_the_clean_loss_is_the_mean_over_the_scored_tokens() -> None:
    model = tiny_model("gpt2")
    nll = -torch.log_softmax(logits(model, IDS), -1).gather(-1, IDS.roll(-1, 1)[..., None])[..., 0]
    assert clean_nll(model, IDS, SCORED, 4) == pytest.approx(float(nll[:, 7:15].mean()), rel=1e-5)
