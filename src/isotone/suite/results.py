"""Puts together what the logs of a request say: the form of a run's results, with what the models and documents are."""

from collections.abc import Mapping, Sequence

from isotone import records
from isotone.attacks import Vocabulary, success_threshold
from isotone.evidence import EXCHANGED
from isotone.findings import gather, margins
from isotone.pipeline.graph import PROBE, Node, probed_arms
from isotone.pipeline.stages.further_attacks import SEARCH
from isotone.result_models import AttackedModel, AttackSuiteResults
from isotone.results import BASELINE, ArmFindings, build_final_results
from isotone.suite.request import FURTHER, source_name
from isotone.suite.work import Row, Work
from isotone.transfer import transfer_matrix


def build_results(work: Work, transfer: Mapping[str, Sequence[Row]]) -> AttackSuiteResults:
    """Return the results of a request whose logs are complete.

    Args:
        work: the request.
        transfer: by arm, rows of other arms' edits and triggers on it.
    """
    threshold = success_threshold(work.rows(Node("hotflip", BASELINE), "random_search"))
    vocabulary = Vocabulary.all_ids(1)
    vocabulary.tokenizer = work.tokenizer  # for the texts of triggers
    findings = {arm: _findings(work, arm, threshold, vocabulary, transfer.get(arm, ())) for arm in work.experiment.arms}
    final = build_final_results(
        work.experiment,
        work.seed,
        findings,
        threshold=threshold,
        margins=_margins(work, findings[BASELINE]),
        transfer=transfer_matrix(findings, transfer) if transfer else (),
    )
    pins = work.request.pins
    models = {
        arm: AttackedModel(
            name=source_name(pin["source"]),
            model_type=pin["model_type"],
            num_parameters=pin["num_parameters"],
            context=pin["context"],
            revision=pin["revision"],
            files=pin["files"],
        )
        for arm, pin in pins.items()
    }
    settings = work.experiment.attacks.model_dump(mode="json")
    return AttackSuiteResults(
        **{key: value for key, value in final if key not in ("schema_", "differences_between_arms")},
        differences_between_arms=[*_different_models(models), *final.differences_between_arms],
        attacks=list(work.request.attacks),
        models=models,
        documents=work.documents.counts(),
        settings=settings,
        notes=work.documents.notes,
    )


def _different_models(models: Mapping[str, AttackedModel]) -> list[Row]:
    named = {arm: f"{model.name} ({records.hash_json(model.files)[:12]})" for arm, model in models.items()}
    return [{"key": "model", "arms": named}] if len(models) > 1 else []


def _findings(
    work: Work, arm: str, threshold: float | None, vocabulary: Vocabulary, replayed: Sequence[Row]
) -> ArmFindings:
    hotflip: dict[str, list[Row]] = {}
    further: dict[str, list[Row]] = {}
    for node, variant, split, _ in work.attacks(arm, 1):
        if split == "attack_test":
            (hotflip if node.kind == "hotflip" else further)[variant or node.kind] = work.rows(node, variant)
    searched = "triggers" in work.request.attacks
    node = Node("triggers", arm)
    matched = work.experiment.arms[arm].matched_loss
    return gather(
        work.experiment,
        vocabulary,
        threshold,
        evaluation=records.read_json(work.folder.node_result(Node("evaluate", arm))),
        evaluation_rows=work.rows(Node("evaluate", arm)),
        hotflip=hotflip,
        further=further,
        trigger_rows=work.rows(node) if searched else [],
        trigger_search=records.read_json(work.folder.node_result(node))["search"] if searched else None,
        transfer_rows=replayed,
        exchanged_rows=work.rows(Node("hotflip", arm), EXCHANGED),
        probe_rows=work.rows(Node(PROBE, arm)) if arm in probed_arms(work.experiment) else (),
        matched_loss=records.read_json(work.folder.node_result(Node("match", arm))) if matched else None,
    )


def _margins(work: Work, baseline: ArmFindings) -> dict[str, float]:
    asked, methods = work.request.attacks, work.experiment.attacks.hotflip.methods
    node = Node("hotflip", BASELINE)
    hotflip = {method: work.rows(node, f"{method}_search") for method in methods} if "hotflip" in asked else {}
    further = {kind: work.rows(Node(kind, BASELINE), SEARCH) for kind in FURTHER if kind in asked and kind != "pgd"}
    random = work.rows(node, "random_search") if "random" in asked else []
    return margins(work.experiment, baseline, hotflip, random, further)
