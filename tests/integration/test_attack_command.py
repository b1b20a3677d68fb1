"""`isotone attack` through the command line: what it writes, how it stops and is killed, how it refuses."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import jsonschema
import pytest

from isotone import records
from isotone.data.bible import web_bible
from isotone.result_models import json_schema

from .conftest import isotone

pytestmark = pytest.mark.integration
SMALL = [
    "--attacks", "hotflip,triggers,gcg,coordinate,random", "--flips", "2", "--num-documents", "4",
    "--prefix", "24", "--gap", "0", "--continuation", "24",
    "--set", "attacks.hotflip.candidates=4", "--set", "attacks.random_draws=2", "--set", "attacks.batch_documents=2",
    "--set", "attacks.gcg.candidates=4", "--set", "attacks.gcg.steps=2",
    "--set", "attacks.coordinate.candidates=4", "--set", "attacks.coordinate.rounds=2",
    "--set", "attacks.triggers.candidates=4", "--set", "attacks.triggers.iterations=2",
    "--set", "attacks.triggers.restarts=2", "--set", "runtime.threads=1",
    "--set", "analysis.min_documents=4", "--set", "analysis.min_spent_tokens=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": document.text[:1200]} for document in islice(web_bible(), 6)]
    records.write_bytes(path, records.dump_json_lines([*lines, {"text": ""}]))
    return path


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one uninterrupted comparison."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = isotone("attack", "pocket", "again=pocket", "--documents", texts, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert (out / "attack_summary.txt").read_text() == done.stdout
    return out


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_bundled_model_is_attacked_and_compared_with_itself(whole: Path) -> None:
    found = records.read_json(whole / "attack_results.json")
    jsonschema.validate(found, json_schema("attack_results"))
    assert set(found["arms"]) == {"baseline", "again"}
    assert found["documents"]["left_out"] == [{"id": "texts.jsonl:7", "reason": "it is empty"}] + [
        entry for entry in found["documents"]["left_out"] if entry["reason"] == "attacks.num_documents is 4"
    ]
    assert [v["verdict"] for v in found["verdicts"]] == ["equivalent"]
    assert {c["difference"] for c in found["comparisons"]} == {0.0}
    summary = (whole / "attack_summary.txt").read_text()
    assert "Transfer" in summary
    assert "equivalent in robustness" in summary


def test_kills_and_stops_change_no_byte(whole: Path, texts: Path, tmp_path: Path) -> None:
    """SIGTERM ends with 75 and says how to go on; SIGKILL leaves what was finished."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "isotone", "attack", "pocket", "again=pocket", "--documents", str(texts)]
    for number, log in ((signal.SIGTERM, "hotflip.baseline.once.jsonl"), (signal.SIGKILL, "hotflip.again.once.jsonl")):
        process = subprocess.Popen(
            [*command, "--out", str(out), *SMALL], env=dict(os.environ), text=True, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 300
        while not (out / "results/documents" / log).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == (75 if number == signal.SIGTERM else -9), said
        assert not (out / "attack_results.json").exists()
        if number == signal.SIGTERM:
            assert "stopped safely (SIGTERM)" in said
            assert "Run the same command again" in said
    done = isotone(*command[3:], "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    left, made = _files(out), _files(whole)
    left.pop("leases/attack.json", None)
    assert left == made


def test_another_request_in_the_folder_is_refused_in_one_line(whole: Path, texts: Path) -> None:
    done = isotone("attack", "pocket", "--documents", texts, "--out", whole, *SMALL, "--seed", "7")
    assert done.returncode == 2
    assert "seed was 42, is now 7; undo the change, or give another --out" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
