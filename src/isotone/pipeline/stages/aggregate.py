"""Stage 7: everything that the run found, put together: figures, comparisons, computed conclusions, report."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isotone import records
from isotone.attacks import Vocabulary, success_threshold
from isotone.attacks.ensemble import ENSEMBLE
from isotone.evidence import EXCHANGED
from isotone.findings import gather, margins
from isotone.pipeline.arms import pinned_tokenizer
from isotone.pipeline.context import Context
from isotone.pipeline.graph import PROBE, Node, further_attacks, probed_arms
from isotone.pipeline.stages.further_attacks import SEARCH
from isotone.pipeline.stages.hotflip import attacks
from isotone.report import write_report, write_tables
from isotone.report.summary import summary_text, triggers_csv
from isotone.report.texts import write_token_texts
from isotone.result_models import AttackResults, EvaluationResults, to_json
from isotone.results import BASELINE, ArmFindings, build_final_results
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
    experiment = context.experiment
    rows = {
        variant: _rows(context, Node("hotflip", arm), variant)
        for variant, (split, _) in attacks(experiment, context.seed, arm).items()
        if split == "attack_test"
    }
    return gather(
        experiment,
        vocabulary,
        threshold,
        evaluation=_result(context, Node("evaluate", arm)),
        evaluation_rows=_rows(context, Node("evaluate", arm)),
        hotflip=rows,
        further={kind: _rows(context, Node(kind, arm)) for kind in further_attacks(experiment)},
        trigger_rows=_rows(context, Node("triggers", arm)),
        premise=_result(context, Node("hotflip", arm)).get("premise"),
        exchanged_rows=_rows(context, Node("hotflip", arm), EXCHANGED),
        trigger_search=_result(context, Node("triggers", arm))["search"],
        transfer_rows=_rows(context, Node("transfer", arm)) if experiment.attacks.transfer else (),
        probe_rows=_rows(context, Node(PROBE, arm)) if arm in probed_arms(experiment) else (),
        training=_result(context, Node("train", arm)) if experiment.arms[arm].train else None,
        matched_loss=_result(context, Node("match", arm)) if experiment.arms[arm].matched_loss else None,
    )


def _margins(context: Context, baseline: ArmFindings) -> dict[str, float]:
    node, experiment = Node("hotflip", BASELINE), context.experiment
    further = {
        kind: _rows(context, Node(kind, BASELINE), SEARCH) for kind in further_attacks(experiment) if kind != "pgd"
    }
    hotflip = {method: _rows(context, node, f"{method}_search") for method in experiment.attacks.hotflip.methods}
    return margins(experiment, baseline, hotflip, _rows(context, node, "random_search"), further)


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
