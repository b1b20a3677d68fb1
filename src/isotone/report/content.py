"""The tables of a run's results: every figure with its interval, and every gap named."""

from collections.abc import Mapping, Sequence
from typing import Any

from isotone.report.run_files import ATTACKS, RunFiles
from isotone.report.tables import MISSING, Table, count, interval, number, p_value, share, signed, with_interval

UNCONSTRAINED = "unconstrained"

_OFFSETS = ("gap", "0-7", "8-31", "32+")
_ATTACK_NAMES = {
    "hotflip": "HotFlip",
    "triggers": "Triggers",
    "gcg": "GCG",
    "coordinate": "Coordinate search",
    "pgd": "PGD (upper bound)",
    "ensemble": "Worst case",
}
NO_TEXT = "no text"
"""Stands where a figure of the attacked text would, of an attack that has none."""

_METRIC_NAMES = {
    "nll": "clean loss",
    "bits_per_byte": "bits per byte",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeLsum": "ROUGE-Lsum",
    "delta_nll": "Δ",
    "clean_nll": "clean loss of scored tokens",
    "attacked_nll": "attacked loss of scored tokens",
    "success_rate": "success",
    "top1_change": "change of top-1",
}
_PROTOCOL_NAMES = {
    "prefix_text_space": "through text",
    "after_first_flip": "after the first flip",
    "published": "published accounting",
}


def overview_table(run: RunFiles) -> Table:
    """One row an arm: what it costs, what attacks do to it, what is proved about it."""
    shown = [attack for attack in run.attacks if attack in (*ATTACKS, "ensemble")]
    attacked = [(a, variant) for a in shown for variant in run.primary_variants(a) if variant != "random"]
    columns = [
        "Arm",
        "Perplexity [95\u00a0%]",
        "Bits per byte [95\u00a0%]",
        *(f"Δ {attack_name(*pair)}, nats per token [95\u00a0%]" for pair in attacked),
        "Certificate",
    ]
    rows = [
        [
            arm,
            value(run.measurement(arm, "perplexity"), 2),
            value(run.measurement(arm, "bits_per_byte"), 3),
            *(value(run.attacked(arm, "delta_nll", *pair)) for pair in attacked),
            _verdict(run, arm),
        ]
        for arm in run.arms
    ]
    return Table("All arms at a glance", columns, rows, frozenset({0, len(columns) - 1}))


def rouge_table(run: RunFiles) -> Table:
    """One row an arm, and one of the source itself, which a text that says little new repeats; none if not measured."""
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeLsum": "ROUGE-Lsum"}
    rows = []
    for arm in run.arms:
        found = [run.measurement(arm, metric) for metric in names]
        if all(found):
            rows.append([arm, count(found[0]["n"]), *(value(entry) for entry in found)])
    if (copied := source_copied(run.final)) is not None:
        rows.append(["the source, copied", count(copied["n"]), *(value(copied[metric]) for metric in names)])
    return Table("ROUGE of what is written, F1", ["Arm", "Pairs", *(f"{n} [95\u00a0%]" for n in names.values())], rows)


