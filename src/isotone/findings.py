"""Turns documents' rows into what an arm has found and into margins of equivalence, with or without a pipeline."""

from collections.abc import Mapping, Sequence
from typing import Any

from isotone.attacks import Vocabulary, summarize, summarize_triggers, worst_case
from isotone.attacks.ensemble import ENSEMBLE
from isotone.config import Experiment
from isotone.results import ArmFindings, equivalence_margin, primary_variant

Json = dict[str, Any]
Rows = list[Json]


def gather(
    experiment: Experiment,
    vocabulary: Vocabulary,
    threshold: float | None,
    *,
    evaluation: Json,
    evaluation_rows: Rows,
    hotflip: Mapping[str, Rows],
    further: Mapping[str, Rows],
    trigger_rows: Rows,
    trigger_search: Json | None,
    premise: Json | None = None,
    **rest: Any,
) -> ArmFindings:
    """Return what was found on one arm, with the worst case of its attacks where there are further ones.

    Args:
        experiment: the resolved configuration.
        vocabulary: for the triggers' texts.
        threshold: τ, nats per scored token; None: unknown.
        evaluation: ``checkpoints``, ``primary_checkpoint`` and ``certificate``.
        evaluation_rows: the documents' rows of the primary checkpoint.
        hotflip: documents' rows by variant, of the held-out documents only.
        further: the same of the further attacks, by name.
        trigger_rows: the documents' rows of the trigger.
        trigger_search: what ``search_trigger`` returned; None: there was no search.
        premise: what ``premise_met`` returned, and of which ``variant``; stands in the certificate, where there is one.
        rest: fields of ``ArmFindings`` that are taken as they are.
    """
    success = experiment.attacks.hotflip.published_success

    def entry(rows: Rows) -> Json:
        return summarize(rows, threshold=threshold, published_success=success)

    certificate = evaluation["certificate"]
    attacked = dict(further)
    if further and (worst := worst_case([*hotflip.values(), *further.values()])):
        attacked[ENSEMBLE] = worst
    triggers = None
    if trigger_search is not None:
        triggers = summarize_triggers(
            trigger_rows, trigger_search, vocabulary, threshold=threshold, published_success=success
        )
    return ArmFindings(
        evaluation=evaluation["checkpoints"],
        primary_checkpoint=evaluation["primary_checkpoint"],
        evaluation_rows=evaluation_rows,
        hotflip={variant: entry(rows) for variant, rows in hotflip.items()},
        hotflip_rows=dict(hotflip),
        triggers=triggers,
        trigger_rows=trigger_rows,
        attacks={name: entry(rows) for name, rows in attacked.items()},
        attack_rows=attacked,
        certificate=certificate | {"premise": premise} if certificate and premise else certificate,
        **rest,
    )


def margins(
    experiment: Experiment,
    baseline: ArmFindings,
    hotflip: Mapping[Any, Rows],
    random: Rows,
    further: Mapping[str, Rows],
) -> dict[str, float]:
    """Return δ by attack: a share of what it does to the baseline on search documents, where that is known.

    Args:
        experiment: the resolved configuration.
        baseline: its triggers name what the best one did on search documents.
        hotflip: the baseline's rows of search documents, by method.
        random: the same of random edits.
        further: the same of the further attacks on texts, by name.
    """
    entry = baseline.triggers or {}
    best = [r for r in entry.get("restarts", ()) if r["restart"] == entry["best_restart"]]
    changes = {"triggers": best[0]["search_delta_nll"]} if best and best[0]["search_delta_nll"] is not None else {}
    primary: dict[str, Sequence[Json]] = {"hotflip": hotflip.get(primary_variant(experiment), [])}
    primary |= {kind: rows for kind, rows in further.items() if kind != "frequency"}  # a control decides nothing
    primary[ENSEMBLE] = worst_case([*hotflip.values(), random, *further.values()])
    for name, rows in primary.items():
        if rows and (change := summarize(rows)["delta_nll"]) is not None:
            changes[name] = change
    return {name: equivalence_margin(experiment, change) for name, change in changes.items()}
