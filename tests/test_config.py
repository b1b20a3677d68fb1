"""The schema refuses what cannot be meant, and combines an arm's values with the experiment's."""

from fractions import Fraction
from typing import Any

import pytest
from pydantic import ValidationError

from isotone.config import Arm, Attacks, Constraint, Data, Experiment, HotFlip, Protocol, Training, epochs_as_fraction


def _experiment(**values: object) -> Experiment:
    return Experiment.model_validate({"name": "x", **values})


def test_the_defaults_are_a_valid_experiment_of_two_arms() -> None:
    assert list(_experiment().arms) == ["baseline", "monotonic"]


def test_an_arm_changes_only_the_values_it_names() -> None:
    experiment = _experiment(
        training={"lr": 2e-5, "clip": 0.5}, arms={"baseline": {}, "slow": {"training": {"lr": 1e-6, "epochs": 3}}}
    )
    assert experiment.training_of("baseline") == Training(lr=2e-5, clip=0.5)
    assert experiment.training_of("slow") == Training(lr=1e-6, clip=0.5, epochs=3)


def test_arms_that_start_from_each_other_in_a_circle_are_refused() -> None:
    arms = {"baseline": {"start": "a"}, "a": {"start": "b"}, "b": {"start": "a"}}
    with pytest.raises(ValidationError, match="in a circle"):
        _experiment(arms=arms)


PAIR = {"baseline": {}, "monotonic": {"constraint": {"recipe": "published"}}}
MADE = {"start": "baseline", "train": False}


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (
            {"baseline": {}, "a": {"start": "nowhere"}},
            "there is no arm 'nowhere'; allowed: pretrained, random, baseline, a",
        ),
        ({"monotonic": {}}, "an unconstrained arm of this name is needed"),
        ({"baseline": {"constraint": {"recipe": "published"}}}, "an unconstrained arm of this name is needed"),
        ({"baseline": {}, "a b": {}}, "letters, digits and _"),
        ({"baseline": {}, "pretrained": {}}, "letters, digits and _"),
        ({"baseline": {}, "a": {"train": False, "training": {"lr": 1}}}, "the arm is not trained"),
        ({"baseline": {}, "a": {"matched_loss": {"to": "baseline", "by": "noise"}}}, "it needs train: false and no"),
        (
            {**PAIR, "c": {**MADE, "matched_loss": {"to": "x", "by": "noise"}}},
            r"c\.matched_loss\.to: found 'x', allowed",
        ),
        (
            {**PAIR, "c": {**MADE, "matched_loss": {"to": "c", "by": "noise"}}},
            "found 'c', allowed: baseline, monotonic",
        ),
        ({**PAIR, "c": {**MADE, "matched_loss": {"to": "baseline", "by": "noise"}}}, "nothing to match"),
        ({**PAIR, "b": {}, "c": {**MADE, "matched_loss": {"to": "b", "by": "noise"}}}, "arm b constrains, and it has"),
        (
            {**PAIR, "c": {"train": False, "matched_loss": {"to": "monotonic", "by": "undertrained"}}},
            "stops the training of arms.c.start, an unconstrained trained arm",
        ),
        (
            {**PAIR, "c": {**MADE, "matched_loss": {"to": "monotonic", "by": "temperature", "draw": 2}}},
            "draw: only by: noise has one",
        ),
        (
            {**PAIR, "c": {**MADE, "matched_loss": {"to": "monotonic", "by": "temperature", "scope": "mlp_in"}}},
            "scope: only by: noise has one",
        ),
        (
            {**PAIR, "c": {**MADE, "matched_loss": {"to": "baseline", "by": "noise", "above": 0.5}}},
            "arm baseline constrains, and it has none; give scope",
        ),
        (
            {**PAIR, "c": {**MADE, "matched_loss": {"to": "monotonic", "by": "temperature", "above": -0.5}}},
            "greater than or equal to 0",
        ),
        (
            {**PAIR, "c": {**MADE, "constraint": {"recipe": "published", "enforce": False}}},
            "says how the arm is trained",
        ),
        (
            {**PAIR, "c": {**MADE, "matched_loss": {"to": "d", "by": "temperature"}}, "d": {"start": "c"}},
            "in a circle",
        ),
    ],
)
def test_arms_that_contradict_each_other_are_refused(arms: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _experiment(arms=arms)


def test_pure_bf16_needs_the_recipe_that_is_known_to_freeze() -> None:
    with pytest.raises(ValidationError, match="freezes constrained weights"):
        _experiment(training={"precision": "pure_bf16"})
    arms = {"baseline": {}, "monotonic": {"constraint": {"recipe": "published_bf16"}}}
    assert _experiment(training={"precision": "pure_bf16"}, arms=arms).training.precision == "pure_bf16"
    arms["rotated"] = {"constraint": {"parametrization": "projection", "initialization": "rotated_nnls"}}
    with pytest.raises(ValidationError, match=r"arms\.rotated\.constraint\.initialization: rotated_nnls needs .* fp32"):
        _experiment(training={"precision": "pure_bf16"}, arms=arms)


def test_fractions_name_every_split_and_sum_to_one() -> None:
    with pytest.raises(ValidationError, match=r"sum to 0\.9, must sum to 1"):
        Data(fractions={"train": 0.5, "validation": 0.1, "attack_search": 0.1, "test": 0.1, "attack_test": 0.1})
    with pytest.raises(ValidationError, match="expected exactly train, validation"):
        Data(fractions={"train": 1.0})


def test_a_constraint_is_named_or_given_in_full() -> None:
    with pytest.raises(ValidationError, match="give either recipe"):
        Constraint(parametrization="softplus")
    assert Constraint(recipe="recommended").scope == "mlp_both"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parametrization": "projection", "initialization": "shift", "calibrate": True}, "calibrate: shift starts"),
        (
            {"parametrization": "projection", "initialization": "rotated_nnls", "calibrate": True},
            "rotated_nnls has means",
        ),
        ({"recipe": "published", "anneal": 0.5}, "anneal: recipe published has none"),
        ({"recipe": "published", "step": "matched"}, "step: recipe published has none"),
        ({"recipe": "published_bf16", "calibrate": True}, "calibrate: recipe published_bf16 has none"),
        ({"recipe": "recommended", "enforce": False, "step": "matched"}, "step: enforce: false leaves nothing"),
    ],
)
def test_keys_of_a_constraint_that_take_each_others_meaning_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Constraint(**given)


