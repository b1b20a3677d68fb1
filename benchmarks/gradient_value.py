"""Measure what gradients are worth to an attack on the bundled model: the same budget with and without them.

    python benchmarks/gradient_value.py

HotFlip with gradients, HotFlip with the gradients of other positions, and coordinate search without any, its candidates
drawn or proposed by a regression on what was evaluated; search documents of the bundled corpus, k edits, equal tokens a
document. Printed is the mean Δ (nats per scored token), and the difference from HotFlip, paired by document, with a
95 % interval.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from oracle import PROTOCOL, pocket_windows

from isotone.attacks import CoordinateSearch, DocumentAttack, HotFlip, ShuffledHotFlip, Vocabulary, run_documents
from isotone.attacks.budget import forward_tokens, gradient_tokens
from isotone.config import Model
from isotone.models import load_model, load_tokenizer
from isotone.statistics import ratio_estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--flips", type=int, default=5)
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--data", type=Path, default=Path("/tmp/isotone-oracle"), help="where the corpus is packed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(Model()).float().eval()
    vocabulary = Vocabulary.from_tokenizer(load_tokenizer(Model()), model.get_input_embeddings().num_embeddings)
    windows = pocket_windows(args.data, args.documents)
    for candidates in args.candidates:
        length = PROTOCOL.length
        budget = args.flips * (gradient_tokens(1, length) + forward_tokens(candidates, length))
        print(f"{len(windows)} documents, {args.flips} flips, {candidates} candidates a gradient: {budget} tokens each")
        deltas = {}
        for name, attack in attacks(args.flips, candidates, budget).items():
            rows = run_documents(attack, model, vocabulary, windows, PROTOCOL)
            deltas[name] = np.array([row["delta_nats"] / row["scored_tokens"] for row in rows])
            against = ratio_estimate((deltas[name] - deltas["hotflip"])[None], np.ones(len(rows)))
            low, high = against.ci95 or (float("nan"), float("nan"))
            spent = max(row["spent_tokens"] for row in rows)
            print(
                f"{name:<10} Δ {deltas[name].mean():.4f}, against hotflip {against.value:+.4f} "
                f"[{low:+.4f}, {high:+.4f}], spent {spent}",
                flush=True,
            )


def attacks(flips: int, candidates: int, budget: int) -> dict[str, DocumentAttack]:
    """Return the attacks; coordinate search takes rounds of 8, more of them than there are gradients."""
    return {
        "hotflip": HotFlip(flips, candidates=candidates),
        "shuffled": ShuffledHotFlip(flips, candidates=candidates),
        "random": CoordinateSearch(flips, candidates=8, budget_tokens=budget),
        "surrogate": CoordinateSearch(flips, candidates=8, budget_tokens=budget, proposals="surrogate"),
    }


if __name__ == "__main__":
    main()
