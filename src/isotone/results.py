"""Puts together what the nodes of one run found: measurements, comparisons with the baseline, computed conclusions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isotone.analysis import Analysis, analyse
from isotone.comparisons import (
    PREFIX,
    PREPENDED,
    Key,
    Quantity,
    Row,
    after_first_flip,
    attack_quantities,
    compare,
    evaluation_quantities,
    trigger_quantities,
)
from isotone.config import Experiment
from isotone.config_family import declared_variant, primary_method
from isotone.evidence import WORST, Evidence, Seeds, by_attack, with_ensemble
from isotone.result_models import ArmResult, Comparison, FamilyMember, FinalResults, Measurement, Transfer
from isotone.robustness import Floors
from isotone.statistics import holm
from isotone.verdict import Conclusion, conclude_clean, conclude_robustness

BASELINE = "baseline"
"""The arm that all others are compared with."""

MIN_FORWARDS = 20
"""Forwards of a text that some search must have spent for a verdict, unless the configuration says how many tokens."""

TRIGGERS = Key("delta_nll", "triggers", "universal", PREPENDED)
"""What conclusions on triggers rest on."""

ENSEMBLE = Key("delta_nll", *WORST, PREFIX)
"""What conclusions on all attacks on text together rest on, where further ones were made."""

Json = dict[str, Any]


@dataclass(frozen=True)
class ArmFindings:
    """What the nodes of one arm and seed found.

    Attributes:
        evaluation: by checkpoint, what ``isotone.evaluation.summarize`` returned.
        primary_checkpoint: the one that is reported and attacked.
        evaluation_rows: the documents' rows of the primary checkpoint.
        hotflip: entries by variant, as ``isotone.attacks`` summarizes them.
        hotflip_rows: documents' rows by variant, of the held-out documents only.
        transfer_rows: rows of other arms' edits on this one; ``source`` says whose.
        probe_rows: rows of ``isotone.attacks.probe``.
        exchanged_rows: rows of ``isotone.attacks.exchange``.
        triggers: entry of the trigger that was learned.
        trigger_rows: the documents' rows.
        attacks: entries of the further attacks and of the ensemble, by name.
        attack_rows: documents' rows of those, of the held-out documents only.
        certificate: of the exported weights.
        training: what training came to.
        matched_loss: how near a matched-loss control came to the loss that it was to meet; None for other arms.
    """

    evaluation: Mapping[str, Json]
    primary_checkpoint: str
    evaluation_rows: Sequence[Row]
    hotflip: Mapping[str, Json] = field(default_factory=dict)
    hotflip_rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    transfer_rows: Sequence[Row] = ()
    probe_rows: Sequence[Row] = ()
    exchanged_rows: Sequence[Row] = ()
    triggers: Json | None = None
    trigger_rows: Sequence[Row] = ()
    attacks: Mapping[str, Json] = field(default_factory=dict)
    attack_rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    certificate: Json | None = None
    training: Json | None = None
    matched_loss: Json | None = None


def build_final_results(
    experiment: Experiment,
    seed: int,
    findings: Mapping[str, ArmFindings],
    *,
    threshold: float | None,
    margins: Mapping[str, float] | None = None,
    transfer: Sequence[Json] = (),
) -> FinalResults:
    """Return the results of one run.

    The confirmatory family, corrected by Holm, is what ``analysis.family`` declares, of every arm against the baseline;
    all other comparisons are exploratory.

    Args:
        experiment: the resolved configuration.
        seed: of the run.
        findings: by arm; without the baseline nothing is compared.
        threshold: τ, nats per scored token above which an attack on a document succeeds; None: unknown.
        margins: half width of equivalence by attack, nats per scored token.
        transfer: entries of the transfer matrix.
    """
    variant = primary_variant(experiment)
    quantities = quantities_of(experiment, findings, threshold)
    comparisons = [
        entry
        for arm in findings
        if arm != BASELINE and BASELINE in findings
        for key, quantity in quantities[arm].items()
        if key in quantities[BASELINE]
        and (entry := compare((arm, [quantity]), (BASELINE, [quantities[BASELINE][key]])))
    ]
    correct(comparisons, experiment)
    analysis = analyse_seeds(experiment, [evidence_of(findings)], margins or {})
    return FinalResults(
        experiment=experiment.name,
        seed=seed,
        success_threshold=threshold,
        equivalence_margins=dict(margins or {}),
        verdicts=analysis.verdicts,
        decompositions=analysis.decompositions,
        masking=analysis.masking,
        family=declared_family(experiment, comparisons),
        measurements=[
            Measurement(**entry)
            for arm, found in findings.items()
            for entry in [
                *_perplexities(arm, seed, found),
                *(q.measurement(arm, seed) | _resampled(found, q.key) for q in quantities[arm].values()),
            ]
        ],
        arms={arm: _arm_result(found, variant) for arm, found in findings.items()},
        comparisons=[Comparison(**entry) for entry in comparisons],
        conclusions=conclusions(
            [entry for entry in comparisons if not findings[entry["a"]].matched_loss], variant, margins or {}
        ),
        transfer=[Transfer(**entry) for entry in transfer],
        differences_between_arms=differences_between_arms(experiment),
    )


def conclusions(comparisons: Sequence[Json], variant: str, margins: Mapping[str, float]) -> list[Conclusion]:
    """Return what can be said about each pair of arms: clean loss first, then robustness under each attack.

    Args:
        comparisons: entries of the results, without controls at matched loss: the verdict speaks of those.
        variant: HotFlip's primary one.
        margins: half width of equivalence by attack.
    """
    found = []
    for a, b in dict.fromkeys((entry["a"], entry["b"]) for entry in comparisons):
        by_key = {Key(*(e[k] for k in Key._fields)): e for e in comparisons if (e["a"], e["b"]) == (a, b)}
        clean = by_key.get(Key("nll"))
        if clean is not None:
            found.append(conclude_clean(clean))
        for key in (Key("delta_nll", "hotflip", variant, PREFIX), TRIGGERS, ENSEMBLE):
            if key in by_key:
                scored = by_key.get(key._replace(metric="clean_nll"))
                losses = [entry for entry in (clean, scored) if entry is not None]
                found.append(conclude_robustness(by_key[key], losses, margins.get(str(key.attack))))
    return found


def primary_variant(experiment: Experiment) -> str:
    """Return HotFlip's variant that conclusions rest on: the first of iterative, beam and once that is configured."""
    return primary_method(experiment.attacks)


