"""Kill a run at random moments until every phase has been hit, and compare what it leaves with an uninterrupted run.

    python benchmarks/kill_campaign.py --per-phase 10

Phases: training, save (a checkpoint half written), evaluation, attack. Each restart is the same command. At the end all
results and checkpoints must be equal byte for byte, and every partial run must have exited with 75 (asked to stop) or
by the signal (killed). Exit code 1 names the differences.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PHASES = {
    "constrain": "training",
    "train": "training",
    "match": "evaluation",
    "evaluate": "evaluation",
    "triggers": "attack",
    "hotflip": "attack",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
NOT_COMPARED = {"records", "logs", "jobs", "leases", "work", "report.html", "timing.jsonl", "attempt.json"}
"""What holds times, hosts and process numbers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pocket-quick")
    parser.add_argument("--per-phase", type=int, default=10, help="SIGKILLs to land in each phase")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-campaign-") as folder:
        command = ["run", args.preset, *(part for item in args.set for part in ("--set", item))]
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        began = time.monotonic()
        subprocess.run([*isotone(), *command, "--out", whole], check=True)
        print(f"uninterrupted: {time.monotonic() - began:.0f} s", flush=True)
        landed = campaign([*isotone(), *command], whole, killed, args.per_phase, random.Random(args.seed))
        print("landed:", dict(sorted(landed.items())))
        problems = differences(whole, killed)
    print("\n".join(problems) or "equal, byte for byte")
    sys.exit(bool(problems))


def isotone() -> list[str]:
    """Return the command line of this Python's isotone."""
    return [sys.executable, "-m", "isotone"]


def campaign(command: list[str], whole: Path, killed: Path, per_phase: int, rng: random.Random) -> Counter[str]:
    """Start the run again and again, ending it at random moments, until enough SIGKILLs have landed in every phase.

    A round is one run from its beginning; when it completes before all phases have been hit, its results are compared
    and another round begins. Returns how often each (signal, phase) was hit.
    """
    landed: Counter[str] = Counter()
    wanted = {"training", "save", "evaluation", "attack"}
    while True:
        missing = sorted(phase for phase in wanted if landed[f"SIGKILL {phase}"] < per_phase)
        process = subprocess.Popen([*command, "--out", killed], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        target = rng.choice(missing) if missing else None
        number = rng.choice(SIGNALS) if rng.random() < 0.3 else signal.SIGKILL
        hit = end_in_phase(process, killed, target, number, rng) if target else None
        code = process.wait()
        if hit:
            landed[f"{number.name} {hit}"] += 1
            print(f"{number.name} in {hit}: exit {code}", flush=True)
            assert code in (-number, 75), f"exit {code} after {number.name} in {hit}"
        elif code:
            raise SystemExit(f"a run that was not interrupted exited with {code}")
        elif not missing:
            return landed
        else:
            if problems := differences(whole, killed):
                raise SystemExit("\n".join(problems))
            shutil.rmtree(killed)


def end_in_phase(
    process: subprocess.Popen[bytes], folder: Path, phase: str, number: signal.Signals, rng: random.Random
) -> str | None:
    """Send a signal at a random moment after a phase is seen; returns where it landed, None if the run ended first."""
    delay: float | None = None
    while process.poll() is None:
        now = phase_now(folder)
        if phase == "save":
            if now == "save":
                process.send_signal(number)
                return "save"
        elif now == phase:
            delay = rng.uniform(0, 3) if delay is None else delay
            time.sleep(min(delay, 0.05))
            delay -= 0.05
            if delay <= 0:
                now = phase_now(folder)
                process.send_signal(number)
                return now
        time.sleep(0.0005 if phase == "save" else 0.01)
    return None


def phase_now(folder: Path) -> str | None:
    """Return what a run is doing, from what it has written."""
    if any(folder.glob("*/seed-*/checkpoints/*/.step-*.tmp")):
        return "save"
    for log in folder.glob("*/seed-*/logs/attempts.jsonl"):
        lines = log.read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {}
        if last.get("outcome") == "started":
            return PHASES.get(last["node"].split(".")[0])
    return None


def differences(whole: Path, killed: Path) -> list[str]:
    """Compare two run folders byte for byte; returns a line for each difference."""
    ours = {p.relative_to(killed) for p in killed.rglob("*") if p.is_file() and compared(p.relative_to(killed))}
    theirs = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and compared(p.relative_to(whole))}
    problems = [f"only in one of the runs: {p}" for p in sorted(ours ^ theirs)]
    for path in sorted(ours & theirs):
        if (whole / path).read_bytes() != (killed / path).read_bytes():
            problems.append(f"differs: {path}")
    return problems


def compared(path: Path) -> bool:
    return not NOT_COMPARED & set(path.parts) and ".set-aside-" not in str(path) and ".lock" not in path.name


if __name__ == "__main__":
    main()
