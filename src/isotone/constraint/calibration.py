"""Calibration text as a model reads it, and the approximate shift that is fitted on it: for norms that keep the mean.

W + c vᵀ with v > 0 changes the pre-activations by c (v·u). Of all v with mean 1 and entries of at least ``LEAST``, the
one of least variance vᵀΣv (least second moment where there is no bias to take up the mean) disturbs least; on LayerNorm
it is the exact shift. Shapes: N calibration tokens, n inputs of a matrix.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.feed_forward import FeedForward, bias_of, in_eval_mode, matrix
from isotone.constraint.journal import Journal
from isotone.errors import UsageError
from isotone.pairs import PairLayout

LEAST = 0.1
"""Smallest entry of v: c grows with its inverse."""

_ITERATIONS = 500


class _AllRead(Exception):  # noqa: N818 - no error: it ends a forward pass
    """Everything that was asked for has been computed."""


def require_enough(
    rows_NL: Tensor | None, modules: Mapping[str, nn.Module], initialization: str, pairs: PairLayout | None = None
) -> Tensor:
    """Return calibration rows that are there and determine what is fitted on them.

    Raises:
        UsageError: there are none, or their tokens are fewer than the widest module has inputs, and an intercept.
    """
    if rows_NL is None:
        raise UsageError(
            f"constraint: {initialization} needs calibration_rows_NL to be fitted on; isotone run takes training rows "
            "of its experiment, from Python give token ids"
        )
    name = max(modules, key=lambda name: matrix(modules[name]).shape[1])
    inputs = matrix(modules[name]).shape[1]
    sides = pairs.sides(rows_NL) if pairs else (rows_NL,)
    num_tokens = min(int((side != pairs.pad).sum()) if pairs else side.numel() for side in sides)
    if num_tokens <= inputs:
        needed = -(-(inputs + 1) * len(rows_NL) // max(num_tokens, 1))
        raise UsageError(
            f"constraint.calibration_rows (--calibration-rows): the calibration text is too short: {num_tokens} tokens "
            f"({len(rows_NL)} rows) are there, and {name} with its {inputs} inputs needs at least {inputs + 1}; give "
            f"longer text, or, where it has more rows, set it to {needed} or more"
        )
    return rows_NL


def read(
    model: PreTrainedModel, ids_1L: Tensor, modules: Mapping[str, nn.Module], pairs: PairLayout | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what modules read (T, n) and put out (T, m) as a row passes, by name; the pass ends at the last one."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = inputs[0].flatten(0, -2), output.flatten(0, -2)
            if len(found) == len(modules):
                raise _AllRead

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        in_eval_mode(model, lambda: _forward(model, ids_1L.to(model.device), pairs))
    except _AllRead:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def calibrated_shift(
    model: PreTrainedModel,
    networks: Sequence[FeedForward],
    constrained: dict[str, nn.Module],
    rows_NL: Tensor,
    margin: float = 0.0,
    pairs: PairLayout | None = None,
    journal: Journal | None = None,
) -> None:
    """Make the weights of ``constrained`` non-negative in place, disturbing the model as little as such a shift can.

    Args:
        model: any language model of the table.
        networks: all feed-forward networks; one is fitted after another, each on what the ones before it now put out.
        constrained: the modules to shift, by full path.
        rows_NL: token ids of the calibration rows.
        margin: how far above 0 every entry ends, in standard deviations of its matrix.
        pairs: the model is an encoder-decoder and the rows are laid out so.
        journal: keeps what is shifted, and brings it back.
    """
    journal, done = journal or Journal(), 0
    with journal.progress(len(constrained), "projection") as bar:
        for network in networks:
            names = [name for name in network.names.values() if name in constrained]
            for stage in _stages(network, names):
                by_name = {name: constrained[name] for name in stage}
                if journal.restore(by_name) is None:
                    _shift_all(model, by_name, rows_NL, margin, pairs, journal)
                    journal.keep(by_name)
                bar.update(done := done + len(stage))


def _shift_all(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    rows_NL: Tensor,
    margin: float,
    pairs: PairLayout | None,
    journal: Journal,
) -> None:
    """Shift modules of a network that read the same, by full path."""
    moments = {name: _Moments(matrix(module)) for name, module in modules.items()}
    handles = [modules[name].register_forward_pre_hook(m.hook) for name, m in moments.items()]
    try:
        for row_L in rows_NL:
            journal.check()
            ids_1L = row_L[None].to(model.device)
            in_eval_mode(model, lambda ids=ids_1L: _forward(model, ids, pairs))  # type: ignore[misc]
    finally:
        for handle in handles:
            handle.remove()
    for name, module in modules.items():
        journal.check()
        _shift(module, moments[name], margin)


def _forward(model: PreTrainedModel, ids_1L: Tensor, pairs: PairLayout | None) -> Tensor:
    """Make one row pass through the model, without padding."""
    if pairs is None:
        return model(ids_1L, use_cache=False, logits_to_keep=1).logits
    layout, ids_1L = pairs.trimmed(ids_1L)
    return model(**layout.inputs(model, ids_1L), use_cache=False).logits


def _stages(network: FeedForward, names: Sequence[str]) -> list[list[str]]:
    """Return a network's names in the order of the computation: what reads the norm, then the second projection."""
    first = [n for n in names if n != network.names["down"]]
    return [stage for stage in (first, [n for n in names if n not in first]) if stage]


