"""The job scripts that are kept for comparison: two stages for each of three site profiles.

python tests/slurm/golden_scripts.py    writes them anew
"""

from dataclasses import replace
from pathlib import Path

from isotone.cluster import Cluster
from isotone.config_io import load_experiment
from isotone.slurm.chain import build_chain
from isotone.slurm.script import render
from isotone.slurm.site import load_cluster

FOLDER = Path(__file__).parent
PROFILES = ("minimal", "university", "many_gpus")
STAGES = ("setup", "train_monotonic")
PROJECT, PYTHON = Path("/project/nlp"), "/project/nlp/.venv/bin/python"


def rendered(profile: str) -> dict[str, str]:
    """Return all scripts of a fixed experiment and place, by file name."""
    cluster = load_cluster(str(FOLDER / "profiles" / f"{profile}.yaml"), Cluster())
    links = build_chain(load_experiment("pythia-1.4b"), cluster, [42], PROJECT / "runs")
    jobs = [replace(link.job, project=PROJECT, python=PYTHON) for link in links]
    return {job.file.name: render(job, cluster) for job in jobs}


def golden(profile: str) -> dict[str, Path]:
    """Return where the kept scripts of a profile lie, by file name."""
    names = {"setup": "job_0_setup.sh", "train_monotonic": "job_3_monotonic.sh"}
    return {names[stage]: FOLDER / "golden" / profile / names[stage] for stage in STAGES}


if __name__ == "__main__":
    for each in PROFILES:
        scripts = rendered(each)
        for name, path in golden(each).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(scripts[name])
