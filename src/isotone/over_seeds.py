"""Puts together what the runs of several seeds found: pooled measurements, comparisons over seeds, conclusions.

Documents are crossed with seeds: every seed's models meet the same ones, and a document without a figure in one seed is
left out in all. The success threshold τ is each seed's own (random edits on its baseline), so a pooled success rate is
the share of (seed, document) pairs beyond the τ of their seed; a margin of equivalence is the mean of the seeds'.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isotone.comparisons import PREFIX, PREPENDED, PUBLISHED, TEXT_SPACE, Key, Quantity, compare, measure
from isotone.config import Experiment
from isotone.evidence import Evidence
from isotone.result_models import (
    ArmOverSeeds,
    ComparisonOverSeeds,
    FinalResults,
    PooledMeasurement,
    PooledTransfer,
    SeedDifference,
    SummaryResults,
)
from isotone.results import (
    BASELINE,
    analyse_seeds,
    conclusions,
    correct,
    declared_family,
    differences_between_arms,
    primary_variant,
)
from isotone.transfer import Cell, pooled_matrix

Json = dict[str, Any]
Quantities = Mapping[str, Mapping[Key, Quantity]]


@dataclass(frozen=True)
class SeedFindings:
    """What the run of one seed found.

    Attributes:
        final: its results.
        quantities: by arm and key, what its documents' rows come to.
        evidence: by arm, the rows themselves, for decompositions, signs of masking and verdicts.
        transfer: by cell of the transfer matrix, the change of loss.
    """

    final: FinalResults
    quantities: Quantities
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    transfer: Mapping[Cell, Quantity] = field(default_factory=dict)


def build_summary(experiment: Experiment, found: Mapping[int, SeedFindings]) -> SummaryResults:
    """Return the results over seeds.

    The confirmatory family is that of a run. A measure that one seed lacks is not pooled, and listed.

    Args:
        experiment: the resolved configuration; the same for all seeds but for the seed.
        found: by seed, in the order in which seeds are shown; all measured the same documents (``other_documents``).
    """
    variant = primary_variant(experiment)
    arms, finals = list(experiment.arms), {seed: f.final for seed, f in found.items()}
    pooled = [entry for arm in arms for entry in _pooled(arm, found)]
    comparisons = [_compared(arm, key, found) for arm in arms if arm != BASELINE for key in _keys(found, arm, BASELINE)]
    compared = [entry for entry in comparisons if entry is not None]
    correct(compared, experiment)
    margins = _mean_margins([final.equivalence_margins for final in finals.values()])
    analysis = analyse_seeds(experiment, [f.evidence for f in found.values()], margins)
    return SummaryResults(
        experiment=experiment.name,
        seeds=list(found),
        success_thresholds={str(seed): final.success_threshold for seed, final in finals.items()},
        equivalence_margins=margins,
        verdicts=analysis.verdicts,
        decompositions=analysis.decompositions,
        masking=analysis.masking,
        family=declared_family(experiment, compared),
        equivalence_margins_by_seed={str(seed): final.equivalence_margins for seed, final in finals.items()},
        measurements=[m for final in finals.values() for m in final.measurements],
        pooled=[PooledMeasurement(**entry) for entry in pooled],
        arms={arm: _arm(arm, finals, pooled) for arm in arms},
        comparisons=[ComparisonOverSeeds(**entry, by_seed=_by_seed(entry, finals)) for entry in compared],
        conclusions=conclusions(
            [c for c in compared if not any(f.final.arms[c["a"]].matched_loss for f in found.values())],
            variant,
            margins,
        ),
        transfer=[PooledTransfer(**entry) for entry in pooled_matrix([f.transfer for f in found.values()])],
        differences_between_arms=differences_between_arms(experiment),
        not_pooled=list(_not_pooled(arms, found)),
    )


def other_documents(found: Mapping[int, SeedFindings]) -> str | None:
    """Say in what two seeds did not measure the same documents; None if all did.

    Documents are chosen by ``data.shuffle_seed`` and not by a run's seed, so this can only be a fault.
    """
    (first, of_first), *others = found.items()
    for seed, of_seed in others:
        for arm, quantities in of_first.quantities.items():
            for key in quantities.keys() & of_seed.quantities.get(arm, {}).keys():
                here, there = (_documents(f.quantities[arm][key]) for f in (of_first, of_seed))
                if odd := sorted(here ^ there):
                    where = " ".join(filter(None, (arm, key.attack, key.variant, key.metric)))
                    return (
                        f"seeds {first} and {seed} measured other documents in {where}: {odd[0]} is in one of them only"
                    )
    return None


def _documents(quantity: Quantity) -> set[str]:
    return quantity.sums.keys() | quantity.missing.keys()


def _keys(found: Mapping[int, SeedFindings], *arms: str) -> list[Key]:
    """Return the measures that every seed has of all these arms."""
    tables = [f.quantities.get(arm, {}) for f in found.values() for arm in arms]
    return [key for key in tables[0] if all(key in table for table in tables)]


def _pooled(arm: str, found: Mapping[int, SeedFindings]) -> Iterator[Json]:
    for key in _keys(found, arm):
        entry = measure(arm, [f.quantities[arm][key] for f in found.values()])
        if key == Key("nll") and entry["value"] is not None:
            yield entry | {
                "metric": "perplexity",
                "value": _perplexity(entry["value"]),
                "ci95": _perplexities(entry["ci95"]),
                "unit": "1",
            }
        yield entry


def _perplexity(nll: float) -> float | None:
    return math.exp(nll) if nll < 690 else None


def _perplexities(ends: Sequence[float] | None) -> list[float] | None:
    found = [value for end in ends or () if (value := _perplexity(end)) is not None]
    return found if len(found) == 2 else None


def _compared(arm: str, key: Key, found: Mapping[int, SeedFindings]) -> Json | None:
    of_arm, of_baseline = ([f.quantities[name][key] for f in found.values()] for name in (arm, BASELINE))
    return compare((arm, of_arm), (BASELINE, of_baseline))


def _by_seed(entry: Json, finals: Mapping[int, FinalResults]) -> list[SeedDifference]:
    """Return what each seed's own run says about a comparison; its test is exact (McNemar) for successes."""
    same = (*Key._fields, "a", "b")
    return [
        SeedDifference(seed=seed, **{k: getattr(c, k) for k in SeedDifference.model_fields if k != "seed"})
        for seed, final in finals.items()
        for c in final.comparisons
        if all(getattr(c, k) == entry[k] for k in same)
    ]


