"""What a recipe adds stands in the resolved configuration; published ones change nothing, to the letter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import tiny_model

from isotone.config import Arm, ArmTraining, Constraint, Distill, Experiment, Training
from isotone.config_io import dump_yaml, list_presets, load_experiment
from isotone.config_recipes import with_recipes
from isotone.constraint import ARCHITECTURES, constrain, recipes, resolve_recipe
from isotone.constraint.recipes import ModelKind, Recipe
from isotone.errors import UsageError
from isotone.models.describe import kind_of
from isotone.pairs import PairLayout
from isotone.pipeline.graph import Node
from isotone.pipeline.resolve import resolve
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.slices import config_slice
from isotone.planning.shape import read_shape

RICH = Recipe(
    "projection",
    "nnls",
    constraint={"activation": "monotone_gelu", "layers": "last:2"},
    training={"distill": {"blocks": 0.3, "logits": 0.5}, "lr": 1.5e-3},
)


def never() -> Any:
    pytest.fail("nobody needs to look at the model")


@pytest.fixture
def rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recommended recipe of RMSNorm models adds a lot, that of LayerNorm models nothing."""
    for kind in ("rms_norm", "rotatable"):
        monkeypatch.setitem(recipes.RECIPES["recommended"], kind, RICH)


def experiment(common: Training | None = None, **arm: Any) -> Experiment:
    given = {"constraint": Constraint(recipe="recommended"), **arm}
    return Experiment(name="x", training=common or Training(), arms={"baseline": Arm(), "monotonic": Arm(**given)})


@pytest.mark.parametrize("preset", [preset.name for preset in list_presets()])
def test_no_preset_that_is_published_is_changed(preset: str) -> None:
    before = load_experiment(preset)
    if {arm.constraint.recipe for arm in before.arms.values() if arm.constraint} <= {
        "published",
        "published_bf16",
        None,
    }:
        assert with_recipes(before, never) is before


@pytest.mark.parametrize("recipe", ["published", "published_bf16"])
def test_published_recipes_have_everything_off(recipe: Any) -> None:
    """Also where the experiment distills; an arm that asks for it itself gets it."""
    both = Training(distill=Distill(blocks=0.5))
    found = with_recipes(experiment(both, constraint=Constraint(recipe=recipe)), never)
    constraint = found.arms["monotonic"].constraint
    assert constraint is not None
    assert constraint == Constraint(recipe=recipe)
    assert (constraint.layers, constraint.activation, constraint.anneal) == (None, None, None)
    assert not found.training_of("monotonic").distill.share
    assert found.training_of("baseline").distill.share
    own = experiment(both, constraint=Constraint(recipe=recipe), training=ArmTraining(distill=Distill(logits=0.2)))
    assert with_recipes(own, never).training_of("monotonic").distill == Distill(logits=0.2)


def test_a_recipe_fills_what_the_arm_leaves_open(rich: None) -> None:
    found = with_recipes(experiment(), lambda: "rms_norm")
    arm = found.arms["monotonic"]
    pair: Any = {"recipe": "recommended", "parametrization": "projection", "initialization": "nnls"}
    assert arm.constraint == Constraint(**pair, activation="monotone_gelu", layers="last:2")
    assert found.training_of("monotonic").distill == Distill(blocks=0.3, logits=0.5)
    assert found.training_of("monotonic").lr == 1.5e-3
    assert found.training_of("baseline") == Training()
    own = experiment(constraint=Constraint(recipe="recommended", activation="relu"), training=ArmTraining(lr=1e-4))
    filled = with_recipes(own, lambda: "rms_norm")
    assert filled.arms["monotonic"].constraint == Constraint(**pair, activation="relu", layers="last:2")
    assert filled.training_of("monotonic").lr == 1e-4
    assert with_recipes(found, lambda: "rms_norm") == found  # as a resume does


def test_an_arm_with_a_start_of_its_own_or_without_constraint_is_not_annealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.RECIPES["recommended"], "rms_norm", Recipe("projection", "nnls", {"anneal": 0.5}))
    assert _annealed(Constraint(recipe="recommended")) == 0.5
    assert _annealed(Constraint(recipe="recommended", initialization="relu")) is None
    assert _annealed(Constraint(recipe="recommended", enforce=False)) is None
    assert _annealed(Constraint(recipe="recommended", anneal=0.25)) == 0.25


def _annealed(constraint: Constraint) -> float | None:
    found = with_recipes(experiment(constraint=constraint), lambda: "rms_norm").arms["monotonic"].constraint
    assert found is not None
    return found.anneal


