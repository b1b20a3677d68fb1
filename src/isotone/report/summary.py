"""The run as plain text: figures, comparisons and computed conclusions, and the learned triggers as a table."""

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from isotone.comparisons import PREFIX, PREPENDED
from isotone.decomposition import Term
from isotone.report.content import source_copied
from isotone.report.tables import interval, number, p_value, share, signed, with_interval
from isotone.result_models import (
    ArmResult,
    AttackSuiteResults,
    Comparison,
    FinalResults,
    Measurement,
    PooledMeasurement,
    SummaryResults,
)

Measured = Measurement | PooledMeasurement

LAYER_NORM_NOTE = (
    "On LayerNorm models a non-negative feed-forward network restricts nothing that the model can represent: there the "
    "property itself cannot be the cause of robustness, the way of training can."
)


def summary_text(results: FinalResults) -> str:
    """Return experiment_summary.txt."""
    return _text(f"{results.experiment}, seed {results.seed}", results, results.measurements)


def attack_summary_text(results: AttackSuiteResults) -> str:
    """Return attack_summary.txt: a run's summary of given models, with what they and the documents are."""
    models = [["arm", "model", "kind", "parameters"]]
    models += [[arm, m.name, m.model_type, f"{m.num_parameters:,}"] for arm, m in results.models.items()]
    counts, left_out = results.documents, results.documents["left_out"]
    lines = [f"{counts['attack_test']} attacked, {counts['attack_search']} searched on, {len(left_out)} left out"]
    reasons = Counter(entry["reason"] for entry in left_out)
    lines += [f"{count} left out: {reason}" for reason, count in reasons.most_common(3)]
    lines += [line for note in results.notes for line in textwrap.wrap(f"{note}.", 108)]
    more = [_block("Models", _aligned(models)), _block("Documents", lines)]
    if results.transfer:
        more.append(_block("Transfer (Δ of what was found on one arm, on every arm)", _transfer_table(results)))
    return _text(f"{', '.join(results.attacks)}, seed {results.seed}", results, results.measurements, *more)


def summary_text_over_seeds(results: SummaryResults) -> str:
    """Return the experiment_summary.txt of a summary over seeds: pooled figures, then each seed's."""
    seeds = f"{'seeds' if len(results.seeds) > 1 else 'seed'} {', '.join(map(str, results.seeds))}"
    thresholds = [f"{seed}: {number(tau)}" for seed, tau in results.success_thresholds.items()]
    note = f"Success is counted with each seed's own τ, nats per scored token ({'; '.join(thresholds)})."
    by_seed = [*_aligned(_rows_by_seed(results)), *textwrap.wrap(note, 108)]
    return _text(f"{results.experiment}, {seeds}", results, results.pooled, _block("By seed", by_seed))


def _text(title: str, results: FinalResults | SummaryResults, measured: Sequence[Measured], *more: str) -> str:
    parts = [
        title,
        *_verdicts(results),
        _block("Conclusions", [line for c in results.conclusions for line in _wrapped(c.sentence)] or ["none"]),
        _block("Clean text", _clean_table(results, measured)),
        *([_block("ROUGE of what is written (F1)", lines)] if (lines := _rouge_table(results, measured)) else []),
        *(
            [_block("Matched loss (nats per scored token, attacked documents)", lines)]
            if (lines := _matched(results))
            else []
        ),
        _block("Attacks (95 % intervals in brackets; Δ in nats per scored token)", _attack_table(measured)),
        _block("Compared with the baseline (confirmatory; p after Holm)", _comparison_table(results.comparisons)),
        *more,
        _block("Differences between arms", [_difference(row) for row in results.differences_between_arms] or ["none"]),
    ]
    if any((found.certificate or {}).get("order") == "vacuous" for found in results.arms.values()):
        parts.append(_block("How to read this", textwrap.wrap(LAYER_NORM_NOTE, 108)))
    return "\n\n".join(parts) + "\n"


