"""Tables of a run's results: built once, rendered as HTML by the page, as Markdown and as LaTeX here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MISSING = "missing"
"""What stands where there is no figure; never a 0."""

_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u00a0": "~",
    "\u202f": r"\,",
    "−": "$-$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "τ": r"$\tau$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names its row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: frozenset[int] = frozenset({0})
    """Columns that hold words, and are set to the left."""
    shades: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """On the page, how deep cells are coloured, −1…1, by row and column; the column of names counts."""
    framed: frozenset[tuple[int, int]] = frozenset()
    """On the page, cells with a frame."""

    def markdown(self) -> str:
        """Return the table as GitHub-flavoured Markdown."""
        marks = [":--" if i in self.text_columns else "--:" for i in range(len(self.columns))]
        lines = [self.columns, marks, *self.rows]
        return "".join("| " + " | ".join(_markdown(cell) for cell in line) + " |\n" for line in lines)

    def latex(self) -> str:
        """Return the table as LaTeX, with the rules of the booktabs package."""
        layout = "".join("l" if i in self.text_columns else "r" for i in range(len(self.columns)))
        lines = [
            r"\begin{tabular}{" + layout + "}",
            r"\toprule",
            _latex_line(self.columns),
            r"\midrule",
            *map(_latex_line, self.rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure with a fixed number of decimals and a true minus sign."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:,.{digits}f}"
    if text.strip("-0.,") == "":  # no minus zero
        text = text.lstrip("-")
    return text.replace("-", "−").replace(",", "\u202f")  # a thin space between thousands


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign."""
    text = number(value, digits)
    positive = value is not None and value > 0 and any(c in "123456789" for c in text)
    return f"+{text}" if positive else text


def share(value: float | None) -> str:
    """Return a share as per cent."""
    return MISSING if value is None else f"{number(100 * value, 1)}\u00a0%"


def interval(ends: Sequence[float] | None, digits: int = 3) -> str:
    """Return an interval as [low, high]."""
    return MISSING if ends is None else f"[{number(ends[0], digits)}, {number(ends[1], digits)}]"


def with_interval(value: float | None, ends: Sequence[float] | None, digits: int = 3) -> str:
    """Return a figure and its interval, or the figure alone where none can be given."""
    return number(value, digits) + (f" {interval(ends, digits)}" if value is not None and ends is not None else "")


def p_value(p: float | None) -> str:
    """Return a p value; small ones as a bound, since their digits mean nothing."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(value: int | None) -> str:
    """Return a whole number."""
    return MISSING if value is None else number(value, 0)


def _markdown(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(_latex(cell) for cell in cells) + r" \\"


def _latex(cell: str) -> str:
    return "".join(_LATEX_ESCAPES.get(c, c) for c in cell)
