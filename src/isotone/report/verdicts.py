"""The verdict on the page: its sentences, what the gaps are made of, and the signs of masking."""

from collections.abc import Mapping
from typing import Any

from isotone.report.run_files import RunFiles
from isotone.report.tables import MISSING, Table, count, interval, number, share, signed

GAPS = {
    "nats": "published, nats per token",
    "bar": "published, log-ratio",
    "success": "published, share of successes",
    "remainder": "primary, nats per scored token",
}
"""How each kind of decomposition is called, with its unit."""

Json = Mapping[str, Any]


def sentences(run: RunFiles) -> list[str]:
    """Return what is said of each arm."""
    found = [v["sentence"] for v in _verdicts(run)]
    return found or ["There is no arm beside the baseline that a verdict could be about."]


def on_masking(run: RunFiles) -> list[str]:
    """Return the signs of masking in words."""
    return [masking["sentence"] for masking in run.final.get("masking", {}).values()]


def controls_table(run: RunFiles) -> Table:
    """One row an arm and control: what remains of the gap at matched clean loss, or why a control does not count."""
    columns = [
        "Arm",
        "Verdict",
        "Control",
        "Made by",
        "Δ baseline",
        "Δ control",
        "Δ arm",
        "Remainder [95\u00a0%]",
        "90 % interval",
    ]
    columns += ["Clean loss, difference", "Context, arm", "Context, baseline", "δ", "Detectable", "Documents"]
    rows = []
    for v in _verdicts(run):
        head = [v["arm"], v["verdict"].replace("_", " ")]
        for entry in v["against"]:
            remains = entry["remainder"]
            rows.append(
                [
                    *head,
                    entry["control"],
                    "as it is" if entry["by"] is None else f"{entry['by']}, from {v[entry['in_place_of']]}",
                    number(entry["delta_baseline"]),
                    number(entry["delta_control"]),
                    number(entry["delta_arm"]),
                    _with_interval(remains),
                    interval(remains["ci90"]),
                    signed(entry["clean_difference"]),
                    number(entry["context_arm"]),
                    number(entry["context_baseline"]),
                    number(v["margin"]),
                    number(remains["detectable"]),
                    count(v["n"]),
                ]
            )
        for entry in v["excluded"]:
            rows.append([*head, entry["control"], f"does not count: {entry['reason']}", *["–"] * 11])
    caption = (
        "Worst of all attacks, nats per scored token; remainder: baseline − arm, the control standing for its origin; "
        "context: what another document's costs in the place of what is attacked"
    )
    return Table(caption, columns, rows, frozenset({0, 1, 2, 3}))


def gaps_table(run: RunFiles) -> Table:
    """One row a gap between the baseline and an arm, with the two parts that add up to it."""
    rows = []
    for gap in run.final.get("decompositions", ()):
        through = f", by way of {gap['control']}" if gap["control"] else ""
        name = f"{gap['arm']}: {GAPS[gap['kind']]}{through}"
        parts = [_part(part) for part in gap["parts"]] or [f"not defined: {gap['reason']}", "–"]
        total = MISSING if gap["total"] is None else _with_interval(gap["total"])
        rows.append([name, total, *parts, count(gap["n"])])
    columns = ["Gap", "Baseline − arm [95\u00a0%]", "First part [95\u00a0%]", "Second part [95\u00a0%]", "Documents"]
    caption = "What gaps are made of, baseline minus arm; shares only where both parts have one sign"
    return Table(caption, columns, rows, frozenset({0, 2, 3}))


def masking_table(run: RunFiles) -> Table:
    """One row an arm and measured index of masking; the sentence above names what was not measured, and why."""
    rows = []
    for arm, masking in run.final.get("masking", {}).items():
        for index in masking["indices"]:
            name = f"{arm}: {index['meaning']}"
            if not index["measured"]:
                continue
            words = "flagged" if index["flagged"] else "not flagged"
            words += ", but not as a share of all harm" if index["explained_by_size"] else ""
            words += "; weak on both" if index["weak_on_both"] else ""
            difference = f"{signed(index['difference'])} {interval(index['ci90'])}"
            values = [signed(index["value_arm"]), signed(index["value_baseline"]), difference]
            rows.append([name, *values, words, count(index["n"])])
    columns = [
        "Index, suspect where large",
        "Arm",
        "Baseline",
        "Arm − baseline [90\u00a0%]",
        "Sign",
        "Documents",
    ]
    caption = "Signs of gradient masking: flagged where arm − baseline is above 0 at one-sided 95 %"
    return Table(caption, columns, rows, frozenset({0, 4}))


def _verdicts(run: RunFiles) -> list[Json]:
    return list(run.final.get("verdicts", ()))


def _part(part: Json) -> str:
    of_total = "" if part["share"] is None else f" ({share(part['share'])})"
    return f"{part['name']} {_with_interval(part)}{of_total}"


def _with_interval(term: Json) -> str:
    return signed(term["value"]) + ("" if term["ci95"] is None else f" {interval(term['ci95'])}")
