"""Measure attacks against rivals of the same configuration, which is printed beside ours, and their memory.

    python benchmarks/attack_speed.py plain      plain HotFlips, one text at a time: texts per second, same edits
    python benchmarks/attack_speed.py nanogcg --nanogcg FOLDER    nanoGCG 0.3.0: candidates per second and loss
    python benchmarks/attack_speed.py triggers   random proposals: tokens to the loss that they reach
    python benchmarks/attack_speed.py memory     peak memory of a GCG step on a 135M-parameter shape

nanoGCG is not installed into isotone's environment, since it asks for other versions of what that has:
``pip install --no-deps nanogcg==0.3.0 --target FOLDER``. Rivals work in turns (A B A B) on one thread, so that a
machine that slows down slows both; times are the process's own CPU seconds, and ratios are medians of the turns'.
Everything but ``memory`` is on the bundled model: ``plain`` on random tokens, ``triggers`` on the bundled corpus.
"""

import argparse
import contextlib
import io
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle import pocket_windows
from rivals import plain_hotflip
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from isotone.attacks import GCG, HotFlip, PrefixProtocol, UniversalTriggers, Vocabulary, Window
from isotone.attacks.budget import forward_tokens
from isotone.attacks.interface import Problem
from isotone.attacks.running import run_documents
from isotone.attacks.scoring import Gradient, Layers, Target, frozen
from isotone.attacks.triggers import TriggerLayout, TriggerProblem, on_all
from isotone.config import Model
from isotone.models import load_model, load_tokenizer

