"""A family declares what this configuration gives figures of: anything else is refused before anything runs."""

from itertools import product
from typing import Any

import pytest
from evidence_rows import rows

from isotone.comparisons import attack_quantities
from isotone.config import Attacks, Experiment
from isotone.config_family import measured_variants
from isotone.config_io import experiment_from_dict
from isotone.errors import UsageError
from isotone.results import family_of


def experiment(member: dict[str, Any], **attacks: Any) -> Experiment:
    return experiment_from_dict({"name": "x", "attacks": attacks, "analysis": {"family": [member]}}, "my.yaml")


DELTA = {"metric": "delta_nll"}


@pytest.mark.parametrize(
    ("member", "attacks", "message"),
    [
        (
            DELTA | {"attack": "gcg"},
            {"pgd": {}},
            r"attack: found 'gcg', allowed: hotflip, triggers, random_edits, pgd, ensemble \(attacks.gcg is not asked",
        ),
        (DELTA | {"attack": "ensemble"}, {}, r"allowed: hotflip, triggers, random_edits \(no further attack is asked"),
        (DELTA | {"attack": "hotflop"}, {}, r"attack: found 'hotflop', allowed: hotflip, triggers, random_edits$"),
        (DELTA | {"attack": "frequency"}, {"frequency": {}}, "found 'frequency', allowed: .*random_edits, ensemble"),
        (DELTA | {"attack": "gcg", "variant": "k"}, {"gcg": {}}, "variant: found 'k', allowed: top_k"),
        (DELTA | {"attack": "hotflip", "variant": "beam"}, {}, "variant: found 'beam', allowed: once, iterative"),
        (DELTA | {"attack": "hotflip", "variant": "published"}, {}, "variant: found 'published', allowed: once"),
        (DELTA | {"attack": "random_edits", "variant": "frequency"}, {}, "found 'frequency', allowed: uniform"),
        (DELTA | {"attack": "random_edits"}, {"frequency": {}}, "which one of random_edits. allowed: uniform, freq"),
        ({"metric": "success_rate", "attack": "triggers"}, {}, "metric: found 'success_rate', allowed for triggers"),
        ({"metric": "top1_change", "attack": "triggers"}, {}, "metric: found 'top1_change', allowed for triggers"),
    ],
)
def test_what_can_never_be_measured_is_refused_in_one_line_with_file_and_key(
    member: dict[str, Any], attacks: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        experiment(member, **attacks)
    assert str(refused.value).startswith("my.yaml: analysis.family.0.")
    assert len(str(refused.value).splitlines()) == 1


def test_an_attack_of_one_variant_needs_no_name_of_it() -> None:
    for attack, variant in (("gcg", "top_k"), ("ensemble", "worst_case"), ("random_edits", "uniform")):
        [key] = family_of(experiment(DELTA | {"attack": attack}, gcg={}))
        assert (key.attack, key.variant, key.protocol) == (attack, variant, "prefix")


def test_what_is_allowed_is_what_attacks_give_figures_of() -> None:
    further: dict[str, Any] = {"gcg": {}, "coordinate": {}, "pgd": {}, "frequency": {}}
    variants = measured_variants(Attacks.model_validate(further))
    del variants["triggers"]
    for attack, metric in product(variants, ("delta_nll", "success_rate", "top1_change")):
        for variant in variants[attack]:
            made = [row | {"top1": {"clean": 1, "attacked": 0}, "upper_bound": True} for row in rows([0.1])]
            named = [row | {"attack": attack, "variant": variant} for row in made]
            keys = {q.key for q in attack_quantities(named, threshold=0.1, published_success=0.15)}
            member = {"metric": metric, "attack": attack, "variant": variant}
            assert set(family_of(experiment(member, **further))) <= keys
