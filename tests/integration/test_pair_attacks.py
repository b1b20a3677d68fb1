"""The promises of `isotone run` for attacks on an encoder-decoder: every stage, attack and control, to a verdict."""

import subprocess
from pathlib import Path

import jsonschema
import pytest
from tiny_models import tiny_model
from tiny_pairs import pair_tokenizer, random_pairs, write_pairs

from isotone import records
from isotone.models import save_model
from isotone.result_models import json_schema

from .conftest import isotone

pytestmark = pytest.mark.integration

EXPERIMENT = """
name: pairs
model: {{source: {folder}/model}}
data: {{source: {folder}/pairs.jsonl, source_field: source, target_field: target, source_length: 20, target_length: 8}}
training: {{epochs: 3, micro_batch: 4, accumulation: 1, lr: 0.003, validation_rows: 8, save_every_steps: 20}}
arms:
  pretrained_model: {{train: false}}
  baseline: {{}}
  monotonic:
    constraint: {{scope: mlp_both, parametrization: projection, initialization: absolute}}
    training: {{lr: 0.001}} # learns less than the baseline, so that there is a loss to match
  edit_trained: {{training: {{random_prefix: 0.2}}}}
  cooled: {{start: baseline, train: false, matched_loss: {{to: monotonic, by: temperature}}}}
  noisy: {{start: baseline, train: false, matched_loss: {{to: monotonic, by: noise}}}}
  stopped: {{start: baseline, train: false, matched_loss: {{to: monotonic, by: undertrained}}}}
attacks:
  num_documents: 12
  num_search_documents: 6
  batch_documents: 4
  random_draws: 3
  hotflip: {{flips: 2, methods: [once, iterative, beam, shuffled], candidates: 4, beam_width: 2}}
  triggers: {{length: 3, candidates: 4, iterations: 2, restarts: 2}}
  gcg: {{candidates: 4, steps: 2}}
  coordinate: {{candidates: 4, rounds: 2}}
  pgd: {{steps: 2}}
  frequency: {{}}
  transfer: true
  probe: {{edits: 10, candidates: 3, num_documents: 3}}
analysis: {{min_documents: 2, min_spent_tokens: 1}}
runtime: {{threads: 1}}
"""
ARMS = ("pretrained_model", "baseline", "monotonic", "edit_trained", "cooled", "noisy", "stopped")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    save_model(tiny_model("t5"), pair_tokenizer(), folder / "model")
    write_pairs(folder / "pairs.jsonl", random_pairs(240))
    file = folder / "pairs.yaml"
    file.write_text(EXPERIMENT.format(folder=folder))
    return file


def run(experiment: Path, *options: object) -> "subprocess.CompletedProcess[str]":
    return isotone("run", experiment, "--out", experiment.parent / "runs", *options)


@pytest.fixture(scope="module")
def finished(experiment: Path) -> Path:
    done = run(experiment)
    assert done.returncode == 0, done.stderr
    return experiment.parent / "runs" / "pairs" / "seed-42"


def test_every_arm_has_every_attack_and_there_is_a_verdict(finished: Path) -> None:
    final = records.read_json(finished / "results" / "final_results.json")
    jsonschema.validate(final, json_schema("final_results"))
    assert tuple(final["arms"]) == ARMS
    for arm in final["arms"].values():
        assert set(arm["hotflip"]["variants"]) == {"once", "iterative", "beam", "shuffled", "published", "random"}
        assert set(arm["attacks"]) == {"gcg", "coordinate", "pgd", "frequency", "ensemble"}
        assert arm["hotflip"]["published_accounting"]["threshold"] == 0.1
        assert arm["hotflip"]["n"] == arm["triggers"]["n"] == 12
        assert arm["hotflip"]["delta_by_offset"].keys() == {"0-7"}
    assert final["arms"]["monotonic"]["certificate"]["premise"]["pairs"] > 0
    assert final["success_threshold"] is not None
    assert {verdict["arm"] for verdict in final["verdicts"]} >= {"monotonic", "edit_trained"}
    judged = next(verdict for verdict in final["verdicts"] if verdict["arm"] == "monotonic")
    controls = {entry["control"] for entry in (*judged["against"], *judged["excluded"])}
    assert {"cooled", "noisy", "stopped"} <= controls
    assert {entry["attack"] for entry in final["transfer"]} == {"hotflip", "gcg", "coordinate", "triggers"}
    assert final["masking"]["monotonic"]["label"] != "not measured"


def test_controls_meet_the_loss_of_references(finished: Path) -> None:
    arms = records.read_json(finished / "results" / "final_results.json")["arms"]
    for name in ("cooled", "noisy", "stopped"):
        matched = arms[name]["matched_loss"]
        assert matched["num_documents"] == 12
        assert matched["num_tokens"] < 12 * 8  # padding is no token
        assert matched["reachable"]
        assert abs(matched["difference"]) <= matched["tolerance"]


def test_the_page_shows_sources_and_references_without_padding(finished: Path) -> None:
    page = next(finished.rglob("report*.html")).read_text()
    assert "&lt;/s&gt;" in page
    assert "&lt;pad&gt;" not in page


def test_a_run_that_is_done_stays_as_it_is(finished: Path, experiment: Path) -> None:
    files = {path: path.read_bytes() for path in (finished / "results").rglob("*.jsonl")}
    again = run(experiment)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in (finished / "results").rglob("*.jsonl")} == files