TARGETS = (
    ("In", " the beginning God created the heavens and the earth."),
    ("The", " quick brown fox jumps over the lazy dog, and nobody knows why."),
    ("A", " child opened the old book and began to read aloud to the children."),
)
"""What nanoGCG and GCG start from, one token each, and the text that is to follow."""
EDITS_SHARE = 0.95
"""Documents in which both HotFlips must find the same edits: sums in another order decide near ties otherwise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plain", "nanogcg", "triggers", "memory"))
    parser.add_argument("--documents", type=int, default=8, help="plain: texts a turn")
    parser.add_argument("--methods", nargs="+", choices=("once", "iterative"), default=["once", "iterative"])
    parser.add_argument("--flips", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--nanogcg", type=Path, help="folder that nanoGCG was installed into")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--proposals", type=int, default=3000)
    parser.add_argument("--data", type=Path, default=Path("/tmp/isotone-oracle"), help="where the corpus is packed")
    parser.add_argument("--seeds", type=int, default=3, help="nanogcg, triggers")
    parser.add_argument("--first-seed", type=int, default=0, help="triggers")
    parser.add_argument("--text-tokens", type=int, default=136, help="triggers: of each text")
    parser.add_argument("--searches", nargs="+", default=["surrogate", "gradient", "gradient-100"], help="triggers")
    parser.add_argument(
        "--limit", type=float, default=2.0, help="triggers: give up at so many times the rival's tokens"
    )
    parser.add_argument("--texts", type=int, default=len(TARGETS), help="nanogcg: of the targets")
    parser.add_argument("--evaluate", type=int, help="memory: stop after so many of the candidates")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"plain": plain, "nanogcg": nanogcg, "triggers": triggers, "memory": memory}[args.what](args)


def plain(args: argparse.Namespace) -> None:
    """Compare with the plain HotFlip."""
    protocol, model = PrefixProtocol(64, 8, 64), pocket()
    windows = random_windows(args.documents, protocol.length)
    vocabulary = Vocabulary.all_ids(model.config.vocab_size)
    texts, where = [torch.from_numpy(window.tokens) for window in windows], (protocol.attackable, protocol.scored)
    iterative: dict[str, Any] = {"flips": args.flips, "candidates": args.candidates, "per_position": 2}
    shared: dict[str, dict[str, Any]] = {"once": {"flips": args.flips}, "iterative": iterative}
    for method in args.methods:
        ours, rival = HotFlip(**shared[method], method=method), getattr(plain_hotflip, method)

        def isotones(ours: HotFlip = ours) -> list[Any]:
            return [row["edits"] for row in run_documents(ours, model, vocabulary, windows, protocol)]

        def plains(method: str = method, rival: Any = rival) -> list[Any]:
            found = [rival(model, text_L, *where, **shared[method]) for text_L in texts]
            return [edits for edits, _, _ in found] if method == "once" else found

        print(f"isotone: {ours}, {protocol}, {len(windows)} texts, judged, fp32, 1 thread")
        print(f"plain:   {method}, {shared[method]}, {where}, {len(windows)} texts, fp32, 1 thread")
        seconds, results = in_turns({"isotone": isotones, "plain": plains}, args.turns)
        same = sum(a == b for a, b in zip(results["isotone"], results["plain"], strict=True))
        print(f"same edits in {same} of {len(windows)} texts")
        report(seconds, len(windows), "texts", "isotone", "plain")
        if same < EDITS_SHARE * len(windows):
            sys.exit("the two do not find the same edits: not a comparison")


def nanogcg(args: argparse.Namespace) -> None:
    """Compare with nanoGCG: both lower the loss of the same target after the same tokens."""
    sys.path.insert(0, str(args.nanogcg))
    import nanogcg.gcg as rival

    rival.logger.disabled = True
    model, tokenizer = pocket(), load_tokenizer(Model())
    ratios, losses = [], []
    for start, target in TARGETS[: args.texts]:
        for seed in range(args.seeds):
            ratio, loss = against_nanogcg(rival, model, tokenizer, (start, " x" * 20, target), seed, args)
            ratios.append(ratio)
            losses.append(loss)
    differences = [ours - theirs for ours, theirs in losses]
    print(
        f"{len(ratios)} comparisons: {statistics.median(ratios):.2f} times nanoGCG's candidates per CPU second "
        f"({min(ratios):.2f}…{max(ratios):.2f}); loss isotone − nanogcg: mean {statistics.mean(differences):+.4f} "
        f"({min(differences):+.4f}…{max(differences):+.4f}) nats per token, "
        f"same or better in {sum(difference <= 0 for difference in differences)}"
    )


def against_nanogcg(
    rival: Any, model: Any, tokenizer: Any, texts: tuple[str, str, str], seed: int, args: argparse.Namespace
) -> tuple[float, tuple[float, float]]:
    """Return isotone's candidates per second over nanoGCG's, and both losses of the target in nats per token."""
    start, init, target = texts
    before, optimized, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    protocol = PrefixProtocol(len(before) + len(optimized), 0, len(after))
    assert len(before) == 1, "the protocol leaves exactly the first token alone"
    config = rival.GCGConfig(
        num_steps=args.steps, optim_str_init=init, search_width=args.width, topk=args.top_k, use_prefix_cache=False,
        allow_non_ascii=True, filter_ids=False, seed=seed, verbosity="ERROR",
    )  # fmt: skip
    ours = GCG(flips=len(optimized), top_k=args.top_k, candidates=args.width, steps=args.steps, seed=seed)
    text_1L = torch.tensor([before + optimized + after])
    print(f"isotone: {ours}, loss of the target lowered, batches of 16")
    print(f"nanogcg: {config}")
    print(f"both: {len(before)} + {len(optimized)} optimized + {len(after)} target tokens, {target!r}, fp32, 1 thread")

    def isotones() -> float:
        with frozen(model):
            problem = Problem(Lowered(model, protocol.scored), protocol, Vocabulary.all_ids(model.config.vocab_size))
            state = ours.start(problem, [Window("text", text_1L[0].numpy())])
            while not ours.is_done(state):
                state = ours.step(problem, state)
        return -float(state["best_B"][0]) / len(after)

    def nanos() -> float:
        with contextlib.redirect_stderr(io.StringIO()):
            return float(rival.GCG(model, tokenizer, config).run(start, target).best_loss)

    seconds, results = in_turns({"isotone": isotones, "nanogcg": nanos}, args.turns)
    print(f"loss of the target: isotone {results['isotone']:.4f}, nanogcg {results['nanogcg']:.4f} nats per token")
    ratio = report(seconds, args.steps * args.width, "candidates", "isotone", "nanogcg")
    return ratio, (results["isotone"], results["nanogcg"])


class Lowered(Target):
    """A target whose loss is lowered: what an attack maximizes is minus the loss."""

    def gradient(
        self, ids_BL: Tensor, keep_cache: bool = False, perturbation_BLD: Tensor | None = None
    ) -> Gradient:  # fmt: skip
        """Return minus loss and minus gradient."""
        found = super().gradient(ids_BL, keep_cache, perturbation_BLD)
        return Gradient(-found.nats_B, -found.grad_BLD, found.layers)

    def candidates(
        self, ids_BL: Tensor, layers: Layers | None, sequences_N: Tensor, positions_N: Tensor, tokens_N: Tensor
    ) -> Tensor:
        """Return minus losses."""
        return -super().candidates(ids_BL, layers, sequences_N, positions_N, tokens_N)


def triggers(args: argparse.Namespace) -> None:
    """Compare with hill climbing over random proposals, in tokens until its loss is reached."""
    model, windows = pocket(), pocket_windows(args.data, 16)
    windows = [Window(window.id, window.tokens[: args.text_tokens]) for window in windows]
    vocabulary = Vocabulary.all_ids(model.config.vocab_size)
    ratios: dict[str, list[float]] = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        searches = {
            "surrogate": UniversalTriggers(10, 8, 10**6, 1, batch_documents=16, seed=seed, proposals="surrogate"),
            "gradient": UniversalTriggers(10, 16, 10**6, 1, batch_documents=16, seed=seed),
            "gradient-100": UniversalTriggers(10, 100, 10**6, 1, batch_documents=16, seed=seed),
        }
        with frozen(model):
            layout = TriggerLayout.for_model(model, vocabulary, 10, windows)
            texts_XT = torch.stack([torch.from_numpy(window.tokens[: layout.text_tokens]) for window in windows])
            problem = TriggerProblem(Target(model, layout.scored(10)), layout, vocabulary, texts_XT)
            rival_nll, rival_tokens = propose(problem, args.proposals, seed)
            print(f"seed {seed}: {rival_nll:.4f} nats per token with {rival_tokens} tokens of random proposals")
            for name in args.searches:
                spent, nll = spent_until(searches[name], problem, rival_nll, args.limit * rival_tokens)
                ratios.setdefault(name, []).append(rival_tokens / spent if nll >= rival_nll else 0.0)
                reached = "" if nll >= rival_nll else ": not reached, counted as 0"
                print(f"  {searches[name]}: {nll:.4f} with {spent}{reached}: {rival_tokens / spent:.2f}", flush=True)
    for name, values in ratios.items():
        print(
            f"{name}: {args.proposals} proposals, 16 texts of {layout.text_tokens} tokens, {args.seeds} seeds: "
            f"median {statistics.median(values):.2f} times fewer tokens ({min(values):.2f}…{max(values):.2f})"
        )


def spent_until(
    attack: UniversalTriggers, problem: TriggerProblem, nll: float, limit_tokens: float
) -> tuple[int, float]:
    """Return the tokens a search spends until it has a trigger of a loss, or the limit, and the loss it has then."""
    state, reached = attack.start(), -np.inf
    while reached < nll and state["spent_tokens"] < limit_tokens:
        state = attack.step(problem, state)
        reached = on_all(problem, state["running"]["trigger_ids"])[0] or -np.inf  # to know where it is: not counted
    return state["spent_tokens"], reached


def propose(problem: TriggerProblem, num_proposals: int, seed: int) -> tuple[float, int]:
    """Return the loss and cost of changing a random token of a random trigger, kept if the loss on all texts rises."""
    rng, layout = np.random.default_rng(seed), problem.layout
    ids = problem.vocabulary.ids_N.numpy()
    trigger = rng.choice(ids, layout.trigger_tokens)
    best, spent = on_all(problem, trigger.tolist())
    for _ in range(num_proposals):
        proposed = trigger.copy()
        proposed[rng.integers(len(proposed))] = rng.choice(ids)
        nll, _ = on_all(problem, proposed.tolist())
        spent += forward_tokens(len(problem.texts_XT), layout.scored(layout.trigger_tokens).stop)
        if nll is not None and (best is None or nll > best):
            best, trigger = nll, proposed
    assert best is not None
    return best, spent


def memory(args: argparse.Namespace) -> None:
    """Print the peak of a GCG step on the shape of SmolLM2-135M, with random weights."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    protocol = PrefixProtocol(120, 8, 128)
    before = peak_gb()
    with frozen(model):
        problem = Problem(FirstOnly(model, protocol.scored, args.evaluate), protocol, Vocabulary.all_ids(49152))
        attack = GCG(flips=10, top_k=args.top_k, candidates=args.width, steps=1)
        attack.step(problem, attack.start(problem, random_windows(1, protocol.length, 49152)))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.0f}M parameters, {protocol.length} tokens, {attack}, evaluated {args.evaluate or args.width}")
    print(f"peak memory of the process: {peak_gb():.2f} GB ({before:.2f} GB before the step, with the model in fp32)")


