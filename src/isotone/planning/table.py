"""A plan as text: an aligned table, then what does not fit and what would, then what was not checked."""

from isotone.planning.plan import Plan
from isotone.planning.row import Row
from isotone.planning.units import duration, size

_WIDTH = 100


def format_plan(plan: Plan) -> str:
    """Return the plan for people, at most 100 columns wide but for advice."""
    cells = [_cells(row) for row in plan.rows]
    header = ("stage", "resource", "expected", "limit", "margin", "", "from")
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(6)]
    lines = [*plan.lines, ""]
    for line in (header, *cells):
        text = "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False))
        room = _WIDTH - len(text) - 2
        lines.append(f"{text}  {line[6] if len(line[6]) <= room else line[6][: room - 1] + '…'}".rstrip())
    return "\n".join([*lines, "", *_paths(plan), *_verdict(plan)])


def _cells(row: Row) -> tuple[str, ...]:
    show = duration if row.is_time else size
    verdict = {True: "safe", False: "UNSAFE", None: ""}[row.safe]
    return (
        row.stage,
        row.resource,
        "?" if row.expected is None else show(row.expected),
        "?" if row.limit is None else show(row.limit),
        "" if row.margin is None else f"{row.margin:+.0%}" if row.margin > -10 else f"{1 - row.margin:,.0f} ×",
        verdict,
        row.origin,
    )


def _paths(plan: Plan) -> list[str]:
    return [
        f"{row.stage}, {row.resource}: {duration(row.expected or 0)} ({row.origin})"
        for row in plan.rows
        if row.stage in ("critical path", "total")
    ]


def unsafe_lines(plan: Plan) -> list[str]:
    """Return two lines for each row that does not fit, those that say the same together: what, and what would fit."""
    lines = []
    for same in _alike(plan.unsafe):
        row, names = same[0], ", ".join(row.stage for row in same)
        show = duration if row.is_time else size
        what = f"{show(row.expected or 0)} {_against(row, show(row.limit or 0))}"
        lines += [f"UNSAFE {names}, {row.resource}: {what}", f"  safe with: {row.advice}"]
    return lines


def _verdict(plan: Plan) -> list[str]:
    unsafe = unsafe_lines(plan)
    lines = [text for i in range(0, len(unsafe), 2) for text in ("", *unsafe[i : i + 2])]
    over = [r for r in plan.rows if r.safe is None and r.margin is not None and r.margin < 0]
    for row in over:
        show = duration if row.is_time else size
        lines += [
            "",
            f"not judged {row.stage}, {row.resource}: {show(row.expected or 0)} against {show(row.limit or 0)}, "
            "but at an assumed rate; isotone plan … --measure on such a machine gives a real one",
        ]
    count = len(plan.unsafe)
    unknown = sum(row.safe is None and row.stage not in ("critical path", "total") for row in plan.rows)
    lines += ["", f"{count} of {len(plan.rows) - 3} rows unsafe, {unknown} not checked (no limit or no rate is known)"]
    return lines


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Return the rows in groups that say the same of several stages."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.resource, row.expected, row.limit, row.advice), []).append(row)
    return list(groups.values())


def _against(row: Row, limit: str) -> str:
    words = {
        "time": f"expected, the limit is {limit}",
        "time limit": f"asked for, the partition allows {limit}",
        "host memory": f"expected, the job gets {limit}",
        "device memory": f"expected, the device has {limit}",
        "disk": f"expected, there are {limit}",
    }
    return words[row.resource]
