"""Asks a model whether its gradients tell what edits do: the same random edits and positions for every arm.

Shapes: L tokens, D embedding, E edits, V admissible tokens.

No stage runs it yet: call ``probe_documents`` and give its rows to ``ArmFindings.probe_rows``. A row a document:

    id, index, status        ok, or missing with the reason
    first_order, true        change of Σ_S NLL that the gradient predicts, and that an edit makes, nats [E]
    oracle                   at one position: change by the best of all tokens (``oracle``), by the best of the first
                             ``candidates`` by gradient (``gradient``), and of as many random ones (``random``), nats
    position, spent_tokens   of the oracle; of the whole probe
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from isotone.attacks.budget import forward_tokens, gradient_tokens
from isotone.attacks.judging import Row, missing
from isotone.attacks.protocol import PrefixProtocol, Window
from isotone.attacks.random_edits import random_tokens
from isotone.attacks.scoring import Gradient, Target, frozen
from isotone.attacks.vocabulary import Vocabulary
from isotone.determinism import stream_key


@dataclass(frozen=True)
class Probe:
    """How much is asked.

    Attributes:
        edits: random single edits a document.
        candidates: tokens evaluated at the oracle's position, by gradient and at random.
        seed: of edits and positions, which depend on it and on the document's id alone.
    """

    edits: int = 500
    candidates: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.edits < 2 or self.candidates < 1:
            raise ValueError(f"at least 2 edits and 1 candidate are needed, found {self}")


def probe_documents(
    probe: Probe,
    model: nn.Module,
    vocabulary: Vocabulary,
    windows: Sequence[Window],
    protocol: PrefixProtocol | None = None,
    *,
    batch_size: int = 16,
) -> list[Row]:
    """Return a row for each document.

    Args:
        probe: how much is asked.
        model: causal language model.
        vocabulary: its admissible tokens.
        windows: the documents.
        protocol: which tokens may be edited and which are scored.
        batch_size: sequences in one forward pass.
    """
    protocol = protocol or PrefixProtocol()
    with frozen(model):
        target = Target(model, protocol.scored, batch_size)
        return [
            {"index": index, "id": window.id} | _row(probe, target, vocabulary, protocol, window)
            for index, window in enumerate(windows)
        ]


def _row(probe: Probe, target: Target, vocabulary: Vocabulary, protocol: PrefixProtocol, window: Window) -> Row:
    ids_L, admissible_V = torch.from_numpy(window.tokens), vocabulary.ids_N
    generator = np.random.default_rng(stream_key(probe.seed, f"probe of {window.id}", 0))
    positions_E = torch.from_numpy(generator.choice(np.array(protocol.attackable), probe.edits))
    tokens_E = torch.from_numpy(random_tokens(generator, admissible_V.numpy(), ids_L[positions_E].numpy()))
    at = int(generator.choice(np.array(protocol.attackable)))
    drawn = torch.from_numpy(generator.permutation(len(admissible_V))[: probe.candidates])
    gradient = target.gradient(ids_L[None], keep_cache=True)
    first_E = _first_order(target, gradient, ids_L, positions_E, tokens_E)
    true_E = _true(target, gradient, ids_L, positions_E, tokens_E)
    at_V = torch.full_like(admissible_V, at)
    by_gradient_V = _first_order(target, gradient, ids_L, at_V, admissible_V)
    change_V = _true(target, gradient, ids_L, at_V, admissible_V)
    if not all(bool(values.isfinite().all()) for values in (first_E, true_E, by_gradient_V, change_V)):
        return missing("a loss or a gradient is not a finite number")
    chosen = torch.argsort(by_gradient_V, descending=True, stable=True)[: probe.candidates]
    return {
        "status": "ok",
        "first_order": first_E.tolist(),
        "true": true_E.tolist(),
        "position": at,
        "oracle": {
            "oracle": float(change_V.max()),
            "gradient": float(change_V[chosen].max()),
            "random": float(change_V[drawn].max()),
        },
        "spent_tokens": gradient_tokens(1, len(ids_L)) + forward_tokens(len(tokens_E) + len(admissible_V), len(ids_L)),
    }


def _first_order(target: Target, gradient: Gradient, ids_L: Tensor, positions_E: Tensor, tokens_E: Tensor) -> Tensor:
    """Return (e_new − e_old)·∂NLL/∂e of each single edit, on the CPU [E]."""
    device = target.embeddings_VD.device
    new_ED, old_ED = target.embeddings_VD[tokens_E.to(device)], target.embeddings_VD[ids_L[positions_E].to(device)]
    grad_ED = gradient.grad_BLD[0][positions_E.to(gradient.grad_BLD.device)].to(device)
    return ((new_ED - old_ED) * grad_ED).sum(dim=1).double().cpu()


def _true(target: Target, gradient: Gradient, ids_L: Tensor, positions_E: Tensor, tokens_E: Tensor) -> Tensor:
    """Return the change of Σ_S NLL by each single edit [E]."""
    sequences_E = torch.zeros_like(positions_E)
    return target.candidates(ids_L[None], gradient.layers, sequences_E, positions_E, tokens_E) - gradient.nats_B[0]
