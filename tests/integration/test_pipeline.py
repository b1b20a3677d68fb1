"""The promises of `isotone run`, through the command line, on a real model."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from isotone import records
from isotone.models import load_tokenizer, save_model
from isotone.result_models import PUBLISHED, json_schema

from .conftest import SHORT, isotone, run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_campaign import campaign, differences

pytestmark = pytest.mark.integration
RUN = Path("pocket-quick/seed-42")


def _copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def test_an_uninterrupted_run_leaves_every_file_of_the_contract(finished: Path) -> None:
    root = finished / RUN
    results = ["evaluation_results.json", "uat_results.json", "learned_triggers.csv", "hotflip_results.json"]
    results += ["final_results.json", "experiment_summary.txt"]
    assert all((root / "results" / name).is_file() for name in results)
    assert (root / "report.html").is_file()
    assert {p.stem for p in (root / "records").glob("*.json")} >= {"setup", "train.baseline", "aggregate"}
    for name in PUBLISHED:
        jsonschema.validate(records.read_json(root / "results" / f"{name}.json"), json_schema(name))


def test_results_contain_no_time_host_path_or_process(finished: Path, tmp_path: Path) -> None:
    """The same experiment elsewhere, later and in another process gives the same bytes."""
    again = tmp_path / "elsewhere"
    assert run(again).returncode == 0
    assert differences(finished, again) == []


def test_a_complete_run_is_not_done_again(finished: Path, tmp_path: Path) -> None:
    out = _copy(finished, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.json")}
    assert run(out).returncode == 0  # also shows that a run can be moved
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.json")} == before


def test_kills_at_random_moments_change_no_byte(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "isotone", "run", "pocket-quick", *SHORT]
    landed = campaign(command, finished, tmp_path / "killed", per_phase=1, rng=random.Random(3))
    assert all(landed[f"SIGKILL {phase}"] for phase in ("training", "save", "evaluation", "attack"))
    assert differences(finished, tmp_path / "killed") == []


def test_a_checkpoint_without_an_optimizer_moment_is_found_out(finished: Path, tmp_path: Path) -> None:
    """The comparison that the kill test rests on sees one lost moment."""
    out = _copy(finished, tmp_path)
    path = next(out.rglob("step-*/optimizer*.safetensors"))
    moments = load_file(path)
    name = next(n for n in moments if n.endswith("exp_avg"))
    save_file(moments | {name: np.zeros_like(moments[name])}, path)
    assert any("optimizer" in line for line in differences(finished, out))


def test_two_halves_of_an_epoch_equal_one(finished: Path, tmp_path: Path) -> None:
    """training.epochs is .01: four steps an arm; budgets of .005 and of a third of it stop inside."""
    out, codes = tmp_path / "halves", list[int]()
    while not codes or codes[-1] == 75:
        done = run(out, "--max-epochs-per-run", "0.0033")
        codes.append(done.returncode)
        if codes[-1] == 75:
            assert "PARTIAL" in done.stderr
            assert "again" in done.stderr
            assert not (out / RUN / "records" / "aggregate.json").exists()
    assert codes[-1] == 0
    assert len(codes) > 2
    assert differences(finished, out) == []


def test_a_stage_whose_input_is_missing_is_blocked_and_names_it(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "hotflip")
    assert done.returncode == 4
    assert "hotflip.baseline needs setup, which is absent" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_changed_configuration_is_refused_and_named(finished: Path, tmp_path: Path) -> None:
    out = _copy(finished, tmp_path)
    done = run(out, "--set", "training.lr=1e-3")
    assert done.returncode == 2
    assert "training.lr was 0.0005, is now 0.001" in done.stderr


def test_a_changed_result_is_never_reused_silently(finished: Path, tmp_path: Path) -> None:
    out = _copy(finished, tmp_path)
    rows = out / RUN / "results/documents/hotflip.baseline.once.jsonl"
    rows.write_text(rows.read_text().replace("1", "2", 1))
    done = run(out)
    assert done.returncode == 4
    assert "hotflip.baseline.once.jsonl" in done.stderr


def test_fresh_sets_aside_and_repeats(finished: Path, tmp_path: Path) -> None:
    out = _copy(finished, tmp_path)
    assert run(out, "--only", "evaluate", "--fresh").returncode == 0
    assert list((out / RUN / "records").glob("evaluate.baseline.json.set-aside-1"))
    assert differences(finished, out) == []


def test_one_arms_part_of_a_stage_is_repeated_alone(finished: Path, tmp_path: Path) -> None:
    out = _copy(finished, tmp_path)
    assert run(out, "--only", "evaluate.baseline", "--fresh").returncode == 0
    aside = [path.name for path in (out / RUN / "records").glob("*.set-aside-1")]
    assert aside == ["evaluate.baseline.json.set-aside-1"]
    assert differences(finished, out) == []


def test_a_second_process_on_the_same_node_is_told_who_holds_it(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "isotone", "run", "pocket-quick", "--out", tmp_path, *SHORT],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        lease = tmp_path / "pocket-quick/setup/leases/setup.json"
        deadline = time.monotonic() + 120
        while not lease.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)  # it stays in setup
        second = run(tmp_path)
        assert second.returncode == 4
        assert f"process {first.pid} on " in second.stderr
    finally:
        first.kill()
        first.wait()


def test_another_seed_shares_the_setup_and_trains_on_its_own(finished: Path, tmp_path: Path) -> None:
    out = _copy(finished, tmp_path)
    fingerprint = records.read_json(out / "pocket-quick/setup/data/dataset.json")["fingerprint"]
    begun = run(out, "--until", "train_baseline", EXPERIMENT_SEED="7")
    assert begun.returncode == 0
    assert begun.stdout.splitlines()[-1].startswith("until train_baseline: complete, of ")  # the run is not
    assert records.read_json(out / "pocket-quick/setup/data/dataset.json")["fingerprint"] == fingerprint
    train = "records/train.baseline.json"
    seven, fortytwo = (records.read_json(out / f"pocket-quick/seed-{s}" / train) for s in (7, 42))
    assert seven["inputs"] == fortytwo["inputs"]
    assert seven["outputs"] != fortytwo["outputs"]


def test_status_and_why_say_how_a_run_stands(finished: Path, tmp_path: Path) -> None:
    rows = json.loads(isotone("status", finished / RUN, "--json").stdout)
    assert {row["state"] for row in rows} == {"complete"}
    out = _copy(finished, tmp_path)
    (out / RUN / "records/train.monotonic.json").unlink()
    assert "train.monotonic" in isotone("why", out / RUN).stdout


def test_an_exported_arm_loads_without_isotone_and_is_monotone(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert isotone("export", finished / RUN, "monotonic", folder).returncode == 0
    check = (
        "import sys; from transformers import AutoModelForCausalLM as M; m = M.from_pretrained(sys.argv[1]);"
        "assert min(p.min() for n, p in m.named_parameters() if 'mlp.dense' in n and n.endswith('weight')) >= 0;"
        "assert 'isotone' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", check, folder]).returncode == 0
    assert json.loads(isotone("certify", folder, "--json").stdout)["verdict"] in ("vacuous", "empirical")


def _wait_for(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the run ended before it printed {text!r}")


def _training(out: Path) -> "subprocess.Popen[str]":
    """Start a run that has five epochs to train, and return it two seconds into them."""
    command = [sys.executable, "-m", "isotone", "run", "pocket-quick", "--out", str(out), *SHORT]
    process = subprocess.Popen([*command, "--set", "training.epochs=5"], stderr=subprocess.PIPE, text=True)
    _wait_for(process, "train.baseline: starts")
    time.sleep(2)
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_a_signal_ends_a_run_safely(tmp_path: Path, number: signal.Signals) -> None:
    process = _training(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "Traceback" not in errors
    assert "PARTIAL: train.baseline stopped safely" in errors
    assert not (tmp_path / RUN / "records/train.baseline.json").exists()


def test_a_second_interrupt_ends_a_run_at_once(tmp_path: Path) -> None:
    process = _training(tmp_path)
    while process.poll() is None:  # two that arrive during one kernel count as one: as a user would, keep pressing
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "second interrupt" in errors
    assert (
        run(
            tmp_path, "--until", "train_baseline", "--set", "training.epochs=5", "--max-epochs-per-run", "0.001"
        ).returncode
        == 75
    )  # what was saved before is whole


def test_a_time_budget_leaves_a_run_that_continues(tmp_path: Path) -> None:
    longer = ("--set", "training.epochs=50")
    run(tmp_path, *longer, "--until", "constrain")  # so that a busy machine, too, comes to the first step in time
    done = run(tmp_path, *longer, "--max-minutes-per-run", "0.5")
    assert done.returncode == 75
    assert "minutes" in done.stderr
    assert list((tmp_path / RUN / "checkpoints/baseline").glob("step-*[1-9]"))


def test_the_shifted_twin_is_the_baseline(tmp_path: Path) -> None:
    """The harness's negative control: the same function, so the same loss, the same effect of the same edits."""
    twin = "{start: baseline, train: false, constraint: {parametrization: projection, initialization: shift}}"
    assert run(tmp_path, "--set", f"arms.shifted_twin={twin}").returncode == 0
    final = records.read_json(tmp_path / RUN / "results/final_results.json")
    baseline, shifted = final["arms"]["baseline"], final["arms"]["shifted_twin"]
    assert shifted["perplexity"] == pytest.approx(baseline["perplexity"], rel=1e-4)
    assert shifted["certificate"]["verdict"] == "vacuous"
    premise = shifted["certificate"]["premise"]
    assert premise["ordered"] == 0 < premise["pairs"]  # theorem 2, on the texts that were attacked
    assert isotone("export", tmp_path / RUN, "shifted_twin", tmp_path / "exported").returncode == 0
    weights = load_file(tmp_path / "exported/model.safetensors")
    assert min(w.min() for n, w in weights.items() if ".mlp." in n and n.endswith("weight")) >= 0
    attack = next(
        c for c in final["comparisons"] if (c["a"], c["metric"], c["variant"]) == ("shifted_twin", "delta_nll", "once")
    )
    assert attack["difference"] == pytest.approx(0, abs=1e-3)


