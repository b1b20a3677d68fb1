"""Universal adversarial triggers (Wallace et al. 2019, 1908.07125): one token sequence before every text, [BOS] t x.

Of a pair the text is the source: t x, and the reference is scored.

The search works in token ids on search documents; what a trigger is worth is said on other documents (trigger_rows.py).
Shapes: B documents of a batch, K tokens of the trigger, T tokens of a text, N candidates, V vocabulary, D embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from isotone import records
from isotone.attacks.budget import forward_tokens, gradient_tokens
from isotone.attacks.protocol import AttackProtocol, SourceProtocol, Window
from isotone.attacks.random_edits import random_tokens
from isotone.attacks.running import Progress
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.search import Pairs, first_order_gains, top_pairs
from isotone.attacks.surrogate import MOST, Evaluated, promising_pairs
from isotone.attacks.vocabulary import Vocabulary
from isotone.determinism import stream_key
from isotone.errors import IsotoneError, UsageError
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout

SKIPPED = 16
"""Tokens at the beginning of a text that are not scored: S = x_16…"""

State = dict[str, Any]
"""JSON: the finished restarts and where the running one stands."""


@dataclass(frozen=True)
class TriggerLayout:
    """How [BOS] t x lies in a sequence.

    Attributes:
        bos: id of BOS, or None for models without one.
        trigger_tokens: K.
        text_tokens: T, the same for all texts, with or without a trigger before them.
    """

    bos: int | None
    trigger_tokens: int
    text_tokens: int

    @classmethod
    def for_model(
        cls, model: nn.Module, vocabulary: Vocabulary, length: int, windows: Sequence[Window]
    ) -> "TriggerLayout":
        """Return the layout in which text and trigger fit the model's context.

        Raises:
            UsageError: too little of the text is left to be scored.
        """
        tokenizer = vocabulary.tokenizer
        bos = None if tokenizer is None else tokenizer.bos_token_id
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf
        num_tokens = min([context - length - (bos is not None), *(len(window.tokens) for window in windows)])
        if num_tokens <= SKIPPED:
            raise UsageError(
                f"attacks.triggers: texts of {num_tokens} tokens have none to score, as the first {SKIPPED} are left "
                "out; use a longer attacks.protocol or a shorter trigger"
            )
        return cls(bos, length, int(num_tokens))

    @property
    def start(self) -> int:
        """Index of the trigger's first token."""
        return 0 if self.bos is None else 1

    @property
    def pairs(self) -> None:
        """Sequences are not divided."""
        return None

    @property
    def identity(self) -> Any:
        """What of the layout decides a search, beside its texts; JSON."""
        return self.bos

    def texts(self, windows: Sequence[Window]) -> Tensor:
        """Return the texts of documents, cut to what fits, int64 [X, T]."""
        return torch.stack([torch.from_numpy(window.tokens[: self.text_tokens]) for window in windows])

    def snippets(self, window: Window) -> np.ndarray:
        """Return the tokens of a document that others' snippets are taken from."""
        return window.tokens

    def num_labels(self, text_T: Tensor, num_before: int) -> int:
        """Return how many tokens have a loss, with so many before the text."""
        return self.start + num_before + self.text_tokens - 1

    def num_scored(self, text_T: Tensor) -> int:
        """Return how many tokens of a text are scored, the last ones."""
        return self.text_tokens - SKIPPED

    def scored(self, num_before: int) -> slice:
        """Return the positions of S after ``num_before`` tokens between BOS and the text."""
        begin = self.start + num_before
        return slice(begin + SKIPPED, begin + self.text_tokens)

    def join(self, before_NK: Tensor, texts_BT: Tensor) -> Tensor:
        """Return [BOS] t x for every t and every x, [N·B, …]; K may be 0."""
        num_before, num_texts = len(before_NK), len(texts_BT)
        parts = [before_NK.repeat_interleave(num_texts, 0), texts_BT[:, : self.text_tokens].repeat(num_before, 1)]
        if self.bos is not None:
            parts.insert(0, torch.full((num_before * num_texts, 1), self.bos))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class SourceTriggerLayout:
    """How t x and a reference lie in the row of a pair: in the columns of the source, which x leaves K free of.

    The source is cut to that before it is read without a trigger, so that a trigger removes nothing of it; what is
    read before it is none, or shorter, is followed by padding.

    Attributes:
        protocol: of the rows.
        trigger_tokens: K.
    """

    protocol: SourceProtocol
    trigger_tokens: int

    def __post_init__(self) -> None:
        if self._columns < 2:
            raise UsageError(
                f"attacks.triggers: {self.trigger_tokens} tokens leave nothing of a source in the "
                f"{self.protocol.source} columns of attacks.protocol.source; use a shorter trigger, or more columns"
            )

    @property
    def start(self) -> int:
        """Index of the trigger's first token."""
        return 0

    @property
    def pairs(self) -> PairLayout:
        """Where rows are divided."""
        return self.protocol.pairs

    @property
    def identity(self) -> Any:
        """What of the layout decides a search, beside its texts; JSON."""
        return {"source": self.protocol.source, "pad": self.protocol.pad}

    def texts(self, windows: Sequence[Window]) -> Tensor:
        """Return pairs, their sources cut to what fits, int64 [X, S − K + T]."""
        source, pad = self.protocol.source, self.protocol.pad
        rows = []
        for window in windows:
            read = [*self.snippets(window)[: self._columns - 1].tolist(), self.protocol.eos]
            rows.append([*read, *[pad] * (self._columns - len(read)), *window.tokens[source:].tolist()])
        return torch.tensor(rows, dtype=torch.int64)

    def snippets(self, window: Window) -> np.ndarray:
        """Return the tokens of a document that others' snippets are taken from: its source."""
        return np.array(self.protocol.text(window.tokens.tolist()), dtype=np.int64)

    def num_labels(self, text_T: Tensor, num_before: int) -> int:
        """Return how many tokens have a loss: those of the target."""
        return int((text_T[self._columns :] != self.protocol.pad).sum())

    def num_scored(self, text_T: Tensor) -> int:
        """Return how many tokens are scored: the whole target."""
        return self.num_labels(text_T, 0)

    def scored(self, num_before: int) -> slice:
        """Return the columns of the target."""
        return self.protocol.scored

    def join(self, before_NK: Tensor, texts_BT: Tensor) -> Tensor:
        """Return the rows of t x for every t and every x, [N·B, L]; K may be 0."""
        num_before, num_texts = len(before_NK), len(texts_BT)
        sources, targets = texts_BT[:, : self._columns], texts_BT[:, self._columns :]
        free = self.protocol.source - self._columns - before_NK.shape[1]
        padding = torch.full((num_before * num_texts, free), self.protocol.pad)
        parts = before_NK.repeat_interleave(num_texts, 0), sources.repeat(num_before, 1)
        return torch.cat([*parts, padding, targets.repeat(num_before, 1)], dim=1)

    @property
    def _columns(self) -> int:
        return self.protocol.source - self.trigger_tokens


