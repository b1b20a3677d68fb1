"""A plan names what does not fit, says what would, and never calls safe what nobody could check."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from isotone import records
from isotone.cli import app
from isotone.config_io import dump_yaml, load_experiment
from isotone.environment import memory_bytes
from isotone.errors import UsageError
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.record import write_record
from isotone.pipeline.run_directory import RunDirectory
from isotone.planning import limits
from isotone.planning.plan import Plan, make_plan
from isotone.planning.rates import Rates, keep, rates_key
from isotone.planning.row import MARGIN, judged
from isotone.planning.shape import read_shape
from isotone.planning.table import format_plan

ENOUGH = ["cluster.max_time=48:00:00", "cluster.device.memory=80G"]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def founding(*overrides: str, tokens: str | None = None, preset: str = "pythia-1.4b") -> Plan:
    return make_plan(load_experiment(preset, overrides), "founding", tokens=tokens)


def row_of(plan: Plan, stage: str, resource: str) -> Any:
    return next(row for row in plan.rows if (row.stage, row.resource) == (stage, resource))


def test_the_founding_table_has_exactly_its_three_faults() -> None:
    plan = founding()
    assert {(row.stage, row.resource) for row in plan.unsafe} == {
        ("train_monotonic", "time limit"),
        ("train_baseline", "device memory"),
        ("train_monotonic", "device memory"),
        ("train_baseline", "time"),
        ("train_monotonic", "time"),
    }
    text = " ".join(format_plan(plan).split())
    assert "train_monotonic, time limit: 32 h asked for, the partition allows 24 h" in text
    assert "train_baseline, time: 236 days expected, the limit is 24 h" in text
    assert "expected, the device has 40G" in text


@pytest.mark.parametrize(
    "hours", [[], [f"cluster.stages.train_{arm}.time=48:00:00" for arm in ("baseline", "monotonic")]]
)
def test_two_days_eighty_gigabytes_and_a_billion_tokens_are_enough(hours: list[str]) -> None:
    assert founding(*ENOUGH, *hours, tokens="1B").unsafe == []


def test_advice_makes_an_unsafe_device_safe() -> None:
    advice = row_of(founding(), "train_monotonic", "device memory").advice
    values = [part.strip().partition(" (")[0] for part in advice.partition(", or ")[0].split(",")]
    assert "training.gradient_checkpointing: true" in values
    changed = founding(*[value.replace(": ", "=") for value in values])
    assert row_of(changed, "train_monotonic", "device memory").safe


def test_advice_makes_an_unsafe_time_safe() -> None:
    advice = row_of(founding(), "train_baseline", "time").advice
    tokens = advice.removeprefix("at most ").partition(" ")[0]
    assert row_of(founding(tokens=tokens), "train_baseline", "time").expected < 24 * 3600


def test_what_is_not_known_is_neither_safe_nor_unsafe() -> None:
    row = judged("train_baseline", "time", 10.0, None, "computed")
    assert (row.margin, row.safe) == (None, None)
    assert row_of(founding(), "train_baseline", "disk").safe is None, "a shipped site is not this machine's disk"


def test_a_margin_too_small_is_unsafe_and_a_lower_bound_is_never_safe() -> None:
    assert judged("evaluate", "time", 100 * (1 - MARGIN) + 0.1, 100, "").safe is False
    assert judged("evaluate", "time", 100 * (1 - MARGIN) - 0.1, 100, "").safe is True
    assert judged("evaluate", "time", 1, 100, "", firm=False).safe is None
    assert judged("evaluate", "time", 101, 100, "", firm=False).safe is False
    assert judged("setup", "time", 1000, 100, "", firm=None).safe is None


def test_attacks_are_judged_once_their_rate_in_fp32_is_stated() -> None:
    bounded, stated = founding(), founding("cluster.device.peak_tflops_fp32=19.5")
    assert row_of(bounded, "triggers", "time").safe is None
    assert row_of(stated, "triggers", "time").expected > 10 * row_of(bounded, "triggers", "time").expected
    assert row_of(stated, "triggers", "time").safe is False


def test_more_devices_divide_the_time_of_training_only() -> None:
    one, four = founding(), founding("cluster.gpus=4")
    assert row_of(four, "train_baseline", "time").expected == row_of(one, "train_baseline", "time").expected / 4
    assert row_of(four, "triggers", "time").expected == row_of(one, "triggers", "time").expected


def test_what_the_profile_expects_goes_before_what_is_computed() -> None:
    plan = founding("cluster.stages.evaluate.expected_time=10:00:00", "cluster.stages.evaluate.expected_memory=100G")
    assert row_of(plan, "evaluate", "time").expected == 36_000
    assert row_of(plan, "evaluate", "host memory").safe is False


def test_every_unsafe_row_says_what_would_make_it_safe() -> None:
    long = [f"cluster.stages.{stage}.expected_time=20-00" for stage in ("setup", "evaluate", "train_baseline")]
    plan = founding("cluster.memory=1G", "cluster.free_disk=1G", *long)
    assert {row.resource for row in plan.unsafe} == {"time", "time limit", "host memory", "device memory", "disk"}
    assert all(row.advice for row in plan.unsafe)


def test_the_critical_path_goes_through_the_slowest_measure() -> None:
    plan = founding()
    path = row_of(plan, "critical path", "time")
    assert path.origin.startswith("setup → constrain → train_monotonic → triggers → aggregate")
    stages = ["setup", "constrain", "train_monotonic", "triggers", "aggregate"]
    assert path.expected == pytest.approx(sum(row_of(plan, stage, "time").expected for stage in stages))


def test_seeds_multiply_the_total_and_the_disk_but_share_the_setup() -> None:
    experiment = load_experiment("pythia-1.4b")
    one, two = (make_plan(experiment, "founding", seeds=seeds, tokens="1B") for seeds in ([1], [1, 2]))
    assert row_of(two, "total", "device time").expected == 2 * row_of(one, "total", "device time").expected
    assert row_of(two, "setup", "disk").expected == row_of(one, "setup", "disk").expected
    assert row_of(two, "train_baseline", "disk").expected < 2 * row_of(one, "train_baseline", "disk").expected


def test_a_laptop_without_slurm_is_told_its_own_memory_and_disk(tmp_path: Path) -> None:
    plan = make_plan(load_experiment("pocket"), None, tmp_path)
    assert row_of(plan, "train_baseline", "disk").safe
    assert row_of(plan, "train_baseline", "host memory").limit == memory_bytes()
    assert row_of(plan, "train_baseline", "time").limit is None
    assert "--measure" in row_of(plan, "train_baseline", "time").origin


def test_a_finished_arm_says_how_long_the_other_takes(tmp_path: Path) -> None:
    experiment = load_experiment("pocket", ["runtime={device: cpu, threads: 1}", "training.precision=fp32"])
    run, graph = RunDirectory.of(tmp_path, "pocket", 42), Graph(experiment)
    records.write_text(run.config, dump_yaml(experiment, defaults=True))
    for node, seconds in ((Node("setup"), 7.0), (Node("train", "baseline"), 100.0)):
        output = run.root / f"{node}.txt"
        records.write_text(output, str(node))
        write_record(run, graph, experiment, 42, node, [output], {"seconds": seconds})
    plan = make_plan(experiment, None, tmp_path)
    assert row_of(plan, "setup", "time").expected == 7
    assert row_of(plan, "train_monotonic", "time").expected == 100
    assert row_of(plan, "evaluate", "time").expected is None
    longer = experiment.model_copy(update={"training": experiment.training.model_copy(update={"epochs": 2.0})})
    assert row_of(make_plan(longer, None, tmp_path), "train_baseline", "time").expected is None, "of other values"


def test_measured_rates_are_kept_and_used(tmp_path: Path) -> None:
    experiment = load_experiment("pocket", ["runtime={device: cpu, threads: 1}", "training.precision=fp32"])
    shape = read_shape(experiment.model)
    key = rates_key(experiment, shape, "cpu", "fp32", 1)
    keep(key, Rates(1e11, 1e11, 1e11, 1e9, 1e8, 1e8, 1e6, 0.1, 0.1, 3.0, 4e8))
    slow = row_of(make_plan(experiment, None, tmp_path), "triggers", "time").expected
    keep(key, Rates(2e11, 2e11, 2e11, 1e9, 1e8, 1e8, 1e6, 0.1, 0.1, 3.0, 4e8))
    fast = row_of(make_plan(experiment, None, tmp_path), "triggers", "time")
    assert slow / 2 < fast.expected < 0.6 * slow
    assert "measured here" in fast.origin


def test_sinfo_is_asked_for_a_partition_that_the_profile_says_nothing_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sinfo").write_text('#!/bin/sh\necho "gpu* 1-00:00:00"\n')
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = load_experiment("pocket", ["cluster.time=32:00:00"]).cluster
    assert limits.partition_maximum(cluster, None, here=True) == 86_400
    assert limits.partition_maximum(cluster, None, here=False) is None


def test_json_has_a_row_for_every_stage_and_resource_and_exit_code_3() -> None:
    result = CliRunner().invoke(app, ["plan", "pythia-1.4b", "--site", "founding", "--json"])
    assert result.exit_code == 3
    rows = json.loads(result.stdout)
    assert all({"stage", "resource", "expected", "limit", "margin", "safe"} <= row.keys() for row in rows)
    assert {row["resource"] for row in rows if row["stage"] == "train_baseline"} == {
        "time",
        "time limit",
        "host memory",
        "device memory",
        "disk",
    }


def test_a_safe_plan_exits_with_0() -> None:
    settings = [word for value in ENOUGH for word in ("--set", value)]
    result = CliRunner().invoke(app, ["plan", "pythia-1.4b", "--site", "founding", "--tokens", "1e9", *settings])
    assert result.exit_code == 0
    assert "0 of" in result.stdout.splitlines()[-1]


def test_the_table_fits_100_columns() -> None:
    table = format_plan(founding()).partition("UNSAFE train_baseline, time")[0]
    assert max(map(len, table[table.index("stage  ") :].partition("\n\n")[0].splitlines())) <= 100


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from isotone.cli import run_command_line; from isotone.interruption import StopFlag; "
        "code = run_command_line(['plan', 'pythia-1.4b', '--site', 'founding'], StopFlag()); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 3


@pytest.mark.parametrize("text", ["0", "many", "-1e9", "1e99", "1Q"])
def test_tokens_that_are_no_number_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--tokens"):
        founding(tokens=text)


def test_an_unknown_corpus_is_answered_with_what_to_give() -> None:
    with pytest.raises(UsageError, match="give --tokens N"):
        founding("data.source=someone/corpus")