class FirstOnly(Target):
    """A target that evaluates the first candidates by position, which read the most tokens, and no more."""

    def __init__(self, model: nn.Module, scored: slice, count: int | None):
        super().__init__(model, scored)
        self.count = count

    def _in_batches(self, count: int, evaluate: Callable[[int, int], Any]) -> list[Any]:
        stop = count if self.count is None else min(count, self.count)
        parts = super()._in_batches(stop, evaluate)
        if stop < count:
            parts.append(torch.zeros(count - stop, dtype=torch.float64))
        return parts


def in_turns(methods: dict[str, Callable[[], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return CPU seconds of each turn and the last results."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    results = {}
    for _ in range(turns):
        for name, method in methods.items():
            began = time.process_time()
            results[name] = method()
            seconds[name].append(time.process_time() - began)
    return seconds, results


def report(seconds: dict[str, list[float]], count: int, unit: str, ours: str, theirs: str) -> float:
    for name, of_turns in seconds.items():
        print(
            f"{name}: {count / statistics.median(of_turns):.2f} {unit} per CPU second (median of {len(of_turns)} turns)"
        )
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    print(f"{ours} / {theirs}: {statistics.median(ratios):.2f} times ({min(ratios):.2f}…{max(ratios):.2f})", flush=True)
    return statistics.median(ratios)


def pocket() -> Any:
    return load_model(Model()).float().eval()


def random_windows(count: int, length: int, vocabulary: int = 4096) -> list[Window]:
    rng = np.random.default_rng(0)
    return [Window(f"random-{i}", rng.integers(0, vocabulary, length)) for i in range(count)]


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
