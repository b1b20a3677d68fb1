"""A sweep ends with the same bytes however often it is interrupted, and chooses on validation text alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tiny_sweep import corpus

from isotone import records
from isotone.config import Experiment
from isotone.config_io import dump_yaml, experiment_from_dict, load_experiment
from isotone.data.packed import PackedData
from isotone.errors import BlockedError, Stopped, UnwritableError, UsageError
from isotone.interruption import StopFlag
from isotone.pipeline.graph import Node
from isotone.pipeline.lease import lease
from isotone.result_models import SWEEP, json_schema
from isotone.sweep.points import SweepDirectory, build_points, resolve_seed_of_points
from isotone.sweep.running import TABLE, Sweeping, run_sweep
from isotone.sweep.standing import standing_of, sweep_status
from isotone.training.loop import Trainer

from .conftest import Tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_campaign import differences

SEED = 7


def sweep(experiment: Experiment, out: Path, **options: Any) -> SweepDirectory:
    return run_sweep(Sweeping(experiment, SEED, out, **options), StopFlag(), lambda line: None)


@pytest.fixture(scope="module")
def finished(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    sweep(experiment_from_dict(tree), out)
    return out


def test_a_finished_sweep_has_a_table_of_every_point_and_an_experiment_that_can_be_run(
    finished: Path, tiny: Tiny
) -> None:
    folder = finished / "tiny/sweep"
    found = records.read_json(folder / "sweep.json")
    jsonschema.validate(found, json_schema(SWEEP))
    assert [p["id"] for p in found["points"]] == [p.id for p in build_points(tiny(), SEED)]
    assert found["searched"] == {"baseline": 2, "monotonic": 2}
    table = (folder / "sweep.md").read_text()
    assert all(p["id"] in table for p in found["points"])
    best = load_experiment(folder / "best.yaml")
    by_id = {p["id"]: p for p in found["points"]}
    assert (best.name, best.sweep, best.evaluation.split) == ("tiny-best", None, "test")
    for arm, chosen in found["chosen"].items():
        assert by_id[chosen]["nll"] == min(p["nll"] for p in found["points"] if p["arm"] == arm and p["nll"])
        assert best.arms[arm].training.lr == by_id[chosen]["settings"]["training.lr"]
        lr = by_id[chosen]["settings"]["training.lr"]
        end = {0.001: "smallest", 0.01: "largest"}[lr]
        assert (
            f"{arm}: training.lr {lr} is the {end} that was tried; the best may lie beyond, if it can."
            in found["notes"]
        )
    assert by_id[found["chosen"]["baseline"]]["ratio"]["value"] == 1
    assert all(p["ratio"]["ci95"] for p in found["points"] if p["state"] == "complete")


def test_the_data_is_packed_once_for_all_points(finished: Path) -> None:
    assert len(list(finished.rglob("dataset.json"))) == 1
    assert len(list((finished / "tiny/sweep").glob("*/records/setup.json"))) == 4


def test_status_shows_every_point_and_the_table(finished: Path) -> None:
    rows = sweep_status(SweepDirectory(finished / "tiny/sweep"))
    assert [row["state"] for row in rows].count("complete") == 6
    assert [row["state"] for row in rows].count("refused") == 2
    assert rows[-1]["node"] == "table"


def test_a_complete_sweep_is_not_done_again_and_can_be_moved(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "moved"))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*-seed-*/records/*.json")}
    assert len(before) == 4 * 3 + 2  # setup, training and evaluation of four points, stage 1 of two
    sweep(tiny(), out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*-seed-*/records/*.json")} == before
    assert differences(finished, out) == []


def test_a_kill_inside_a_point_changes_no_byte(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    out, folder = tmp_path / "killed", tmp_path / "killed/tiny/sweep"
    child = os.fork()
    if child == 0:
        sweep(tiny(), out)
        os._exit(0)
    while len(list(folder.glob("*/checkpoints/*/step-*"))) < 3:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (folder / "sweep.json").exists()
    assert not (folder / "best.yaml").exists()
    assert sweep_status(SweepDirectory(folder))[-1]["state"] != "complete"
    sweep(tiny(), out)
    assert differences(finished, out) == []


def test_a_stop_between_points_keeps_what_is_done(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    stop = StopFlag()

    def stop_at_third(line: str) -> None:
        if (
            line.startswith("point ")
            and stop.requested is None
            and len(list(tmp_path.rglob("records/evaluate.*.json"))) >= 2
        ):
            stop.request("SIGTERM")

    with pytest.raises(Stopped):
        run_sweep(Sweeping(tiny(), SEED, tmp_path), stop, stop_at_third)
    assert not (tmp_path / "tiny/sweep/best.yaml").exists()
    sweep(tiny(), tmp_path)
    assert differences(finished, tmp_path) == []


def test_a_signal_to_the_command_saves_and_the_same_command_goes_on(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(dump_yaml(tiny()))
    command = [sys.executable, "-m", "isotone", "sweep", str(file), "--seed", str(SEED), "--out", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("tiny/sweep/*/checkpoints/*/step-*")) and first.poll() is None:
        time.sleep(0.02)
    first.terminate()
    said = first.communicate(timeout=120)[1]
    assert (first.returncode, "PARTIAL: train.baseline stopped safely" in said) == (75, True), said
    assert not (out / "tiny/sweep/best.yaml").exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    assert differences(finished, out) == []


def test_the_choice_does_not_read_a_document_of_test_or_attack(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    documents = PackedData.documents

    def noted(self: PackedData, split: str) -> Any:
        read.add(split)
        return documents(self, split)

    monkeypatch.setattr(PackedData, "documents", noted)
    sweep(tiny(), tmp_path)
    assert read == {"validation"}


def test_other_test_and_attack_documents_change_no_figure_and_no_choice(
    finished: Path, tiny: Tiny, tree: dict[str, Any], tmp_path: Path
) -> None:
    other = corpus(tmp_path / "other.jsonl", {"test": 1, "attack_test": 1, "attack_search": 1})
    sweep(tiny(data=tree["data"] | {"source": str(other)}), tmp_path)

    def figures(out: Path) -> list[Any]:
        points = json.loads((out / "tiny/sweep/sweep.json").read_text())["points"]
        return [[p["settings"], p["nll"], p["ratio"]] for p in points]

    assert figures(tmp_path) == figures(finished)
    packed = [next(out.rglob("test.documents.jsonl")).read_bytes() for out in (finished, tmp_path)]
    assert packed[0] != packed[1]
    validated = corpus(tmp_path / "third.jsonl", {"validation": 1})  # the comparison can see a difference
    sweep(tiny(data=tree["data"] | {"source": str(validated)}), tmp_path / "third")
    assert figures(tmp_path / "third") != figures(finished)


def test_what_the_model_refuses_is_listed_with_its_reason_and_the_others_go_on(tiny: Tiny, tmp_path: Path) -> None:
    axes = {"constraint.scope": ["gated_all", "mlp_both"]}
    folder = sweep(tiny(sweep={"arms": {"monotonic": axes}}), tmp_path).root
    baseline, refused, complete = records.read_json(folder / "sweep.json")["points"]
    assert (baseline["state"], refused["state"], complete["state"]) == ("complete", "refused", "complete")
    assert "gated_all" in refused["reason"]
    assert refused["reason"] in (folder / "sweep.md").read_text()
    assert (folder / "best.yaml").is_file()


def test_a_training_that_fails_is_told_and_does_not_end_the_sweep(tiny: Tiny, tmp_path: Path) -> None:
    arms = {"monotonic": {"training.lr": [1e-3, 1e30]}, "baseline": {"training.lr": [1e-3]}}
    folder = sweep(tiny(sweep={"arms": arms}), tmp_path).root
    found = records.read_json(folder / "sweep.json")
    assert [p["state"] for p in found["points"]] == ["complete", "complete", "diverged"]
    assert "loss nan" in found["points"][2]["reason"]
    assert "1 points diverged" in (folder / "sweep.md").read_text()
    assert found["chosen"].keys() == {"baseline", "monotonic"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error"),
        OSError(5, "Input/output"),
        UnwritableError("a checkpoint cannot be written (Read-only file system)"),
    ],
)
def test_what_a_device_or_a_disk_did_to_a_point_is_no_end_and_nothing_is_chosen_until_it_was_tried_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    experiment = tiny(sweep={"arms": {"baseline": {"training.lr": [1e-3, 1e-2]}}})
    first, _ = build_points(experiment, SEED)

    def broken(*args: object) -> None:
        raise error

    with monkeypatch.context() as broken_machine:
        broken_machine.setattr(Trainer, "_apply_gradients", broken)
        with pytest.raises((type(error), BlockedError)):
            sweep(experiment, tmp_path)
    directory = SweepDirectory.of(tmp_path, "tiny")
    now = standing_of(directory, first, SEED)
    assert (now.state, now.settled) == ("failed", False)
    with pytest.raises(BlockedError, match=f"{first.id} is failed"):
        sweep(experiment, tmp_path, only=TABLE)
    assert records.read_json(directory.table)["chosen"] == {}
    assert not directory.best.exists()
    sweep(experiment, tmp_path)
    assert records.read_json(directory.table)["chosen"].keys() == {"baseline"}


def test_a_setup_that_is_refused_refuses_no_point(tiny: Tiny, tree: dict[str, Any], tmp_path: Path) -> None:
    data = tree["data"] | {"source": str(tmp_path / "late.jsonl")}
    experiment = tiny(data=data, sweep={"arms": {"baseline": {"training.lr": [1e-3, 1e-2]}}})
    directory, points = SweepDirectory.of(tmp_path, "tiny"), build_points(experiment, SEED)
    with pytest.raises(UsageError, match=r"late\.jsonl"):
        sweep(experiment, tmp_path, only="setup")
    now = standing_of(directory, points[0], SEED)
    assert (now.state, now.settled) == ("blocked", False)
    assert "needs setup, which failed: " in now.reason
    with pytest.raises(BlockedError, match=f"{points[0].id} is blocked"):
        sweep(experiment, tmp_path, only=TABLE)
    shutil.copy(tree["data"]["source"], tmp_path / "late.jsonl")
    sweep(experiment, tmp_path)
    assert records.read_json(directory.table)["searched"] == {"baseline": 2}


def test_the_best_experiment_keeps_the_seeds_and_status_finds_the_points(tiny: Tiny, tmp_path: Path) -> None:
    experiment = tiny(seeds=[1, 2, 3], sweep={"arms": {"baseline": {"training.lr": [1e-3]}}})
    directory = sweep(experiment, tmp_path)
    assert load_experiment(directory.best).seeds == (1, 2, 3)
    assert {row["state"] for row in sweep_status(directory)} == {"complete"}
    assert resolve_seed_of_points(directory.load()) == SEED  # what was written down continues this sweep
    assert resolve_seed_of_points(experiment) == 1
    assert resolve_seed_of_points(directory.load(), 3) == 3


def test_a_part_leaves_the_experiment_of_a_later_sweep_alone(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "runs"))
    directory = SweepDirectory.of(out, "tiny")
    before = directory.experiment_file.read_text()
    earlier = tiny(sweep={"arms": {"baseline": {"training.lr": [1e-3]}}})
    point = build_points(earlier, SEED)[0].id
    sweep(earlier, out, only=point)
    assert directory.experiment_file.read_text() == before


def test_while_another_process_holds_a_point_nothing_is_chosen(tiny: Tiny, tmp_path: Path) -> None:
    experiment = tiny(sweep={"arms": {"baseline": {"training.lr": [1e-3, 1e-2]}}})
    directory, (first, _) = SweepDirectory.of(tmp_path, "tiny"), build_points(experiment, SEED)
    held = lease(directory.run(first, SEED).lease(Node("train", "baseline")), "the point")
    with held, pytest.raises(BlockedError, match=f"{first.id} is "):
        sweep(experiment, tmp_path)
    assert not directory.best.exists()
    assert records.read_json(directory.table)["chosen"] == {}
    sweep(experiment, tmp_path)
    assert records.read_json(directory.table)["chosen"].keys() == {"baseline"}


def test_a_best_experiment_of_other_points_is_set_aside(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "runs"))
    arms = {"monotonic": {"training.lr": [5e-3]}, "baseline": {"training.lr": [5e-3]}}
    folder = sweep(tiny(sweep={"arms": arms}), out).root
    assert (folder / "best.yaml.set-aside-1").read_bytes() == (finished / "tiny/sweep/best.yaml").read_bytes()
