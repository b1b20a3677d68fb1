"""Distillation: nothing to learn from oneself, the gradient that mathematics says, and resumable at its boundaries."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_models import MODELS, tiny_model, tokens
from torch import nn

from isotone import records
from isotone.config import ArmTraining, Distill, Experiment, Training
from isotone.constraint import ARCHITECTURES
from isotone.errors import IsotoneError
from isotone.pairs import PairLayout
from isotone.scoring import token_kl, token_nll
from isotone.training import Budget
from isotone.training.distill import Distillation, phase_at, state_error
from training import test_pairs, tiny_run
from training.tiny_run import RECIPE, outcome, train, train_in_budgets, trainer

BOTH = Distill(blocks=0.3, logits=0.4, weight=0.7, temperature=2.0)
RECIPE_2 = RECIPE.model_copy(update={"epochs": 2, "distill": BOTH})  # blocks to step 7, logits to 16, plain to 22


def teacher() -> nn.Module:
    return tiny_run.tiny_model()


def distilled(model: nn.Module, teacher: nn.Module, recipe: Distill, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of the first step of ten."""
    distillation = Distillation(recipe, lambda: teacher, lambda model: None, 10)
    distillation.prepare(0)
    return distillation.losses(model, ids_BL, ids_BL, distillation.counts(ids_BL))


def test_phases_follow_each_other_at_exact_shares() -> None:
    phases = [phase_at(BOTH, step, 10) for step in range(10)]
    assert phases == ["blocks"] * 3 + ["logits"] * 4 + [None] * 3
    assert [phase_at(Distill(blocks=0.1), step, 11) for step in range(3)] == ["blocks", "blocks", None]
    assert phase_at(Distill(), 0, 10) is None


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "opt", "bloom", "arcee", "llama", "gemma2"])
@pytest.mark.parametrize("phase", ["blocks", "logits"])
def test_a_model_has_nothing_to_learn_from_itself(name: str, phase: str) -> None:
    model, same = tiny_model(name), tiny_model(name)
    found = distilled(model, same, Distill(**{phase: 1.0, "weight": 1.0}), tokens())
    assert found[phase].item() == pytest.approx(0, abs=1e-10)
    found["loss"].backward()
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-4 for p in model.parameters())
    assert all(p.grad is None for p in same.parameters())


@pytest.mark.parametrize("name", [n for n in MODELS if n in ("gpt_neox", "arcee")])
def test_every_block_is_matched(name: str) -> None:
    """Changing the second projection of any block is seen, and its gradient pulls back."""
    for block in range(2):
        model, other = tiny_model(name).train(), tiny_model(name)
        with torch.no_grad():
            layers = model.get_submodule(ARCHITECTURES[model.config.model_type].blocks)
            weight = layers[block].get_submodule(ARCHITECTURES[model.config.model_type].down).weight
            weight.mul_(1.1)
        found = distilled(model, other, Distill(blocks=1.0, weight=1.0), tokens())
        found["loss"].backward()
        assert found["blocks"].item() > 1e-8
        assert (weight.grad * weight).sum().item() > 0