@pytest.mark.parametrize(
    ("layers", "fits"), [("-:3", False), ("3:-", False), ("-2:", True), (":", True), ("1:3", True)]
)
def test_a_slice_of_layers_has_numbers(layers: str, fits: bool) -> None:
    if fits:
        assert Constraint(recipe="published", layers=layers).layers == layers
    else:
        with pytest.raises(ValidationError, match="layers"):
            Constraint(recipe="published", layers=layers)


def test_more_flips_than_attackable_tokens_are_refused() -> None:
    assert _experiment(attacks=Attacks(protocol=Protocol(prefix=8), hotflip=HotFlip(flips=7)))
    with pytest.raises(ValidationError, match="8 flips do not fit the 7 attackable tokens"):
        _experiment(attacks=Attacks(protocol=Protocol(prefix=8), hotflip=HotFlip(flips=8)))


@pytest.mark.parametrize("value", ["nan", "inf", "-1", 0, float("nan")])
def test_a_learning_rate_is_a_positive_finite_number(value: object) -> None:
    with pytest.raises(ValidationError):
        Training.model_validate({"lr": value})


def test_parts_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Arm().train = False  # type: ignore[misc]


def test_no_seed_is_given_twice() -> None:
    """Two runs would share one folder, and one seed would count as two."""
    with pytest.raises(ValidationError, match="seeds: 7 is given twice"):
        Experiment(name="x", seeds=(7, 42, 7))


def test_a_tenth_of_an_epoch_is_exactly_a_tenth() -> None:
    assert epochs_as_fraction(0.1) == Fraction(1, 10)
    assert epochs_as_fraction(1e-4) == Fraction(1, 10_000)


@pytest.mark.parametrize(
    ("part", "least"),
    [
        ({"hotflip": {"flips": 2}}, 8),
        ({"hotflip": {"flips": 2, "beam_width": 3, "methods": ["beam"]}}, 3 * 4 + 6),
        ({"hotflip": {"methods": ["once"]}, "gcg": {"candidates": 5}}, 8),
        ({"hotflip": {"methods": ["once"]}, "coordinate": {"candidates": 5}}, 6),
        ({"hotflip": {"methods": ["once"]}, "pgd": {}}, 3),
    ],
)
def test_a_budget_that_buys_no_round_is_refused_before_anything_runs(part: dict, least: int) -> None:
    protocol = {"prefix": 10, "gap": 2, "continuation": 12}
    with pytest.raises(ValidationError, match=f"do not buy one round of .*; at least {24 * least} are needed"):
        Attacks.model_validate({**part, "protocol": protocol, "budget_tokens": 24 * least - 1})
    Attacks.model_validate({**part, "protocol": protocol, "budget_tokens": 24 * least})


def test_a_control_alone_is_no_method_to_conclude_from() -> None:
    with pytest.raises(ValidationError, match="shuffled is a control; add once, iterative or beam"):
        Attacks.model_validate({"hotflip": {"methods": ["shuffled"]}})
    with pytest.raises(ValidationError, match=r"hotflip.candidates: 3 are fewer than the 4 beams"):
        Attacks.model_validate({"hotflip": {"methods": ["beam"], "candidates": 3}})
