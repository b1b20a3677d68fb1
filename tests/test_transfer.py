"""The matrix pools each source's edits on each target, with what attacks did to their own arms on its diagonal."""

from typing import Any

from isotone.results import ArmFindings
from isotone.transfer import transfer_matrix


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
