from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, logits, tiny_model, tokens

from isotone.constraint import Constraint, constrain, fold
from isotone.constraint.feed_forward import architecture_of_model
from isotone.constraint.initialization import ALLOWED_PAIRS, INITIALIZATIONS
from isotone.constraint.parametrization import PARAMETRIZATIONS
from isotone.errors import IsotoneError, UsageError
from isotone.models import load_model, save_model


def weights_of(model: torch.nn.Module, constraint: Constraint) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in constraint.names}


def step(
    model: torch.nn.Module, constraint: Constraint, optimizer: torch.optim.Optimizer, micro_batches: int = 2
) -> None:
    for number in range(micro_batches):
        ids = tokens(seed=number)
        (model(ids, labels=ids).loss / micro_batches).backward()
    constraint.pull_back()
    optimizer.step()
    constraint.push()
    optimizer.zero_grad()


def optimizer_of(model: torch.nn.Module, constraint: Constraint, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.AdamW(constraint.trainable(model).values(), lr=lr, weight_decay=0.0)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_goes_through_constrain_steps_fold_export_reload(name: str, tmp_path: Path) -> None:
    """The constraint holds after each of two real optimizer steps, and the reloaded folder has the same logits."""
    model = tiny_model(name)
    for number, scope in enumerate(architecture_of_model(model).scopes):
        model = tiny_model(name)
        constraint = constrain(model, scope)
        optimizer = optimizer_of(model, constraint)
        for _ in range(2):
            before = {n: w.clone() for n, w in weights_of(model, constraint).items()}
            step(model, constraint, optimizer)
            after = weights_of(model, constraint)
            assert constraint.holds()
            assert all((w > 0).all() and not torch.equal(w, before[n]) for n, w in after.items())
        trained = logits(model)
        save_model(fold(model), None, tmp_path / str(number))
        assert torch.equal(logits(load_model(str(tmp_path / str(number)))), trained)


@pytest.mark.parametrize(("parametrization", "initialization"), sorted(ALLOWED_PAIRS))
def test_every_allowed_pair_holds_through_steps(parametrization: str, initialization: str) -> None:
    model = tiny_model("arcee" if initialization == "rotated_nnls" else "gpt_neox")  # LayerNorm has shift for that
    constraint = constrain(
        model, "mlp_both", parametrization, initialization, calibration_rows_NL=tokens(6), will_train=True
    )
    optimizer = optimizer_of(model, constraint)
    for _ in range(3):
        step(model, constraint, optimizer)
        assert constraint.holds()
    expected = {name: w.clone() for name, w in weights_of(model, constraint).items()}
    constraint.push()
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(model, constraint).items())


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_pairs_that_do_not_fit_are_refused_with_the_reason(parametrization: str, initialization: str) -> None:
    model = tiny_model("gpt_neox")
    if (parametrization, initialization) in ALLOWED_PAIRS:
        return
    fitting = "magnitude, projection" if initialization in ("relu", "nnls", "rotated_nnls") else ".*"
    fitting = "sign_frozen" if initialization == "unchanged" else fitting
    with pytest.raises(UsageError, match=f"with {initialization} use one of {fitting} as parametrization"):
        constrain(model, "mlp_both", parametrization, initialization)


def test_forbidden_pairs_are_those_of_the_documents() -> None:
    refused = {(p, i) for p in PARAMETRIZATIONS for i in INITIALIZATIONS} - ALLOWED_PAIRS
    frozen = {("sign_frozen", i) for i in INITIALIZATIONS} | {(p, "unchanged") for p in PARAMETRIZATIONS}
    sparse = {(p, i) for p in ("softplus", "scaled_softplus", "square") for i in ("relu", "nnls", "rotated_nnls")}
    assert refused - frozen == sparse
    assert frozen - refused == {("sign_frozen", "unchanged")}


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_master_gradient_equals_autograd_through_the_map(parametrization: str) -> None:
    """Two micro-batches; the reference differentiates map(V) inside the model with functional_call."""
    model = tiny_model("gpt_neox", torch.float64)
    constraint = constrain(
        model, "mlp_both", parametrization, "unchanged" if parametrization == "sign_frozen" else "absolute"
    )
    masters = constraint.state_dict()
    leaves = {n: masters[n].clone().requires_grad_() for n in constraint.names}
    maps = {
        "softplus": lambda v, s: torch.log1p(torch.exp(v)),
        "scaled_softplus": lambda v, s: torch.log1p(torch.exp(v * s)) / s,
        "square": lambda v, s: v**2,
        "magnitude": lambda v, s: v.abs(),
        "projection": lambda v, s: v,
        "sign_frozen": lambda v, s: v,
    }
    effective = {n: maps[parametrization](v, masters[f"{n}.scale"]) for n, v in leaves.items()}
    for seed in range(2):
        ids = tokens(seed=seed)
        loss = torch.func.functional_call(model, effective, (ids,), {"labels": ids}).loss
        loss.backward(retain_graph=True)
        model.zero_grad() if seed == 1 else None
    for parameter in model.parameters():
        parameter.grad = None
    for seed in range(2):
        ids = tokens(seed=seed)
        model(ids, labels=ids).loss.backward()
    constraint.pull_back()
    for name, master in zip(constraint.names, constraint.parameters(), strict=True):
        torch.testing.assert_close(master.grad, leaves[name].grad, rtol=1e-9, atol=1e-12)


