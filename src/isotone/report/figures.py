"""Figures as inline SVG that follows the page's colours and is the same, byte for byte, for the same numbers."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEXT, _LINE = "#010203", "#010204"
"""Colours that stand for the page's own and are replaced by them, so that a figure follows light and dark."""

_ARM = "#0102{:02x}"
_FIRST_ARM = 0x10
NUM_COLORS = 6
"""Colours that the page defines; further arms differ by dashes and markers."""

_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = ("o", "s", "D", "^", "v", "P")
_STYLE: Any = {
    "svg.hashsalt": "isotone",
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.color": _TEXT,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "path.simplify": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, if there is one; without a value, the heading of the rows below it.

    ``points`` are what it is made from (one a seed), drawn small and hollow below it.
    """

    label: str
    arm: int = 0
    value: float | None = None
    low: float | None = None
    high: float | None = None
    points: Sequence[float] = ()


@dataclass(frozen=True)
class Curve:
    """One line: points x, y of an arm, with marks where ``marked``."""

    label: str
    arm: int
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False


@dataclass(frozen=True)
class Trial:
    """One model that was tried: a ratio, and where it is drawn by what was measured of it, with their intervals."""

    label: str
    arm: int
    x: float
    x_ends: Sequence[float] | None = None
    chosen: bool = False
    y: float = 0.0
    y_ends: Sequence[float] | None = None


def intervals(name: str, rows: Sequence[Interval], x_label: str, *, zero: bool = False) -> str:
    """Draw one dot with its interval a row, the first on top.

    Args:
        name: of this figure and no other on the page.
        rows: what is drawn.
        x_label: quantity and unit.
        zero: add a line at 0.
    """
    with _figure(name, 4.8, 0.75 + 0.34 * len(rows), x_label) as (axes, svg):
        heights = range(len(rows) - 1, -1, -1)
        for height, row in zip(heights, rows, strict=True):
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [height, height], color=_color(row.arm), linewidth=2.5, alpha=0.55)
            if row.value is not None:
                marker = _MARKERS[row.arm % len(_MARKERS)]
                axes.plot([row.value], [height], marker=marker, color=_color(row.arm), linestyle="none")
            for point in row.points:
                axes.plot([point], [height - 0.27], marker="o", markersize=4, markerfacecolor="none", color=_TEXT)
        axes.set_yticks(heights, [row.label for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row.value is None else "normal")
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        if zero:
            axes.axvline(0, color=_TEXT, linewidth=0.8)
    return svg()


def curves(
    name: str,
    lines: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    steps: bool = False,
    marks: Mapping[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Draw lines over each other, the first as a pale band, so that equal ones are all seen.

    Args:
        name: of this figure and no other on the page.
        lines: what is drawn, in this order.
        x_label: quantity and unit.
        y_label: quantity and unit.
        steps: the values stay until the next point (shares over thresholds).
        marks: vertical lines, by label.
        y_range: limits of y; those of the data unless given.
    """
    with _figure(name, 4.8, 3.2, x_label) as (axes, svg):
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=_color(line.arm),
                linewidth=_width(line.arm),
                alpha=_opacity(line.arm),
                linestyle=_DASHES[line.arm % len(_DASHES)],
                marker=_MARKERS[line.arm % len(_MARKERS)] if line.marked else "",
                markersize=5,
                drawstyle="steps-post" if steps else "default",
                label=line.label,
            )
        for label, x in (marks or {}).items():
            axes.axvline(x, color=_TEXT, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(label, (x, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")
        axes.set_ylabel(y_label)
        axes.locator_params(axis="x", nbins=7)
        if y_range:
            axes.set_ylim(*y_range)
        axes.legend(loc="best", handlelength=3)
    return svg()


def trials(name: str, shown: Sequence[Trial], measured: Sequence[Trial], x_label: str, y_label: str) -> str:
    """Draw ratios to the right on a logarithmic axis, and above it what was measured of some of the same models.

    The lower part has a row of marks for each arm, with every trial in it, the best lowest.

    Args:
        name: of this figure and no other on the page.
        shown: every trial; its label names its arm.
        measured: those with y, once for each measurement, which its label names; may be empty.
        x_label: quantity and unit of the ratios.
        y_label: quantity and unit of what was measured.
    """
    arms = list(dict.fromkeys(trial.arm for trial in shown))
    rows = 0.32 * len(arms) + 0.02 * len(shown)
    ratios = (2.6, 0.5 + rows) if measured else (1,)
    with _figure(name, 5.6, 1.0 + rows + (2.6 if measured else 0), x_label, ratios) as (axes, svg):
        for index, trial in enumerate(measured):
            beside = 6.0 * sum(other.x == trial.x for other in measured[:index])  # lest intervals hide each other
            _cross(axes, trial, trial.y, beside)
            _name(axes, trial, [other for other in measured if other.x == trial.x], beside)
        if measured:
            axes.margins(y=0.2)  # room for names at the ends of intervals
            axes.axhline(0, color=_TEXT, linewidth=0.8)
            axes.set_ylabel(y_label)
        strip = axes.figure.axes[-1]
        for row, arm in enumerate(reversed(arms)):
            of_arm = sorted((trial for trial in shown if trial.arm == arm), key=lambda trial: trial.x)
            for rank, trial in enumerate(of_arm):
                _cross(strip, trial, row + 0.7 * (rank + 0.5) / len(of_arm) - 0.35)
        names = {trial.arm: trial.label for trial in reversed(shown)}
        strip.set_yticks(range(len(arms)), [names[arm] for arm in reversed(arms)])
        strip.set_ylim(-0.5, len(arms) - 0.5)
        strip.grid(axis="y", visible=False)
        strip.set_xscale("log")
        _plain_ticks(strip, [end for trial in shown for end in (trial.x, *(trial.x_ends or ()))])
    return svg()


def _cross(axes: "Axes", trial: Trial, height: float, beside: float = 0.0) -> None:
    """Draw one trial as a mark with its intervals, so many points to the right; what was chosen is filled and large."""
    from matplotlib.transforms import ScaledTranslation

    color = _color(trial.arm)
    place = axes.transData + ScaledTranslation(beside / 72, 0, axes.figure.dpi_scale_trans)
    faint: Any = {"color": color, "linewidth": 1.6 if trial.chosen else 1.0, "alpha": 0.55}
    if trial.x_ends and not beside:
        axes.plot(trial.x_ends, [height, height], **faint)
    if trial.y_ends:
        axes.update_datalim([(trial.x, end) for end in trial.y_ends])
        axes.plot([trial.x, trial.x], trial.y_ends, transform=place, **faint)
    axes.plot(
        [trial.x],
        [height],
        marker=_MARKERS[trial.arm % len(_MARKERS)],
        markersize=7 if trial.chosen else 4,
        markerfacecolor=color if trial.chosen else "none",
        markeredgecolor=color,
        linestyle="none",
        transform=place,
    )


def _name(axes: "Axes", trial: Trial, together: Sequence[Trial], beside: float) -> None:
    """Write a measurement's name: above the highest of those at its ratio, below the lowest, right of the others."""
    by_height = sorted(together, key=lambda other: other.y)
    ends = trial.y_ends or (trial.y, trial.y)
    where: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "ha": "center", "linespacing": 1.1}
    label = trial.label.replace(" ", "\n", 1)
    if trial is by_height[-1]:
        axes.annotate(label, (trial.x, ends[1]), xytext=(beside, 3), va="bottom", **where)
    elif trial is by_height[0]:
        axes.annotate(label, (trial.x, ends[0]), xytext=(beside, -3), va="top", **where)
    else:
        axes.annotate(trial.label, (trial.x, trial.y), xytext=(beside + 7, 4), **{**where, "ha": "left"})


def _plain_ticks(axes: "Axes", values: Sequence[float]) -> None:
    """Label a logarithmic axis with a few plain numbers over the range of its values, 1 among them."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(1.0, *values), max(1.0, *values)
    ticks = [m * 10.0**e for e in range(-3, 9) for m in ((1, 2, 5) if high / low < 200 else (1,))]
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 8), None)
    if step and high / low < 4:
        ticks = [round(k * step, 6) for k in range(1, int(high / step) + 2)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low * 0.98 <= tick <= high * 1.02]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def standalone(svg: str) -> str:
    """Return a figure as a file of its own, in the colours of the page, light or dark as the reader has it."""
    css = (resources.files("isotone.report") / "templates" / "report.css").read_text(encoding="utf-8")
    colors = re.findall(r"^(?::root|@media \(prefers-color-scheme:dark\)\{:root)\{[^}]*\}+", css, re.MULTILINE)
    own = "svg{color:var(--text);background:var(--back);font-family:sans-serif}"
    head, end, body = svg.replace('aria-hidden="true" focusable="false" ', "").partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{end}<style>{"".join(colors)}{own}</style>{body}\n'


def line_style(arm: int) -> dict[str, str]:
    """Return how an arm's lines look, for a legend in HTML: number of its colour, width, opacity and dashes."""
    dashes = _DASHES[arm % len(_DASHES)]
    on_off = "none" if isinstance(dashes, str) else " ".join(f"{_width(arm) * part:g}" for part in dashes[1])
    return {
        "color": str(arm % NUM_COLORS),
        "width": f"{_width(arm):g}",
        "opacity": f"{_opacity(arm):g}",
        "dashes": on_off,
    }


def _width(arm: int) -> float:
    return 1.8 if arm else 4.5


def _opacity(arm: int) -> float:
    return 1 if arm else 0.5


def _color(arm: int) -> str:
    return _ARM.format(_FIRST_ARM + arm % NUM_COLORS)


@contextmanager
def _figure(
    name: str, width_in: float, height_in: float, x_label: str, heights: Sequence[float] = (1,)
) -> Iterator[tuple["Axes", Callable[[], str]]]:
    """Yield axes and, valid after the block, a function that returns the SVG.

    Several ``heights`` make several axes over one x, the uppermost of which is yielded; the others are its figure's.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rendered: list[str] = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        parts = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)
        axes = parts[0, 0]
        parts[-1, 0].set_xlabel(x_label)
        yield axes, lambda: rendered[0]
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(file, metadata=metadata)  # draws once; savefig draws twice
        rendered.append(_inline(file.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Return an SVG document as an element of a page: no prolog, the page's colours and fonts, no names that clash."""
    svg = svg[svg.index("<svg") :]
    own = re.sub(r"\W+", "-", name)
    for pattern, replacement in (
        (r"<metadata>.*?</metadata>", ""),
        (r"<style.*?</style>", ""),  # would apply to the whole page
        (r'<g id="[^"]*"', "<g"),
        (r' id="', f' id="{own}-'),
        (r"url\(#", f"url(#{own}-"),
        (r'href="#', f'href="#{own}-'),
        (r"font-family: [^;\"]*;?", ""),
        (_TEXT, "currentColor"),
        (_LINE, "var(--line)"),
        (r"#0102([0-9a-f]{2})", lambda m: f"var(--arm-{int(m[1], 16) - _FIRST_ARM})"),
        (r"^<svg ", '<svg aria-hidden="true" focusable="false" '),
    ):
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    return svg.strip()
