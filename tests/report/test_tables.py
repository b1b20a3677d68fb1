"""Figures read the same everywhere, and nothing that is missing looks like a figure."""

import math

import pytest

from isotone.report.tables import Table, count, interval, number, p_value, share, signed, with_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23456, "1.235"), (-0.5, "−0.500"), (-0.0001, "0.000"), (12345.6, "12\u202f345.600"), (None, "missing"),
     (math.nan, "missing"), (math.inf, "missing"), (0, "0.000")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_signs_intervals_shares_and_p_values() -> None:
    assert [signed(v) for v in (0.25, -0.25, 0.0, 0.0001, None)] == ["+0.250", "−0.250", "0.000", "0.000", "missing"]
    assert interval((-1, 2), 1) == "[−1.0, 2.0]"
    assert with_interval(1, None) == "1.000"
    assert with_interval(None, (1, 2)) == "missing"
    assert share(0.5) == "50.0\u00a0%"
    assert share(None) == "missing"
    assert [p_value(p) for p in (0.0001, 0.035, 1.0, None)] == ["< 0.001", "0.035", "1.000", "missing"]
    assert count(0) == "0"


def test_table_in_markdown_and_latex_escapes_its_cells() -> None:
    table = Table("caption", ["Arm", "Δ"], [["a_b | <c>", "−1\u202f000"], ["50 % & more", "\\x"]])
    assert table.markdown() == (
        "| Arm | Δ |\n| :-- | --: |\n| a_b \\| &lt;c> | −1\u202f000 |\n| 50 % & more | \\\\x |\n"
    )
    assert table.latex() == (
        "\\begin{tabular}{lr}\n\\toprule\nArm & $\\Delta$ \\\\\n\\midrule\n"
        "a\\_b | <c> & $-$1\\,000 \\\\\n50 \\% \\& more & \\textbackslash{}x \\\\\n\\bottomrule\n\\end{tabular}\n"
    )
