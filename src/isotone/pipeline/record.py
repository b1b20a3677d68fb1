"""The record of a node: what went in, what came out, with hashes.

A node is complete when its record stands and matches configuration and inputs.
"""

from collections.abc import Iterable, Iterator
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
            "outputs": {run.relative(p): fingerprint(p) for p in sorted(outputs)},
            "provenance": provenance,
        },
    )


def fingerprint(path: Path) -> dict[str, Any]:
    """Return what a record says about an output: size and hash."""
    return {"size": path.stat().st_size, "sha256": records.sha256_file(path)}


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
        if problem := output_problem(run.resolve(name), expected):
            return Standing("stale", problem)
    return Standing("complete")


def output_problem(path: Path, expected: dict[str, Any]) -> str | None:
    """Say in what an output is no longer what its record says; None if it is."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{path} has {path.stat().st_size} bytes, its record says {expected['size']}"
    if expected["size"] <= _HASHED_UP_TO and records.sha256_file(path) != expected["sha256"]:
        return f"{path} does not have the hash in its record"
    return None


def different_values(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys in which two slices differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for k in sorted(a.keys() | b.keys()):
            yield from different_values(a.get(k, "its default"), b.get(k, "its default"), f"{key}.{k}".lstrip("."))
    elif a != b:
        yield key, a, b


def _differences(was: Any, now: Any) -> list[str]:
    return [f"{key} was {a}, is now {b}" for key, a, b in different_values(was, now)]
