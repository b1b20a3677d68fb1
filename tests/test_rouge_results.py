"""ROUGE stands in results like any other measure: by arm, compared with the baseline in pairs, and beside copying."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from isotone.comparisons import Key, evaluation_quantities
from isotone.config import Experiment
from isotone.config_io import experiment_from_dict
from isotone.errors import UsageError
from isotone.evaluation import summarize
from isotone.evaluation.rouge import ROUGE, summarize_rouge
from isotone.over_seeds import SeedFindings, build_summary
from isotone.report.content import source_copied
from isotone.report.summary import summary_text, summary_text_over_seeds
from isotone.result_models import FinalResults, to_json
from isotone.results import ArmFindings, build_final_results, evidence_of, quantities_of

PAIRS = {"name": "x", "data": {"source": "bible-pairs"}, "evaluation": {"rouge": {}}}


def experiment(**more: object) -> Experiment:
    return experiment_from_dict({**PAIRS, **more})


def findings(shift: float) -> ArmFindings:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(30):
        score = float(rng.uniform(0.3, 0.6)) + shift * float(rng.uniform(0.5, 1.5))
        scores = {"rouge1": score, "rouge2": score / 2, "rougeLsum": score}
        rows.append({"id": f"d{i}", "nats": 9.0, "num_tokens": 9, "num_bytes": 30, "rouge": scores})
    rows.append({"id": "unwritten", "nats": 9.0, "num_tokens": 9, "num_bytes": 30})
    scored = summarize_rouge([row["rouge"] for row in rows[:30]], 200)
    copied = summarize_rouge([dict.fromkeys(ROUGE, 0.25)] * 30, 200)
    entry = {**summarize(rows), "rouge": {"num_documents": 30, **scored, "source_copied": copied}}
    return ArmFindings({"last": entry}, "last", rows)


def results() -> FinalResults:
    found = {"baseline": findings(0), "monotonic": findings(-0.1)}
    return build_final_results(experiment(), 42, found, threshold=None)


def test_arms_are_compared_in_pairs_of_documents() -> None:
    found = results()
    by_metric = {c.metric: c for c in found.comparisons}
    assert {"rouge1", "rouge2", "rougeLsum"} <= by_metric.keys()
    c = by_metric["rougeLsum"]
    assert (c.a, c.b, c.n, c.unit, c.family) == ("monotonic", "baseline", 30, "F1", "exploratory")
    assert c.difference == pytest.approx(-0.1, abs=0.02)
    assert c.ci95 is not None
    assert c.ci95[1] < 0


def test_a_measurement_has_the_interval_of_the_resampled_documents() -> None:
    found = results()
    measured = next(m for m in found.measurements if (m.arm, m.metric) == ("monotonic", "rouge1"))
    entry = found.arms["monotonic"].evaluation["last"]["rouge"]["rouge1"]
    assert measured.value == pytest.approx(entry["value"])
    assert measured.ci95 == entry["ci95"]


def test_the_summary_sets_models_beside_the_copied_source() -> None:
    found = results()
    assert source_copied(to_json(found)) == {
        "n": 30,
        **{metric: {"value": 0.25, "ci95": [0.25, 0.25], "unit": "F1"} for metric in ROUGE},
    }
    text = summary_text(found)
    assert "ROUGE of what is written (F1)" in text
    assert "the source, copied  0.250 [0.250, 0.250]" in text


def test_seeds_are_pooled_with_documents_crossed() -> None:
    found = {}
    for seed, shift in ((1, -0.1), (2, -0.08), (3, -0.12)):
        of_arms = {"baseline": findings(0), "monotonic": findings(shift)}
        final = build_final_results(experiment(), seed, of_arms, threshold=None)
        found[seed] = SeedFindings(final, quantities_of(experiment(), of_arms, None), evidence_of(of_arms))
    summary = build_summary(experiment(), found)
    pooled = next(m for m in summary.pooled if (m.arm, m.metric) == ("monotonic", "rougeLsum"))
    assert (pooled.n, pooled.num_seeds, pooled.unit) == (30, 3, "F1")
    c = next(c for c in summary.comparisons if c.metric == "rougeLsum")
    assert c.difference == pytest.approx(-0.1, abs=0.02)
    assert c.num_seeds == 3
    assert "ROUGE of what is written (F1)" in summary_text_over_seeds(summary)


def test_a_family_may_declare_rouge_where_it_is_measured() -> None:
    declared = {"family": [{"metric": "rougeLsum"}]}
    assert experiment(analysis=declared).analysis.family[0].metric == "rougeLsum"
    with pytest.raises(UsageError, match=r"rougeLsum is never measured; give evaluation\.rouge"):
        experiment(analysis=declared, evaluation={})
    with pytest.raises(UsageError, match=r"evaluation\.rouge: only of pairs"):
        experiment(data={})


def test_rows_of_texts_have_no_rouge() -> None:
    rows = [{key: row[key] for key in ("id", "nats", "num_tokens", "num_bytes")} for row in findings(0).evaluation_rows]
    assert [q.key for q in evaluation_quantities(rows)] == [Key("nll"), Key("bits_per_byte")]
    assert replace(findings(0), evaluation_rows=rows).evaluation_rows