def test_a_gated_model_goes_through_every_stage_and_is_said_not_to_be_monotone(tmp_path: Path) -> None:
    """Llama's architecture: non-negative weights do not make a gated network with SiLU monotone.

    Its head shares the embeddings' matrix, which the recommended start takes apart, in every stage alike.
    """
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=2, num_attention_heads=2, **shape))
    save_model(model, load_tokenizer("pocket"), tmp_path / "llama")
    arms = {
        "baseline": {},
        "monotonic": {"constraint": {"recipe": "published", "scope": "gated_updown"}},
        "rotated": {"constraint": {"recipe": "recommended", "scope": "gated_all"}},
        "further": {"start": "rotated"},
    }
    done = run(tmp_path, "--set", f"model.source={tmp_path / 'llama'}", "--set", f"arms={json.dumps(arms)}")
    assert done.returncode == 0, done.stderr
    assert "constrain.monotonic: no weight is negative, yet not monotone" in done.stderr
    found = records.read_json(tmp_path / RUN / "results/final_results.json")["arms"]
    for arm in ("monotonic", "rotated"):
        assert (found[arm]["certificate"]["verdict"], found[arm]["certificate"]["weights"]) == ("violated", "nonneg")
    for arm in ("rotated", "further"):
        assert isotone("export", tmp_path / RUN, arm, tmp_path / arm).returncode == 0
        weights = load_file(tmp_path / arm / "model.safetensors")
        assert not np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_mistyped_setting_binds_nobody(tmp_path: Path) -> None:
    """The same folder serves once the mistake is mended."""
    wrong = run(tmp_path, "--until", "setup", "--set", "data.source=/nonexistent.txt")
    assert wrong.returncode == 2
    assert "data.source" in wrong.stderr
    assert run(tmp_path, "--until", "setup").returncode == 0
