"""Asks a model whether its gradients tell what edits do: the same random edits and positions for every arm.

Shapes: L tokens, D embedding, E edits, V tokens that are tried at one position.

No attack: nothing is searched, and what it finds says whether a search by gradients can be trusted. A row a document:

    id, index, status        ok, or missing with the reason
    first_order, true        change of Σ_S NLL that the gradient predicts, and that an edit makes, nats [E]
    oracle                   at one position: change by the best of all tokens (``oracle``), by the best of the first
                             ``candidates`` by gradient (``gradient``), and of as many random ones (``random``), nats
    position                 of the oracle
    tried, admissible        tokens that were tried there, and how many there are
    spent_tokens             of the whole probe
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from isotone.attacks.budget import forward_tokens, gradient_tokens
from isotone.attacks.judging import Row, missing
from isotone.attacks.protocol import AttackProtocol, PrefixProtocol, Window
from isotone.attacks.random_edits import editable_positions, random_tokens
from isotone.attacks.running import Progress, continue_rows
from isotone.attacks.scoring import Gradient, Target, frozen
from isotone.attacks.vocabulary import Vocabulary
from isotone.determinism import stream_key
from isotone.interruption import StopFlag
from isotone.records import JsonLines

PROBE, VARIANT = "probe", "gradient"
"""What the rows call themselves in the place of an attack and its variant."""

PART = 1024
"""Tokens at the oracle's position that are evaluated before the next look at the stop flag: a multiple of a batch."""


@dataclass(frozen=True)
class Probe:
    """How much is asked.

    Attributes:
        edits: random single edits a document.
        candidates: tokens evaluated at the oracle's position, by gradient and at random.
        oracle_tokens: admissible tokens that are tried there, drawn at random; None: all. Of fewer, the best is the
            oracle's of these tokens, not of the vocabulary.
        seed: of edits, positions and tokens, which depend on it and on the document's id alone.
    """

    edits: int = 500
    candidates: int = 32
    oracle_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.edits < 2 or self.candidates < 1:
            raise ValueError(f"at least 2 edits and 1 candidate are needed, found {self}")


def probe_documents(
    probe: Probe,
    model: nn.Module,
    vocabulary: Vocabulary,
    windows: Sequence[Window],
    protocol: AttackProtocol | None = None,
    *,
    log: JsonLines | None = None,
    stop: StopFlag | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Row]:
    """Return a row for each document.

    A document's row depends on nothing of the documents before it, so that a resume changes none.

    Args:
        probe: how much is asked.
        model: causal or encoder-decoder language model.
        vocabulary: its admissible tokens.
        windows: the documents.
        protocol: which tokens may be edited and which are scored.
        log: rows already there are kept, new ones are appended after each document.
        stop: read before each document, and within it: a document that is not finished is asked again, whole.
        batch_size: sequences in one forward pass; halved when memory runs out.
        progress: called with the documents done and all documents.

    Raises:
        Stopped: a stop was requested; finished documents are in the log.
        IsotoneError: the log holds rows of other documents.
    """
    protocol, stop = protocol or PrefixProtocol(), stop or StopFlag()
    rows = continue_rows(log, PROBE, VARIANT, windows)
    with frozen(model):
        target = Target(model, protocol.scored, batch_size, protocol.pairs)
        for index in range(len(rows), len(windows)):
            head = {"index": index, "id": windows[index].id, "attack": PROBE, "variant": VARIANT}
            where = f"probe after {index} of {len(windows)} documents"
            target = target.around(torch.from_numpy(windows[index].tokens)[None])
            rows.append(head | _row(probe, target, vocabulary, protocol, windows[index], partial(stop.check, where)))
            if log is not None:
                log.append(rows[-1])
            if progress is not None:
                progress(len(rows), len(windows))
    return rows


def _row(
    probe: Probe,
    target: Target,
    vocabulary: Vocabulary,
    protocol: AttackProtocol,
    window: Window,
    check: Callable[[], None],
) -> Row:
    check()
    ids_L, admissible_N = torch.from_numpy(window.tokens), vocabulary.ids_N
    generator = np.random.default_rng(stream_key(probe.seed, f"probe of {window.id}", 0))
    editable = editable_positions(protocol, window)
    positions_E = torch.from_numpy(generator.choice(editable, probe.edits))
    tokens_E = torch.from_numpy(random_tokens(generator, admissible_N.numpy(), ids_L[positions_E].numpy()))
    at = int(generator.choice(editable))
    tried_V = admissible_N[torch.from_numpy(generator.permutation(len(admissible_N))[: probe.oracle_tokens])]
    gradient = target.gradient(ids_L[None], keep_cache=True)
    first_E, true_E = _changes(target, gradient, ids_L, positions_E, tokens_E, check)
    by_gradient_V, change_V = _changes(target, gradient, ids_L, torch.full_like(tried_V, at), tried_V, check)
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
            "random": float(change_V[: probe.candidates].max()),  # they are in random order
        },
        "tried": len(tried_V),
        "admissible": len(admissible_N),
        "spent_tokens": gradient_tokens(1, len(ids_L)) + forward_tokens(len(tokens_E) + len(tried_V), len(ids_L)),
    }


def _changes(
    target: Target, gradient: Gradient, ids_L: Tensor, positions_E: Tensor, tokens_E: Tensor, check: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Return the change of Σ_S NLL that the gradient predicts of each single edit, and that it makes, part by part."""
    predicted, made = list[Tensor](), list[Tensor]()
    for of_part_P, to_P in zip(positions_E.split(PART), tokens_E.split(PART), strict=True):
        check()
        predicted.append(_first_order(target, gradient, ids_L, of_part_P, to_P))
        sequences_P = torch.zeros_like(of_part_P)
        nats_P = target.candidates(ids_L[None], gradient.layers, sequences_P, of_part_P, to_P)
        made.append(nats_P - gradient.nats_B[0])
    return torch.cat(predicted), torch.cat(made)


def _first_order(target: Target, gradient: Gradient, ids_L: Tensor, positions_E: Tensor, tokens_E: Tensor) -> Tensor:
    """Return (e_new − e_old)·∂NLL/∂e of each single edit, on the CPU [E]."""
    device = target.embeddings_VD.device
    new_ED, old_ED = target.embeddings_VD[tokens_E.to(device)], target.embeddings_VD[ids_L[positions_E].to(device)]
    grad_ED = gradient.grad_BLD[0][positions_E.to(gradient.grad_BLD.device)].to(device)
    return ((new_ED - old_ED) * grad_ED).sum(dim=1).double().cpu()
