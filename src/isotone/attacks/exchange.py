"""Gives every document the context of another one: what a model loses that can no longer read what attacks edit.

No attack: nothing is searched. A model whose loss hardly rises here does not read what is attacked, and edits of it
cannot move that model, whatever it has learned.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from isotone.attacks.judging import Row
from isotone.attacks.protocol import AttackProtocol, PrefixProtocol, Window
from isotone.attacks.random_edits import editable_positions
from isotone.attacks.running import replay
from isotone.attacks.vocabulary import Vocabulary
from isotone.evidence import EXCHANGED


def exchange_contexts(
    model: nn.Module,
    vocabulary: Vocabulary,
    windows: Sequence[Window],
    protocol: AttackProtocol | None = None,
    **logged: Any,
) -> list[Row]:
    """Replace all tokens of each document that may be edited by those of the next, and score the same tokens.

    The last document is given the first one's. A shorter context is repeated from its start.

    Args:
        model: causal or encoder-decoder language model.
        vocabulary: for text-space figures.
        windows: at least two, or there is nothing to exchange and rows are missing.
        protocol: which tokens may be edited and which are scored.
        logged: ``log``, ``stop``, ``batch_documents`` and ``batch_size`` of ``replay``.

    Returns:
        A row for each document, as ``replay`` has it.
    """
    protocol = protocol or PrefixProtocol()
    edits = _edits(windows, protocol) if len(windows) > 1 else {}
    return replay(model, vocabulary, windows, edits, protocol, name=EXCHANGED, **logged)


def _edits(windows: Sequence[Window], protocol: AttackProtocol) -> Mapping[str, list[tuple[int, int, int]]]:
    found = {}
    for window, donor in zip(windows, [*windows[1:], windows[0]], strict=True):
        positions = editable_positions(protocol, window)
        tokens = np.resize(donor.tokens[editable_positions(protocol, donor)], len(positions))
        pairs = zip(positions.tolist(), window.tokens[positions].tolist(), tokens.tolist(), strict=True)
        found[window.id] = [(at, old, new) for at, old, new in pairs if old != new]
    return found
