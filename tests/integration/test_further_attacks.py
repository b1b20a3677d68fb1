"""Attacks that are asked for later are added to a complete run: nothing else of it is made again."""

import shutil
from pathlib import Path

import jsonschema
import pytest

from isotone import records
from isotone.result_models import json_schema

from .conftest import run

pytestmark = pytest.mark.integration
RUN = Path("pocket-quick/seed-42")
FURTHER = [
    "--set", "attacks.gcg.candidates=4", "--set", "attacks.gcg.steps=2",
    "--set", "attacks.coordinate.candidates=4", "--set", "attacks.coordinate.rounds=2",
    "--set", "attacks.pgd.steps=2",
    "--set", "attacks.frequency.draws=1",
    "--set", "attacks.transfer=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def further(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = Path(shutil.copytree(finished, tmp_path_factory.mktemp("further") / "runs"))
    done = run(out, *FURTHER)
    assert done.returncode == 0, done.stderr
    return out / RUN


def test_only_what_was_asked_for_is_made(finished: Path, further: Path) -> None:
    before = {p.name: p.read_bytes() for p in (finished / RUN / "records").glob("*.json") if p.stem != "aggregate"}
    assert {name: (further / "records" / name).read_bytes() for name in before} == before
    added = {p.stem for p in (further / "records").glob("*.json")} - {Path(name).stem for name in before}
    kinds = ("gcg", "coordinate", "pgd", "frequency", "transfer")
    assert added == {"aggregate"} | {f"{kind}.{arm}" for kind in kinds for arm in ("baseline", "monotonic")}


def test_results_hold_every_attack_the_worst_case_and_the_matrix(further: Path) -> None:
    final = records.read_json(further / "results/final_results.json")
    jsonschema.validate(final, json_schema("final_results"))
    assert set(final["equivalence_margins"]) == {"hotflip", "triggers", "gcg", "coordinate", "ensemble"}
    for arm in final["arms"].values():
        entries = arm["attacks"]
        assert set(entries) == {"gcg", "coordinate", "pgd", "frequency", "ensemble"}
        assert entries["pgd"]["upper_bound"] is True
        on_text = [*arm["hotflip"]["variants"].values(), entries["gcg"], entries["coordinate"], entries["frequency"]]
        deltas = [entry["delta_nll"] for entry in on_text if entry["delta_nll"] is not None]
        assert entries["ensemble"]["delta_nll"] >= max(deltas)
    cells = {(c["source"], c["target"], c["attack"], c["variant"]): c for c in final["transfer"]}
    attacks = [("hotflip", "once"), ("hotflip", "iterative"), ("gcg", "top_k"), ("coordinate", "random")]
    attacks.append(("triggers", "universal"))
    arms = ("baseline", "monotonic")
    assert set(cells) == {(source, target, *attack) for source in arms for target in arms for attack in attacks}
    own = final["arms"]["monotonic"]["attacks"]["gcg"]["delta_nll"]
    assert cells["monotonic", "monotonic", "gcg", "top_k"]["value"] == pytest.approx(own)


def test_the_worst_case_names_the_attack_of_each_document(further: Path) -> None:
    rows = records.JsonLines(further / "results/documents/ensemble.baseline.jsonl").read()
    gcg = records.JsonLines(further / "results/documents/gcg.baseline.jsonl").read()
    assert [row["id"] for row in rows] == [row["id"] for row in gcg]
    assert all(row["of"]["attack"] in ("hotflip", "random_edits", "gcg", "coordinate") for row in rows)
    assert all(row["delta_nats"] >= other["delta_nats"] for row, other in zip(rows, gcg, strict=True))
