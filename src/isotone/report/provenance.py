"""The tables that say what a run was made from and with: configuration, software, and each node's hashes."""

from collections.abc import Mapping
from typing import Any

from isotone.records import hash_json
from isotone.report.content import plain
from isotone.report.run_files import RunFiles
from isotone.report.tables import MISSING, Table


def provenance_tables(run: RunFiles) -> list[Table]:
    """What the run was made from and with: inputs, software, and each node's configuration and outputs by hash."""
    nodes = dict(run.provenance())
    machines: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, record in nodes.items():
        machines.setdefault(_software(record.get("provenance") or {}), []).append(name)
    software = [[key, value, ", ".join(names)] for machine, names in machines.items() for key, value in machine]
    if len(machines) == 1:
        software = [[key, value, "all nodes"] for key, value, _ in software]
    inputs = [
        [key, plain(run.config.get(key))] for key in ("model", "data", "training", "attacks") if run.config.get(key)
    ]
    hashes = [
        [name, str(record.get("status", MISSING)), str(record.get("config_hash", MISSING))[:12], _outputs_hash(record)]
        for name, record in nodes.items()
    ]
    return [
        table
        for table in (
            Table("What went in", ["Part", "Values"], inputs, frozenset({0, 1})),
            Table("Software and device", ["What", "Version", "Nodes"], software, frozenset({0, 1, 2})),
            Table("Records", ["Node", "Status", "Configuration", "Outputs"], hashes, frozenset({0, 1, 2, 3})),
        )
        if table.rows
    ]


def _given(value: Any) -> Any:
    """Return a part of the configuration without what was left out."""
    return {k: _given(v) for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def _software(provenance: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return versions and device of a record, without its times and its host."""
    packages = tuple((str(k), str(v)) for k, v in (provenance.get("packages") or {}).items())
    return packages + tuple(
        (key, str(provenance[key])) for key in ("platform", "device", "threads") if key in provenance
    )


def _outputs_hash(record: Mapping[str, Any]) -> str:
    return hash_json(record["outputs"])[:12] if record.get("outputs") else MISSING