def differences_between_arms(experiment: Experiment) -> list[Json]:
    """Return every value in which arms are treated differently, by dotted key; of training, where arms are trained."""
    values: dict[str, Json] = {"start": {}, "train": {}, "constraint": {}, "matched_loss": {}}
    for name, arm in experiment.arms.items():
        values["start"][name], values["train"][name] = arm.start, arm.train
        values["constraint"][name] = None
        if arm.constraint:
            given = arm.constraint.model_dump(mode="json", exclude_defaults=True)
            values["constraint"][name] = {"scope": arm.constraint.scope, **given}
        matched = arm.matched_loss
        values["matched_loss"][name] = matched.model_dump(mode="json", exclude_defaults=True) if matched else None
        if arm.train:
            for key, value in experiment.training_of(name).model_dump(mode="json").items():
                values.setdefault(f"training.{key}", {})[name] = value
    return [
        {"key": key, "arms": of_arms}
        for key, of_arms in values.items()
        if any(value != next(iter(of_arms.values())) for value in of_arms.values())
    ]


def quantities_of(
    experiment: Experiment, findings: Mapping[str, ArmFindings], threshold: float | None
) -> dict[str, dict[Key, Quantity]]:
    """Return every arm's quantities by key.

    Args:
        experiment: the resolved configuration.
        findings: by arm.
        threshold: τ, as in ``build_final_results``.
    """
    published_success, budget = experiment.attacks.hotflip.published_success, experiment.attacks.budget_tokens
    found: dict[str, list[Quantity]] = {arm: evaluation_quantities(f.evaluation_rows) for arm, f in findings.items()}
    for arm, finding in findings.items():
        for rows in (*finding.hotflip_rows.values(), *finding.attack_rows.values()):
            found[arm] += attack_quantities(
                rows, threshold=threshold, published_success=published_success, budget_tokens=budget
            )
        found[arm] += trigger_quantities(finding.trigger_rows, (finding.triggers or {}).get("spent_tokens"))
    rows_of = {arm: {**f.hotflip_rows, **f.attack_rows} for arm, f in findings.items()}
    for name in dict.fromkeys(name for of_arm in rows_of.values() for name in of_arm):
        rows_by_arm = {arm: of_arm[name] for arm, of_arm in rows_of.items() if of_arm.get(name)}
        if any(row.get("upper_bound") for rows in rows_by_arm.values() for row in rows):
            continue
        for arm, quantity in after_first_flip(rows_by_arm).items():
            found[arm].append(quantity)
    return {arm: {quantity.key: quantity for quantity in of_arm} for arm, of_arm in found.items()}


def equivalence_margin(experiment: Experiment, change: float) -> float:
    """Return δ, the half width of equivalence, from what an attack does to the baseline on search documents."""
    return experiment.analysis.margin_share * abs(change)


