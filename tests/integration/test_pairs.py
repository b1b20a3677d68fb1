"""The promises of `isotone run` for an encoder-decoder on pairs, stages 0 to 4, through the command line."""

import subprocess
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_pairs import pair_tokenizer, random_pairs, write_pairs

from isotone import records
from isotone.models import save_model

from .conftest import isotone

pytestmark = pytest.mark.integration

ARMS = ("pretrained_model", "baseline", "monotonic")
EXPERIMENT = """
name: pairs
model: {{source: {folder}/model}}
data: {{source: {folder}/pairs.jsonl, source_field: source, target_field: target, source_length: 16, target_length: 8}}
training: {{epochs: 2, micro_batch: 4, accumulation: 1, lr: 0.003, validation_rows: 8, save_every_steps: 20}}
arms:
  pretrained_model: {{train: false}}
  baseline: {{}}
  monotonic: {{constraint: {{scope: mlp_both, parametrization: projection, initialization: absolute}}}}
evaluation: {{rouge: {{beams: 2, batch_size: 4, resamples: 200}}}}
runtime: {{threads: 1}}
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    save_model(tiny_model("t5", dropout_rate=0.1), pair_tokenizer(), folder / "model")
    write_pairs(folder / "pairs.jsonl", random_pairs(240))
    file = folder / "pairs.yaml"
    file.write_text(EXPERIMENT.format(folder=folder))
    return file


def run(experiment: Path, out: Path, *options: object) -> "subprocess.CompletedProcess[str]":
    return isotone("run", experiment, "--out", out, "--until", "evaluate", *options)


@pytest.fixture(scope="module")
def finished(experiment: Path) -> Path:
    out = experiment.parent / "whole"
    done = run(experiment, out)
    assert done.returncode == 0, done.stderr
    return out / "pairs" / "seed-42"


def test_three_arms_are_trained_evaluated_and_certified(finished: Path) -> None:
    found = {arm: records.read_json(finished / "results" / "by_arm" / f"evaluate.{arm}.json") for arm in ARMS}
    assert found["baseline"]["perplexity"]["value"] < found["pretrained_model"]["perplexity"]["value"]
    assert found["monotonic"]["certificate"]["verdict"] == "strict"
    for entry in found.values():
        assert entry["rouge"]["source_copied"] == found["baseline"]["rouge"]["source_copied"]
        assert entry["rouge"]["num_documents"] == entry["num_documents"]
        assert all(0 <= entry["rouge"][name]["value"] <= 1 for name in ("rouge1", "rouge2", "rougeLsum"))
    rows = records.JsonLines(finished / "results" / "documents" / "evaluate.baseline.jsonl").read()
    assert all(row["written"] is not None and set(row["rouge"]) == {"rouge1", "rouge2", "rougeLsum"} for row in rows)


def test_a_run_in_parts_equals_an_uninterrupted_one(experiment: Path, finished: Path) -> None:
    out, codes = experiment.parent / "parts", set()
    while (code := run(experiment, out, "--max-epochs-per-run", "0.7").returncode) == 75:
        codes.add(code)
    assert (code, codes) == (0, {75})
    for path in (*(finished / "results").rglob("*.json*"), *(finished / "checkpoints").rglob("model.safetensors")):
        assert (out / "pairs" / "seed-42" / path.relative_to(finished)).read_bytes() == path.read_bytes(), path


def test_sides_that_are_cut_are_said_to_be(experiment: Path, tmp_path: Path) -> None:
    cut = isotone("run", experiment, "--out", tmp_path, "--only", "setup", "--set", "data.target_length=4")
    assert cut.returncode == 0, cut.stderr
    assert "targets are longer than data.target_length: 4; only their beginning is read" in cut.stderr


def test_a_model_and_data_of_different_tasks_are_refused_in_setup(experiment: Path, tmp_path: Path) -> None:
    pairless = run(experiment, tmp_path / "a", "--set", "data={source: web-bible}", "--set", "evaluation.rouge=null")
    assert (pairless.returncode, "reads pairs; give source_field and target_field" in pairless.stderr) == (2, True)
    causal = run(experiment, tmp_path / "b", "--set", "model.source=pocket")
    assert (causal.returncode, "the model is no encoder-decoder" in causal.stderr) == (2, True)
