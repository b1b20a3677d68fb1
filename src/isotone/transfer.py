"""The transfer matrix: what edits and triggers found on one arm do to every arm, pooled over documents and seeds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from isotone.comparisons import PREFIX, PREPENDED, Quantity, Row, change_quantity, measure
from isotone.results import ArmFindings


class Cell(NamedTuple):
    """Where edits were found, which arm they were replayed on, and by what they were found."""

    source: str
    target: str
    attack: str
    variant: str


def transfer_matrix(findings: Mapping[str, ArmFindings], replayed: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Return a cell for each source, target and attack; on the diagonal is what the attack did to its own arm.

    Args:
        findings: by arm; what each arm's own attacks did.
        replayed: by target arm, rows of other arms' attacks (``source`` says whose).
    """
    kept = ("attack", "variant", "protocol", "n", "num_missing", "value", "ci95", "unit")
    return [
        _entry(cell, quantity.measurement(cell.target, seed=0), kept)
        for cell, quantity in transfer_quantities(findings, replayed).items()
    ]


def pooled_matrix(of_seeds: Sequence[Mapping[Cell, Quantity]]) -> list[dict[str, Any]]:
    """Return the matrix over seeds, of the cells that all of them have; documents are crossed with seeds."""
    kept = ("attack", "variant", "protocol", "n", "num_missing", "num_seeds", "value", "ci95", "unit")
    return [
        _entry(cell, measure(cell.target, [of_seed[cell] for of_seed in of_seeds]), kept)
        for cell in (of_seeds[0] if of_seeds else ())
        if all(cell in of_seed for of_seed in of_seeds)
    ]


def transfer_quantities(
    findings: Mapping[str, ArmFindings], replayed: Mapping[str, Sequence[Row]]
) -> dict[Cell, Quantity]:
    """Return the change of loss in each cell of the matrix of one seed; arguments as for ``transfer_matrix``."""
    cells: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for target, rows in replayed.items():
        for row in rows:
            cell = cells.setdefault((row["source"], target), {})
            cell.setdefault((row["attack"], row["variant"]), []).append(row)
    attacks = list(dict.fromkeys(key for cell in cells.values() for key in cell))
    for arm, found in findings.items():
        own = {(rows[0]["attack"], rows[0]["variant"]): list(rows) for rows in _own_rows(found) if rows}
        cells[arm, arm] = {key: own[key] for key in attacks if key in own}
    return {
        Cell(source, target, *key): change_quantity(rows, PREPENDED if key[0] == "triggers" else PREFIX)
        for key in attacks
        for source in findings
        for target in findings
        for rows in [cells.get((source, target), {}).get(key)]
        if rows
    }


def _own_rows(found: ArmFindings) -> Iterator[Sequence[Row]]:
    yield from found.hotflip_rows.values()
    yield from found.attack_rows.values()
    yield found.trigger_rows


def _entry(cell: Cell, measured: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    return {"source": cell.source, "target": cell.target} | {key: measured[key] for key in kept}
