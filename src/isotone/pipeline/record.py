"""The record of a node: what went in, what came out, with hashes.

A node is complete when its record stands and matches configuration and inputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isotone import records
from isotone.config import Experiment
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.slices import config_slice

SCHEMA = 1
_HASHED_UP_TO = 32 * 2**20
"""Outputs up to this many bytes are hashed whenever a record is read; checkpoints are, when they are loaded."""

State = Literal["complete", "stale", "absent"]


@dataclass(frozen=True)
class Standing:
    """How a node stands, and why it is not complete."""

    state: State
    reason: str = ""
    by_config: bool = False
    """The configuration differs from the one in the record (and not only what came in)."""


def write_record(
    run: RunDirectory,
    graph: Graph,
    experiment: Experiment,
    seed: int,
    node: Node,
    outputs: Iterable[Path],
    provenance: dict[str, Any],
) -> None:
    """Say that a node is complete. The last thing that a node does."""
    part = config_slice(experiment, seed, node)
    records.write_json(
        run.record(node),
        {
            "schema": SCHEMA,
            "node": str(node),
            "status": "complete",
            "config": part,
            "config_hash": records.hash_json(part),
            "inputs": {str(n): outputs_hash(run, n) for n in graph.needs[node]},
            "outputs": {
                run.relative(p): {"size": p.stat().st_size, "sha256": records.sha256_file(p)} for p in sorted(outputs)
            },
            "provenance": provenance,
        },
    )


def outputs_hash(run: RunDirectory, node: Node) -> str:
    """Return the hash of what a complete node put out: the same for a rerun with the same results."""
    return records.hash_json(records.read_json(run.record(node))["outputs"])


def standing(run: RunDirectory, graph: Graph, experiment: Experiment, seed: int, node: Node) -> Standing:
    """Say whether a node is complete: record there, same configuration, same inputs, outputs in place.

    Raises:
        CorruptError: the record is not JSON.
    """
    path = run.record(node)
    if not path.is_file():
        return Standing("absent", f"{path} is not there")
    record = records.read_json(path)
    if record.get("schema") != SCHEMA:
        return Standing("stale", f"{path} has schema {record.get('schema')!r}, this isotone writes {SCHEMA}")
    part = config_slice(experiment, seed, node)
    if record["config_hash"] != records.hash_json(part):
        return Standing("stale", "; ".join(_differences(record["config"], part)), by_config=True)
    for needed in graph.needs[node]:
        if not run.record(needed).is_file():
            return Standing("stale", f"{needed}, which it was made from, is not complete")
        if record["inputs"].get(str(needed)) != outputs_hash(run, needed):
            return Standing("stale", f"{needed}, which it was made from, has changed")
    for name, expected in record["outputs"].items():
        if problem := _output_problem(run.resolve(name), expected):
            return Standing("stale", problem)
    return Standing("complete")


def _output_problem(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{path} has {path.stat().st_size} bytes, its record says {expected['size']}"
    if expected["size"] <= _HASHED_UP_TO and records.sha256_file(path) != expected["sha256"]:
        return f"{path} does not have the hash in its record"
    return None


def _differences(was: Any, now: Any, key: str = "") -> list[str]:
    """Name the keys in which two slices differ, with both values."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            line
            for k in sorted(was.keys() | now.keys())
            for line in _differences(was.get(k, "its default"), now.get(k, "its default"), f"{key}.{k}".lstrip("."))
        ]
    return [] if was == now else [f"{key} was {was}, is now {now}"]
