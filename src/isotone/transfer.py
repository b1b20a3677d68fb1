"""The transfer matrix: what edits and triggers found on one arm do to every arm, pooled over documents."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from isotone.comparisons import PREFIX, PREPENDED, Row, change_quantity
from isotone.results import ArmFindings


def transfer_matrix(findings: Mapping[str, ArmFindings], replayed: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Return a cell for each source, target and attack; on the diagonal is what the attack did to its own arm.

    Args:
        findings: by arm; what each arm's own attacks did.
        replayed: by target arm, rows of other arms' attacks (``source`` says whose).
    """
    cells: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for target, rows in replayed.items():
        for row in rows:
            cell = cells.setdefault((row["source"], target), {})
            cell.setdefault((row["attack"], row["variant"]), []).append(row)
    attacks = list(dict.fromkeys(key for cell in cells.values() for key in cell))
    for arm, found in findings.items():
        own = {(rows[0]["attack"], rows[0]["variant"]): list(rows) for rows in _own_rows(found) if rows}
        cells[arm, arm] = {key: own[key] for key in attacks if key in own}
    return [
        _entry(source, target, cells[source, target][key])
        for key in attacks
        for source in findings
        for target in findings
        if key in cells.get((source, target), {})
    ]


def _own_rows(found: ArmFindings) -> Iterator[Sequence[Row]]:
    yield from found.hotflip_rows.values()
    yield from found.attack_rows.values()
    yield found.trigger_rows


def _entry(source: str, target: str, rows: Sequence[Row]) -> dict[str, Any]:
    protocol = PREPENDED if rows[0]["attack"] == "triggers" else PREFIX
    measured = change_quantity(rows, protocol).measurement(target, seed=0)
    kept = ("attack", "variant", "protocol", "n", "num_missing", "value", "ci95", "unit")
    return {"source": source, "target": target} | {key: measured[key] for key in kept}
