"""The ensemble is the worst attack on each document, and says nothing where an attack has no figures."""

from typing import Any

from isotone.attacks import worst_case
from isotone.attacks.ensemble import is_member


def rows(attack: str, deltas: list[float | None], **more: Any) -> list[dict[str, Any]]:
    return [
        {"index": i, "id": f"d{i}", "attack": attack, "variant": "v", "spent_tokens": 10}
        | ({"status": "missing", "reason": "NaN"} if delta is None else {"status": "ok", "delta_nats": delta})
        | more
        for i, delta in enumerate(deltas)
    ]


def test_the_worst_attack_of_each_document_is_taken_and_named() -> None:
    found = worst_case([rows("a", [1.0, 5.0, 2.0], edits=["a"]), rows("b", [3.0, 4.0, 2.0], edits=["b"])])
    assert [row["delta_nats"] for row in found] == [3, 5, 2]
    assert [row["of"]["attack"] for row in found] == ["b", "a", "a"]
    assert [row["edits"] for row in found] == [["b"], ["a"], ["a"]]
    assert {(row["attack"], row["variant"], row["spent_tokens"]) for row in found} == {("ensemble", "worst_case", 20)}


def test_what_one_attack_could_not_say_the_ensemble_does_not() -> None:
    found = worst_case([rows("a", [1.0, None]), rows("b", [3.0, 4.0])])
    assert [row["status"] for row in found] == ["ok", "missing"]
    assert found[1]["reason"] == "a (v): NaN"
    assert "delta_nats" not in found[1]
    assert worst_case([rows("a", [1.0]), rows("b", [3.0, 4.0])])[0]["delta_nats"] == 3


def test_upper_bounds_and_edits_of_scored_tokens_are_no_members() -> None:
    bound, published = rows("pgd", [9.0, 9.0], upper_bound=True), rows("hotflip", [None, None], variant="published")
    assert not is_member(bound)
    assert not is_member(published)
    assert [row["delta_nats"] for row in worst_case([bound, published, rows("a", [1.0, 2.0])])] == [1, 2]
    assert worst_case([bound]) == []


def test_details_of_one_attack_alone_are_left_out() -> None:
    found = worst_case([rows("a", [1.0], progress=[[10, 3.0]], draw_deltas=[0.1])])
    assert not {"progress", "draw_deltas"} & found[0].keys()