@pytest.mark.parametrize("centred", [False, True])
def test_gradient_of_the_block_loss_is_the_one_computed_by_hand(centred: bool) -> None:
    """∂/∂h ‖n − n*‖² = 2 c (1 − n nᵀ)(n − n*) / ‖c h‖, n = c h / ‖c h‖, c the projection that takes the mean away."""
    own = torch.randn(3, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    its = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    state_error(list(own.float()), list(its.float()), centred).sum().backward()
    assert own.grad is not None
    centring = torch.eye(8, dtype=torch.float64) - 1 / 8
    for number in range(3):
        c = centring if centred and number < 2 else torch.eye(8, dtype=torch.float64)
        own_c, its_c = own.detach()[number] @ c, its[number] @ c
        length = own_c.norm(dim=-1, keepdim=True)
        n, m = own_c / length, its_c / its_c.norm(dim=-1, keepdim=True)
        across = (n - m) - n * (n * (n - m)).sum(-1, keepdim=True)
        by_hand = 2 * across @ c / length / 3
        torch.testing.assert_close(own.grad[number], by_hand, rtol=1e-4, atol=1e-6)


def test_divergence_is_that_of_two_distributions_at_a_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (torch.randn(2, 5, 7) for _ in range(2))
    p, q = (torch.distributions.Categorical(logits=x / 2) for x in (theirs, ours))
    expected = 4 * torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(token_kl(ours, theirs, 2.0), expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("isotone.scoring.CHUNK_ELEMENTS", 14)
    torch.testing.assert_close(token_kl(ours, theirs, 2.0), expected, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_weighted_sum_of_what_the_curve_shows() -> None:
    model, other = tiny_model("arcee").train(), tiny_model("arcee", seed=1)
    for phase in ("blocks", "logits"):
        found = distilled(model, other, Distill(**{phase: 1.0, "weight": 0.7}), tokens())
        assert float(found["loss"]) == pytest.approx(0.7 * float(found[phase]) + 0.3 * float(found["nll"]), rel=1e-5)
        assert float(found["nll"]) == pytest.approx(float(token_nll(model, tokens()).mean()), rel=1e-5)


@pytest.mark.parametrize("arm", [None, "scaled_softplus", "projection"])
def test_budgets_do_not_change_a_bit_at_the_boundaries_of_phases(tmp_path: Path, arm: str | None) -> None:
    """Processes of one step each stop at every boundary there is; teachers come and go with them."""
    assert train(tmp_path / "whole", arm, recipe=RECIPE_2, teacher=teacher).complete
    train_in_budgets(tmp_path / "pieces", "1/11", arm, recipe=RECIPE_2, teacher=teacher)
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")
    lines = records.JsonLines(tmp_path / "whole" / "train.arm.jsonl").read()
    parts = [sorted(line.keys() & {"nll", "blocks", "logits"}) for line in lines if "loss" in line]
    assert parts == [["blocks", "nll"]] * 7 + [["logits", "nll"]] * 9 + [[]] * 6


def test_the_teacher_is_in_memory_only_while_it_teaches(tmp_path: Path) -> None:
    a_trainer = trainer(tmp_path, recipe=RECIPE_2, teacher=teacher)
    taught = []
    distillation: Any = a_trainer.distillation

    def look(step: int, text: str) -> None:
        taught.append(distillation._teacher is not None)
        if taught[-1]:
            assert not any(module.training for module in distillation._teacher.modules())
            assert not any(p.requires_grad for p in distillation._teacher.parameters())

    a_trainer.progress = look
    a_trainer.run()
    assert taught == [True] * 16 + [False] * 6
    finished = trainer(tmp_path, recipe=RECIPE_2, teacher=lambda: pytest.fail("nothing is left to teach"))
    assert finished.run().complete


def test_micro_batches_change_rounding_only(tmp_path: Path) -> None:
    curves = []
    for rows in (1, 4):
        recipe = RECIPE_2.model_copy(update={"micro_batch": rows, "accumulation": 4 // rows, "epochs": 1})
        train(tmp_path / str(rows), recipe=recipe, teacher=teacher, dropout=0.0)
        lines = records.JsonLines(tmp_path / str(rows) / "train.arm.jsonl").read()
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for on in (False, True):
        recipe = RECIPE_2.model_copy(update={"gradient_checkpointing": on, "epochs": 1})
        train(tmp_path / str(on), recipe=recipe, teacher=teacher, dropout=0.0)
    assert outcome(tmp_path / "True") == outcome(tmp_path / "False")


@pytest.mark.parametrize("phase", ["blocks", "logits"])
def test_under_autocast_losses_are_of_fp32_and_near_those_without(phase: str) -> None:
    model, other = tiny_model("arcee"), tiny_model("arcee", seed=1)
    plain = distilled(model, other, Distill(**{phase: 1.0}), tokens())
    with torch.autocast("cpu", torch.bfloat16):
        found = distilled(model, other, Distill(**{phase: 1.0}), tokens())
        same = distilled(model, model, Distill(**{phase: 1.0}), tokens())
    assert {loss.dtype for loss in found.values()} == {torch.float32}
    assert found[phase].item() == pytest.approx(plain[phase].item(), rel=0.05)
    assert same[phase].item() == pytest.approx(0, abs=1e-6)


def test_no_room_for_a_teacher_is_said() -> None:
    def no_room() -> nn.Module:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    with pytest.raises(IsotoneError, match=r"training.distill: not enough memory for a second model"):
        Distillation(BOTH, no_room, lambda model: None, 10).prepare(0)


def test_it_is_off_unless_asked_for_and_an_arm_can_have_its_own() -> None:
    assert not Training().distill.share
    experiment = Experiment(name="x", training=Training(distill=BOTH))
    assert experiment.training_of("monotonic").distill == experiment.training_of("baseline").distill == BOTH
    arm = experiment.arms["monotonic"].model_copy(update={"training": ArmTraining(distill=Distill())})
    off = experiment.model_copy(update={"arms": experiment.arms | {"monotonic": arm}})
    assert not off.training_of("monotonic").distill.share
    assert Distill(blocks=0.3, logits=0.7).share == Fraction(1)
    with pytest.raises(ValidationError, match="more than all steps"):
        Distill(blocks=0.4, logits=0.7)


# --- encoder-decoders ------------------------------------------------------------------------------------------------


def test_padding_of_pairs_teaches_nothing() -> None:
    """Wider rows with more padding, in one micro-batch or two, give the same losses; a model has none with itself."""
    ids_BL = torch.from_numpy(test_pairs.PairRows().rows("train")[:4].astype(np.int64))
    layout = PairLayout(test_pairs.S, test_pairs.PAD)
    source_BS, target_BT = layout.sides(ids_BL)
    padding_BP = torch.full((4, 3), test_pairs.PAD)
    wide_BL = torch.cat([source_BS, padding_BP, target_BT, padding_BP], 1)
    model, other = tiny_model("t5"), tiny_model("t5", seed=1)
    for phase in ("blocks", "logits"):
        recipe = Distill(**{phase: 1.0})
        found = pair_losses(model, other, recipe, ids_BL, layout, rows=4)
        assert found == pytest.approx(pair_losses(model, other, recipe, ids_BL, layout, rows=1), rel=1e-4)
        wide = PairLayout(test_pairs.S + 3, test_pairs.PAD)
        assert found == pytest.approx(pair_losses(model, other, recipe, wide_BL, wide, rows=4), rel=1e-4)
        assert found["nll"] == pytest.approx(
            float(token_nll(model, ids_BL, pairs=layout).sum()) / layout.num_scored(ids_BL)
        )
        assert found[phase] > 1e-3
        assert pair_losses(model, model, recipe, ids_BL, layout, rows=4)[phase] == pytest.approx(0, abs=1e-10)


def pair_losses(
    model: nn.Module, teacher: nn.Module, recipe: Distill, ids_BL: torch.Tensor, layout: PairLayout, rows: int
) -> dict[str, float]:
    distillation = Distillation(recipe, lambda: teacher, lambda model: None, 10, layout)
    distillation.prepare(0)
    total: dict[str, float] = {}
    for part_BL in ids_BL.split(rows):
        for name, loss in distillation.losses(model, part_BL, part_BL, distillation.counts(ids_BL)).items():
            total[name] = total.get(name, 0.0) + loss.item()
    return total


def test_pairs_resume_bit_for_bit_at_the_boundaries_of_phases(tmp_path: Path) -> None:
    recipe = test_pairs.RECIPE.model_copy(update={"epochs": 2, "distill": BOTH})

    def part(name: str, epochs: str | None) -> bool:
        budget = Budget(Fraction(epochs)) if epochs else None
        options = {"recipe": recipe, "teacher": lambda: tiny_model("t5"), "budget": budget}
        return test_pairs.train(tmp_path / name, parametrization="projection", **options).complete

    assert part("whole", None)
    while not part("pieces", "1/5"):
        pass
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")