def family_of(experiment: Experiment) -> list[Key]:
    """Return the keys of the declared family; a variant that is not given is the one that conclusions rest on."""
    keys = []
    for declared in experiment.analysis.family:
        protocol = {None: None, "triggers": PREPENDED}.get(declared.attack, PREFIX)
        variant = declared_variant(declared, experiment.attacks)
        keys.append(Key(declared.metric, declared.attack, variant, protocol))
    return keys


def correct(comparisons: list[Json], experiment: Experiment) -> None:
    """Write the adjusted p of the confirmatory family into its entries, and the level at which it is read.

    Controls at matched loss are no claims of their own (the verdict is about the arm that they are matched to), so they
    are exploratory, and adding one takes nothing from the claims.

    Args:
        comparisons: entries of the results.
        experiment: declares the family.
    """
    family, level = set(family_of(experiment)), experiment.analysis.level
    controls = {name for name, arm in experiment.arms.items() if arm.matched_loss}
    p = {
        index: entry["p"]
        for index, entry in enumerate(comparisons)
        if Key(*(entry[k] for k in Key._fields)) in family and entry["p"] is not None and entry["a"] not in controls
    }
    for index, adjusted in holm(p).items():
        comparisons[index] |= {"p_adjusted": adjusted, "family": "confirmatory", "level": level}


def declared_family(experiment: Experiment, comparisons: Sequence[Json]) -> list[FamilyMember]:
    """Return the declared family with the number of comparisons that each member has: 0 where it was not measured."""
    made = [Key(*(entry[k] for k in Key._fields)) for entry in comparisons if entry["family"] == "confirmatory"]
    return [FamilyMember(**key._asdict(), num_comparisons=made.count(key)) for key in family_of(experiment)]


def analyse_seeds(experiment: Experiment, seeds: Seeds, margins: Mapping[str, float]) -> Analysis:
    """Return decompositions, signs of masking and verdicts; of one seed or several."""
    primary = ("hotflip", primary_variant(experiment))
    declared, length = experiment.analysis, experiment.attacks.protocol.length
    spent = declared.min_spent_tokens or MIN_FORWARDS * length
    floors = Floors(declared.min_documents, spent)
    return analyse(seeds, BASELINE, primary, margins, experiment.attacks.hotflip.published_success, floors)


def evidence_of(findings: Mapping[str, ArmFindings]) -> dict[str, Evidence]:
    """Return what the analysis reads of one seed's findings, by arm."""
    return {
        arm: Evidence(
            attacks=with_ensemble(by_attack([*found.hotflip_rows.values(), *found.attack_rows.values()])),
            clean=found.evaluation_rows,
            transferred=found.transfer_rows,
            probes=found.probe_rows,
            exchanged=found.exchanged_rows,
            matched=found.matched_loss,
            order=(found.certificate or {}).get("order"),
        )
        for arm, found in findings.items()
    }


def _perplexities(arm: str, seed: int, found: ArmFindings) -> list[Json]:
    """Return the perplexity of the primary checkpoint as a measurement."""
    summary = found.evaluation[found.primary_checkpoint]
    if summary["perplexity"] is None:
        return []
    return [
        {
            "arm": arm,
            "seed": seed,
            **Key("perplexity")._asdict(),
            "budget": None,
            "threshold": None,
            "n": summary["num_documents"],
            "num_missing": len(summary["missing"]),
            **summary["perplexity"],
        }
    ]


def _resampled(found: ArmFindings, key: Key) -> Json:
    """Return the interval that an evaluation took from resampled documents, where it did: of ROUGE."""
    entry = (found.evaluation[found.primary_checkpoint].get("rouge") or {}).get(key.metric)
    return {"ci95": entry["ci95"]} if entry else {}


def _arm_result(found: ArmFindings, variant: str) -> ArmResult:
    summary = found.evaluation[found.primary_checkpoint]
    hotflip = None
    if found.hotflip:
        first = variant if variant in found.hotflip else next(iter(found.hotflip))
        hotflip = {"variant": first, **found.hotflip[first], "variants": dict(found.hotflip)}
    return ArmResult(
        perplexity=summary["perplexity"] and summary["perplexity"]["value"],
        bits_per_byte=summary["bits_per_byte"] and summary["bits_per_byte"]["value"],
        evaluation=dict(found.evaluation),
        hotflip=hotflip,
        triggers=found.triggers,
        attacks=dict(found.attacks),
        certificate=found.certificate,
        training=found.training,
        matched_loss=found.matched_loss,
    )
