"""Place arms beside the frontier of unconstrained models that were damaged: Δ under attack against clean loss.

    isotone run benchmarks/frontier/frontier.yaml --seeds 42 1337 2024
    python benchmarks/frontier/frontier.py runs/frontier --figure frontier.svg

docs/frontier.md holds the protocol and what was found. Killed, the first command goes on where it was. Prints the
page's tables; both axes are of the scored tokens of the attacked test documents, means over seeds.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from isotone import records
from isotone.statistics import holm

ASKED = ("published", "scaled", "projected", "shifted")
CONTROLS = ("edit_trained", "brief")
WAYS = {"stopped": "|W|, stopped early", "noise": "noise on FFN weights", "temperature": "temperature"}
UNDAMAGED = {"baseline": "noise", "absolute": "stopped"}
NUM_SEEDS = 3
DEGREE = 2
"""Of the polynomial in the clean loss."""


@dataclass(frozen=True)
class Point:
    """An arm over seeds: clean loss and the ensemble's Δ, nats per scored token.

    Attributes:
        arm: its name.
        clean: of each seed.
        delta: of each seed.
    """

    arm: str
    clean: list[float] = field(default_factory=list)
    delta: list[float] = field(default_factory=list)

    @property
    def x(self) -> float:
        """Mean clean loss."""
        return float(np.mean(self.clean))

    @property
    def y(self) -> float:
        """Mean Δ."""
        return float(np.mean(self.delta))


@dataclass(frozen=True)
class Frontier:
    """Least squares through points, and the interval in which another point is expected (Student's t).

    Attributes:
        coefficients: of 1, x, x², …
        covariance: (XᵀX)⁻¹.
        sigma: standard deviation of the points around the curve.
        dof: points − coefficients.
    """

    coefficients: np.ndarray
    covariance: np.ndarray
    sigma: float
    dof: int

    @classmethod
    def through(cls, points: Sequence[Point]) -> "Frontier":
        """Fit points."""
        design = np.array([powers(p.x) for p in points])
        y = np.array([p.y for p in points])
        coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
        dof = len(points) - design.shape[1]
        sigma = math.sqrt(float(((y - design @ coefficients) ** 2).sum()) / dof)
        return cls(coefficients, np.linalg.inv(design.T @ design), sigma, dof)

    def at(self, x: float) -> float:
        """Return Δ of the curve."""
        return float(powers(x) @ self.coefficients)

    def se(self, x: float) -> float:
        """Return the standard error of another point's distance from the curve."""
        return self.sigma * math.sqrt(1 + powers(x) @ self.covariance @ powers(x))

    def half_width(self, x: float, level: float) -> float:
        """Return half the width of the prediction interval."""
        return float(stats.t.ppf(0.5 + level / 2, self.dof)) * self.se(x)

    def p(self, point: Point) -> float:
        """Return how probable a distance like a point's is, two-sided."""
        return float(2 * stats.t.sf(abs(point.y - self.at(point.x)) / self.se(point.x), self.dof))


def powers(x: float) -> np.ndarray:
    return np.array([x**k for k in range(DEGREE + 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    results = [records.read_json(p) for p in sorted(args.runs.glob("seed-*/results/final_results.json"))]
    if len(results) < NUM_SEEDS:
        raise SystemExit(f"{args.runs} has {len(results)} complete runs of the {NUM_SEEDS} that the protocol asks for")
    points, left_out = read_points(results)
    fitted = {way: of_way(points, way) for way in WAYS}
    frontier = Frontier.through([p for of in fitted.values() for p in of])
    delta = float(np.mean([r["equivalence_margins"]["ensemble"] for r in results]))
    print(f"{len(results)} seeds, {sum(map(len, fitted.values()))} damaged or free models on the frontier, sigma "
          f"{frontier.sigma:.4f}, δ {delta:.4f}")  # fmt: skip
    print("".join(f"left out, {reason}\n" for reason in left_out))
    print_arms(points, frontier, delta)
    print_ways(points, fitted)
    print_levels(fitted, frontier)
    if args.figure:
        draw(args.figure, points, fitted, frontier)


def read_points(results: Sequence[dict[str, Any]]) -> tuple[dict[str, Point], list[str]]:
    """Return arms over seeds, and why others are left out: a loss that was not reached, a document without figures."""
    points: dict[str, Point] = {}
    left_out: dict[str, str] = {}
    for result in results:
        keys = ("attack", "variant", "protocol", "metric")
        by_arm = {
            (m["arm"], m["metric"]): m
            for m in result["measurements"]
            if tuple(m[k] for k in keys[:3]) == ("ensemble", "worst_case", "prefix")
        }
        for arm, found in result["arms"].items():
            clean, delta = by_arm[arm, "clean_nll"], by_arm[arm, "delta_nll"]
            point = points.setdefault(arm, Point(arm))
            point.clean.append(clean["value"])
            point.delta.append(delta["value"])
            matched = found["matched_loss"]
            if matched and not matched["reachable"]:
                left_out[arm] = f"{arm}: seed {result['seed']}: {matched['reason']}"
            if delta["num_missing"]:
                left_out[arm] = f"{arm}: seed {result['seed']}: {delta['num_missing']} documents without figures"
    return {arm: p for arm, p in points.items() if arm not in left_out}, list(left_out.values())


def of_way(points: dict[str, Point], way: str) -> list[Point]:
    """Return the models that were damaged in one way, the undamaged one first."""
    undamaged = [points[arm] for arm, its in UNDAMAGED.items() if its == way and arm in points]
    return undamaged + [p for arm, p in points.items() if arm.startswith(f"{way}_")]


def print_arms(points: dict[str, Point], frontier: Frontier, delta: float) -> None:
    """Print where each arm lies: outside of the band, or inside of ±δ, or neither; p after Holm over what is asked."""
    adjusted = holm({arm: frontier.p(points[arm]) for arm in ASKED if arm in points})
    print(
        "| arm | clean NLL | Δ | Δ − frontier | 95 % prediction band | p (Holm) | lies |\n|---|---|---|---|---|---|---|"
    )
    for arm in (*ASKED, *CONTROLS):
        if arm not in points:
            continue
        point = points[arm]
        gap, band = point.y - frontier.at(point.x), frontier.half_width(point.x, 0.95)
        p = f"{adjusted[arm]:.3f}" if arm in adjusted else f"{frontier.p(point):.3f}, not corrected"
        print(f"| {arm} | {point.x:.3f} | {point.y:.4f} | {gap:+.4f} | ± {band:.4f} | {p} | "
              f"{place(gap, band, frontier.half_width(point.x, 0.90), delta)} |")  # fmt: skip
    print()


def place(gap: float, half95: float, half90: float, delta: float) -> str:
    """Return where an arm lies, in the words of the protocol."""
    if abs(gap) > half95:
        return "below: harmed less than damage explains" if gap < 0 else "above: harmed more than damage explains"
    return "on it, within ±δ" if abs(gap) + half90 < delta else "inside the band"


def print_ways(points: dict[str, Point], fitted: dict[str, list[Point]]) -> None:
    """Print each arm's distance from the curve of each way of damage alone."""
    print("| arm | " + " | ".join(WAYS[way] for way in fitted) + " |\n|---" + "|---" * len(fitted) + "|")
    for arm in (*ASKED, *CONTROLS):
        cells = []
        for of_way in fitted.values():
            x_range = [p.x for p in of_way]
            if arm not in points or len(of_way) <= DEGREE + 1:
                cells.append("")
                continue
            frontier, point = Frontier.through(of_way), points[arm]
            beyond = "" if min(x_range) <= point.x <= max(x_range) else ", extrapolated"
            half = frontier.half_width(point.x, 0.95)
            cells.append(f"{point.y - frontier.at(point.x):+.4f} ± {half:.4f}{beyond}")
        print(f"| {arm} | {' | '.join(cells)} |")
    print()


def print_levels(fitted: dict[str, list[Point]], frontier: Frontier) -> None:
    print("| damage | clean NLL | Δ by seed | Δ | Δ − frontier |\n|---|---|---|---|---|")
    for of_way in fitted.values():
        for p in of_way:
            by_seed = ", ".join(f"{value:.3f}" for value in p.delta)
            print(f"| {p.arm} | {p.x:.3f} | {by_seed} | {p.y:.4f} | {p.y - frontier.at(p.x):+.4f} |")


def draw(path: Path, points: dict[str, Point], fitted: dict[str, list[Point]], frontier: Frontier) -> None:
    """Write the figure."""
    mpl.rcParams["svg.hashsalt"] = "isotone"
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shown = [p for of in fitted.values() for p in of] + [points[arm] for arm in (*ASKED, *CONTROLS) if arm in points]
    x = np.linspace(min(p.x for p in shown), max(p.x for p in shown), 200)
    curve, half = np.array([frontier.at(v) for v in x]), np.array([frontier.half_width(v, 0.95) for v in x])
    axes.fill_between(x, curve - half, curve + half, color="0.88", label="95 % prediction band", zorder=0)
    axes.plot(x, curve, color="0.5", linewidth=1, zorder=1)
    colours = {"stopped": "#7570b3", "noise": "#1b9e77", "temperature": "#666666"}
    for (way, of_way), marker in zip(fitted.items(), "v^s", strict=True):
        axes.plot([p.x for p in of_way], [p.y for p in of_way], marker, color=colours[way], label=WAYS[way], ms=5)
    for arm, marker in zip((*ASKED, *CONTROLS), "oDPXd*", strict=True):
        if arm in points:
            colour = "#d95f02" if arm in ASKED else "#1f78b4"
            p, name = points[arm], arm.replace("_", " ")
            axes.plot([p.x], [p.y], marker, color=colour, ms=8, label=name, zorder=3)
            offset = (7, 5) if arm in ASKED else (7, -13)
            axes.annotate(name, (p.x, p.y), xytext=offset, textcoords="offset points", color=colour, fontsize=9)
    axes.set_xlabel("clean loss, nats per scored token")
    axes.set_ylabel("Δ under the worst attack, nats per scored token")
    axes.legend(frameon=False, fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
