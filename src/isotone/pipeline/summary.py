"""The summary over several seeds: gathers complete runs, pools them, and writes runs/NAME/summary; needs no model."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isotone import records
from isotone.config import Experiment
from isotone.environment import provenance
from isotone.errors import BlockedError, UsageError
from isotone.evidence import EXCHANGED
from isotone.over_seeds import SeedFindings, build_summary, other_documents
from isotone.pipeline.graph import PROBE, Node, probed_arms
from isotone.pipeline.record import SCHEMA, fingerprint
from isotone.pipeline.run_directory import ExperimentDirectory, RunDirectory
from isotone.pipeline.seeds import chosen_seeds, experiment_of, inputs_hashes, left_out, named, require_complete
from isotone.report.over_seeds import render_summary, summary_tables
from isotone.report.summary import summary_text_over_seeds, triggers_csv
from isotone.result_models import FinalResults, SummaryResults, to_json
from isotone.results import ArmFindings, evidence_of, quantities_of
from isotone.transfer import transfer_quantities


def summarize_seeds(folder: Path, seeds: Sequence[int] = (), say: Callable[[str], None] = print) -> Path:
    """Write the results over seeds and return their folder.

    Args:
        folder: runs/NAME.
        seeds: what is summarized; the experiment's own unless given.
        say: where lines for the user go.

    Raises:
        BlockedError: a seed is missing, stale, or made from another configuration; nothing is written.
        UsageError: the folder holds no run, or the seeds are not clear.
    """
    started = time.time()
    directory = ExperimentDirectory.find(folder)
    chosen = chosen_seeds(directory, seeds)
    for seed in left_out(directory, chosen):
        say(f"seed-{seed} is not used: the summary is over {named(chosen)}")
    require_complete(directory, chosen)
    experiment = experiment_of(directory, chosen[0])
    if experiment.evaluation.split == "validation":
        raise UsageError(f"{directory.root}: evaluation.split is validation: there are no results to summarize")
    inputs = inputs_hashes(directory, chosen)
    found = {seed: _findings(directory.run(seed), experiment) for seed in chosen}
    if problem := other_documents(found):
        raise BlockedError(f"{directory.root}: {problem}; all seeds must come from one {directory.root / 'setup'}")
    results = build_summary(experiment, found)
    files = _files(directory, results, [f.final for f in found.values()])
    for name, data in files.items():
        records.write_bytes(directory.summary / name, data)
    records.write_json(
        directory.summary_record,
        {
            "schema": SCHEMA,
            "node": "summary",
            "status": "complete",
            "seeds": chosen,
            "inputs": inputs,
            "outputs": {name: fingerprint(directory.summary / name) for name in sorted(files)},
            "provenance": {**provenance(directory.root), "started": started, "seconds": time.time() - started},
        },
    )
    say(summary_text_over_seeds(results))
    return directory.summary


def _findings(run: RunDirectory, experiment: Experiment) -> SeedFindings:
    path = run.results / "final_results.json"
    try:
        final = FinalResults.model_validate(records.read_json(path))
    except ValidationError as error:
        raise BlockedError(
            f"{path} was written by another version of isotone; make it again: "
            f"isotone run … --only aggregate --fresh ({error.error_count()} faults)"
        ) from error
    arms = {arm: _arm_findings(run, final, arm, experiment) for arm in experiment.arms}
    quantities = quantities_of(experiment, arms, final.success_threshold)
    transfer = transfer_quantities(arms, {arm: of_arm.transfer_rows for arm, of_arm in arms.items()})
    return SeedFindings(final, quantities, evidence_of(arms), transfer)


def _arm_findings(run: RunDirectory, final: FinalResults, arm: str, experiment: Experiment) -> ArmFindings:
    """Read what the nodes of an arm found back from a run's results and its documents' rows."""
    result = final.arms[arm]
    variants = (result.hotflip or {}).get("variants", {})
    return ArmFindings(
        evaluation=result.evaluation,
        primary_checkpoint=experiment.attacks.checkpoint,
        evaluation_rows=_rows(run, Node("evaluate", arm)),
        hotflip=variants,
        hotflip_rows={variant: _rows(run, Node("hotflip", arm), variant) for variant in variants},
        triggers=result.triggers,
        trigger_rows=_rows(run, Node("triggers", arm)),
        attacks=result.attacks,
        attack_rows={name: _rows(run, Node(name, arm)) for name in result.attacks},
        certificate=result.certificate,
        transfer_rows=_rows(run, Node("transfer", arm)) if final.transfer else (),
        exchanged_rows=_rows(run, Node("hotflip", arm), EXCHANGED),
        probe_rows=_rows(run, Node(PROBE, arm)) if arm in probed_arms(experiment) else (),
        training=result.training,
        matched_loss=result.matched_loss,
    )


def _rows(run: RunDirectory, node: Node, variant: str | None = None) -> list[dict[str, Any]]:
    return records.JsonLines(run.documents(node, variant)).read()


def _files(directory: ExperimentDirectory, results: SummaryResults, finals: Sequence[FinalResults]) -> dict[str, bytes]:
    """Return every file of the summary but its record, by name."""
    config = directory.run(results.seeds[0]).config
    return {
        "learned_triggers.csv": triggers_csv(*finals).encode(),
        "experiment_summary.txt": summary_text_over_seeds(results).encode(),
        "final_results.json": records.dump_json(to_json(results)),
        **{f"tables/{name}": text.encode() for name, text in summary_tables(to_json(results), config).items()},
        "report.html": render_summary(to_json(results), config).encode(),
    }
