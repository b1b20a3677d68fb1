"""The transfer matrix on the page: for each attack a table that is coloured by harm, of one run or of several seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from isotone.report.content import attack_name
from isotone.report.run_files import RunFiles
from isotone.report.tables import MISSING, Table, with_interval

Json = Mapping[str, Any]


def transfer_tables(run: RunFiles) -> list[Table]:
    """Return a table an attack, the one that conclusions rest on first; none where nothing was replayed."""
    cells = list(run.final.get("transfer") or ())
    attacks = list(dict.fromkeys((cell["attack"], cell["variant"]) for cell in cells))
    primary = {"attack": "hotflip", "variant": _primary_variant(run)}
    attacks.sort(key=lambda pair: pair != tuple(primary.values()))
    return [_table(run, pair, [c for c in cells if (c["attack"], c["variant"]) == pair]) for pair in attacks]


def _primary_variant(run: RunFiles) -> str | None:
    return next((found["variant"] for arm in run.arms if (found := run.arm(arm).get("hotflip"))), None)


def _table(run: RunFiles, pair: tuple[str, str], cells: Sequence[Json]) -> Table:
    found = {(cell["source"], cell["target"]): cell for cell in cells}
    arms = [arm for arm in run.arms if any(arm in where for where in found)]
    largest = max((abs(cell["value"]) for cell in cells if cell["value"] is not None), default=0.0)
    rows, shades, framed = [], dict[tuple[int, int], float](), set[tuple[int, int]]()
    for number, source in enumerate(arms):
        row = [source]
        for column, target in enumerate(arms, 1):
            cell = found.get((source, target), {})
            value = cell.get("value")
            row.append(MISSING if value is None else with_interval(value, cell["ci95"]).replace(", ", ",\u00a0"))
            if value is not None and largest:
                shades[number, column] = value / largest
            if source == target:
                framed.add((number, column))
        rows.append(row)
    documents = max((cell["n"] for cell in cells), default=0)
    over = f", {cells[0]['num_seeds']} seeds" if cells and "num_seeds" in cells[0] else ""
    caption = f"{attack_name(*pair)}: Δ of what was found on the row's arm ({documents} documents{over})"
    return Table(caption, ["Found on", *arms], rows, shades=shades, framed=frozenset(framed))
