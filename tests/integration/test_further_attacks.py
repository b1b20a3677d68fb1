"""Attacks that are asked for later are added to a complete run: nothing else of it is made again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from isotone import records
from isotone.result_models import json_schema

from .conftest import SHORT, run
from .test_pipeline import differences

pytestmark = pytest.mark.integration
RUN = Path("pocket-quick/seed-42")
FURTHER = [
    "--set", "attacks.gcg.candidates=4", "--set", "attacks.gcg.steps=2",
    "--set", "attacks.coordinate.candidates=4", "--set", "attacks.coordinate.rounds=2",
    "--set", "attacks.pgd.steps=2",
    "--set", "attacks.frequency.draws=1",
    "--set", "attacks.probe={edits: 20, candidates: 8, oracle_tokens: 64}",
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
    kinds = ("gcg", "coordinate", "pgd", "frequency", "probe", "transfer")
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


def test_a_probe_measures_the_signs_of_masking_that_no_attack_can(further: Path) -> None:
    masking = records.read_json(further / "results/final_results.json")["masking"]["monotonic"]
    indices = {index["name"]: index for index in masking["indices"]}
    assert all(index["measured"] for index in indices.values()), masking["sentence"]
    assert indices["first order"]["n"] == indices["oracle"]["n"] == 4
    assert indices["oracle"]["meaning"].endswith("to 64 random tokens at a position")
    arms = [
        records.JsonLines(further / f"results/documents/probe.{arm}.jsonl").read() for arm in ("baseline", "monotonic")
    ]
    assert [row["position"] for row in arms[0]] == [row["position"] for row in arms[1]]
    assert "to 64 random tokens at a position" in (further / "report.html").read_text()


LOGS = {
    "transfer": ("work/transfer.baseline", "*.jsonl", 4 * 5),  # four documents; five attacks are replayed
    "probe": ("results/documents", "probe.baseline.jsonl", 4),
}
"""Where the log of each stage's first node grows, and to how many lines."""


@pytest.mark.parametrize("stage", LOGS)
def test_a_kill_in_the_middle_of_a_stage_changes_no_byte(further: Path, tmp_path: Path, stage: str) -> None:
    out = Path(shutil.copytree(further.parents[1], tmp_path / "runs"))
    for _ in range(5):  # a kill may come too late on a busy machine
        half = lines_at_a_kill(out, stage)
        if 0 < half < LOGS[stage][2]:
            break
    assert 0 < half < LOGS[stage][2]
    assert not (out / RUN / f"records/{stage}.baseline.json").exists()
    done = run(out, *FURTHER, "--only", stage)
    assert done.returncode == 0, done.stderr
    assert (out / RUN / f"records/{stage}.monotonic.json").exists()
    assert differences(further.parents[1], out) == []


def lines_at_a_kill(out: Path, stage: str) -> int:
    """Make a stage anew, kill the process within the log of its first node, and return that log's lines."""
    command = ["run", "pocket-quick", "--out", str(out), *SHORT, *FURTHER, "--only", stage, "--fresh"]
    process = subprocess.Popen([sys.executable, "-m", "isotone", *command], stderr=subprocess.DEVNULL)
    record = out / RUN / f"records/{stage}.baseline.json"
    while process.poll() is None:
        if not record.exists() and 0 < _num_lines(out, stage) < LOGS[stage][2]:  # the old ones are set aside first
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    return _num_lines(out, stage)


def _num_lines(out: Path, stage: str) -> int:
    folder, pattern, _ = LOGS[stage]
    return sum(len(records.JsonLines(path).read()) for path in (out / RUN / folder).glob(pattern))
