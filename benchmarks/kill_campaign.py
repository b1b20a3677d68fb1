"""Kill a run at random moments until every phase has been hit, and compare what it leaves with an uninterrupted run.

    python benchmarks/kill_campaign.py --per-phase 10

Phases: training, save (a checkpoint half written), evaluation, attack. Each restart is the same command. At the end all
results and checkpoints must be equal byte for byte, and every partial run must have exited with 75 (asked to stop) or
by the signal (killed). Exit code 1 names the differences. To make it shorter: --set runtime.threads=1
--set training.epochs=0.01 --set evaluation.num_documents=3 --set attacks.num_documents=4
--set attacks.num_search_documents=3 --set attacks.triggers.iterations=2
"""

import argparse
import json
import math
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
    "training": {"constrain", "train"},
    "save": {"constrain", "train"},
    "evaluation": {"evaluate"},
    "attack": {"triggers", "hotflip"},
}
"""Kinds of nodes in which each phase is met."""
LONGEST_SAVE_S = 0.15
"""A strike at a save comes within so many seconds after its folder has been seen."""
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
    durations_s = node_durations_s(whole)
    while True:
        missing = {phase for phase in PHASES if landed[f"SIGKILL {phase}"] < per_phase}
        open_nodes = [node for node in durations_s if not any(killed.glob(f"*/seed-*/records/{node}.json"))]
        target = choose_target(open_nodes, missing, rng)
        number = rng.choice(SIGNALS) if rng.random() < 0.3 else signal.SIGKILL
        began = Began(killed)
        process = subprocess.Popen([*command, "--out", killed], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        hit = target and end_at(process, began, *target, durations_s[target[0]], number, rng)
        code = process.wait()
        if hit and code != 0:  # 0: it had just come to its end
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
            print("a round is complete and equal", flush=True)
            shutil.rmtree(killed)


def node_durations_s(whole: Path) -> dict[str, float]:
    """Return how long each node of an uninterrupted run took, in the order in which they ran."""
    lines = next(whole.glob("*/seed-*/logs/attempts.jsonl")).read_text().splitlines()
    ended = [entry for entry in map(json.loads, lines) if entry["outcome"] == "complete"]
    return {entry["node"]: entry["ended"] - entry["started"] for entry in ended}


def choose_target(open_nodes: list[str], missing: set[str], rng: random.Random) -> tuple[str, str] | None:
    """Choose a node to strike, and a phase in it: mostly the next node, so that a round takes many kills."""
    for node in open_nodes:
        if (phases := sorted(missing & offered(node))) and rng.random() < 2 / 3:
            return node, rng.choice(phases)
    return None


def offered(node: str) -> set[str]:
    """Return the phases that a node goes through."""
    return {phase for phase, kinds in PHASES.items() if node.split(".")[0] in kinds}


class Began:
    """What lay in a run's folder when a process began: what an earlier kill left behind says nothing about this one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._leftovers = self._unpublished()

    def node_and_phase(self, pid: int) -> tuple[str | None, str | None]:
        """Return which node the process works on and in which phase, from what it has written; None: in none yet."""
        unpublished = self._unpublished()
        self._leftovers &= unpublished  # swept; the next one of that name is this process's own
        node = None
        for log in self.folder.glob("*/seed-*/logs/attempts.jsonl"):
            *_, last = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] or [{}]
            if last.get("pid") == pid and last["outcome"] == "started":
                node = last["node"]
        if unpublished - self._leftovers:
            return node, "save"
        return node, next(
            (phase for phase in ("training", "evaluation", "attack") if node and phase in offered(node)), None
        )

    def _unpublished(self) -> set[Path]:
        return set(self.folder.glob("*/seed-*/checkpoints/*/.step-*.tmp"))


def end_at(
    process: subprocess.Popen[bytes],
    began: Began,
    node: str,
    phase: str,
    duration_s: float,
    number: signal.Signals,
    rng: random.Random,
) -> str | None:
    """Send a signal at a random moment of a node's phase; returns where it landed, None if the run ended first."""
    strike_at = math.inf
    while process.poll() is None:
        now = began.node_and_phase(process.pid)
        if strike_at == math.inf and now[1] == phase and (phase == "save" or now[0] == node):
            strike_at = time.monotonic() + rng.uniform(0, LONGEST_SAVE_S if phase == "save" else duration_s)
        if time.monotonic() >= strike_at:
            process.send_signal(number)
            return now[1] or "another stage"
        time.sleep(0.001 if phase == "save" else 0.005)
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
