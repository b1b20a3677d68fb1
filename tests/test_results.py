"""Two arms are attacked for real on tiny models, and what results say follows from what was found."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evidence_rows import matched_to
from pydantic import ValidationError
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from isotone import records
from isotone.attacks import HotFlip, PrefixProtocol, PublishedHotFlip, Vocabulary, run_documents, worst_case
from isotone.attacks.protocol import Window
from isotone.attacks.summary import summarize as summarize_attack
from isotone.attacks.summary import summarize_triggers
from isotone.attacks.trigger_rows import evaluate_trigger
from isotone.attacks.triggers import UniversalTriggers, search_trigger
from isotone.config import Experiment
from isotone.evaluation import summarize
from isotone.report.summary import summary_text, triggers_csv
from isotone.result_models import SCHEMA_FOLDER, SCHEMAS, FinalResults, json_schema, to_json
from isotone.results import ArmFindings, build_final_results, differences_between_arms, equivalence_margin

PROTOCOL = PrefixProtocol(prefix=8, gap=2, continuation=20)
VOCABULARY = Vocabulary.all_ids(64)
TRIGGERS = UniversalTriggers(length=2, candidates=4, iterations=2, restarts=2, batch_documents=4)


def model(seed: int, scale: float = 1.0) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    network = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        network.lm_head.weight *= scale  # sharper predictions of random text: a higher loss
    return network


def windows(num: int, seed: int = 0) -> list[Window]:
    generator = np.random.default_rng(seed)
    return [Window(f"d{i}", generator.integers(0, 64, PROTOCOL.length).astype(np.int64)) for i in range(num)]


def findings_of(network: GPTNeoXForCausalLM, nll: float) -> ArmFindings:
    """Attack a model; its clean rows are made up around ``nll``."""
    attacks = {"iterative": HotFlip(flips=2, candidates=4), "published": PublishedHotFlip(flips=2)}
    rows = {name: run_documents(a, network, VOCABULARY, windows(12), PROTOCOL) for name, a in attacks.items()}
    found = search_trigger(TRIGGERS, network, VOCABULARY, windows(8, seed=1))
    trigger_rows = evaluate_trigger(TRIGGERS, found, network, VOCABULARY, windows(12))
    spread = np.random.default_rng(3).normal(0, 0.05, 30)
    clean = [{"id": f"t{i}", "nats": 50 * (nll + e), "num_tokens": 50, "num_bytes": 200} for i, e in enumerate(spread)]
    return ArmFindings(
        evaluation={"last": summarize(clean)},
        primary_checkpoint="last",
        evaluation_rows=clean,
        hotflip={name: summarize_attack(of_variant, threshold=0.01) for name, of_variant in rows.items()},
        hotflip_rows=rows,
        triggers=summarize_triggers(trigger_rows, found, VOCABULARY),
        trigger_rows=trigger_rows,
    )


EXPERIMENT = Experiment.model_validate(
    {
        "name": "tiny",
        "analysis": {"min_documents": 2, "min_spent_tokens": 1},
        "arms": {
            "baseline": {},
            "monotonic": {"constraint": {"recipe": "published"}, "training": {"warmup": 0.15}},
            "shifted_twin": {
                "start": "baseline",
                "train": False,
                "constraint": {"parametrization": "projection", "initialization": "shift"},
            },
        },
    }
)


@pytest.fixture(scope="module")
def found() -> dict[str, ArmFindings]:
    return {"plain": findings_of(model(0), 3.3), "sharp": findings_of(model(0, 30.0), 3.3)}


def results_of(findings: Mapping[str, ArmFindings], **options: Any) -> FinalResults:
    return build_final_results(EXPERIMENT, 42, findings, **{"threshold": 0.01} | options)


def test_identical_arms_differ_in_nothing(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"], "monotonic": found["plain"]}, margins={"hotflip": 0.1})
    assert {c.difference for c in results.comparisons} == {0}
    assert {c.verdict for c in results.conclusions} == {"no_difference_shown"}
    assert [c.subject for c in results.conclusions] == ["clean_loss", "robustness", "robustness"]
    assert results.conclusions[1].equivalent is True


def test_the_ensemble_is_concluded_about_where_there_is_one(found: dict[str, ArmFindings]) -> None:
    arm = found["plain"]
    rows = worst_case(list(arm.hotflip_rows.values()))
    both = replace(arm, attacks={"ensemble": summarize_attack(rows)}, attack_rows={"ensemble": rows})
    results = results_of({"baseline": both, "monotonic": both}, margins={"hotflip": 0.1, "ensemble": 0.2})
    assert [c.attack for c in results.conclusions] == [None, "hotflip", "triggers", "ensemble"]
    assert results.conclusions[-1].equivalent is True
    assert "within the margin of ±0.200" in results.conclusions[-1].sentence
    assert "robustness between monotonic and baseline under the worst of all" in results.conclusions[-1].sentence


def test_measurements_equal_the_attacks_own_entries(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"]})
    entry = found["plain"].hotflip["iterative"]
    for metric in ("delta_nll", "clean_nll", "attacked_nll", "success_rate"):
        [value] = [
            m.value
            for m in results.measurements
            if (m.metric, m.variant, m.protocol) == (metric, "iterative", "prefix")
        ]
        assert value == pytest.approx(entry[metric], rel=1e-12)
    trigger = found["plain"].triggers or {}
    for metric in ("delta_nll", "delta_minus_shift", "delta_minus_random"):
        [value] = [m.value for m in results.measurements if (m.metric, m.attack) == (metric, "triggers")]
        assert value == pytest.approx(trigger[metric], rel=1e-9)
    for name in ("success_rate", "degradation"):
        [value] = [
            m.value
            for m in results.measurements
            if (m.metric, m.variant, m.protocol) == (name, "published", "published")
        ]
        assert value == pytest.approx(found["plain"].hotflip["published"]["published_accounting"][name])


def test_exchanging_the_arms_exchanges_every_comparison(found: dict[str, ArmFindings]) -> None:
    one = results_of({"baseline": found["plain"], "monotonic": found["sharp"]})
    two = results_of({"baseline": found["sharp"], "monotonic": found["plain"]})
    for ab, ba in zip(one.comparisons, two.comparisons, strict=True):
        assert (ab.metric, ab.variant, ab.protocol, ab.n) == (ba.metric, ba.variant, ba.protocol, ba.n)
        assert ab.difference == -ba.difference
        assert ab.p == pytest.approx(ba.p)


def test_no_word_on_robustness_between_arms_of_different_loss(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"], "monotonic": found["sharp"]})
    robustness = [c for c in results.conclusions if c.subject == "robustness"]
    assert [c.verdict for c in robustness] == ["not_concluded", "not_concluded"]
    assert "more robust" not in summary_text(results)
    assert "less robust" not in summary_text(results)


def test_the_declared_family_is_corrected_and_nothing_else(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"], "monotonic": found["sharp"], "shifted_twin": found["plain"]})
    family = [(c.a, c.attack, c.metric) for c in results.comparisons if c.family == "confirmatory"]
    assert sorted(family, key=str) == sorted(
        [
            (arm, attack, metric)
            for arm in ("monotonic", "shifted_twin")
            for attack, metric in ((None, "nll"), ("hotflip", "delta_nll"), ("triggers", "delta_nll"))
        ],
        key=str,
    )
    assert all((c.p_adjusted is None) == (c.family == "exploratory") for c in results.comparisons)
    assert all(c.p_adjusted >= c.p for c in results.comparisons if c.p_adjusted is not None and c.p is not None)


def test_a_family_that_the_configuration_declares_takes_the_place_of_the_default(found: dict[str, ArmFindings]) -> None:
    family = [
        {"metric": "bits_per_byte"},
        {"metric": "delta_nll", "attack": "hotflip", "variant": "once"},
        {"metric": "success_rate", "attack": "hotflip"},
    ]
    declared = {"analysis": {"family": family, "level": 0.01}}
    experiment = Experiment.model_validate(EXPERIMENT.model_dump(exclude_defaults=True) | declared)
    arms = {"baseline": found["plain"], "monotonic": found["sharp"]}
    results = build_final_results(experiment, 42, arms, threshold=0.01)
    confirmatory = [c for c in results.comparisons if c.family == "confirmatory"]
    assert [(c.metric, c.attack, c.variant, c.level) for c in confirmatory] == [
        ("bits_per_byte", None, None, 0.01),
        ("success_rate", "hotflip", "iterative", 0.01),
    ]
    assert [m.num_comparisons for m in results.family] == [1, 0, 1]  # HotFlip once was declared, but not made
    default = results_of(arms)
    assert [(m.metric, m.attack, m.variant, m.num_comparisons) for m in default.family] == [
        ("nll", None, None, 1),
        ("delta_nll", "hotflip", "iterative", 1),
        ("delta_nll", "triggers", "universal", 1),
    ]
    assert {c.level for c in default.comparisons} == {None, 0.05}


def test_the_margin_is_the_declared_share_of_what_an_attack_does() -> None:
    wider = Experiment.model_validate(
        EXPERIMENT.model_dump(exclude_defaults=True) | {"analysis": {"margin_share": 0.2}}
    )
    assert equivalence_margin(EXPERIMENT, -0.5) == pytest.approx(0.05)
    assert equivalence_margin(wider, 0.5) == pytest.approx(0.1)


def test_every_arm_gets_a_verdict_its_gaps_and_its_signs_of_masking(found: dict[str, ArmFindings]) -> None:
    worse = findings_of(model(0, 30.0), 3.9)
    control = replace(worse, matched_loss=matched_to("monotonic"))
    arms = {"baseline": found["plain"], "monotonic": worse, "matched": control, "shifted_twin": found["plain"]}
    results = results_of(arms, margins={"hotflip": 0.5})
    assert [(v.arm, v.verdict) for v in results.verdicts] == [
        ("monotonic", "equivalent"),  # the control is the same model
        ("shifted_twin", "equivalent"),
    ]
    assert [a.control for v in results.verdicts for a in v.against] == ["matched", "baseline"]
    assert [(d.arm, d.kind) for d in results.decompositions] == [
        *(("monotonic", kind) for kind in ("nats", "bar", "success", "remainder")),
        *(("shifted_twin", kind) for kind in ("nats", "bar", "success")),
    ]
    assert list(results.masking) == ["monotonic", "shifted_twin"]
    without = results_of({"baseline": found["plain"], "monotonic": worse})
    assert [v.verdict for v in without.verdicts] == ["not_concluded"]
    text = " ".join(summary_text(results).split())
    assert all(v.sentence in text for v in results.verdicts)
    assert all(m.sentence in text for m in results.masking.values())


def test_every_protocol_is_measured(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"], "monotonic": found["sharp"]})
    protocols = {(m.variant, m.protocol) for m in results.measurements if m.attack}
    assert protocols == {
        *(("iterative", p) for p in ("prefix", "prefix_text_space", "after_first_flip", "published")),
        *(("published", p) for p in ("after_first_flip", "published")),
        ("universal", "prepended"),
    }


def test_written_results_are_read_back_and_hold_nothing_else(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"], "monotonic": found["sharp"]})
    written = json.loads(records.dump_json(to_json(results)))
    assert written["schema"] == 1
    assert FinalResults.model_validate(written) == results
    with pytest.raises(ValidationError, match="extra"):
        FinalResults.model_validate(written | {"extra": 1})


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas_are_those_of_the_classes(name: str) -> None:
    """``python -m isotone.result_models`` writes them anew."""
    assert records.read_json(SCHEMA_FOLDER / f"{name}.schema.json") == json_schema(name)


def test_an_entry_of_an_arm_shows_the_primary_variant(found: dict[str, ArmFindings]) -> None:
    arm = results_of({"baseline": found["plain"]}).arms["baseline"]
    assert arm.hotflip is not None
    assert arm.hotflip["variant"] == "iterative"
    assert arm.hotflip["delta_nll"] == arm.hotflip["variants"]["iterative"]["delta_nll"]
    assert arm.perplexity == pytest.approx(np.exp(3.3), rel=0.02)


def test_differences_between_arms_name_every_value() -> None:
    rows = {row["key"]: row["arms"] for row in differences_between_arms(EXPERIMENT)}
    assert rows == {
        "start": {"baseline": "pretrained", "monotonic": "pretrained", "shifted_twin": "baseline"},
        "train": {"baseline": True, "monotonic": True, "shifted_twin": False},
        "constraint": {
            "baseline": None,
            "monotonic": {"scope": "mlp_both", "recipe": "published"},
            "shifted_twin": {"scope": "mlp_both", "parametrization": "projection", "initialization": "shift"},
        },
        "training.warmup": {"baseline": 0.1, "monotonic": 0.15},
    }


MATCHED = {
    "to": "monotonic",
    "by": "temperature",
    "target": 3.5,
    "reached": 3.501,
    "parameter": 1.25,
    "reachable": True,
    "reason": "",
}


def test_a_control_leads_to_no_conclusion_of_its_own_but_to_a_line(found: dict[str, ArmFindings]) -> None:
    missed = {**MATCHED, "reachable": False, "reason": "it is too high already"}
    arms = {"baseline": found["plain"], "a": replace(found["sharp"], matched_loss=MATCHED)}
    results = results_of({**arms, "b": replace(found["sharp"], matched_loss=missed)})
    assert results.conclusions == []  # the verdict speaks of controls
    assert {c.a for c in results.comparisons} == {"a", "b"}
    text = " ".join(summary_text(results).split())
    assert "a: 3.501 for the 3.500 of monotonic (temperature, 1.250)" in text
    assert "b: 3.501 for the 3.500 of monotonic (not reachable, so nothing follows from this arm: it is too" in text


def test_the_summary_names_every_arm_and_conclusion(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"], "monotonic": found["sharp"]})
    text = " ".join(summary_text(results).split())
    assert all(conclusion.sentence in text for conclusion in results.conclusions)
    assert "training.warmup: baseline 0.1; monotonic 0.15" in text


def test_triggers_are_listed_with_every_restart(found: dict[str, ArmFindings]) -> None:
    results = results_of({"baseline": found["plain"], "monotonic": found["sharp"]})
    lines = list(csv.DictReader(io.StringIO(triggers_csv(results))))
    assert [(line["arm"], line["restart"]) for line in lines] == [
        (arm, restart) for arm in ("baseline", "monotonic") for restart in ("0", "1")
    ]
    [best] = [line for line in lines if line["arm"] == "baseline" and line["best"] == "1"]
    trigger = found["plain"].triggers or {}
    assert best["token_ids"] == " ".join(map(str, trigger["trigger_ids"]))
    assert float(best["delta_nll"]) == trigger["delta_nll"]
    assert float(best["search_delta_nll"]) == trigger["restarts"][trigger["best_restart"]]["search_delta_nll"]
    assert all(line["delta_nll"] == "" for line in lines if line["best"] == "0")


def test_an_arm_without_any_figure_stays_missing() -> None:
    broken = [{"id": "t0", "nats": None, "num_tokens": 50, "num_bytes": 200}]
    results = results_of({"baseline": ArmFindings({"last": summarize(broken)}, "last", broken)})
    arm = results.arms["baseline"]
    assert (arm.perplexity, arm.bits_per_byte, arm.hotflip, arm.triggers) == (None, None, None, None)
    assert results.comparisons == results.conclusions == []
    assert "missing" in summary_text(results)
