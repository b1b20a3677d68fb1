"""The worst case: for each document of an arm, the attack on its text that raised the loss most."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

ENSEMBLE, WORST_CASE = "ensemble", "worst_case"
"""Attack and variant of the ensemble's rows."""


def is_member(rows: Sequence[Row]) -> bool:
    """Say whether an attack's rows count: it edits tokens, none of them scored, and is no upper bound."""
    return not any(row.get("upper_bound") or row["variant"] == "published" for row in rows)


def worst_case(attacks: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Return a row for each document: that of the attack with the largest change, and which one it was (``of``).

    A document without figures under one attack has none here, as what that attack would have found is not known.

    Args:
        attacks: every attack's rows on the same documents of one arm; those that are no members are left out.
    """
    members = [rows for rows in attacks if rows and is_member(rows)]
    if not members:
        return []
    by_attack = [{row["id"]: row for row in rows} for rows in members]
    found = []
    for index, document in enumerate(by_attack[0]):
        rows = [of_attack[document] for of_attack in by_attack if document in of_attack]
        lacking = [row for row in rows if row["status"] != "ok"]
        head = {"index": index, "id": document, "attack": ENSEMBLE, "variant": WORST_CASE}
        spent = {"spent_tokens": sum(row["spent_tokens"] for row in rows)}
        if lacking or len(rows) < len(by_attack):
            reason = _name(lacking[0]) + f": {lacking[0]['reason']}" if lacking else "an attack has no row of it"
            found.append(head | {"status": "missing", "reason": reason} | spent)
            continue
        worst = max(rows, key=lambda row: row["delta_nats"])  # the first of equals
        figures = {key: value for key, value in worst.items() if key not in (*_OF_ONE_ATTACK, *head)}
        found.append(head | figures | spent | {"of": {"attack": worst["attack"], "variant": worst["variant"]}})
    return found


_OF_ONE_ATTACK = ("progress", "draw_deltas", "spent_tokens")


def _name(row: Row) -> str:
    return f"{row['attack']} ({row['variant']})"
