"""Measure how much of an exhaustive search at one position gradient-ranked and random candidates find.

    python benchmarks/oracle.py --documents 16

For each document one attackable position is drawn, and every token of the vocabulary is written there and evaluated:
the oracle. A method that evaluates a share of them gains the largest change among those, or nothing. Printed is its
gain summed over documents over the oracle's, with the gradient's order and as the mean over random orders (exact, from
the distribution of the largest of a random subset). Candidates are all tokens of the model but the one that is there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from isotone.attacks import PrefixProtocol, Vocabulary, Window
from isotone.attacks.interface import Problem
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.search import evaluate_pairs, gains_where, top_pairs
from isotone.config import Data, Model
from isotone.data import prepare_data
from isotone.data.packed import open_packed
from isotone.determinism import stream_key
from isotone.interruption import StopFlag
from isotone.models import load_model, load_tokenizer

SHARES = (0.02, 0.06, 0.12, 0.25)
PROTOCOL = PrefixProtocol(64, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--data", type=Path, default=Path("/tmp/isotone-oracle"), help="where the corpus is packed")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(Model()).float().eval()
    windows = pocket_windows(args.data, args.documents)
    gradient, random = np.zeros(len(SHARES)), np.zeros(len(SHARES))
    oracle, correlations = 0.0, []
    for window in windows:
        changes_N = changes_by_rank(model, window, args.seed, args.batch)
        counts = [max(1, round(share * len(changes_N))) for share in SHARES]
        oracle += max(0.0, changes_N.max())
        gradient += [max(0.0, changes_N[:count].max()) for count in counts]
        random += [expected_largest(changes_N, count) for count in counts]
        ranks = changes_N.argsort().argsort()
        correlations.append(np.corrcoef(-np.arange(len(ranks)), ranks)[0, 1])
    print(f"pocket model, {len(windows)} documents, one position each, {len(changes_N)} candidates, seed {args.seed}")
    print(f"mean rank correlation of first-order and true change: {np.mean(correlations):.3f}")
    print("share of the oracle's evaluations   gradient-ranked   random")
    for share, ranked, drawn in zip(SHARES, gradient / oracle, random / oracle, strict=True):
        print(f"{share:>33.0%}   {ranked:>15.3f}   {drawn:>6.3f}")


def changes_by_rank(model: torch.nn.Module, window: Window, seed: int, batch: int) -> np.ndarray:
    """Return the change of loss by each token at the document's position, in nats, best-ranked by gradient first."""
    position = int(np.random.default_rng(stream_key(seed, f"oracle {window.id}")).choice(np.array(PROTOCOL.attackable)))
    text_1L = torch.from_numpy(window.tokens)[None]
    with frozen(model):
        target = Target(model, PROTOCOL.scored, batch)
        problem = Problem(target, PROTOCOL, Vocabulary.all_ids(len(target.embeddings_VD)))
        gradient = target.gradient(text_1L, keep_cache=True)
        allowed_P = torch.arange(len(PROTOCOL.attackable)) == position - PROTOCOL.attackable.start
        pairs = top_pairs(gains_where(problem, gradient.grad_BLD[0], text_1L[0], allowed_P), 10**9)
        [nats_N] = evaluate_pairs(problem, text_1L, gradient.layers, [pairs])
    return (nats_N - gradient.nats_B[0]).numpy()


def expected_largest(changes_N: np.ndarray, count: int) -> float:
    """Return the mean over all subsets of ``count`` of the largest change in them, nothing where all are negative."""
    ordered_N = np.maximum(np.sort(changes_N), 0)
    number = len(ordered_N)
    # P(the largest of the subset is the i-th smallest) = C(i − 1, count − 1) / C(number, count), by its ratios
    probability, mean = count / number, 0.0
    for i in range(number, count - 1, -1):
        mean += probability * ordered_N[i - 1]
        probability *= (i - count) / (i - 1) if i > 1 else 0
    return float(mean)


def pocket_windows(folder: Path, num_documents: int, protocol: PrefixProtocol = PROTOCOL) -> list[Window]:
    """Return search documents of the bundled corpus, cut to a protocol; packs it first where it is not yet."""
    if not (folder / "dataset.json").is_file():
        prepare_data(Data(), load_tokenizer(Model()), folder, max_context=256, stop=StopFlag())
    documents = open_packed(folder).documents("attack_search").shuffled(0)
    return protocol.cut(documents, num_documents)[0]


if __name__ == "__main__":
    main()