def test_attached_optimizer_steps_like_explicit_moves() -> None:
    explicit, attached = (tiny_model("gpt_neox") for _ in range(2))
    by_hand, by_hooks = constrain(explicit), constrain(attached)
    optimizer = optimizer_of(attached, by_hooks)
    by_hooks.attach(optimizer)
    step(explicit, by_hand, optimizer_of(explicit, by_hand), micro_batches=1)
    attached(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for name, parameter in explicit.named_parameters():
        assert torch.equal(parameter, attached.get_parameter(name)), name


def test_restored_constraint_continues_like_the_one_that_was_saved() -> None:
    model = tiny_model("gpt_neox")
    constraint = constrain(model, "mlp_both", "scaled_softplus", "shift")
    optimizer = optimizer_of(model, constraint)
    step(model, constraint, optimizer)
    saved = {name: t.clone() for name, t in constraint.state_dict().items()}
    copy = tiny_model("gpt_neox", seed=1)
    copy.load_state_dict(model.state_dict())
    restored = constrain(copy, "mlp_both", "scaled_softplus", "absolute")
    restored.load_state_dict(saved)
    for m, c in ((model, constraint), (copy, restored)):
        step(m, c, optimizer_of(m, c))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_state_of_another_scope_is_refused_by_name() -> None:
    both = constrain(tiny_model("gpt_neox"), "mlp_both")
    with pytest.raises(IsotoneError, match=r"gpt_neox.layers.0.mlp.dense_4h_to_h.weight is unexpected"):
        constrain(tiny_model("gpt_neox"), "mlp_in").load_state_dict(both.state_dict())


def test_state_dict_of_the_model_holds_the_effective_weights_at_any_moment() -> None:
    model = tiny_model("gpt_neox")
    names = set(model.state_dict())
    constraint = constrain(model)
    assert set(model.state_dict()) == names
    assert all((model.state_dict()[name] > 0).all() for name in constraint.names)
    assert set(constraint.trainable(model)) == {name for name, _ in model.named_parameters()}


def test_fold_keeps_the_very_tensors_and_refuses_what_left_the_constraint() -> None:
    model = tiny_model("gpt_neox")
    constraint = constrain(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = logits(model)
    with pytest.raises(UsageError, match="constrained already"):
        constrain(model)
    assert fold(model) is model
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert torch.equal(logits(model), before)
    again = tiny_model("gpt_neox")
    constraint = constrain(again)
    with torch.no_grad():
        again.get_parameter(constraint.names[0])[0, 0] = -1e-6
    with pytest.raises(IsotoneError, match="negative or not finite"):
        fold(again)


def test_published_bf16_masters_freeze_where_fp32_masters_move() -> None:
    """Science 2.1: at V ≈ −3.9 a step of 5e-5 is below the spacing of bf16."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model("gpt_neox").to(dtype)
        constraint = constrain(model, "mlp_both", "softplus", "absolute", master_dtype=dtype)
        assert {p.dtype for p in constraint.parameters()} == {dtype}
        optimizer = optimizer_of(model, constraint, lr=5e-5)
        before = [p.detach().clone() for p in constraint.parameters()]
        step(model, constraint, optimizer)
        changes = [float((a != b).float().mean()) for a, b in zip(before, constraint.parameters(), strict=True)]
        moved[dtype] = sum(changes) / len(changes)
    assert moved[torch.bfloat16] < 0.02
    assert moved[torch.float32] > 0.9


def test_half_precision_weights_get_fp32_masters_unless_asked_otherwise() -> None:
    model = tiny_model("gpt_neox").to(torch.bfloat16)
    constraint = constrain(model, "mlp_both", "softplus", "absolute")
    assert {p.dtype for p in constraint.parameters()} == {torch.float32}
    step(model, constraint, optimizer_of(model, constraint))
    assert constraint.holds()


# --- the control that keeps signs ------------------------------------------------------------------------------------


def test_frozen_signs_are_kept_through_steps_that_would_flip_them(tmp_path: Path) -> None:
    """The same steps without the constraint flip many; zeros come and go, but nothing crosses over."""
    free, model = tiny_model("gpt2"), tiny_model("gpt2")
    constraint = constrain(model, "mlp_both", "sign_frozen", "unchanged")
    assert torch.equal(logits(model), logits(free))  # it starts as it is
    before = {name: w.clone() for name, w in weights_of(model, constraint).items()}
    optimizer = optimizer_of(model, constraint)
    free_optimizer = torch.optim.AdamW(free.parameters(), lr=0.05, weight_decay=0.0)
    for number in range(3):
        step(model, constraint, optimizer)
        free(tokens(seed=number), labels=tokens(seed=number)).loss.backward()
        free_optimizer.step()
        assert constraint.holds()
    flipped = {n: (dict(free.named_parameters())[n] * w < 0).sum() for n, w in before.items()}
    assert all(count > 0 for count in flipped.values())
    assert all((w * before[n] >= 0).all() for n, w in weights_of(model, constraint).items())
    assert any((w == 0).any() for w in weights_of(model, constraint).values())


def test_frozen_signs_survive_saving_even_of_weights_that_are_zero_now() -> None:
    model = tiny_model("gpt_neox")
    constraint = constrain(model, "mlp_in", "sign_frozen", "unchanged")
    before = {name: w.clone() for name, w in weights_of(model, constraint).items()}
    for master in constraint.parameters():
        master.data.zero_()
    state = {name: value.clone() for name, value in constraint.state_dict().items()}
    again = tiny_model("gpt_neox", seed=1)
    restored = constrain(again, "mlp_in", "sign_frozen", "unchanged")
    restored.load_state_dict(state)
    for master in restored.parameters():
        master.data.fill_(-1.0)
    restored.push()
    for name, weight in weights_of(again, restored).items():
        assert torch.equal(weight == 0, ~torch.signbit(before[name]))


def test_a_flipped_sign_is_noticed_when_folding() -> None:
    model = tiny_model("gpt_neox")
    constraint = constrain(model, "mlp_in", "sign_frozen", "unchanged")
    next(iter(constraint.parameters())).data.neg_()
    with pytest.raises(IsotoneError, match="has left its frozen sign"):
        fold(model)


# --- steps that are comparable ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", ["softplus", "scaled_softplus", "square", "magnitude"])
def test_matched_steps_move_weights_as_far_as_projection_does(parametrization: str) -> None:
    """One AdamW step from the same weights; where the slope is above its floor, W moves alike to first order."""
    moved = {}
    for name, how in (("projection", "raw"), (parametrization, "matched"), (parametrization, "raw")):
        model = tiny_model("arcee", initializer_range=0.2)
        constraint = constrain(model, "mlp_both", name, "absolute", step=how)
        before = {n: w.clone() for n, w in weights_of(model, constraint).items()}
        step(model, constraint, optimizer_of(model, constraint, lr=1e-5), micro_batches=1)
        assert constraint.holds()
        large = {n: before[n] > 0.05 for n in before}  # the slope of each map is above .01 there
        after = weights_of(model, constraint)
        moved[name, how] = torch.cat([(after[n] - before[n])[large[n]] for n in before])
    reference = moved["projection", "raw"]
    off = {
        how: float((moved[parametrization, how] - reference).abs().mean() / reference.abs().mean())
        for how in ("matched", "raw")
    }
    assert off["matched"] < 0.03
    assert off["matched"] < 0.2 * off["raw"] or parametrization == "magnitude"


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_matched_steps_stay_inside_the_constraint_and_finite(parametrization: str) -> None:
    model = tiny_model("gpt2")
    start = "unchanged" if parametrization == "sign_frozen" else "absolute"
    constraint = constrain(model, "mlp_both", parametrization, start, step="matched")
    optimizer = optimizer_of(model, constraint, lr=0.05)
    constraint.attach(optimizer)
    for seed in range(5):
        model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert constraint.holds()
        assert max(float(w.abs().max()) for w in weights_of(model, constraint).values()) < 5


def test_masters_of_matched_steps_are_no_masters_of_raw_ones() -> None:
    """What a checkpoint says, by which it refuses to go on; a constraint as it always was says nothing new."""
    matched = constrain(tiny_model("gpt2"), step="matched").description
    assert matched == {**constrain(tiny_model("gpt2")).description, "step": "matched"}


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"constraint\.step: 'large' is unknown; allowed: raw, matched"):
        constrain(tiny_model("gpt2"), step="large")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_every_parametrization_holds_after_every_step_of_every_architecture(parametrization: str, name: str) -> None:
    """Steps of AdamW that would take many weights over 0; folded, the model is the same."""
    model = tiny_model(name)
    start = "unchanged" if parametrization == "sign_frozen" else "absolute"
    constraint = constrain(model, architecture_of_model(model).widest_scope, parametrization, start)
    optimizer = optimizer_of(model, constraint)
    for _ in range(2):
        before = {n: w.clone() for n, w in weights_of(model, constraint).items()}
        step(model, constraint, optimizer, micro_batches=1)
        assert constraint.holds()
        assert all(not torch.equal(w, before[n]) for n, w in weights_of(model, constraint).items())
        if parametrization != "sign_frozen":
            assert all((w >= 0).all() for w in weights_of(model, constraint).values())
    trained = logits(model)
    assert torch.equal(logits(fold(model)), trained)
