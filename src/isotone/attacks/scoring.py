"""The model as an attack sees it: frozen, with losses of the scored tokens, candidates' losses and gradients.

Shapes: B sequences, L tokens of a sequence, T scored tokens, N candidates, P positions, V vocabulary, D embedding.
Every loss comes from ``isotone.scoring``; what is here is batching, the prefix cache and halving on memory errors.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from isotone.pairs import PairLayout
from isotone.scoring import TokenScores, token_nll, token_scores

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, heads, L, head]."""


@dataclass
class Gradient:
    """One forward and backward pass.

    Attributes:
        nats_B: Σ_S NLL, fp64 on the CPU.
        grad_BLD: its gradient with respect to the input embeddings.
        layers: keys and values of the whole sequences, or None where the model keeps none that can be cut.
    """

    nats_B: Tensor  # noqa: N815 - shape suffixes
    grad_BLD: Tensor  # noqa: N815
    layers: Layers | None


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode without weight gradients, and restore both."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


class Target:
    """Losses of fixed positions under a frozen model, in fp32, in fixed batches.

    Args:
        model: causal or encoder-decoder language model; use inside ``frozen``.
        scored: the positions whose NLL an attack maximizes.
        batch_size: sequences in one forward pass; halved for good when memory runs out.
        pairs: how rows are divided that an encoder-decoder model reads; edits and embeddings are of the source. There
            is no prefix cache then: an edit changes all that the encoder says.
    """

    def __init__(self, model: nn.Module, scored: slice, batch_size: int = 16, pairs: PairLayout | None = None):
        self.model = model
        self.scored = scored
        self.batch_size = batch_size
        self.pairs = pairs
        self.device = next(model.parameters()).device

    def over(self, scored: slice, pairs: PairLayout | None = None) -> "Target":
        """Return the same model with other scored positions, and rows divided elsewhere where ``pairs`` is given."""
        return Target(self.model, scored, self.batch_size, pairs or self.pairs)

    def around(self, ids_BL: Tensor) -> "Target":
        """Return the same for rows that stay together: of pairs, what is padding in all of them is not computed."""
        if self.pairs is None:
            return self
        around = copy.copy(self)  # with the embeddings that are there, and a halved batch
        around.pairs = self.pairs.around(ids_BL)
        return around

    @cached_property
    def embeddings_VD(self) -> Tensor:  # noqa: N802 - shape suffix
        """What the model reads for each id, any scaling of its embedding layer included; fp32."""
        with torch.no_grad():
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
            return embedding(torch.arange(embedding.num_embeddings, device=self.device)).float()

    def nats(self, ids_BL: Tensor) -> Tensor:
        """Return Σ_S NLL of each sequence, fp64 on the CPU [B]."""

        def evaluate(start: int, stop: int) -> Tensor:
            ids = ids_BL[start:stop].to(self.device)
            return _total(token_nll(self.model, ids, self.scored, pairs=self.pairs))

        with torch.no_grad():
            return _concatenate_nats(self._in_batches(len(ids_BL), evaluate))

    def scores(self, ids_BL: Tensor) -> TokenScores:
        """Return the scores of all tokens but the first, or of pairs' targets, on the CPU."""

        def evaluate(start: int, stop: int) -> TokenScores:
            return _to_cpu(token_scores(self.model, ids_BL[start:stop].to(self.device), pairs=self.pairs))

        return _join(self._in_batches(len(ids_BL), evaluate))

    def score_both(self, clean_BL: Tensor, attacked_BL: Tensor) -> tuple[TokenScores, TokenScores]:
        """Return the scores that ``scores`` returns, of clean and attacked texts in equal batches."""

        def evaluate(start: int, stop: int) -> tuple[TokenScores, TokenScores]:
            clean = token_scores(self.model, clean_BL[start:stop].to(self.device), pairs=self.pairs)
            attacked = token_scores(self.model, attacked_BL[start:stop].to(self.device), pairs=self.pairs)
            return _to_cpu(clean), _to_cpu(attacked)

        clean, attacked = zip(*self._in_batches(len(clean_BL), evaluate), strict=True)
        return _join(clean), _join(attacked)

    def score_perturbed(self, ids_BL: Tensor, perturbation_BLD: Tensor) -> tuple[TokenScores, TokenScores]:
        """Return the scores that ``scores`` returns, without and with a perturbation of the input embeddings."""

        def evaluate(start: int, stop: int) -> tuple[TokenScores, TokenScores]:
            ids = ids_BL[start:stop].to(self.device)
            embeds = self._read(ids)
            perturbed = embeds + perturbation_BLD[start:stop, : embeds.shape[1]].to(embeds)
            clean, attacked = (
                token_scores(self.model, ids, inputs_embeds_BLD=read, pairs=self.pairs) for read in (embeds, perturbed)
            )
            return _to_cpu(clean), _to_cpu(attacked)

        clean, attacked = zip(*self._in_batches(len(ids_BL), evaluate), strict=True)
        return _join(clean), _join(attacked)

    def read(self, ids_BL: Tensor) -> tuple[Tensor, Layers | None]:
        """Return Σ_S NLL of each sequence and, for ``candidates``, its keys and values: a forward pass alone."""

        def evaluate(start: int, stop: int) -> tuple[Tensor, Layers | None]:
            ids, cache = ids_BL[start:stop].to(self.device), None if self.pairs else DynamicCache()
            nll_BT = token_nll(self.model, ids, self.scored, past=cache, pairs=self.pairs)
            return _total(nll_BT), _layers(cache, ids.shape[1])

        with torch.no_grad():
            nats, layers = zip(*self._in_batches(len(ids_BL), evaluate), strict=True)
        return torch.cat(nats), _concatenate(layers)

    def gradient(self, ids_BL: Tensor, keep_cache: bool = False, perturbation_BLD: Tensor | None = None) -> Gradient:
        """Return Σ_S NLL and its gradient at the input embeddings (of pairs: those of the source).

        The labels are the ids themselves; no scored token is edited by an attack that uses this.

        Args:
            ids_BL: token ids.
            keep_cache: also return the keys and values, for ``candidates``.
            perturbation_BLD: added to the input embeddings.
        """

        def evaluate(start: int, stop: int) -> Gradient:
            ids = ids_BL[start:stop].to(self.device)
            embeds = self._read(ids).detach()
            if perturbation_BLD is not None:
                embeds = embeds + perturbation_BLD[start:stop, : embeds.shape[1]].to(embeds)
            embeds.requires_grad_(True)
            cache = DynamicCache() if keep_cache and not self.pairs else None
            with torch.enable_grad():
                nll_BT = token_nll(self.model, ids, self.scored, past=cache, inputs_embeds_BLD=embeds, pairs=self.pairs)
                nll_BT.sum().backward()
            assert embeds.grad is not None
            return Gradient(_total(nll_BT), embeds.grad.float(), _layers(cache, ids.shape[1]))

        parts = self._in_batches(len(ids_BL), evaluate)
        return Gradient(
            torch.cat([part.nats_B for part in parts]),
            torch.cat([part.grad_BLD for part in parts]),
            _concatenate([part.layers for part in parts]),
        )

    def candidates(
        self, ids_BL: Tensor, layers: Layers | None, sequences_N: Tensor, positions_N: Tensor, tokens_N: Tensor
    ) -> Tensor:
        """Return Σ_S NLL after each of N single edits, fp64 on the CPU [N].

        Candidates are evaluated in the order of their positions, so that a batch reads its common beginning from the
        cache; the order is undone in the result.

        Args:
            ids_BL: the sequences that are edited.
            layers: their keys and values, from ``gradient``; None: nothing is cached.
            sequences_N: which sequence a candidate edits.
            positions_N: which position it edits.
            tokens_N: which token it writes.
        """
        order_N = torch.argsort(positions_N, stable=True)
        edited_NL = ids_BL[sequences_N].clone()
        edited_NL[torch.arange(len(edited_NL)), positions_N] = tokens_N
        edited_NL = edited_NL[order_N].to(self.device)
        sequences_N = sequences_N[order_N].to(self.device)
        starts_N = positions_N[order_N].tolist()

        def evaluate(start: int, stop: int) -> Tensor:
            if layers is None:
                return _total(token_nll(self.model, edited_NL[start:stop], self.scored, pairs=self.pairs))
            first = starts_N[start]
            cache = _cut(layers, sequences_N[start:stop], first)
            scored = slice(self.scored.start - first, self.scored.stop - first)
            return _total(token_nll(self.model, edited_NL[start:stop, first:], scored, past=cache))

        with torch.no_grad():
            nats_N = _concatenate_nats(self._in_batches(len(edited_NL), evaluate))
        return torch.empty_like(nats_N).index_copy_(0, order_N, nats_N)

    def _read(self, ids_BL: Tensor) -> Tensor:
        """Return the embeddings of the tokens that may be edited: of a row, or of a pair's source."""
        read_BL = ids_BL if self.pairs is None else self.pairs.sides(ids_BL)[0]
        return self.model.get_input_embeddings()(read_BL)  # type: ignore[operator]

    def _in_batches(self, count: int, evaluate: Callable[[int, int], Any]) -> list[Any]:
        """Apply ``evaluate`` to consecutive ranges; one that does not fit into memory is halved, the rest is kept."""
        parts, start = [], 0
        while start < count:
            stop = min(start + self.batch_size, count)
            try:
                parts.append(evaluate(start, stop))
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
                self.batch_size = (stop - start) // 2
                continue
            start = stop
        return parts


