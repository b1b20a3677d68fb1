"""A sweep on a real Slurm: an element that is interrupted goes on under its number, and the table comes last."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_sweep import FRACTIONS, corpus, make_model

from isotone import records
from isotone.config_io import dump_yaml, experiment_from_dict

from .conftest import isotone
from .slurm_cluster import SlurmCluster, wait_for
from .test_slurm import CHAIN_S, SITE

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_campaign import differences

pytestmark = pytest.mark.integration
SCOPES = ["mlp_both", "gated_all"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if os.geteuid() != 0 or not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("needs root and Debian's slurm-wlm: bash scripts/install_test_packages.sh")
    found = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


def test_an_interrupted_element_goes_on_and_the_bytes_are_those_of_one_process(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    tree = {
        "name": "tiny",
        "model": {"source": str(make_model(tmp_path / "model"))},
        "data": {
            "source": str(corpus(tmp_path / "documents.jsonl", {})),
            "sequence_length": 32,
            "fractions": FRACTIONS,
        },
        "training": {"epochs": 20, "micro_batch": 4, "accumulation": 1, "validation_rows": 2, "save_every_steps": 20},
        "attacks": {"protocol": {"prefix": 16, "gap": 4, "continuation": 16}},
        "runtime": {"threads": 1, "device": "cpu"},
        "sweep": {"arms": {"baseline": {"training.lr": [1e-3]}, "monotonic": {"constraint.scope": SCOPES}}},
    }
    file, site, out = tmp_path / "tiny.yaml", tmp_path / "site.yaml", tmp_path / "cluster"
    file.write_text(dump_yaml(experiment_from_dict(tree)))
    site.write_text(SITE.format(python=sys.executable).replace('"2:00"', '"20:00"'))
    command = ("sweep", file, "--seed", 7, "--site", site, "--out", out)
    done = isotone(*command, "--slurm", **cluster.environment)
    assert done.returncode == 0, done.stderr
    elements = dict(re.findall(r"^(\S+): job (\d+_\d+)$", done.stdout, re.MULTILINE))
    assert len(elements) == 3
    table = re.findall(r"-table: job (\d+)$", done.stdout, re.MULTILINE)[0]
    first = out / f"tiny/sweep/{next(iter(elements))}-seed-7"
    wait_for(lambda: any(first.glob("checkpoints/*/step-*")), CHAIN_S, "a checkpoint of the first point")
    cluster.run("scancel", "--signal=USR1", "--batch", elements[next(iter(elements))], check=True)
    shown = isotone("status", out / "tiny/sweep", **cluster.environment)
    assert f"job {table}" in shown.stdout, shown.stderr
    wait_for(lambda: not cluster.jobs(), CHAIN_S, f"the end of the sweep: {cluster.jobs()}")
    ends = [line for line in records.JsonLines(first / "logs/jobs.jsonl").read() if line["stage"] == "points"]
    assert [line["code"] for line in ends] == [75, 0], ends
    assert {line["job_id"] for line in ends} == {elements[next(iter(elements))]}
    attempts = [entry.get("outcome") for entry in records.JsonLines(first / "logs/attempts.jsonl").read()]
    assert "partial" in attempts, attempts  # the signal was heard, and what was done by then was saved
    sweep = records.read_json(out / "tiny/sweep/sweep.json")
    assert [p["state"] for p in sweep["points"]] == ["complete", "complete", "refused"]
    assert (out / "tiny/sweep/best.yaml").is_file()
    assert isotone("sweep", file, "--seed", 7, "--out", tmp_path / "alone").returncode == 0
    assert [d for d in differences(tmp_path / "alone", out) if "experiment.yaml" not in d] == []
    again = isotone(*command, "--slurm", **cluster.environment)
    assert not re.findall(r"job \d+", again.stdout), again.stdout  # all is at its end, what was refused as well
