"""Every control of science.md as an arm of one line, added to a run that is complete, through the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from isotone import records
from isotone.result_models import json_schema

from .conftest import SHORT, isotone
from .test_pipeline import differences

pytestmark = pytest.mark.integration
RUN = Path("pocket-quick/seed-42")
FREE = "constraint: {recipe: published, enforce: false}"
CONTROLS = {
    "edit_trained": "{training: {random_prefix: 0.1}}",
    "reparametrized": f"{{{FREE}}}",
    "slow": f"{{{FREE}, training: {{lr: 1e-4}}}}",  # whose loss lies on the way of ``reparametrized``
    "sign_frozen": "{constraint: {parametrization: sign_frozen, initialization: unchanged}, training: {lr: 5e-3}}",
    "matched_temperature": "{start: baseline, train: false, matched_loss: {to: monotonic, by: temperature}}",
    "matched_noise": "{start: baseline, train: false, matched_loss: {to: monotonic, by: noise, draw: 2}}",
    "matched_undertrained": "{start: baseline, train: false, matched_loss: {to: monotonic, by: undertrained}}",
    "worse": "{start: baseline, train: false, matched_loss: {to: baseline, above: 0.5, by: noise, scope: mlp_in}}",
    "worse_still": "{start: baseline, train: false, matched_loss: {to: baseline, above: 0.75, by: temperature}}",
    "stopped": "{start: reparametrized, train: false, matched_loss: {to: slow, by: undertrained}}",
}
MEASURED = ("matched_temperature", "matched_undertrained")


def _command(out: Path, *more: object, controls: Iterable[str] = CONTROLS) -> list[str]:
    added = [part for name in controls for part in ("--set", f"arms.{name}={CONTROLS[name]}")]
    return ["run", "pocket-quick", "--out", str(out), *SHORT, *added, *map(str, more)]


def _modified(out: Path) -> dict[Path, int]:
    """Return when what the two founding arms have left was written."""
    arms = ("setup", "baseline", "monotonic")
    files = [p for p in (out / RUN).rglob("*") if p.is_file() and not {"logs", "leases"} & set(p.parts)]
    return {p: p.stat().st_mtime_ns for p in files if {*p.name.split("."), *p.parts} & set(arms)}


@pytest.fixture(scope="module")
def controlled(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, int]]:
    """Return a complete run of two arms to which the models of all controls were added, and its files' times before."""
    out = Path(shutil.copytree(finished, tmp_path_factory.mktemp("controlled") / "runs"))
    before = _modified(out)
    done = isotone(*_command(out, "--until", "train_monotonic"))
    assert done.returncode == 0, done.stderr
    return out, before