class _Moments:
    """Sums of u and uuᵀ over all tokens that a module reads, in fp64."""

    def __init__(self, w: Tensor):
        n = w.shape[1]
        self.count = 0
        self.sum_n = torch.zeros(n, dtype=torch.float64, device=w.device)
        self.square_nn = torch.zeros(n, n, dtype=torch.float64, device=w.device)

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        u_Nn = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        self.count += len(u_Nn)
        self.sum_n += u_Nn.sum(0)
        self.square_nn.addmm_(u_Nn.T, u_Nn)


def _shift(module: nn.Module, moments: _Moments, margin: float) -> None:
    mean_n, second_nn = moments.sum_n / moments.count, moments.square_nn / moments.count
    bias = bias_of(module)
    spread_nn = second_nn if bias is None else second_nn - torch.outer(mean_n, mean_n)
    v_n = least_disturbing_direction(spread_nn)
    w = matrix(module)
    wide = w.double()
    c = (-wide / v_n).amax(1).clamp_min(0) + margin * wide.std() / v_n.min()
    w.copy_((wide + c[:, None] * v_n).clamp_min(0))
    if bias is not None:
        bias.copy_(bias.double() - c * (v_n @ mean_n))


def least_disturbing_direction(spread_nn: Tensor) -> Tensor:
    """Return argmin vᵀ S v over {v ≥ LEAST, mean(v) = 1}, by accelerated projected gradient (Beck & Teboulle 2009)."""
    n = len(spread_nn)
    step = 1 / float(torch.linalg.eigvalsh(spread_nn)[-1].clamp_min(1e-30))
    v = y = torch.ones(n, dtype=spread_nn.dtype, device=spread_nn.device)
    t = 1.0
    for _ in range(_ITERATIONS):
        v_next = _project(y - step * (spread_nn @ y))
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y = v_next + (t - 1) / t_next * (v_next - v)
        v, t = v_next, t_next
    return v


def _project(v_n: Tensor) -> Tensor:
    """Return the nearest point of {v ≥ LEAST, mean(v) = 1}: the projection onto a simplex (Duchi et al. 2008)."""
    mass = len(v_n) * (1 - LEAST)
    ordered, _ = (v_n - LEAST).sort(descending=True)
    excess = (ordered.cumsum(0) - mass) / torch.arange(1, len(v_n) + 1, device=v_n.device, dtype=v_n.dtype)
    last = int((ordered > excess).sum()) - 1
    return (v_n - LEAST - excess[last]).clamp_min(0) + LEAST