def test_an_arm_that_is_not_trained_gets_no_training(rich: None) -> None:
    found = with_recipes(experiment(train=False), lambda: "rms_norm")
    assert found.arms["monotonic"].training == ArmTraining()


def test_layer_norm_models_have_a_recipe_of_their_own(rich: None) -> None:
    before = experiment()
    pair: Any = {"parametrization": "scaled_softplus", "initialization": "shift"}
    own = experiment(constraint=Constraint(recipe="recommended", **pair))
    assert with_recipes(before, lambda: "layer_norm") == own
    assert with_recipes(own, lambda: "layer_norm") is own


def test_a_record_answers_for_what_a_recipe_means() -> None:
    """Were the name alone hashed, a recipe that means something else one day would make nothing stale."""
    norms: tuple[Any, Any] = ("layer_norm", "rms_norm")
    one, other = (with_recipes(experiment(), lambda norm=norm: norm) for norm in norms)  # type: ignore[misc]
    for node in (Node("constrain", "monotonic"), Node("aggregate")):
        assert config_slice(one, 1, node) != config_slice(other, 1, node)
    assert config_slice(one, 1, Node("train", "baseline")) == config_slice(other, 1, Node("train", "baseline"))


def test_what_does_not_fit_the_meaning_of_a_recipe_is_refused_by_key() -> None:
    given = experiment(constraint=Constraint(recipe="recommended", calibrate=True))
    with pytest.raises(UsageError, match=r"arms\.monotonic\.constraint: .* from shift here; calibrate: shift starts"):
        with_recipes(given, lambda: "layer_norm")
    assert with_recipes(given, lambda: "rms_norm").arms["monotonic"].constraint


def test_a_run_is_resolved_with_what_its_recipes_add(rich: None, tmp_path: Path) -> None:
    given = experiment().model_copy(update={"model": experiment().model.model_copy(update={"source": "pocket-arcee"})})
    assert kind_of(given.model) == "rotatable"
    run = RunDirectory.of(tmp_path, "x", 1)
    resolved = resolve(given, run)
    assert resolved.training_of("monotonic").distill.share
    assert load_experiment(str(run.config)) == resolved
    assert resolve(given, run) == resolved
    assert "blocks: 0.3" in dump_yaml(resolved)


def test_a_start_in_another_basis_distils_no_states_after_blocks() -> None:
    given = Constraint(parametrization="projection", initialization="rotated_nnls")
    blocks = Training(distill=Distill(blocks=0.5))
    with pytest.raises(ValidationError, match=r"arms\.monotonic\.training\.distill\.blocks: rotated_nnls puts"):
        experiment(blocks, constraint=given)
    own = experiment(blocks, constraint=given, training=ArmTraining(distill=Distill(logits=0.5)))
    assert own.arms["monotonic"].constraint == given
    told = r"distill\.blocks: rotated_nnls puts .* start from nnls \(this is what recipes mean for pocket; an arm's own"
    recommended = experiment(training=ArmTraining(distill=Distill(blocks=0.5)))
    with pytest.raises(UsageError, match=told):
        with_recipes(recommended, lambda: "rotatable")
    assert with_recipes(recommended, lambda: "rms_norm").training_of("monotonic").distill.blocks


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("arcee", {}, "rotatable"),
        ("llama", {"tie_word_embeddings": True}, "rotatable"),
        ("gemma", {}, "rotatable"),
        ("gemma2", {}, "rms_norm"),
        ("arcee", {"hidden_size": 15, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}, "rms_norm"),
        ("t5", {}, "rms_norm"),
        ("gpt_neox", {}, "layer_norm"),
    ],
)
def test_recommended_starts_from_the_best_start_that_a_model_can_have(
    name: str, changes: dict[str, Any], kind: ModelKind, tmp_path: Path
) -> None:
    """Told from config.json alone, and the start does what it was told it can."""
    model = tiny_model(name, **changes)
    model.save_pretrained(tmp_path)
    source = experiment().model.model_copy(update={"source": str(tmp_path)})
    assert kind_of(source) == read_shape(source).kind == kind
    recipe = resolve_recipe("recommended", kind)
    pairs = PairLayout(source=6, pad=0) if model.config.is_encoder_decoder else None
    rows = torch.randint(4, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    pair = (recipe.parametrization, recipe.initialization)
    scope = ARCHITECTURES[model.config.model_type].widest_scope
    assert constrain(model, scope, *pair, calibration_rows_NL=rows, pairs=pairs).holds()