def source_copied(final: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the sources score as they are, by measure, with their number ``n``; None where it is not known."""
    for found in final["arms"].values():
        for of_checkpoint in (found.get("evaluation") or {}).values():
            if (rouge := of_checkpoint.get("rouge")) and rouge["num_documents"]:
                return {"n": rouge["num_documents"], **rouge["source_copied"]}
    return None


def attack_table(run: RunFiles, *attacks: str) -> Table:
    """One row an arm and variant: clean and attacked loss, success at the common threshold, what was spent.

    Args:
        run: the run.
        attacks: one of ``ATTACKS``, or all further ones.
    """
    columns = [
        "Arm, attack",
        "Documents",
        "Clean, nats",
        "Attacked, nats",
        "Δ, nats per token [95\u00a0%]",
        "Success [95\u00a0%]",
        "Top-1, clean → attacked",
        "Δ through text (texts changed)",
        "Tokens spent",
    ]
    rows, thresholds = [], set()
    for attack, variant in ((a, variant) for a in attacks for variant in run.primary_variants(a)):
        for arm in run.arms:
            entry = run.entry(arm, attack, variant)
            success = run.attacked(arm, "success_rate", attack, variant)
            thresholds |= {entry.get("threshold")} - {None}
            rows.append(
                [
                    f"{arm}, {attack_name(attack, variant)}",
                    count(entry.get("n")),
                    number(entry.get("clean_nll")),
                    number(entry.get("attacked_nll")),
                    value(run.attacked(arm, "delta_nll", attack, variant)),
                    success_share(success) if success else share(entry.get("success_rate")),
                    _top1(entry.get("top1")),
                    NO_TEXT if entry.get("upper_bound") else _through_text(entry.get("text_space")),
                    count(entry.get("spent_tokens")),
                ]
            )
    bar = f"; success: Δ above τ = {number(thresholds.pop())} nats per token" if len(thresholds) == 1 else ""
    return Table(f"{attacks_name(attacks)}: primary figures{bar}", columns, rows)


def published_table(run: RunFiles) -> Table:
    """The published accounting, under its own name."""
    columns = ["Arm, attack", "Success", "Degradation", "Clean, nats", "Attacked, nats", "Success above"]
    rows = []
    for arm in run.arms:
        for attack in (a for a in run.attacks if a not in ("pgd", "ensemble")):  # no text; the worst by another measure
            for variant in run.variants(attack):
                entry = run.entry(arm, attack, variant).get("published_accounting") or {}
                rows.append(
                    [
                        f"{arm}, {attack_name(attack, variant)}",
                        share(entry.get("success_rate")),
                        share(entry.get("degradation")),
                        number(entry.get("clean")),
                        number(entry.get("attacked")),
                        share(entry.get("threshold")),
                    ]
                )
    labels = "inserted tokens are scored as labels (of pairs: the reference)"
    return Table(f"Published accounting: {labels}, the bar is relative", columns, rows)


def offsets_table(run: RunFiles) -> Table:
    """Where the damage lies, by distance from the attacked part."""
    rows = []
    for arm in run.arms:
        for attack in run.attacks:
            for variant in run.variants(attack):
                by_offset = run.entry(arm, attack, variant).get("delta_by_offset")
                if by_offset:
                    rows.append(
                        [
                            f"{arm}, {attack_name(attack, variant)}",
                            *(signed(by_offset[o]) if o in by_offset else "–" for o in _OFFSETS),
                        ]
                    )
    columns = ["Arm, attack", "Gap (not scored)", "Tokens 0–7", "Tokens 8–31", "Tokens 32 and on"]
    return Table("Δ in nats per token, by distance from the attacked part", columns, rows)


def triggers_table(run: RunFiles) -> Table:
    """The trigger that each arm's search chose, against its controls."""
    columns = ["Arm", "Trigger", "Δ trigger", "minus shifted text", "minus random trigger", "Δ first trigger"]
    rows = []
    for arm in run.arms:
        for variant in run.variants("triggers"):
            entry = run.entry(arm, "triggers", variant)
            rows.append(
                [
                    arm,
                    str(entry.get("trigger_text") or MISSING),
                    signed(entry.get("delta_nll")),
                    signed(entry.get("delta_minus_shift")),
                    signed(entry.get("delta_minus_random")),
                    signed(entry.get("delta_initial")),
                ]
            )
    return Table("Universal triggers on held-out documents, nats per token", columns, rows, frozenset({0, 1}))


def restarts_table(run: RunFiles) -> Table:
    """Every restart of each arm's trigger search: one trigger is one draw."""
    rows = []
    for arm in run.arms:
        for variant in run.variants("triggers"):
            for restart in run.entry(arm, "triggers", variant).get("restarts") or ():
                rows.append(
                    [
                        f"{arm}, {restart['restart']}",
                        str(restart["initial_text"]),
                        str(restart["trigger_text"]),
                        signed(restart["initial_search_delta_nll"]),
                        signed(restart["search_delta_nll"]),
                    ]
                )
    columns = ["Arm, restart", "First trigger", "Found trigger", "Δ first, search", "Δ found, search"]
    return Table("Restarts of the trigger search, on search documents", columns, rows, frozenset({0, 1, 2}))


def comparisons_table(run: RunFiles, *, declared: bool) -> Table:
    """Paired comparisons of arms: the declared family, or the exploratory rest."""
    columns = ["Comparison", "a", "b", "a − b", "95 % interval", "p", "p, Holm", "Effect size", "n", "Test"]
    rows = [
        [
            comparison_name(c),
            c["a"],
            c["b"],
            signed(c.get("difference"), 4),
            interval(c.get("ci95"), 4),
            p_value(c.get("p")),
            p_value(c.get("p_adjusted")) if declared else "–",
            signed(c.get("effect_size"), 2),
            count(c.get("n")),
            str(c.get("test", "")),
        ]
        for c in run.final.get("comparisons", ())
        if (c.get("family") != "exploratory") == declared
    ]
    caption = "the declared family, corrected together" if declared else "exploratory, not corrected"
    return Table(f"Paired comparisons on the same documents: {caption}", columns, rows, frozenset({0, 1, 2, 9}))


def certificates_table(run: RunFiles) -> Table:
    """What is proved about each arm's weights, and why no more."""
    keys = ("verdict", "scope", "map", "domain", "weights", "activation", "order", "reasons", "weights_hash")
    rows = []
    for arm in run.arms:
        certificate = run.arm(arm).get("certificate") or {}
        rows.append(
            [
                arm,
                *(plain(certificate.get(key)) for key in keys[:-1]),
                premise_met(certificate),
                str(certificate.get(keys[-1], MISSING))[:12],
            ]
        )
    columns = ["Arm", *(key.capitalize() for key in keys[:-1]), "Premise met", "Weights' hash"]
    return Table("Certificates of the weights that were measured", columns, rows, frozenset(range(len(columns))))


def premise_met(certificate: Mapping[str, Any]) -> str:
    """Return in how many pairs of network inputs, before and after an attack, the certificate has anything to say."""
    found = certificate.get("premise")
    return f"{found['ordered']:,} of {found['pairs']:,}" if found else MISSING


def differences_table(run: RunFiles) -> Table:
    """Every value of the configuration in which arms differ."""
    rows = [
        [entry["key"], *(plain(entry["arms"].get(arm), "–") for arm in run.arms)]
        for entry in run.final["differences_between_arms"]
    ]
    columns = ["Key", *run.arms]
    return Table("Every value of the configuration in which arms differ", columns, rows, frozenset(range(len(columns))))


def missing_table(run: RunFiles) -> Table:
    """Every figure that is not there, with its reason."""
    rows = []
    for arm in run.arms:
        if not run.measurement(arm, "perplexity"):
            rows.append([arm, "perplexity", "", "not measured"])
        for attack in run.attacks:
            if not run.entries(arm, attack):
                rows.append([arm, attack_name(attack), "", "not attacked"])
            for variant in run.variants(attack):
                for reason, documents in (run.entry(arm, attack, variant).get("missing") or {}).items():
                    rows.append([arm, attack_name(attack, variant), count(documents), reason])
    return Table("What is missing", ["Arm", "Figure", "Documents", "Why"], rows, frozenset({0, 1, 3}))


def attack_name(attack: str, variant: str = "universal") -> str:
    """Return how an attack is called on the page; without a variant, all of its variants."""
    if "frequency" in (attack, variant):
        return "Random edits by frequency"
    if attack == "random_edits" or (attack, variant) == ("hotflip", "random"):
        return "Random edits"
    name = _ATTACK_NAMES.get(attack, attack.replace("_", " "))
    return f"{name} {variant.replace('_', ' ')}" if attack == "hotflip" and variant != "universal" else name


def attacks_name(attacks: Sequence[str]) -> str:
    """Return how a table of one attack, or of all further ones, is called."""
    return attack_name(attacks[0]) if len(attacks) == 1 and attacks[0] in ATTACKS else "Further attacks"


def plain(value: Any, nothing: str = MISSING) -> str:
    """Return a value of the results as words; ``nothing`` stands for None."""
    if value is None:
        return nothing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {plain(part)}" for key, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    return str(value)


def _verdict(run: RunFiles, arm: str) -> str:
    certificate = run.arm(arm).get("certificate")
    if not certificate:
        return MISSING if run.is_constrained(arm) else UNCONSTRAINED
    return str(certificate["verdict"])


def value(measurement: Mapping[str, Any], digits: int = 3) -> str:
    """Return a measurement with its interval."""
    return with_interval(measurement.get("value"), measurement.get("ci95"), digits)


def success_share(measurement: Mapping[str, Any]) -> str:
    """Return a success rate with its interval, in per cent."""
    ends = measurement.get("ci95")
    per_cent = None if ends is None else [100 * end for end in ends]
    return share(measurement["value"]) + ("" if per_cent is None else f" {interval(per_cent, 0)}")


def _top1(shares: Mapping[str, float] | None) -> str:
    if not shares or shares["clean"] is None:
        return MISSING
    return f"{share(shares['clean'])} → {share(shares['attacked'])}"


def _through_text(found: Mapping[str, Any] | None) -> str:
    """Return Δ once the attacked texts are decoded and encoded again, and how many of them that changes."""
    return f"{signed(found['delta_nll'])} ({count(found['changed'])})" if found else MISSING


def comparison_name(comparison: Mapping[str, Any]) -> str:
    """Return what a comparison compares, in words."""
    metric = _METRIC_NAMES.get(comparison["metric"], comparison["metric"])
    if comparison["attack"] is None:
        return metric
    where = _PROTOCOL_NAMES.get(comparison["protocol"], "")
    return ", ".join(filter(None, (metric, attack_name(comparison["attack"], comparison["variant"]), where)))
