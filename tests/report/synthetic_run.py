"""A finished run's folder with made-up figures, built by the project's own summaries, for tests of the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from isotone import records
from isotone.attacks import summary as attack_summary
from isotone.attacks import worst_case
from isotone.config import Experiment
from isotone.config_io import load_experiment
from isotone.evaluation import summarize
from isotone.pipeline.graph import Graph
from isotone.pipeline.record import write_record
from isotone.pipeline.run_directory import RunDirectory
from isotone.result_models import to_json
from isotone.results import ArmFindings, build_final_results
from isotone.transfer import transfer_matrix

PREFIX, GAP, SCORED = 16, 4, 16
_VERSES = (
    "In the beginning God created the heavens and the earth . Now the earth was formless and empty . Darkness was on "
    "the surface of the deep and God ’ s Spirit was hovering over the surface of the waters . God said , “ Let there "
    "be light , ” and there was light . God saw the light , and saw that it was good ."
)
TEXT = _VERSES.split()
THRESHOLD = 0.12
_SEARCH: dict[str, Any] = {
    "best": 1,
    "finished": [
        {
            "restart": restart,
            "iterations": 2,
            "trigger_ids": [1, 2, 3 + restart],
            "initial_ids": [5, 6, 7],
            "search_nll": 3.5 + restart / 10,
            "initial_search_nll": 3.4,
        }
        for restart in (0, 1)
    ],
    "spent_tokens": 780_000,
    "clean_search_nll": 3.3,
}
NOT_FINITE = "the loss of the clean text is not a finite number"

ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "monotonic": {"constraint": {"recipe": "published", "scope": "mlp_both"}, "training": {"warmup": 0.15}},
    "shifted_twin": {
        "start": "baseline",
        "train": False,
        "constraint": {"parametrization": "projection", "initialization": "shift"},
    },
}
VARIANTS = ("once", "iterative", "published", "random")
_PRIMARY_ONLY = ("delta_nats", "delta_by_offset", "top1", "round_trip", "text_space", "progress")
_NLL = {"baseline": 3.35, "monotonic": 3.9, "shifted_twin": 3.35}
_HARM = {"baseline": 0.38, "monotonic": 0.31, "shifted_twin": 0.38}


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self, words: Sequence[str] = TEXT):
        self.words = sorted(set(words))

    def encode(self, words: Sequence[str]) -> list[int]:
        return [self.words.index(word) for word in words]

    def decode(self, token_ids: list[int], /) -> str:
        return " ".join(self.words[i] for i in token_ids)  # like many: no blank before the first


def write_run(
    root: Path,
    *,
    attacked: Sequence[str] = tuple(ARMS),
    num_documents: int = 24,
    text: Sequence[str] = TEXT,
    tokens: bool = True,
    seed: int = 42,
    complete: bool = False,
    further: bool = False,
) -> Path:
    """Write a run's folder and return it; arms outside of ``attacked`` are neither evaluated nor attacked.

    Seeds share documents and differ in losses; ``complete`` gives every node of the graph its true record; ``further``
    adds GCG, PGD, the ensemble and the transfer matrix.
    """
    from isotone.report import write_token_texts

    tokenizer = Words(text)
    run = root / "pocket" / f"seed-{seed}"
    attacks = {"attacks": {"gcg": {"steps": 5}, "pgd": {"steps": 5}, "transfer": True}} if further else {}
    made_up = {"name": "pocket", "description": "A made-up run.", "arms": ARMS, **attacks}
    experiment = Experiment.model_validate(made_up)
    records.write_json(run / "config.yaml", experiment.model_dump(mode="json", exclude_defaults=True) | {"arms": ARMS})
    findings, all_rows = {}, []
    shift = (seed - 42) % 7 / 100
    for arm in attacked:
        rows = {v: hotflip_rows(arm, v, num_documents, tokenizer, text, shift) for v in VARIANTS}
        triggers = trigger_rows(arm, num_documents)
        evaluation = _evaluation_rows(arm, shift)
        records.JsonLines(run / "results" / "documents" / f"evaluate.{arm}.jsonl").append(*evaluation)
        for variant, of_variant in rows.items():
            records.JsonLines(run / "results" / "documents" / f"hotflip.{arm}.{variant}.jsonl").append(*of_variant)
            all_rows += of_variant
        records.JsonLines(run / "results" / "documents" / f"triggers.{arm}.jsonl").append(*triggers)
        findings[arm] = _findings(arm, rows, triggers, evaluation, THRESHOLD + shift)
        if further:
            findings[arm] = _with_further(run, findings[arm], arm, num_documents, shift)
        if ARMS[arm].get("train", True):
            records.JsonLines(run / "metrics" / f"train.{arm}.jsonl").append(*_metrics(arm))
        _write_record(run, f"hotflip.{arm}")
    margins = {"hotflip": 0.03 + shift}
    margins |= {"ensemble": 0.04} if further else {}
    results = build_final_results(
        experiment,
        seed,
        findings,
        threshold=THRESHOLD + shift,
        margins=margins,
        transfer=transfer_matrix(findings, {a: f.transfer_rows for a, f in findings.items()}) if further else (),
    )
    records.write_json(run / "results" / "final_results.json", to_json(results))
    if tokens:
        write_token_texts(run, all_rows, tokenizer)
    if complete:
        write_true_records(RunDirectory(run), seed)
    return run


def write_true_records(run: RunDirectory, seed: int) -> None:
    """Write the record of every node, over the results that are there."""
    experiment = load_experiment(run.config)
    graph = Graph(experiment)
    for node in graph.nodes:
        outputs = [p for p in run.results.rglob("*.jsonl") if p.name.startswith(f"{node}.")]
        outputs += [run.results / "final_results.json"] if node.kind == "aggregate" else []
        write_record(run, graph, experiment, seed, node, outputs, {"seconds": 1.0})


def hotflip_rows(
    arm: str,
    variant: str,
    num_documents: int,
    tokenizer: Words,
    text: Sequence[str] = TEXT,
    shift: float = 0.0,
) -> list[dict[str, Any]]:
    """Return rows as isotone.attacks writes them; the last document has no figures."""
    rows = []
    for index in range(num_documents):
        generator = np.random.default_rng([index, len(variant)])
        attack = ("random_edits", "uniform") if variant == "random" else ("hotflip", variant)
        base = {"index": index, "id": f"web/Genesis/{index + 1}", "attack": attack[0], "variant": attack[1]}
        if index == num_documents - 1:
            rows.append({**base, "status": "missing", "reason": NOT_FINITE, "spent_tokens": 9})
            continue
        ids = tokenizer.encode([text[(index + i) % len(text)] for i in range(PREFIX + GAP + SCORED)])
        positions = sorted(generator.choice(np.arange(1, PREFIX), 3, replace=False).tolist())
        edits = [[p, ids[p], (ids[p] + 1 + int(generator.integers(20))) % len(tokenizer.words)] for p in positions]
        clean = generator.gamma(2, _NLL[arm] / 2, SCORED)
        rise = generator.normal(_HARM[arm] * (1 if variant == "iterative" else 0.6) + shift, 0.9, SCORED)
        context = generator.gamma(2, 1.5, PREFIX + GAP - 1)
        degradation = float(rise.sum() / clean.sum())
        rows.append(
            {
                **base,
                "status": "ok",
                "clean_ids": ids,
                "edits": edits,
                "context_clean_nll": context.tolist(),
                "context_attacked_nll": (context + 0.2).tolist(),
                "clean_nll": clean.tolist(),
                "attacked_nll": (clean + rise).tolist(),
                "scored_tokens": SCORED,
                "delta_nats": math.fsum(rise.tolist()),
                "delta_by_offset": {
                    "gap": {"nats": 0.8, "tokens": GAP},
                    "0-7": {"nats": float(rise[:8].sum()), "tokens": 8},
                    "8-31": {"nats": float(rise[8:].sum()), "tokens": 8},
                },
                "top1": {"clean": 6, "attacked": 5},
                "spent_tokens": 16_000,
                "progress": [
                    [4_000 * n, math.fsum(clean.tolist()) + math.fsum(rise.tolist()) * n / 4] for n in range(5)
                ],
                "round_trip": True,
                "text_space": None,
                "published_accounting": {
                    "clean": float(clean.mean()),
                    "attacked": float((clean + rise).mean()),
                    "degradation": degradation,
                    "flipped": 0.1,
                    "untouched": 0.2,
                    "tokens": 35,
                },
            }
        )
    if variant == "published":  # edits anywhere, so nothing is scored in the primary protocol
        rows = [{k: v for k, v in row.items() if k not in _PRIMARY_ONLY} for row in rows]
    if variant == "random":
        rows = [{k: v for k, v in row.items() if k != "progress"} | {"draw_deltas": [0.05]} for row in rows]
    return rows


def _with_further(run: Path, found: ArmFindings, arm: str, num_documents: int, shift: float) -> ArmFindings:
    """Return an arm's findings with further attacks and what other arms' edits did to it, and write their rows."""
    once = hotflip_rows(arm, "iterative", num_documents, Words(), shift=shift)
    texts = ("edits", "round_trip", "text_space", "published_accounting", "context_clean_nll", "context_attacked_nll")
    pgd = [{k: v for k, v in row.items() if k not in texts} | {"upper_bound": True} for row in once]
    rows: dict[str, Any] = {
        "gcg": [row | {"attack": "gcg", "variant": "top_k"} for row in once],
        "pgd": [row | {"attack": "pgd", "variant": "l2"} for row in pgd],
    }
    rows["ensemble"] = worst_case([*found.hotflip_rows.values(), *rows.values()])
    replayed = [
        row | {"source": source}
        for source in ARMS
        if source != arm
        for row in (*rows["gcg"], *found.hotflip_rows["iterative"], *found.trigger_rows)
    ]
    for name, of_attack in {**rows, "transfer": replayed}.items():
        records.JsonLines(run / "results" / "documents" / f"{name}.{arm}.jsonl").append(*of_attack)
    entries = {name: attack_summary.summarize(of_attack, threshold=THRESHOLD) for name, of_attack in rows.items()}
    return replace(found, attacks=entries, attack_rows=rows, transfer_rows=replayed)


def trigger_rows(arm: str, num_documents: int) -> list[dict[str, Any]]:
    """Return rows of the universal trigger."""
    rows = hotflip_rows(arm, "once", num_documents, Words())
    extra = {"shift_deltas": [0.05] * 8, "random_deltas": [0.08] * 8, "initial_delta": 0.1}
    return [
        {k: v for k, v in row.items() if k != "progress"} | {"attack": "triggers", "variant": "universal"} | extra
        for row in rows
    ]


def _findings(
    arm: str, rows: Mapping[str, Any], triggers: Sequence[Any], evaluation_rows: Sequence[Any], threshold: float
) -> ArmFindings:
    entries = {v: attack_summary.summarize(of_variant, threshold=threshold) for v, of_variant in rows.items()}
    trigger = attack_summary.summarize_triggers(triggers, _SEARCH, cast(Any, Words()), threshold=threshold)
    constrained = "constraint" in ARMS[arm]
    return ArmFindings(
        evaluation={"last": summarize(evaluation_rows)},
        primary_checkpoint="last",
        evaluation_rows=evaluation_rows,
        hotflip=entries,
        hotflip_rows=rows,
        triggers=trigger,
        trigger_rows=triggers,
        certificate={
            "verdict": "vacuous" if constrained else "violated",
            "scope": "mlp_both",
            "map": "u ↦ W2 σ(W1 u + b1) + b2",
            "domain": "outputs of the norm, an antichain",
            "weights": "nonneg" if constrained else "mixed",
            "activation": {"name": "gelu", "non_decreasing_on": "[−0.7518, ∞)"},
            "order": "vacuous",
            "weights_hash": "5f" * 32,
            "reasons": ["LayerNorm's outputs have a fixed sum, so no two of them are ordered"],
            "premise": {"variant": "iterative", "pairs": 12_000, "ordered": 3, "rate": 0.00025},
        },
        training={"step": 60, "total_steps": 60} if ARMS[arm].get("train", True) else None,
    )


def _evaluation_rows(arm: str, shift: float) -> list[dict[str, Any]]:
    generator = np.random.default_rng(5)
    return [
        {
            "id": f"test/{index}",
            "nats": float(num_tokens * (_NLL[arm] + shift + generator.normal(0, 0.2))),
            "num_tokens": num_tokens,
            "num_bytes": 4 * num_tokens,
        }
        for index, num_tokens in enumerate(generator.integers(200, 900, 40).tolist())
    ]


def _metrics(arm: str) -> list[dict[str, Any]]:
    generator = np.random.default_rng(7)
    high = 3 if arm == "monotonic" else 0.1
    lines: list[dict[str, Any]] = []
    for step in range(1, 61):
        loss = _NLL[arm] + high * math.exp(-step / 12)
        noisy = loss + generator.normal(0, 0.05)
        where = {"step": step, "epoch": step / 200}
        lines.append(where | {"loss": noisy, "lr": 5e-4, "grad_norm": 1.0, "tokens": 4096 * step})
        if step % 20 == 0:
            lines.append(where | {"validation_nll": loss})
    return lines


def _write_record(run: Path, node: str) -> None:
    records.write_json(
        run / "records" / f"{node}.json",
        {
            "schema": 1,
            "node": node,
            "status": "complete",
            "config": {},
            "config_hash": "ab" * 32,
            "inputs": {},
            "outputs": {f"results/by_arm/{node}.json": {"size": 10, "sha256": "cd" * 32}},
            "provenance": {
                "packages": {"python": "3.11.7", "isotone": "0.1.0", "torch": "2.13.0"},
                "platform": "Linux-6.1-x86_64",
                "host": "secret-host",
                "device": "no GPU: running on the CPU (x86_64, 2 cores, 2 threads)",
                "threads": 2,
                "started": 1700000000.0,
            },
        },
    )