def _total(nll_BT: Tensor) -> Tensor:
    return nll_BT.detach().cpu().double().sum(dim=1)


def _concatenate_nats(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])


def _to_cpu(scores: TokenScores) -> TokenScores:
    return TokenScores(scores.nll_BT.cpu(), scores.correct_BT.cpu())


def _join(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(torch.cat([part.nll_BT for part in parts]), torch.cat([part.correct_BT for part in parts]))


def _layers(cache: DynamicCache | None, length: int) -> Layers | None:
    """Return a cache's keys and values if all of its layers are plain attention over the whole sequence."""
    if cache is None or not cache.layers:
        return None
    layers = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or type(layer) is not DynamicLayer or layer.get_seq_length() != length:
            return None  # sliding or recurrent: what a prefix left behind cannot be cut out of it
        if layer.keys is None or layer.values is None:
            return None
        layers.append((layer.keys.detach(), layer.values.detach()))
    return layers


def _concatenate(parts: Sequence[Layers | None]) -> Layers | None:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        return None
    return [
        (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
        for layer in zip(*present, strict=True)
    ]


def _cut(layers: Layers, sequences_B: Tensor, length: int) -> DynamicCache:
    """Return a new cache that holds the first ``length`` positions of the given sequences."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[sequences_B, :, :length], values[sequences_B, :, :length], index)
    return cache
