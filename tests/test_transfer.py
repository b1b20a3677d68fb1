"""The matrix pools each source's edits on each target, with what attacks did to their own arms on its diagonal."""

from typing import Any

from isotone.results import ArmFindings
from isotone.transfer import Cell, pooled_matrix, transfer_matrix, transfer_quantities


def rows(attack: str, variant: str, deltas: list[float | None], **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"d{i}", "attack": attack, "variant": variant, "spent_tokens": 5, "scored_tokens": 2}
        | ({"status": "missing", "reason": "NaN"} if delta is None else {"status": "ok", "delta_nats": delta})
        | more
        for i, delta in enumerate(deltas)
    ]


def findings(deltas: list[float | None]) -> ArmFindings:
    return ArmFindings(
        evaluation={},
        primary_checkpoint="last",
        evaluation_rows=(),
        hotflip_rows={"iterative": rows("hotflip", "iterative", deltas), "random": rows("random_edits", "x", deltas)},
    )


def test_cells_are_ratios_of_sums_and_missing_documents_are_counted() -> None:
    replayed = {"a": rows("hotflip", "iterative", [1.0, None], source="b"), "b": []}
    cells = transfer_matrix({"a": findings([3.0, 5.0]), "b": findings([7.0, 9.0])}, replayed)
    assert [(c["source"], c["target"], c["value"], c["n"], c["num_missing"]) for c in cells] == [
        ("a", "a", 2.0, 2, 0),
        ("b", "a", 0.5, 1, 1),
        ("b", "b", 4.0, 2, 0),
    ]
    assert {(c["attack"], c["variant"], c["protocol"]) for c in cells} == {("hotflip", "iterative", "prefix")}


def test_a_cell_over_seeds_is_over_what_all_seeds_have() -> None:
    seeds = []
    for harm in (1.0, 3.0):
        replayed = {"a": rows("hotflip", "iterative", [harm, None if harm > 2 else 9.0], source="b"), "b": []}
        seeds.append(transfer_quantities({"a": findings([3.0, 5.0]), "b": findings([7.0, 9.0])}, replayed))
    del seeds[1][Cell("b", "b", "hotflip", "iterative")]
    pooled = {(c["source"], c["target"]): c for c in pooled_matrix(seeds)}
    assert pooled.keys() == {("a", "a"), ("b", "a")}
    cell = pooled["b", "a"]
    assert (cell["value"], cell["n"], cell["num_missing"], cell["num_seeds"]) == (1.0, 1, 1, 2)
