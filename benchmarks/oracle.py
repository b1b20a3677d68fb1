"""Measure how much of an exhaustive search at one position other searches find with a share of its evaluations.

    python benchmarks/oracle.py --documents 16

For each document one attackable position is drawn, and every token of the vocabulary is written there and evaluated:
the oracle. A search that evaluates a share of them gains the largest change among those, or nothing. Printed is its
gain summed over documents over the oracle's: of the gradient's order; of the surrogate, that is drawn tokens at first
and then the ones that a regression on what was evaluated proposes (attacks/surrogate.py), the mean over seeds; and of
random orders (exact, from the distribution of the largest of a random subset). All evaluations count. Candidates are
all tokens of the model but the one that is there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from isotone import records
from isotone.attacks import PrefixProtocol, Vocabulary, Window
from isotone.attacks.interface import Problem
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.search import evaluate_pairs, gains_where, top_pairs
from isotone.attacks.surrogate import Evaluated, promising_pairs
from isotone.config import Data, Model
from isotone.data import prepare_data
from isotone.data.packed import open_packed
from isotone.determinism import stream_key
from isotone.interruption import StopFlag
from isotone.models import load_model, load_tokenizer

SHARES = (0.02, 0.06, 0.12, 0.25)
PROTOCOL = PrefixProtocol(64, 8, 64)
ROUND = 32
"""Tokens that are drawn at first, and then proposed at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--data", type=Path, default=Path("/tmp/isotone-oracle"), help="where the corpus is packed")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the positions")
    parser.add_argument("--seeds", type=int, default=5, help="of the surrogate's draws")
    parser.add_argument("--tables", type=Path, help="folder to keep each document's exhaustive search in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(Model()).float().eval()
    windows = pocket_windows(args.data, args.documents)
    found = {name: np.zeros(len(SHARES)) for name in ("gradient", "surrogate", "random")}
    oracle, correlations, above = 0.0, [], []
    for window in windows:
        tokens_N, changes_N = kept(model, window, args)
        counts = [max(1, round(share * len(changes_N))) for share in SHARES]
        oracle += max(0.0, changes_N.max())
        found["gradient"] += best_of(changes_N, counts)
        drawn = [surrogate_order(model, tokens_N, changes_N, counts[-1], seed) for seed in range(args.seeds)]
        of_seeds = [best_of(changes_N[order], counts) for order in drawn]
        found["surrogate"] += np.mean(of_seeds, axis=0)
        above.append(np.array(of_seeds))
        found["random"] += [expected_largest(changes_N, count) for count in counts]
        ranks = changes_N.argsort().argsort()
        correlations.append(np.corrcoef(-np.arange(len(ranks)), ranks)[0, 1])
    print(f"pocket model, {len(windows)} documents, one position each, {len(changes_N)} candidates, seed {args.seed}")
    print(f"mean rank correlation of first-order and true change: {np.mean(correlations):.3f}")
    print("share of the oracle's evaluations   " + "   ".join(f"{name:>9}" for name in found))
    for index, share in enumerate(SHARES):
        print(f"{share:>33.0%}   " + "   ".join(f"{gain[index] / oracle:>9.3f}" for gain in found.values()))
    pooled = np.sum(above, axis=0)[:, -1] / oracle
    print(f"surrogate at {SHARES[-1]:.0%}, {args.seeds} seeds of its draws: {pooled.min():.3f}…{pooled.max():.3f}")


def best_of(changes_N: np.ndarray, counts: list[int]) -> list[float]:
    """Return the gain of the first so many evaluations."""
    return [max(0.0, changes_N[:count].max()) for count in counts]


def surrogate_order(
    model: torch.nn.Module, tokens_N: np.ndarray, changes_N: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Return which of the candidates the surrogate evaluates, in order; it is told the changes of those alone."""
    embeddings_VD = model.get_input_embeddings().weight.detach()  # type: ignore[operator, union-attr]
    number = len(embeddings_VD)
    [current] = set(range(number)) - set(tokens_N.tolist())
    place_V = np.zeros(number, dtype=np.int64)
    place_V[tokens_N] = np.arange(len(tokens_N))
    order = np.random.default_rng(seed).choice(len(tokens_N), ROUND, replace=False).tolist()
    while len(order) < count:
        tried = torch.zeros(len(order), dtype=torch.int64), torch.from_numpy(tokens_N[order])
        _, proposed = promising_pairs(
            embeddings_VD,
            admissible_V=torch.ones(number, dtype=torch.bool),
            current_P=torch.tensor([current]),
            allowed_P=torch.tensor([True]),
            evaluated=Evaluated(*tried, torch.from_numpy(changes_N[order])),
            tried=tried,
            count=ROUND,
        )
        order += place_V[proposed.numpy()].tolist()
    return np.array(order[:count])


def kept(model: torch.nn.Module, window: Window, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return ``changes_by_rank``, from where it was kept if it was."""
    if args.tables is None:
        return changes_by_rank(model, window, args.seed, args.batch)
    path = args.tables / f"{records.hash_json([window.id, window.tokens.tolist(), args.seed])[:16]}.npz"
    if not path.is_file():
        args.tables.mkdir(parents=True, exist_ok=True)
        tokens_N, changes_N = changes_by_rank(model, window, args.seed, args.batch)
        np.savez(path, tokens_N=tokens_N, changes_N=changes_N)
    table = np.load(path)
    return table["tokens_N"], table["changes_N"]


def changes_by_rank(
    model: torch.nn.Module, window: Window, seed: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return tokens, best-ranked by gradient first, and how each changes the loss at the document's position, nats."""
    position = int(np.random.default_rng(stream_key(seed, f"oracle {window.id}")).choice(np.array(PROTOCOL.attackable)))
    text_1L = torch.from_numpy(window.tokens)[None]
    with frozen(model):
        target = Target(model, PROTOCOL.scored, batch)
        problem = Problem(target, PROTOCOL, Vocabulary.all_ids(len(target.embeddings_VD)))
        gradient = target.gradient(text_1L, keep_cache=True)
        allowed_P = torch.arange(len(PROTOCOL.attackable)) == position - PROTOCOL.attackable.start
        pairs = top_pairs(gains_where(problem, gradient.grad_BLD[0], text_1L[0], allowed_P), 10**9)
        [nats_N] = evaluate_pairs(problem, text_1L, gradient.layers, [pairs])
    return pairs[1].numpy(), (nats_N - gradient.nats_B[0]).numpy()


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