@pytest.fixture(scope="module")
def measured(controlled: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of a run of which some controls were also measured."""
    out = Path(shutil.copytree(controlled[0], tmp_path_factory.mktemp("measured") / "runs"))
    done = isotone(*_command(out, controls=MEASURED))
    assert done.returncode == 0, done.stderr
    return out / RUN / "results"


def _result(controlled: tuple[Path, Any], node: str) -> dict[str, Any]:
    found: dict[str, Any] = records.read_json(controlled[0] / RUN / "results/by_arm" / f"{node}.json")
    return found


def _weights(controlled: tuple[Path, Any], arm: str, last: bool = True) -> dict[str, torch.Tensor]:
    folders = sorted((controlled[0] / RUN / "checkpoints" / arm).glob("step-????????"))
    tensors = load_file(folders[-1 if last else 0] / "model.safetensors")
    return {name: w for name, w in tensors.items() if ".mlp." in name and name.endswith("weight")}


def test_adding_controls_does_nothing_again_that_stands(controlled: tuple[Path, dict[Path, int]]) -> None:
    before = controlled[1]
    assert len(before) > 20
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("arm", ["matched_temperature", "matched_noise", "worse", "stopped"])
def test_a_matched_arm_has_the_loss_that_it_was_to_meet(controlled: tuple[Path, Any], arm: str) -> None:
    found = _result(controlled, f"match.{arm}")
    assert found["reachable"]
    assert found["reason"] == ""
    assert abs(found["reached"] - found["target"]) <= 0.01
    assert found["difference"] == found["reached"] - found["target"]


def test_a_level_of_damage_lies_above_the_loss_that_it_is_told_from(controlled: tuple[Path, Any]) -> None:
    worse, still, control = (_result(controlled, f"match.{a}") for a in ("worse", "worse_still", "matched_noise"))
    assert still["target"] - worse["target"] == pytest.approx(0.25, abs=1e-9)
    assert worse["reached"] == pytest.approx(worse["target"], abs=0.01)
    assert (worse["above"], worse["scope"], worse["start"]) == (0.5, "mlp_in", "baseline")
    assert (control["above"], control["scope"]) == (0.0, "mlp_both")
    before, after = _weights(controlled, "baseline"), _weights(controlled, "worse")
    changed = {name.split(".mlp.")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"dense_h_to_4h.weight"}


def test_results_carry_how_well_an_arm_is_matched(controlled: tuple[Path, Any], measured: Path) -> None:
    final = records.read_json(measured / "final_results.json")
    for arm in MEASURED:
        assert final["arms"][arm]["matched_loss"] == _result(controlled, f"match.{arm}")
        assert final["arms"][arm]["certificate"] is None
    assert final["arms"]["baseline"]["matched_loss"] is None
    differences = {row["key"]: row["arms"] for row in final["differences_between_arms"]}
    assert differences["matched_loss"]["matched_temperature"] == {"to": "monotonic", "by": "temperature"}
    jsonschema.validate(final, json_schema("final_results"))


def test_a_loss_that_cannot_be_reached_is_said_to_be_and_leads_to_no_conclusion(
    controlled: tuple[Path, Any], measured: Path
) -> None:
    """The monotonic arm is worse than the model that the baseline starts from: no training of that is so bad."""
    found = _result(controlled, "match.matched_undertrained")
    assert not found["reachable"]
    assert "training baseline takes the loss from" in found["reason"]
    final = records.read_json(measured / "final_results.json")
    assert {c["a"] for c in final["conclusions"]} == {"monotonic"}  # the verdict speaks of controls
    assert "not reachable, so nothing follows from this arm" in (measured / "experiment_summary.txt").read_text()


def test_a_repeated_training_takes_the_same_path(controlled: tuple[Path, Any]) -> None:
    metrics = controlled[0] / RUN / "metrics"
    again = (metrics / "match.stopped.jsonl").read_text().splitlines()
    first = (metrics / "train.reparametrized.jsonl").read_text().splitlines()
    assert again
    assert again == first[: len(again)]
    steps = _result(controlled, "match.stopped")["steps"]
    assert 0 <= steps[0] < steps[1] <= 4


def test_a_reparametrized_arm_starts_where_the_constrained_one_does_and_is_free(controlled: tuple[Path, Any]) -> None:
    start, masters = _weights(controlled, "reparametrized", last=False), _weights(controlled, "monotonic", last=False)
    assert all(torch.equal(torch.nn.functional.softplus(masters[name]), w) for name, w in start.items())
    assert all(w.min() >= 0 for w in start.values())
    assert all(w.min() < 0 for w in _weights(controlled, "reparametrized").values())


def test_a_sign_frozen_arm_ends_with_the_signs_of_the_pretrained_model(controlled: tuple[Path, Any]) -> None:
    start, end = _weights(controlled, "sign_frozen", last=False), _weights(controlled, "sign_frozen")
    assert all((w * start[name] >= 0).all() for name, w in end.items())
    assert all((w == 0).any() for w in end.values())  # some would have crossed
    free_start, free_end = _weights(controlled, "edit_trained", last=False), _weights(controlled, "edit_trained")
    assert any((w * free_start[name] < 0).any() for name, w in free_end.items())


def test_an_exported_temperature_arm_is_the_baseline_with_its_logits_divided(
    controlled: tuple[Path, Any], tmp_path: Path
) -> None:
    folders = [tmp_path / arm for arm in ("baseline", "matched_temperature")]
    for folder in folders:
        assert isotone("export", controlled[0] / RUN, folder.name, folder).returncode == 0
    check = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        "a, b = (M.from_pretrained(f) for f in sys.argv[1:3]); ids = torch.arange(40).view(2, 20)\n"
        "torch.testing.assert_close(b(ids).logits, a(ids).logits / float(sys.argv[3]), rtol=1e-4, atol=1e-4)\n"
        "assert 'isotone' not in sys.modules"
    )
    temperature = _result(controlled, "match.matched_temperature")["parameter"]
    command = [sys.executable, "-c", check, *map(str, folders), str(temperature)]
    assert subprocess.run(command).returncode == 0


def test_a_kill_within_the_bisection_changes_no_byte(controlled: tuple[Path, Any], tmp_path: Path) -> None:
    out = Path(shutil.copytree(controlled[0], tmp_path / "runs"))
    fresh = _command(out, "--only", "train_matched_noise", "--fresh")
    process = subprocess.Popen([sys.executable, "-m", "isotone", *fresh], stderr=subprocess.DEVNULL)
    log, deadline = out / RUN / "work/match.matched_noise/evaluations.jsonl", time.monotonic() + 120
    while len(records.JsonLines(log).read()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    half = log.read_text()
    assert not (out / RUN / "records/match.matched_noise.json").exists()
    assert 3 <= len(half.splitlines()) < _result(controlled, "match.matched_noise")["evaluations"]
    assert isotone(*_command(out, "--only", "train_matched_noise")).returncode == 0
    assert _without_set_aside(differences(controlled[0], out)) == []


def test_budgets_within_a_repeated_training_change_no_byte(controlled: tuple[Path, Any], tmp_path: Path) -> None:
    out, codes = Path(shutil.copytree(controlled[0], tmp_path / "runs")), list[int]()
    only = ("--only", "train_stopped")
    while not codes or codes[-1] == 75:
        done = isotone(*_command(out, *only, *([] if codes else ["--fresh"]), "--max-epochs-per-run", "0.005"))
        codes.append(done.returncode)
    assert codes[-1] == 0, done.stderr
    assert len(codes) > 1
    assert _without_set_aside(differences(controlled[0], out)) == []


def _without_set_aside(lines: list[str]) -> list[str]:
    return [line for line in lines if "set-aside" not in line]


def test_every_node_of_a_control_is_listed_with_its_stage(controlled: tuple[Path, Any]) -> None:
    rows = json.loads(isotone("status", controlled[0] / RUN, "--json").stdout)
    stages = {row["node"]: (row["stage"], row["name"], row["state"]) for row in rows}
    assert stages["match.matched_noise"] == (3, "train_matched_noise", "complete")
    assert "constrain.reparametrized" not in stages
