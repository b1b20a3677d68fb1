"""Several seeds by one command, through the command line, on a real model."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from isotone import records
from isotone.result_models import SUMMARY, json_schema

from .conftest import isotone, run

pytestmark = pytest.mark.integration


def _files(folder: Path, name: str) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(name)) if p.is_file()}


def test_seeds_run_in_turn_and_are_summarized_or_the_missing_one_is_named(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "runs"))
    experiment = out / "pocket-quick"
    partial = run(out, "--seeds", 42, 1337, "--max-epochs-per-run", "0.005")
    assert partial.returncode == 75  # seed 42 stands, and 1337 takes more than that
    assert not (experiment / "summary").exists()
    done = run(out, "--seeds", 42, 1337)
    assert done.returncode == 0, done.stderr
    assert f"COMPLETE: {experiment / 'summary'}" in done.stdout
    assert _files(experiment / "seed-42/results", "*") == _files(finished / "pocket-quick/seed-42/results", "*")

    summary = records.read_json(experiment / "summary/final_results.json")
    jsonschema.validate(summary, json_schema(SUMMARY))
    assert summary["seeds"] == [42, 1337]
    assert {c["num_seeds"] for c in summary["comparisons"]} == {2}
    rows = json.loads(isotone("status", experiment, "--json").stdout)
    assert {row["state"] for row in rows} == {"complete"}
    assert {row["seed"] for row in rows} == {42, 1337, None}

    moved = Path(shutil.copytree(experiment, tmp_path / "elsewhere" / "pocket-quick"))
    shutil.rmtree(moved / "summary")
    assert isotone("summarize", moved, "--seeds", "1337,42").returncode == 0
    before, again = _files(experiment / "summary", "*"), _files(moved / "summary", "*")
    assert {k: v for k, v in before.items() if k != "record.json"} == {
        k: v for k, v in again.items() if k != "record.json"
    }

    (experiment / "seed-1337/records/aggregate.json").unlink()
    blocked = isotone("summarize", experiment)
    assert blocked.returncode == 4
    assert "seed 1337 is missing: aggregate is absent" in blocked.stderr
    assert "seed 42" not in blocked.stderr
    assert _files(experiment / "summary", "*") == before
    assert "the summary is stale: seed 1337" in isotone("why", experiment).stdout
