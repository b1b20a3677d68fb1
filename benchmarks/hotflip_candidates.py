"""Compare how many candidates HotFlip evaluates at one position, on search documents of a finished run.

    python benchmarks/hotflip_candidates.py runs/pocket

The documents that results are made of are not touched. Prints the mean Δ (nats per scored token) of each bound, and its
difference from no bound, paired by document, with a 95 % interval.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotone.attacks import HotFlip, run_documents
from isotone.config_io import load_experiment
from isotone.data.packed import open_packed
from isotone.interruption import StopFlag
from isotone.pipeline.arms import attack_vocabulary, attacked_windows, first_token, load_end, prefix_protocol
from isotone.pipeline.context import Context
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.status import seed_of
from isotone.statistics import ratio_estimate
from isotone.training.budget import Budget

BOUNDS = (1, 2, 4, None)
"""Candidates at one position; None: as many as are evaluated in all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--arm", default="baseline")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    deltas = measure(args.run, args.arm)
    print(f"no bound: Δ {deltas[None].mean():.4f}")
    for bound in BOUNDS[:-1]:
        values = deltas[bound]
        against = ratio_estimate((values - deltas[None])[None], np.ones(len(values)))
        low, high = against.ci95 or (float("nan"), float("nan"))
        print(
            f"{bound}: Δ {values.mean():.4f}, {against.value / deltas[None].mean():+.1%} of no bound "
            f"(difference {against.value:+.4f} [{low:+.4f}, {high:+.4f}], {len(values)} documents)"
        )


def measure(folder: Path, arm: str) -> dict[int | None, np.ndarray]:
    """Return the Δ of each document, nats per scored token, for every bound."""
    run = RunDirectory.find(folder)
    experiment = load_experiment(run.config)
    context = Context(
        experiment, Graph(experiment), run, seed_of(run), Node("hotflip", arm), StopFlag(), Budget(), print
    )
    model, config = load_end(context, arm, experiment.attacks.checkpoint), experiment.attacks
    windows, _ = attacked_windows(context, open_packed(run.data), "attack_search", first_token(context))
    found: dict[int | None, np.ndarray] = {}
    for bound in BOUNDS:
        attack = HotFlip(
            flips=config.hotflip.flips,
            candidates=config.hotflip.candidates,
            per_position=bound or config.hotflip.candidates,
        )
        rows: list[dict[str, Any]] = run_documents(
            attack,
            model,
            attack_vocabulary(context, model),
            windows,
            prefix_protocol(context),
            batch_documents=config.batch_documents,
        )
        found[bound] = np.array([row["delta_nats"] / row["scored_tokens"] for row in rows])
        print(f"{bound or 'no bound'}: measured", flush=True)
    return found


if __name__ == "__main__":
    main()
