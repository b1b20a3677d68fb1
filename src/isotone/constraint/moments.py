"""Means and variances of a constrained network brought to what the original's are, for any start.

Weights of one sign shift the means of units and spread or shrink them. Each row of a constrained matrix is multiplied
by a positive number, so that what it puts out varies as much as in the original network on the same input, and its bias
takes up the mean; a module without a bias keeps the mean that it gets. Networks are visited in the order of the
computation, the second projection after the first. A row that puts out a constant, here or there, stays as it is.
Shapes: T tokens, m outputs of a matrix.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.calibration import read
from isotone.constraint.feed_forward import FeedForward, bias_of, matrix
from isotone.constraint.journal import Journal
from isotone.constraint.nnls import STAGES, target_of
from isotone.pairs import PairLayout

_CONSTANT = 1e-6
"""Share of the other one's standard deviation under which an output counts as constant."""


@torch.no_grad()
def match_moments(
    model: PreTrainedModel,
    networks: Sequence[FeedForward],
    originals: Sequence[FeedForward],
    constrained: dict[str, nn.Module],
    rows_NL: Tensor,
    pairs: PairLayout | None = None,
    journal: Journal | None = None,
) -> None:
    """Scale the rows of ``constrained`` in place, and move their biases.

    Args:
        model: with its start.
        networks: its feed-forward networks, in the order of the computation.
        originals: copies of them from before the start.
        constrained: the modules to change, by full path.
        rows_NL: token ids of the calibration rows.
        pairs: the model is an encoder-decoder and the rows are laid out so.
        journal: keeps what is done, and brings it back.
    """
    journal, done = journal or Journal(), 0
    with journal.progress(len(constrained), "projection") as bar:
        for network, original in zip(networks, originals, strict=True):
            for roles in STAGES:
                changed = {r: constrained[network.names[r]] for r in roles if network.names.get(r) in constrained}
                by_name = {network.names[role]: module for role, module in changed.items()}
                if changed and journal.restore(by_name) is None:
                    _match_all(model, network, original, changed, rows_NL, pairs, journal)
                    journal.keep(by_name)
                bar.update(done := done + len(changed))


def _match_all(
    model: PreTrainedModel,
    network: FeedForward,
    original: FeedForward,
    changed: Mapping[str, nn.Module],
    rows_NL: Tensor,
    pairs: PairLayout | None,
    journal: Journal,
) -> None:
    """Match modules of a network that read the same, by role."""
    sums = {role: (_Sums(), _Sums()) for role in changed}
    for row_L in rows_NL:
        journal.check()
        found = read(model, row_L[None], {"up": network.up, **changed}, pairs)
        inputs = {role: x_Tn for role, (x_Tn, _) in found.items()}
        for role, (now, then) in sums.items():
            now.add(found[role][1])
            then.add(target_of(original, role, inputs))
    for role, (now, then) in sums.items():
        _match(changed[role], now, then)


class _Sums:
    """Sums over tokens from which mean and standard deviation of every output follow, in fp64."""

    def __init__(self) -> None:
        self.count, self.total_m, self.square_m = 0, torch.zeros(()), torch.zeros(())

    def add(self, y_Tm: Tensor) -> None:
        y_Tm = y_Tm.double()
        self.count += len(y_Tm)
        self.total_m = self.total_m.to(y_Tm) + y_Tm.sum(0)
        self.square_m = self.square_m.to(y_Tm) + y_Tm.square().sum(0)

    @property
    def mean_m(self) -> Tensor:
        return self.total_m / self.count

    @property
    def std_m(self) -> Tensor:
        return (self.square_m / self.count - self.mean_m.square()).clamp_min(0).sqrt()


def _match(module: nn.Module, now: _Sums, then: _Sums) -> None:
    varies_m = torch.minimum(now.std_m, then.std_m) > _CONSTANT * torch.maximum(now.std_m, then.std_m)
    scale_m = torch.where(varies_m, then.std_m / now.std_m, 1.0)
    w_mn, bias_m = matrix(module), bias_of(module)
    w_mn.copy_(w_mn.double() * scale_m[:, None])
    if bias_m is not None:
        bias_m.copy_(then.mean_m - scale_m * (now.mean_m - bias_m.double()))