def layout_for(
    model: nn.Module,
    vocabulary: Vocabulary,
    length: int,
    windows: Sequence[Window],
    protocol: AttackProtocol | None,
) -> TriggerLayout | SourceTriggerLayout:
    """Return how triggers of a length lie before the documents of a protocol.

    Raises:
        UsageError: too little of the text is left.
    """
    if isinstance(protocol, SourceProtocol):
        return SourceTriggerLayout(protocol, length)
    return TriggerLayout.for_model(model, vocabulary, length, windows)


@dataclass(frozen=True)
class TriggerProblem:
    """What a trigger is searched on: a frozen model, the tokens that may be written, and the search documents."""

    target: Target
    layout: "TriggerLayout | SourceTriggerLayout"
    vocabulary: Vocabulary
    texts_XT: Tensor  # noqa: N815 - shape suffix, X search documents


@dataclass(frozen=True)
class UniversalTriggers:
    """Search a trigger from several random starts; the best on all search documents is reported.

    An iteration takes the gradient over a batch of search documents, evaluates the best-ranked candidates (each
    position gets its share) exactly on the same batch, and goes to the best one if it beats the trigger as it stands.
    Without gradients (``proposals``) a regression on all that the restart evaluated takes their place (surrogate.py);
    the candidates of its first iteration are drawn.

    Attributes:
        length: tokens of the trigger.
        candidates: exactly evaluated candidates an iteration.
        iterations: a restart, at most.
        restarts: independent starts.
        batch_documents: search documents an iteration is evaluated on.
        budget_tokens: of the whole search, shared equally by the restarts, which then iterate less; None: no bound.
        seed: of the starts and the order of documents.
        proposals: gradient or surrogate.
    """

    name: ClassVar[str] = "triggers"
    variant: ClassVar[str] = "universal"

    length: int = 10
    candidates: int = 100
    iterations: int = 100
    restarts: int = 5
    batch_documents: int = 8
    budget_tokens: int | None = None
    seed: int = 0
    proposals: Literal["gradient", "surrogate"] = "gradient"

    def __post_init__(self) -> None:
        if min(self.length, self.candidates, self.iterations, self.restarts, self.batch_documents) < 1:
            raise ValueError(f"every number must be at least 1, found {self}")
        if self.proposals not in ("gradient", "surrogate"):
            raise ValueError(f"proposals: found {self.proposals!r}, allowed are gradient and surrogate")

    def start(self) -> State:
        """Return the state before the first step."""
        return {"finished": [], "running": None, "spent_tokens": 0}

    def is_done(self, state: State) -> bool:
        """Return whether all restarts are finished."""
        return len(state["finished"]) == self.restarts

    def step(self, problem: TriggerProblem, state: State) -> State:
        """Return the next state: begin a restart, iterate, or finish it; the state given is left as it is."""
        running = state["running"]
        if running is None:
            return self._begin(problem, state)
        if running["iteration"] < self.num_iterations(problem):
            return self._iterate(problem, state)
        return self._finish(problem, state)

    def num_iterations(self, problem: TriggerProblem) -> int:
        """Return the iterations a restart makes: as asked for, or what its share of the budget buys.

        Raises:
            UsageError: the budget does not buy one.
        """
        if self.budget_tokens is None:
            return self.iterations
        length = problem.layout.scored(self.length).stop
        batch = min(self.batch_documents, len(problem.texts_XT))
        iteration = self._standing_tokens(batch, length) + forward_tokens(self.candidates * batch, length)
        ends = forward_tokens(2 * len(problem.texts_XT), length)  # the first and the last trigger, on all documents
        affordable = (self.budget_tokens // self.restarts - ends) // iteration
        if affordable < 1:
            raise UsageError(
                f"attacks.triggers.budget_tokens: {self.budget_tokens} do not buy one iteration in each of "
                f"{self.restarts} restarts; at least {self.restarts * (ends + iteration)} are needed"
            )
        return min(self.iterations, affordable)

    def _begin(self, problem: TriggerProblem, state: State) -> State:
        restart = len(state["finished"])
        generator = np.random.default_rng(stream_key(self.seed, "trigger start", restart))
        initial = generator.choice(problem.vocabulary.ids_N.numpy(), self.length).tolist()
        nats, spent = on_all(problem, initial)
        running = {"iteration": 0, "trigger_ids": initial, "initial_ids": initial, "initial_search_nats": nats}
        return state | {"running": running, "spent_tokens": state["spent_tokens"] + spent}

    def _iterate(self, problem: TriggerProblem, state: State) -> State:
        running, layout = state["running"], problem.layout
        texts_BT = problem.texts_XT[self._batch(problem, len(state["finished"]), running["iteration"])]
        trigger_K = torch.tensor(running["trigger_ids"])
        sequences_BL = layout.join(trigger_K[None], texts_BT)
        target = problem.target.around(sequences_BL)
        learns = self.proposals == "surrogate"
        if learns:
            standing, pairs = float(target.nats(sequences_BL).sum()), self._learned_pairs(problem, state)
        else:
            gradient = target.gradient(sequences_BL)
            grad_KD = gradient.grad_BLD[:, layout.start : layout.start + self.length].sum(dim=0)
            standing, pairs = float(gradient.nats_B.sum()), self._ranked_pairs(problem, trigger_K, grad_KD)
        candidates_NK = _written(trigger_K, pairs)
        nats_N = target.nats(layout.join(candidates_NK, texts_BT)).view(-1, len(texts_BT)).sum(dim=1)
        best, best_nats = None, standing
        for index, nats in enumerate(nats_N.tolist()):
            if best_nats < nats < math.inf:
                best, best_nats = index, nats
        if best is not None:
            trigger_K = candidates_NK[best]
        length = sequences_BL.shape[1]
        spent = self._standing_tokens(len(texts_BT), length) + forward_tokens(len(nats_N) * len(texts_BT), length)
        if learns:
            running = running | {"evaluated": _learned(running.get("evaluated"), pairs, nats_N - standing, best)}
        running = running | {"iteration": running["iteration"] + 1, "trigger_ids": trigger_K.tolist()}
        return state | {"running": running, "spent_tokens": state["spent_tokens"] + spent}

    def _standing_tokens(self, num_texts: int, length: int) -> int:
        """Return what an iteration spends on the trigger as it stands."""
        return (forward_tokens if self.proposals == "surrogate" else gradient_tokens)(num_texts, length)

    def _ranked_pairs(self, problem: TriggerProblem, trigger_K: Tensor, grad_KD: Tensor) -> Pairs:
        """Return positions and tokens to evaluate, best-ranked by the gradient first."""
        target = problem.target
        admissible_V = problem.vocabulary.admissible_V.to(target.device)
        gains_KV = first_order_gains(grad_KD, target.embeddings_VD, trigger_K.to(target.device), admissible_V)
        return top_pairs(gains_KV, self.candidates, per_row=math.ceil(self.candidates / self.length))

    def _learned_pairs(self, problem: TriggerProblem, state: State) -> Pairs:
        """Return positions and tokens to evaluate: drawn at first, then what is expected to do most."""
        running, vocabulary = state["running"], problem.vocabulary
        trigger_K, known = torch.tensor(running["trigger_ids"]), running.get("evaluated")
        if known is not None and any(gain is not None for gain in known["gains"]):
            positions_N, tokens_N = torch.tensor(known["positions"]), torch.tensor(known["tokens"])
            gains = [math.nan if gain is None else gain for gain in known["gains"]]
            gains_N = torch.tensor(gains, dtype=torch.float64)
            before = len(positions_N) - known["since"]
            return promising_pairs(
                problem.target.embeddings_VD,
                vocabulary.admissible_V,
                trigger_K,
                torch.ones(self.length, dtype=torch.bool),
                Evaluated(positions_N, tokens_N, gains_N),
                tried=(positions_N[before:], tokens_N[before:]),
                count=self.candidates,
            )
        key = stream_key(self.seed, "trigger candidates", len(state["finished"]), running["iteration"])
        generator = np.random.default_rng(key)
        drawn_N = generator.integers(0, self.length, self.candidates)
        written_N = random_tokens(generator, vocabulary.ids_N.numpy(), trigger_K.numpy()[drawn_N])
        return torch.from_numpy(drawn_N), torch.from_numpy(written_N)

    def _batch(self, problem: TriggerProblem, restart: int, iteration: int) -> Tensor:
        """Return the search documents of an iteration: every pass is shuffled anew and leaves a broken batch out."""
        num_texts = len(problem.texts_XT)
        size = min(self.batch_documents, num_texts)
        turn, place = divmod(iteration, num_texts // size)
        generator = np.random.default_rng(stream_key(self.seed, "trigger documents", restart, turn))
        return torch.from_numpy(generator.permutation(num_texts)[place * size : (place + 1) * size])

    def _finish(self, problem: TriggerProblem, state: State) -> State:
        running = state["running"]
        nats, spent = on_all(problem, running["trigger_ids"])
        entry = {
            "restart": len(state["finished"]),
            "trigger_ids": running["trigger_ids"],
            "initial_ids": running["initial_ids"],
            "search_nll": nats,
            "initial_search_nll": running["initial_search_nats"],
            "iterations": running["iteration"],
        }
        finished = [*state["finished"], entry]
        return state | {"finished": finished, "running": None, "spent_tokens": state["spent_tokens"] + spent}


def _written(trigger_K: Tensor, pairs: Pairs) -> Tensor:
    """Return the triggers that candidates make of one, one token changed in each [N, K]."""
    positions_N, tokens_N = pairs
    candidates_NK = trigger_K.repeat(len(tokens_N), 1)
    candidates_NK[torch.arange(len(tokens_N)), positions_N] = tokens_N
    return candidates_NK


def _learned(known: dict[str, Any] | None, pairs: Pairs, gains_N: Tensor, best: int | None) -> dict[str, Any]:
    """Return the latest evaluations as JSON; ``since``: those of the trigger as it stands.

    A gain that is not finite is None: tried, and never learned from. Gains at a changed position become those against
    the token that is there now.
    """
    known = known or {"positions": [], "tokens": [], "gains": [], "since": 0}
    positions = [*known["positions"], *pairs[0].tolist()]
    tokens = [*known["tokens"], *pairs[1].tolist()]
    gains = [*known["gains"], *(gain if math.isfinite(gain) else None for gain in gains_N.tolist())]
    since = known["since"] + len(gains_N)
    if best is not None:
        at, gain, since = int(pairs[0][best]), float(gains_N[best]), 0
        moved = [position == at and value is not None for position, value in zip(positions, gains, strict=True)]
        gains = [value - gain if is_moved else value for value, is_moved in zip(gains, moved, strict=True)]
    return {"positions": positions[-MOST:], "tokens": tokens[-MOST:], "gains": gains[-MOST:], "since": min(since, MOST)}


def on_all(problem: TriggerProblem, trigger: list[int]) -> tuple[float | None, int]:
    """Return the NLL of all search documents after a trigger, nats per scored token or None, and what it cost."""
    sequences_XL = problem.layout.join(torch.tensor([trigger], dtype=torch.int64), problem.texts_XT)
    target = problem.target.over(problem.layout.scored(len(trigger))).around(sequences_XL)
    nats = float(target.nats(sequences_XL).sum())
    num_scored = sum(problem.layout.num_scored(text_T) for text_T in problem.texts_XT)
    return nats / num_scored if math.isfinite(nats) else None, forward_tokens(*sequences_XL.shape)


def search_trigger(
    attack: UniversalTriggers,
    model: nn.Module,
    vocabulary: Vocabulary,
    windows: Sequence[Window],
    protocol: AttackProtocol | None = None,
    *,
    state_path: Path | None = None,
    stop: StopFlag | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> State:
    """Search a trigger on search documents, from where the saved state stands.

    Args:
        attack: the search.
        model: causal or encoder-decoder language model, in fp32; frozen meanwhile, then as it was.
        vocabulary: tokens that may be written.
        windows: search documents.
        protocol: that they were cut to, where they are pairs.
        state_path: where the state is saved after each step, and continued from.
        stop: read between steps.
        batch_size: sequences in one forward pass; halved when memory runs out.
        progress: called with the steps done and all steps.

    Returns:
        ``finished`` (one entry a restart), ``best`` (the restart with the largest NLL on all search documents, ties to
        the first; None if none was finite), ``clean_search_nll`` (without a trigger) and ``spent_tokens``.

    Raises:
        Stopped: a stop was requested; the state is saved.
        IsotoneError: the saved state belongs to another search.
    """
    if not windows:
        raise UsageError("attacks.triggers: there is no search document that is long enough")
    layout = layout_for(model, vocabulary, attack.length, windows, protocol)
    texts_XT = layout.texts(windows)
    identity = {"attack": repr(attack), "texts": records.hash_json([layout.identity, texts_XT.tolist()])}
    with frozen(model):
        target = Target(model, layout.scored(attack.length), batch_size, layout.pairs)
        problem = TriggerProblem(target, layout, vocabulary, texts_XT)
        num_steps = attack.restarts * (attack.num_iterations(problem) + 2)
        state = _saved(state_path, identity) or attack.start()
        while not attack.is_done(state):
            if stop is not None:
                stop.check(f"trigger search after {len(state['finished'])} of {attack.restarts} restarts")
            state = attack.step(problem, state)
            if state_path is not None:
                records.write_json(state_path, identity | {"state": state})
            if progress is not None:
                progress(_steps_done(state, num_steps // attack.restarts), num_steps)
        clean_nll, _ = on_all(problem, [])
    finite = [entry for entry in state["finished"] if entry["search_nll"] is not None]
    best = max(finite, key=lambda entry: (entry["search_nll"], -entry["restart"]), default=None)
    return {
        "finished": state["finished"],
        "best": None if best is None else best["restart"],
        "clean_search_nll": clean_nll,
        "spent_tokens": state["spent_tokens"],
    }


def _saved(path: Path | None, identity: dict[str, str]) -> State | None:
    if path is None or not path.exists():
        return None
    saved = records.read_json(path)
    if any(saved.get(key) != value for key, value in identity.items()):
        raise IsotoneError(f"{path} belongs to another trigger search; move it away and run again")
    return saved["state"]


def _steps_done(state: State, steps_per_restart: int) -> int:
    running = state["running"]
    return len(state["finished"]) * steps_per_restart + (0 if running is None else 1 + running["iteration"])
