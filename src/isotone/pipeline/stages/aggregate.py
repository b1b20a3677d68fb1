"""Stage 7: everything that the run found, put together: figures, comparisons, computed conclusions, report."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isotone import records
from isotone.attacks import Vocabulary, success_threshold, summarize, summarize_triggers, worst_case
from isotone.attacks.ensemble import ENSEMBLE
from isotone.pipeline.arms import pinned_tokenizer
from isotone.pipeline.context import Context
from isotone.pipeline.graph import PROBE, Node, further_attacks, probed_arms
from isotone.pipeline.stages.further_attacks import SEARCH
from isotone.pipeline.stages.hotflip import attacks
from isotone.report import write_report, write_tables
from isotone.report.summary import summary_text, triggers_csv
from isotone.report.texts import write_token_texts
from isotone.result_models import AttackResults, EvaluationResults, to_json
from isotone.results import BASELINE, ArmFindings, build_final_results, equivalence_margin, primary_variant
from isotone.transfer import transfer_matrix

Json = dict[str, Any]


def run(context: Context) -> list[Path]:
    """Write the result files and the report."""
    threshold = success_threshold(_rows(context, Node("hotflip", BASELINE), "random_search"))
    tokenizer = pinned_tokenizer(context)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, records.read_json(context.run.pinned_model)["vocab_size"])
    findings = {arm: _findings(context, arm, threshold, vocabulary) for arm in context.experiment.arms}
    transfer = {arm: found.transfer_rows for arm, found in findings.items()}
    final = build_final_results(
        context.experiment,
        context.seed,
        findings,
        threshold=threshold,
        margins=_margins(context, findings[BASELINE]),
        transfer=transfer_matrix(findings, transfer) if context.experiment.attacks.transfer else (),
    )
    results = context.run.results
    evaluation = {
        arm: {"primary_checkpoint": f.primary_checkpoint, "checkpoints": dict(f.evaluation)}
        for arm, f in findings.items()
    }
    hotflip = {arm: {"variants": dict(f.hotflip)} for arm, f in findings.items()}
    triggers = {arm: dict(f.triggers or {}) for arm, f in findings.items()}
    seed = context.seed
    texts: dict[str, bytes] = {
        "evaluation_results.json": records.dump_json(to_json(EvaluationResults(seed=seed, arms=evaluation))),
        "hotflip_results.json": records.dump_json(to_json(AttackResults(seed=seed, attack="hotflip", arms=hotflip))),
        "uat_results.json": records.dump_json(to_json(AttackResults(seed=seed, attack="triggers", arms=triggers))),
        "learned_triggers.csv": triggers_csv(final).encode(),
        "experiment_summary.txt": summary_text(final).encode(),
        "final_results.json": records.dump_json(to_json(final)),
    }
    for name, data in texts.items():
        records.write_bytes(results / name, data)
    ensembles = [_write_ensemble(context, arm, f) for arm, f in findings.items() if ENSEMBLE in f.attack_rows]
    tokens = write_token_texts(context.run.root, _all_attack_rows(findings.values()), tokenizer)
    tables = write_tables(context.run.root)
    report = write_report(context.run.root)
    context.say(summary_text(final))
    context.say(f"report: {report}")
    return [tokens, *tables, *ensembles, *(results / name for name in texts)]


def _findings(context: Context, arm: str, threshold: float | None, vocabulary: Vocabulary) -> ArmFindings:
    evaluation = _result(context, Node("evaluate", arm))
    config = context.experiment.attacks.hotflip
    rows = {
        variant: _rows(context, Node("hotflip", arm), variant)
        for variant, (split, _) in attacks(context.experiment, context.seed, arm).items()
        if split == "attack_test"
    }
    trigger_rows = _rows(context, Node("triggers", arm))
    triggers = summarize_triggers(
        trigger_rows,
        _result(context, Node("triggers", arm))["search"],
        vocabulary,
        threshold=threshold,
        published_success=config.published_success,
    )
    further: dict[str, list[Json]] = {
        kind: _rows(context, Node(kind, arm)) for kind in further_attacks(context.experiment)
    }
    if further:
        further[ENSEMBLE] = worst_case([*rows.values(), *further.values()])

    def entry(found: list[Json]) -> Json:
        return summarize(found, threshold=threshold, published_success=config.published_success)

    return ArmFindings(
        evaluation=evaluation["checkpoints"],
        primary_checkpoint=evaluation["primary_checkpoint"],
        evaluation_rows=_rows(context, Node("evaluate", arm)),
        hotflip={variant: entry(found) for variant, found in rows.items()},
        hotflip_rows=rows,
        triggers=triggers,
        trigger_rows=trigger_rows,
        attacks={name: entry(found) for name, found in further.items()},
        attack_rows=further,
        certificate=evaluation["certificate"],
        transfer_rows=_rows(context, Node("transfer", arm)) if context.experiment.attacks.transfer else (),
        probe_rows=_rows(context, Node(PROBE, arm)) if arm in probed_arms(context.experiment) else (),
        training=_result(context, Node("train", arm)) if context.experiment.arms[arm].train else None,
        matched_loss=_result(context, Node("match", arm)) if context.experiment.arms[arm].matched_loss else None,
    )


def _margins(context: Context, baseline: ArmFindings) -> dict[str, float]:
    """Return δ by attack: a share of what it does to the baseline on search documents, where that is known."""
    entry = baseline.triggers or {}
    best = [r for r in entry.get("restarts", ()) if r["restart"] == entry["best_restart"]]
    changes = {"triggers": best[0]["search_delta_nll"]} if best else {}
    for name, rows in _on_search_documents(context).items():
        if rows and (change := summarize(rows)["delta_nll"]) is not None:
            changes[name] = change
    return {name: equivalence_margin(context.experiment, change) for name, change in changes.items()}


def _on_search_documents(context: Context) -> dict[str, list[Json]]:
    """Return the rows of the baseline's search documents under HotFlip's primary variant, further attacks, and all."""
    node, experiment = Node("hotflip", BASELINE), context.experiment
    methods: tuple[str, ...] = experiment.attacks.hotflip.methods
    hotflip = {method: _rows(context, node, f"{method}_search") for method in methods}
    further = {
        kind: _rows(context, Node(kind, BASELINE), SEARCH) for kind in further_attacks(experiment) if kind != "pgd"
    }
    found = {"hotflip": hotflip[primary_variant(experiment)]}
    found |= {kind: rows for kind, rows in further.items() if kind != "frequency"}  # a control decides nothing
    random = _rows(context, node, "random_search")
    return found | {ENSEMBLE: worst_case([*hotflip.values(), random, *further.values()])}


def _write_ensemble(context: Context, arm: str, found: ArmFindings) -> Path:
    path = context.run.documents(Node(ENSEMBLE, arm))
    records.write_bytes(path, records.dump_json_lines(found.attack_rows[ENSEMBLE]))
    return path


def _rows(context: Context, node: Node, variant: str | None = None) -> list[Json]:
    return records.JsonLines(context.run.documents(node, variant)).read()


def _result(context: Context, node: Node) -> Json:
    return records.read_json(context.run.node_result(node))


def _all_attack_rows(findings: Iterable[ArmFindings]) -> list[Json]:
    return [dict(row) for found in findings for rows in found.hotflip_rows.values() for row in rows]