def _verdicts(results: FinalResults | SummaryResults) -> list[str]:
    """Return the verdicts with the signs of masking, and what the gaps are made of; nothing where there are none."""
    said = [v.sentence for v in results.verdicts] + [m.sentence for m in results.masking.values()]
    rows = [["arm", "gap", "baseline − arm", "first part", "second part"]]
    for gap in results.decompositions:
        name = gap.kind + (f" ({gap.control})" if gap.control else "")
        parts = [f"{part.name} {_term(part)}" for part in gap.parts] or ["not defined", ""]
        rows.append([gap.arm, name, "missing" if gap.total is None else _term(gap.total), *parts])
    blocks = [_block("Verdict", [line for text in said for line in _wrapped(text)])] if said else []
    return blocks + ([_block("What gaps are made of", _aligned(rows))] if len(rows) > 1 else [])


def _term(term: Term) -> str:
    return signed(term.value) + ("" if term.ci95 is None else f" {interval(term.ci95)}")


def triggers_csv(*of_runs: FinalResults) -> str:
    """Return learned_triggers.csv: one line a restart; held-out figures belong to the best one of an arm."""
    columns = ["arm", "seed", "restart", "best", "token_ids", "text", "initial_text", "iterations"]
    columns += ["initial_search_delta_nll", "search_delta_nll", "delta_nll", "delta_minus_shift", "delta_minus_random"]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for results, arm, found in ((r, arm, found) for r in of_runs for arm, found in r.arms.items()):
        entry = found.triggers or {}
        for restart in entry.get("restarts", ()):
            best = restart["restart"] == entry["best_restart"]
            line = {column: restart[column] for column in columns[6:-3]}
            line |= {"arm": arm, "seed": results.seed, "restart": restart["restart"], "best": int(best)}
            line |= {"token_ids": " ".join(map(str, restart["trigger_ids"])), "text": restart["trigger_text"]}
            writer.writerow(line | {column: entry[column] for column in columns[-3:] if best})
    return file.getvalue()


def _clean_table(results: FinalResults | SummaryResults, measured: Sequence[Measured]) -> list[str]:
    rows = [["arm", "perplexity", "bits per byte", "documents", "certificate"]]
    for arm, found in results.arms.items():
        by_metric = {m.metric: m for m in measured if m.arm == arm and m.attack is None}
        verdict = (found.certificate or {}).get("verdict", "none")
        n = by_metric["nll"].n if "nll" in by_metric else 0
        rows.append(
            [arm, _figure(by_metric.get("perplexity"), 2), _figure(by_metric.get("bits_per_byte")), str(n), verdict]
        )
    return _aligned(rows)


def _rouge_table(results: FinalResults | SummaryResults, measured: Sequence[Measured]) -> list[str]:
    """Return a line for each arm and one for the source itself, copied; nothing where no text was written."""
    rows = [["arm", "ROUGE-1", "ROUGE-2", "ROUGE-Lsum", "pairs"]]
    for arm in results.arms:
        found = {m.metric: m for m in measured if m.arm == arm and m.metric.startswith("rouge")}
        if found:
            figures = [_figure(found.get(metric)) for metric in ("rouge1", "rouge2", "rougeLsum")]
            rows.append([arm, *figures, str(found["rouge1"].n)])
    copied = source_copied(results.model_dump(include={"arms"}))
    if copied is not None:
        figures = [with_interval(copied[m]["value"], copied[m]["ci95"]) for m in ("rouge1", "rouge2", "rougeLsum")]
        rows.append(["the source, copied", *figures, str(copied["n"])])
    return _aligned(rows) if len(rows) > 1 else []


def _matched(results: FinalResults | SummaryResults) -> list[str]:
    """Return a line for each matched-loss control, of several seeds one for each."""
    lines = []
    for arm, found in results.arms.items():
        one = {"": found.matched_loss} if isinstance(found, ArmResult) else found.matched_loss
        for seed, entry in one.items():
            if entry:
                name = f"{arm}, seed {seed}" if seed else arm
                reached = f"{number(entry['reached'])} for the {number(entry['target'])} of {entry['to']}"
                reached += f" + {entry['above']:g}" if entry.get("above") else ""
                rest = f"{entry['by']}, {number(entry['parameter'])}"
                if not entry["reachable"]:
                    rest = f"not reachable, so nothing follows from this arm: {entry['reason']}"
                lines += textwrap.wrap(f"{name}: {reached} ({rest})", 110, subsequent_indent="  ")
    return lines


