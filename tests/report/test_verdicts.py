"""The page's tables of the verdict hold the results' figures, and name what does not count or was not measured."""

from pathlib import Path

import numpy as np
from evidence_rows import ITERATIVE, evidence, matched_to, rows

from isotone.analysis import analyse
from isotone.report.over_seeds import SummaryFiles
from isotone.report.verdicts import controls_table, gaps_table, masking_table, on_masking, sentences
from isotone.robustness import Floors


def harms(mean: float, seed: int) -> np.ndarray:
    return mean + np.random.default_rng(seed).normal(0, 0.05, 40)


def results() -> SummaryFiles:
    def arm(mean: float, seed: int, **options: object) -> object:
        published = rows(harms(mean, seed), attack=("hotflip", "published"))
        return evidence(rows(harms(mean, seed)), published, **options)  # type: ignore[arg-type]

    seed = {
        "baseline": arm(0.4, 1),
        "monotonic": arm(0.2, 2, nll=3.5),
        "by_temperature": arm(0.3, 3, nll=3.5, matched=matched_to("monotonic")),
        "by_noise": arm(0.3, 4, nll=3.5, matched=matched_to("monotonic", "noise", reachable=False, reason="it jumps")),
    }
    found = analyse([seed], "baseline", ITERATIVE, {"ensemble": 0.04}, 0.15, Floors())  # type: ignore[list-item]
    final = {
        "verdicts": [v.model_dump(mode="json") for v in found.verdicts],
        "decompositions": [d.model_dump(mode="json") for d in found.decompositions],
        "masking": {name: m.model_dump(mode="json") for name, m in found.masking.items()},
    }
    return SummaryFiles(Path("config.yaml"), final)


def test_controls_stand_beside_the_arm_and_those_that_do_not_count_say_why() -> None:
    table = controls_table(results())
    assert [row[:4] for row in table.rows] == [
        ["monotonic", "more robust", "by_temperature", "temperature, from baseline"],
        ["monotonic", "more robust", "by_noise", "does not count: not reachable: it jumps"],
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[0][7].startswith("+0.098 [")
    assert dict(zip(table.columns, table.rows[0], strict=True))["δ"] == "0.040"


def test_every_gap_is_shown_with_its_parts() -> None:
    table = gaps_table(results())
    assert [row[0] for row in table.rows] == [
        "monotonic: published, nats per token",
        "monotonic: published, log-ratio",
        "monotonic: published, share of successes",
        "monotonic: primary, nats per scored token, by way of by_temperature",
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[3][2].startswith("matched loss +0.")
    assert "%)" in table.rows[3][3]


def test_what_was_not_measured_of_masking_is_named() -> None:
    run = results()
    assert list(masking_table(run).rows) == []  # no row of dashes that could be read as "no sign of masking"
    assert on_masking(run)[0].startswith("Masking of monotonic was not measured")


def test_results_without_an_arm_to_judge_say_so() -> None:
    empty = SummaryFiles(Path("config.yaml"), {})
    assert sentences(empty) == ["There is no arm beside the baseline that a verdict could be about."]
    assert [list(t.rows) for t in (controls_table(empty), gaps_table(empty), masking_table(empty))] == [[], [], []]
