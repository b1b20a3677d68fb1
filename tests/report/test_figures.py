"""Figures are the same bytes for the same numbers, follow the page's colours and show every arm."""

import re
import xml.etree.ElementTree as ElementTree

from isotone.report.figures import NUM_COLORS, Curve, Interval, curves, intervals


def _curves(height: float = 1.0) -> str:
    lines = [Curve("baseline", 0, (0, 1, 2), (3, 2, height)), Curve("twin $x$", 1, (0, 1, 2), (3, 2, height))]
    return curves("a figure", lines, "step", "loss", marks={"τ": 0.5})


def test_same_numbers_give_same_bytes_and_others_do_not() -> None:
    assert _curves() == _curves()
    assert _curves() != _curves(1.1)


def test_figure_is_an_element_in_the_pages_colours() -> None:
    svg = _curves()
    ElementTree.fromstring(svg)
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert "font-family" not in svg
    assert not re.findall(r"#[0-9a-f]{6}(?![0-9a-f-])", svg)
    assert {"currentColor", "var(--line)", "var(--arm-0)", "var(--arm-1)"} <= set(
        re.findall(r"currentColor|var\(--[a-z0-9-]+\)", svg)
    )
    assert ">twin $x$</text>" in svg


def test_interval_rows_stand_in_their_order_with_their_ends() -> None:
    rows = [Interval("baseline", 0, 2.0, 1.0, 3.0), Interval("arm_7", NUM_COLORS + 1, 5.0)]
    svg = intervals("intervals", rows, "perplexity", zero=True)
    heights = {label: float(y) for y, label in re.findall(r'y="([0-9.]+)"[^>]*>(baseline|arm_7)</text>', svg)}
    assert heights["baseline"] < heights["arm_7"]
    assert svg.count("stroke: var(--arm-0); stroke-opacity: 0.55") == 1
    assert "var(--arm-1)" in svg


def test_each_point_that_a_figure_is_made_from_has_its_mark() -> None:
    plain, with_points = (
        intervals("intervals", [Interval("baseline", 0, 2.0, 1.0, 3.0, points)], "perplexity")
        for points in ((), (1.5, 2.5))
    )
    assert with_points.count("<use") == plain.count("<use") + 2
