"""The start in another basis: the model stays the same there, and the constraint can cost next to nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import nnls as reference
from tiny_models import logits, tiny_model, tokens

from isotone.constraint import certify, constrain, fold
from isotone.constraint.constraint import Constraint
from isotone.constraint.feed_forward import bias_of, feed_forwards, matrix
from isotone.constraint.nnls import COUPLED_TOLERANCE, solve
from isotone.constraint.rotation import rotate
from isotone.errors import UsageError
from isotone.models import load_model, save_model
from isotone.pairs import PairLayout

ROWS = tokens(48, seed=3).clamp_min(1)
ROTATABLE = ("arcee", "llama", "mistral", "qwen2", "gemma")


def model_of(name: str, **changes: Any) -> Any:
    """Return a tiny model with an output embedding of its own unless asked, and biases where it can have them."""
    biases: dict[str, Any] = {"arcee": {"mlp_bias": True}, "llama": {"mlp_bias": True, "attention_bias": True}}
    return tiny_model(name, **{"tie_word_embeddings": False, **biases.get(name, {}), **changes})


def without(model: Any, *coordinates: int) -> Any:
    """Return the model with a stream that is 0 in some coordinates of its basis, and in a rotated basis then."""
    with torch.no_grad():
        for index in coordinates:
            model.get_input_embeddings().weight[:, index] = 0
            for network in feed_forwards(model):
                for writer in (network.attention_out, network.down):
                    matrix(writer)[index] = 0
                    if (bias := bias_of(writer)) is not None:
                        bias[index] = 0
    return model


def start(model: Any, scope: str = "mlp_both", initialization: str = "rotated_nnls", **options: Any) -> Constraint:
    return constrain(model, scope, "projection", initialization, calibration_rows_NL=ROWS, **options)


@pytest.mark.parametrize("name", ROTATABLE)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_whose_stream_has_two_directions_to_spare_is_the_same_in_the_new_basis(name: str, tied: bool) -> None:
    model = without(model_of(name, tie_word_embeddings=tied), 3, 10)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    before = logits(model, ROWS)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    basis = rotate(model, feed_forwards(model), {}, ROWS)
    assert (logits(model, ROWS) - before).abs().max() < 1e-4 * before.std()
    assert not torch.allclose(model.state_dict()["model.embed_tokens.weight"], state["model.embed_tokens.weight"])
    stream = model.get_input_embeddings()(ROWS).double()
    for unused in (basis.unread_d, basis.gain_d):
        assert (stream @ unused).abs().max() < 1e-5


def test_a_head_that_was_tied_is_saved_and_built_again_as_one_of_its_own(tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=True)
    start(model, "gated_updown")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    again = model_of("llama", tie_word_embeddings=True)
    start(again, "gated_updown", weights_follow=True)  # as a resume builds it
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))
    save_model(fold(model), None, tmp_path / "export")
    loaded = load_model(str(tmp_path / "export"))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.tie_word_embeddings is False


@pytest.mark.parametrize(("name", "scope"), [("arcee", "mlp_in"), ("llama", "gated_updown")])
def test_with_a_direction_to_spare_first_projections_cost_nothing(name: str, scope: str) -> None:
    """W1 + c 1ᵀ reads nothing else than W1 does: what the theorem says of LayerNorm, by another basis."""
    model = without(model_of(name), 3, 10)
    constraint = start(model, scope)
    assert constraint.holds()
    first = [fit.residual for name, fit in constraint.fits.items() if "up_proj" in name]
    assert max(first) < 1e-3
    plain = start(without(model_of(name), 3, 10), scope, "nnls")
    assert min(fit.residual for name, fit in plain.fits.items() if "up_proj" in name) > 0.05


def test_second_projections_are_fitted_better_where_nothing_reads_what_the_constraint_adds() -> None:
    change = {}
    for initialization in ("rotated_nnls", "nnls"):
        model = without(model_of("arcee", initializer_range=0.3), 3, 10)
        before = logits(model, ROWS)
        start(model, initialization=initialization)
        change[initialization] = float((logits(model, ROWS) - before).square().mean())
    assert change["rotated_nnls"] < 0.5 * change["nnls"]


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("arcee", "mlp_both"),
        ("arcee", "mlp_in_attn_out"),
        *((name, scope) for name in ROTATABLE[1:] for scope in ("gated_updown", "gated_all")),
    ],
)
def test_every_scope_starts_inside_the_constraint(name: str, scope: str) -> None:
    model = model_of(name)
    constraint = start(model, scope)
    assert constraint.holds()
    assert set(constraint.fits) == {weight.removesuffix(".weight") for weight in constraint.names}
    assert all(0 <= fit.residual <= 1 and fit.kkt <= COUPLED_TOLERANCE for fit in constraint.fits.values())
    assert torch.isfinite(logits(model)).all()


def test_the_start_is_certified_strict_also_behind_gains_of_both_signs() -> None:
    model = model_of("arcee")
    start(model)
    certificate = certify(fold(model))
    assert certificate.verdict == "strict"
    with torch.no_grad():
        matrix(feed_forwards(model)[0].up)[0, 0] = -1e-6
    assert certify(model).verdict == "violated"


def test_blocks_that_are_not_chosen_stay_what_they_were() -> None:
    """They read no more than a spare direction less."""
    model = without(model_of("arcee"), 3, 10)
    kept = copy.deepcopy(feed_forwards(model)[0])
    before = logits(model, ROWS)
    constraint = start(model, layers=(1,))
    assert all(".1." in name for name in constraint.names)
    network = feed_forwards(model)[0]
    assert bool((matrix(network.up) < 0).any())
    assert matrix(network.down).norm() == pytest.approx(float(matrix(kept.down).norm()), rel=1e-5)
    assert (logits(model, ROWS) - before).square().mean() < before.var()


@pytest.mark.parametrize(("initialization", "said"), [("rotated_nnls", True), ("nnls", False)])
@pytest.mark.parametrize(("name", "scope"), [("arcee", "mlp_both"), ("llama", "gated_all")])
def test_a_certificate_says_that_the_order_of_what_is_read_was_chosen(
    name: str, scope: str, initialization: str, said: bool
) -> None:
    model = model_of(name)
    start(model, scope, initialization)
    certificate = certify(fold(model))
    assert (certificate.verdict == "strict") is (name == "arcee")
    turned = [
        reason for reason in certificate.reasons if "negative gains stand in the norms before all networks" in reason
    ]
    assert bool(turned) is said


def test_bits_are_the_same_twice() -> None:
    first, second = model_of("arcee"), model_of("arcee")
    start(first)
    start(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "changes", "scope", "said"),
    [
        ("gpt_neox", {}, "mlp_both", "is a LayerNorm; use another initialization, such as nnls"),
        ("gemma2", {"tie_word_embeddings": False}, "gated_all", "changed the logits of random tokens"),
        ("gemma2", {"tie_word_embeddings": True}, "gated_all", "changed the logits of random tokens"),
        ("t5", {}, "mlp_both", "an encoder-decoder has two streams"),
        ("arcee", {"dtype": torch.bfloat16}, "mlp_both", "the weights are bfloat16; load in float32"),
    ],
)
def test_a_model_that_cannot_be_rotated_is_refused_and_stays_as_it_was(
    name: str, changes: dict[str, Any], scope: str, said: str
) -> None:
    model = tiny_model(name, **changes)
    state, tied = copy.deepcopy(model.state_dict()), model.config.tie_word_embeddings
    pairs = PairLayout(source=6, pad=0) if model.config.is_encoder_decoder else None
    with pytest.raises(UsageError, match=f"rotated_nnls is not possible here: .*{said}"):
        start(model, scope, pairs=pairs)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not hasattr(model, "isotone_constraint")
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (shared, model.config.tie_word_embeddings) == (tied, tied)


def test_errors_that_count_less_are_weighed_as_scipy_weighs_them() -> None:
    """Coupled outputs are one problem for scipy: all weights in a row, errors multiplied by the root of M."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, dtype=torch.float64, generator=generator).relu()
    y = x @ torch.randn(7, 4, dtype=torch.float64, generator=generator)
    light = torch.full((4,), 0.5, dtype=torch.float64) * 0.9
    w, kkt, _ = solve(x.T @ x, y.T @ x, y.square().sum(0), torch.zeros(4, 7, dtype=torch.float64), light_m=light)
    root = torch.linalg.cholesky(torch.eye(4, dtype=torch.float64) - torch.outer(light, light)).T
    stacked = torch.kron(x, root)  # error of token t in output k: Σ root[k, m] x[t, n] W[m, n]
    best, residual = reference(stacked.numpy(), (y @ root.T).flatten().numpy())
    assert kkt <= COUPLED_TOLERANCE
    assert float(((x @ w.T - y) @ root.T).norm()) == pytest.approx(residual, rel=1e-4)
    assert torch.allclose(w.T.flatten(), torch.from_numpy(best), atol=0.02)