def _attack_table(measured: Sequence[Measured]) -> list[str]:
    shown = [
        m
        for m in measured
        if m.attack and m.metric in ("delta_nll", "success_rate") and m.protocol != "prefix_text_space"
    ]
    attacks = list(dict.fromkeys((m.attack, m.variant) for m in shown))
    measures = list(dict.fromkeys((m.protocol, m.metric) for m in shown))
    # arms of one measure stand together
    shown.sort(key=lambda m: (attacks.index((m.attack, m.variant)), measures.index((m.protocol, m.metric))))
    rows = [["attack", "protocol", "measure", "arm", "value", "documents"]]
    for m in shown:
        name = f"{m.attack} {m.variant}"
        rows.append([name, m.protocol or "", _measure_name(m), m.arm, _attack_figure(m), str(m.n)])
    return _aligned(rows) if shown else ["none"]


def _transfer_table(results: FinalResults) -> list[str]:
    """One row an attack and the arm that it was made on, one column an arm that was asked."""
    cells = {(c.attack, c.variant, c.source, c.target): c.value for c in results.transfer}
    rows = [["attack", "found on", *results.arms]]
    for attack, variant, source in dict.fromkeys(key[:3] for key in cells):
        values = [number(cells.get((attack, variant, source, target))) for target in results.arms]
        rows.append([f"{attack} {variant}", source, *values])
    return _aligned(rows)


def _rows_by_seed(results: SummaryResults) -> list[list[str]]:
    """One row a clean perplexity and a primary Δ of an arm, one column a seed."""
    rows = [["measure", "arm", *map(str, results.seeds)]]
    shown = [m for m in results.measurements if _is_headline(m)]
    names = list(dict.fromkeys(_headline(m) for m in shown))
    pairs = dict.fromkeys((_headline(m), m.arm) for m in shown)
    for name, arm in sorted(pairs, key=lambda pair: names.index(pair[0])):  # arms of one measure stand together
        of_row = {m.seed: m.value for m in shown if (_headline(m), m.arm) == (name, arm)}
        digits = 2 if name == "perplexity" else 3
        rows.append([name, arm, *(number(of_row.get(seed), digits) for seed in results.seeds)])
    return rows


def _is_headline(m: Measurement) -> bool:
    return m.metric == "perplexity" or (m.metric == "delta_nll" and m.protocol in (PREFIX, PREPENDED))


def _headline(m: Measurement) -> str:
    return m.metric if m.attack is None else f"Δ {m.attack} {m.variant}"


def _measure_name(measurement: Measured) -> str:
    if measurement.metric == "delta_nll":
        return "Δ"
    bar = measurement.threshold
    return "success" if bar is None else f"success, Δ > {number(bar)}"


def _attack_figure(measurement: Measured) -> str:
    if measurement.metric == "delta_nll" or measurement.value is None:
        return _figure(measurement)
    ends = measurement.ci95 or []
    return share(measurement.value) + (f" [{', '.join(map(share, ends))}]" if ends else "")


def _comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    rows = [["arms", "measure", "difference", "95 % interval", "p", "d", "detectable"]]
    for c in comparisons:
        if c.family == "confirmatory":
            measure = " ".join(filter(None, (c.attack, c.variant, c.metric)))
            d, detectable = number(c.effect_size, 2), number(c.detectable)
            rows.append(
                [
                    f"{c.a} − {c.b}",
                    measure,
                    signed(c.difference),
                    interval(c.ci95),
                    p_value(c.p_adjusted),
                    d,
                    detectable,
                ]
            )
    return _aligned(rows) if len(rows) > 1 else ["none"]


def _figure(measurement: Measured | None, digits: int = 3) -> str:
    return "missing" if measurement is None else with_interval(measurement.value, measurement.ci95, digits)


def _difference(row: dict[str, Any]) -> str:
    return f"{row['key']}: " + "; ".join(f"{arm} {_plain(value)}" for arm, value in row["arms"].items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return "none" if value is None else str(value)


def _block(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(f"• {sentence}", 110, subsequent_indent="  ")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