def _mean_margins(margins: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean margin of each attack for which every seed has one."""
    names = [name for name in margins[0] if all(name in of_seed for of_seed in margins)]
    return {name: math.fsum(of_seed[name] for of_seed in margins) / len(margins) for name in names}


def _arm(arm: str, finals: Mapping[int, FinalResults], pooled: Sequence[Json]) -> ArmOverSeeds:
    of_arm = [entry for entry in pooled if entry["arm"] == arm]
    of_seeds = {seed: final.arms[arm] for seed, final in finals.items()}
    first = next(iter(of_seeds.values()))
    hotflip = None
    if first.hotflip:
        variants = {
            name: _attack_entry(of_arm, entry["attack"], entry["variant"])
            for name, entry in first.hotflip["variants"].items()
        }
        hotflip = {**variants[first.hotflip["variant"]], "variant": first.hotflip["variant"], "variants": variants}
    triggers = first.triggers and _attack_entry(of_arm, first.triggers["attack"], first.triggers["variant"])
    return ArmOverSeeds(
        perplexity=_value(of_arm, Key("perplexity")),
        bits_per_byte=_value(of_arm, Key("bits_per_byte")),
        hotflip=hotflip,
        triggers=triggers,
        attacks={
            name: _attack_entry(of_arm, entry["attack"], entry["variant"])
            | ({"upper_bound": True} if entry.get("upper_bound") else {})
            for name, entry in first.attacks.items()
        },
        certificate=_certificate({seed: result.certificate for seed, result in of_seeds.items()}),
        training={str(seed): result.training for seed, result in of_seeds.items()},
        matched_loss={str(seed): found for seed, result in of_seeds.items() if (found := result.matched_loss)},
    )


def _attack_entry(of_arm: Sequence[Json], attack: str, variant: str) -> Json:
    """Return an attack's entry over seeds, in the names of a run's entry; None where nothing is pooled."""
    primary = PREPENDED if attack == "triggers" else PREFIX
    measured = {
        e["metric"]: e for e in of_arm if (e["attack"], e["variant"], e["protocol"]) == (attack, variant, primary)
    }
    any_protocol = [e for e in of_arm if (e["attack"], e["variant"]) == (attack, variant)]
    known = measured.get("delta_nll") or next(iter(any_protocol), {})
    values = dict.fromkeys(("delta_nll", "clean_nll", "attacked_nll", "success_rate"))
    return {
        "attack": attack,
        "variant": variant,
        "n": known.get("n", 0),
        "num_missing": known.get("num_missing", 0),
        **values,
        **{metric: entry["value"] for metric, entry in measured.items()},
        "text_space_delta_nll": _value(of_arm, Key("delta_nll", attack, variant, TEXT_SPACE)),
        "budget": known.get("budget"),
        "published_accounting": {
            metric: _value(of_arm, Key(metric, attack, variant, PUBLISHED))
            for metric in ("success_rate", "degradation")
        },
    }


def _value(of_arm: Sequence[Json], key: Key) -> float | None:
    return next((e["value"] for e in of_arm if Key(*(e[k] for k in Key._fields)) == key), None)


def _certificate(by_seed: Mapping[int, Json | None]) -> Json | None:
    """Return what is proved in all seeds; where they differ, each verdict with its seeds."""
    if not any(by_seed.values()):
        return None
    found = {
        key: _joined({seed: str((certificate or {}).get(key, "missing")) for seed, certificate in by_seed.items()})
        for key in ("verdict", "order")
    }
    return {
        **found,
        "by_seed": {str(seed): (certificate or {}).get("verdict") for seed, certificate in by_seed.items()},
        "premise": _premise([(certificate or {}).get("premise") for certificate in by_seed.values()]),
    }


def _premise(of_seeds: Sequence[Json | None]) -> Json | None:
    """Return how often attacked texts met the certificate's premise, in all seeds together."""
    found = [premise for premise in of_seeds if premise]
    if len(found) < len(of_seeds):
        return None
    pairs, ordered = (sum(premise[key] for premise in found) for key in ("pairs", "ordered"))
    return {
        "variant": found[0]["variant"],
        "pairs": pairs,
        "ordered": ordered,
        "rate": ordered / pairs if pairs else None,
    }


def _joined(by_seed: Mapping[int, str]) -> str:
    seeds: dict[str, list[int]] = {}
    for seed, value in by_seed.items():
        seeds.setdefault(value, []).append(seed)
    if len(seeds) == 1:
        return next(iter(seeds))
    return ", ".join(f"{value} ({', '.join(map(str, of_value))})" for value, of_value in seeds.items())


def _not_pooled(arms: Sequence[str], found: Mapping[int, SeedFindings]) -> Iterator[Json]:
    for arm in arms:
        tables = {seed: f.quantities.get(arm, {}) for seed, f in found.items()}
        for key in dict.fromkeys(key for table in tables.values() for key in table):
            if lacking := [seed for seed, table in tables.items() if key not in table]:
                yield {"arm": arm, **key._asdict(), "missing_in": lacking}
    for cell, quantity in {c: q for f in found.values() for c, q in f.transfer.items()}.items():
        if lacking := [seed for seed, f in found.items() if cell not in f.transfer]:
            yield {"arm": cell.target, "source": cell.source, **quantity.key._asdict(), "missing_in": lacking}
