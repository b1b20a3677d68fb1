"""Layer-wise non-negative least squares: the start that keeps most of a model where the constraint binds.

Block after block, in the order of the computation, each constrained matrix is fitted to what the original did there:

    min Σ ‖W x + b − y‖² over the calibration tokens, W ≥ 0, b free where the module has a bias (none otherwise)

x is what the module reads in the model that is being made, behind everything fitted before it; y is what the *original*
network makes of that same input: its pre-activations for the first projection, its output for the second, which so
answers for what the new hidden units lack. With inputs of the original model, every block but the first would be fitted
to a stream that it never sees; with targets from the original model's stream, to errors that its input no longer tells
of, and would put out little but means. docs/constraints.md has the measurement.

Only sums of products are kept, never activations: memory is that of the Gram matrix of the widest input. Shapes: T
tokens, n inputs and m outputs of a matrix.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.calibration import read
from isotone.constraint.feed_forward import FeedForward, affine, bias_of, matrix
from isotone.constraint.journal import Journal
from isotone.constraint.pivoting import pivot
from isotone.constraint.rotation import PENALTY, Basis
from isotone.pairs import PairLayout

TOLERANCE = 1e-3
"""Largest correlation of a free input with what is left over, as a share of the target's size, at which a fit ends."""

COUPLED_TOLERANCE = 5e-3
"""The same where errors of different outputs are not told apart: no pivots help there, and sweeps from there to 1e-3
were found to bring .0002 of the squares for three times the time (pocket-arcee)."""

MAX_SWEEPS = 500
"""Passes over all coordinates after which a fit ends in any case; what it has then reached is reported."""

_SWEEPS_BETWEEN_CHECKS = 5
_PIVOTS = 5
"""Pivots that an output takes from there, about; with _OVERHEAD, only a matter of time."""
_OVERHEAD = 5e6
"""Floating-point operations that one pivot costs beside its own, as time."""
_BLOCK = 32
_RIDGE = 1e-6
"""Share of the mean diagonal that is added to it: units that never fire get 0, and collinear ones a definite share."""


@dataclass(frozen=True)
class Fit:
    """How well a non-negative matrix does what the original one did.

    Attributes:
        residual: what it leaves of the targets' variance (of their squares, where there is no intercept), summed over
            the outputs.
        kkt: by how much the conditions of optimality are missed, in the units of ``TOLERANCE``.
        sweeps: passes over all coordinates, before outputs that were not fitted by them were solved exactly.
        zeros: share of weights that are exactly 0.
    """

    residual: float
    kkt: float
    sweeps: int
    zeros: float


@torch.no_grad()
def nnls(
    model: PreTrainedModel,
    networks: Sequence[FeedForward],
    constrained: dict[str, nn.Module],
    rows_NL: Tensor,
    pairs: PairLayout | None = None,
    journal: Journal | None = None,
    basis: Basis | None = None,
) -> dict[str, Fit]:
    """Fit the modules of ``constrained`` in place, and their biases; return how well, by full path.

    Rows are read one by one, in order, so that the result is the same whenever kernels and threads are.

    Args:
        model: any language model of the table.
        networks: all feed-forward networks, in the order of the computation, with their original activations.
        constrained: the modules to fit, by full path.
        rows_NL: token ids of the calibration rows.
        pairs: the model is an encoder-decoder and the rows are laid out so.
        journal: keeps what is fitted, and brings it back.
        basis: the stream's, where it was rotated: then networks are fitted to what the original makes of what is meant
            to be read, and what they write where nothing reads counts less.
    """
    journal = journal or Journal()
    fits: dict[str, Fit] = {}
    with journal.progress(len(constrained), "projection") as bar:
        for network in networks:
            original = copy.deepcopy(network)
            for roles in STAGES:
                fitted = {r: constrained[network.names[r]] for r in roles if network.names.get(r) in constrained}
                if not fitted:
                    continue
                by_name = {network.names[role]: module for role, module in fitted.items()}
                if (notes := journal.restore(by_name)) is not None:
                    fits |= {name: Fit(**note) for name, note in notes.items()}
                else:
                    products = {role: _Products(module, _unread(role, basis)) for role, module in fitted.items()}
                    for row_L in rows_NL:
                        journal.check()
                        found = read(model, row_L[None], {"up": network.up} | fitted, pairs)
                        inputs = {role: x_Tn for role, (x_Tn, _) in found.items()}
                        meant = inputs if basis is None else {**inputs, **_as_meant(inputs, basis)}
                        for role, sums in products.items():
                            sums.add(inputs[role], target_of(original, role, meant))
                    made = {network.names[r]: sums.fit(fitted[r], journal.check) for r, sums in products.items()}
                    journal.keep(by_name, {name: asdict(fit) for name, fit in made.items()})
                    fits |= made
                bar.update(len(fits))
    return fits


STAGES = (("attention_out",), ("gate", "up"), ("down",))
"""Roles in the order of the computation; those that read the same are fitted together."""


def target_of(original: FeedForward, role: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what the original puts out (T, m) in the place of a module, on the inputs of the model being made."""
    if role == "down":
        return original(inputs["up"])
    return affine(getattr(original, role), inputs[role])


def _as_meant(inputs: Mapping[str, Tensor], basis: Basis) -> dict[str, Tensor]:
    """Return what projections behind a norm would read if nothing were written where nothing reads, by role."""
    return {role: basis.without_unread(inputs[role]) for role in ("gate", "up") if role in inputs}


def _unread(role: str, basis: Basis | None) -> Tensor | None:
    """Return the direction along which errors of a module count less, scaled to what they count less."""
    writes = role in ("down", "attention_out")
    return basis.unread_d * (1 - PENALTY) ** 0.5 if basis is not None and writes else None


class _Products:
    """Sums over tokens of everything that a least-squares problem depends on, in fp64."""

    def __init__(self, module: nn.Module, light_m: Tensor | None = None):
        """Begin for a module; ``light_m`` is as in ``solve``."""
        m, n = matrix(module).shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=matrix(module).device)

        self.count = 0
        self.x_n, self.y_m, self.yy_m = zeros(n), zeros(m), zeros(m)
        self.xx_nn, self.yx_mn = zeros(n, n), zeros(m, n)
        self.light_m, self.light_yy = light_m, zeros()

    def add(self, x_Tn: Tensor, y_Tm: Tensor) -> None:
        x_Tn, y_Tm = x_Tn.double(), y_Tm.double()
        self.count += len(x_Tn)
        self.x_n += x_Tn.sum(0)
        self.y_m += y_Tm.sum(0)
        self.yy_m += y_Tm.square().sum(0)
        self.xx_nn.addmm_(x_Tn.T, x_Tn)
        self.yx_mn.addmm_(y_Tm.T, x_Tn)
        if self.light_m is not None:
            self.light_yy += (y_Tm @ self.light_m).square().sum()

    def fit(self, module: nn.Module, check: Callable[[], None]) -> Fit:
        """Write the best non-negative matrix, and its intercept, into a module."""
        w_mn, bias_m = matrix(module), bias_of(module)
        x_n, y_m = self.x_n / self.count, self.y_m / self.count
        gram_nn, cross_mn, size_m = (sums / self.count for sums in (self.xx_nn, self.yx_mn, self.yy_m))
        if bias_m is not None:
            gram_nn = gram_nn - torch.outer(x_n, x_n)
            cross_mn = cross_mn - torch.outer(y_m, x_n)
            size_m = size_m - y_m.square()
        w, kkt, sweeps = solve(gram_nn, cross_mn, size_m, w_mn.double().clamp_min(0), check, self.light_m)
        w_mn.copy_(w)
        w = w_mn.double()  # as it is stored
        if bias_m is not None:
            bias_m.copy_(y_m - w @ x_n)
        left = (size_m - 2 * (w * cross_mn).sum(1) + (w @ gram_nn * w).sum(1)).sum()
        size = size_m.sum()
        if self.light_m is not None:
            size_light = self.light_yy / self.count
            if bias_m is not None:
                size_light = size_light - (self.light_m @ y_m).square()
            w_n = self.light_m @ w
            left = left - (size_light - 2 * (self.light_m @ cross_mn) @ w_n + w_n @ gram_nn @ w_n)
            size = size - size_light
        residual = float(left / size.clamp_min(torch.finfo(torch.float64).tiny))
        return Fit(max(residual, 0.0), kkt, sweeps, float((w == 0).double().mean()))


def solve(
    gram_nn: Tensor,
    cross_mn: Tensor,
    size_m: Tensor,
    start_mn: Tensor,
    check: Callable[[], None] = lambda: None,
    light_m: Tensor | None = None,
) -> tuple[Tensor, float, int]:
    """Return argmin ½ tr(M(W G Wᵀ − 2W Cᵀ)) over W ≥ 0, how far it is from optimal, and the sweeps it took.

    M = I − f fᵀ, f being ``light_m``: errors along f count 1 − ‖f‖². Without it all count alike, M = I, and every
    output is a problem of its own. With it outputs are coupled; a coordinate's step takes I for M's curvature, which is
    never less, so that no step goes up.

    Coordinates are minimized one after another, for all outputs at once (Franc, Hlaváč & Navara 2005); the gradient is
    brought up to date by blocks, so that almost all of the work is matrix products. It can take hundreds of sweeps
    (SmolLM2-135M); so once they have cost as much as solving exactly for the outputs that are left (``pivoting``), that
    is done.

    Args:
        gram_nn: G = E[x xᵀ], (n, n).
        cross_mn: C = E[y xᵀ], (m, n).
        size_m: E[y²] of each output, by which its correlations are measured.
        start_mn: a non-negative start.
        check: called before each sweep and pivot; raises to leave.
        light_m: the direction f of the outputs, shorter than 1; None: there is none.
    """
    n, tiny = len(gram_nn), torch.finfo(gram_nn.dtype).tiny
    gram_nn = gram_nn + torch.eye(n, dtype=gram_nn.dtype, device=gram_nn.device) * (_RIDGE * gram_nn.diagonal().mean())
    curvature_n = gram_nn.diagonal().clamp_min(tiny)
    unit_nm = (curvature_n[:, None] * size_m.clamp_min(tiny)).sqrt()
    w_nm, cross_nm = start_mn.T.contiguous(), cross_mn.T.contiguous()
    failed = light_m is not None  # pivots solve for one output alone
    tolerance = TOLERANCE if light_m is None else COUPLED_TOLERANCE
    for sweep in range(1, MAX_SWEEPS + 1):
        check()
        for first in range(0, n, _BLOCK):
            _sweep_block(w_nm, gram_nn, cross_nm, curvature_n, slice(first, min(first + _BLOCK, n)), light_m)
        if sweep % _SWEEPS_BETWEEN_CHECKS == 0 or sweep == MAX_SWEEPS:
            open_k = (_missed(w_nm, gram_nn, cross_nm, unit_nm, light_m) > tolerance).nonzero().flatten()
            due = sweep == MAX_SWEEPS or sweep * 2 * w_nm.numel() * n >= _cost_of_pivots(w_nm[:, open_k])
            if due and not failed:
                for k in open_k.tolist():
                    exact_n = pivot(gram_nn, cross_nm[:, k], unit_nm[:, k], w_nm[:, k], check)
                    failed = failed or exact_n is None  # then sweeps are all that is left
                    w_nm[:, k] = w_nm[:, k] if exact_n is None else exact_n
                if not failed:
                    break
            elif len(open_k) == 0:
                break
    return w_nm.T, float(_missed(w_nm, gram_nn, cross_nm, unit_nm, light_m).max()), sweep


def _missed(w_nm: Tensor, gram_nn: Tensor, cross_nm: Tensor, unit_nm: Tensor, light_m: Tensor | None = None) -> Tensor:
    """Return by how much each output misses the conditions of optimality."""
    slope_nm = _lighter(gram_nn @ w_nm - cross_nm, light_m)
    return (torch.where(w_nm > 0, slope_nm, slope_nm.clamp_max(0)).abs() / unit_nm).amax(0)


def _cost_of_pivots(w_nk: Tensor) -> float:
    """Return the floating-point operations that solving exactly for some outputs takes, about; 0 of none."""
    free_k = (w_nk > 0).sum(0).double()
    return _PIVOTS * float((free_k**3 / 3 + 4 * free_k * len(w_nk) + _OVERHEAD).sum())


def _lighter(slope_nm: Tensor, light_m: Tensor | None) -> Tensor:
    """Return slopes times M, (…, m)."""
    return slope_nm if light_m is None else slope_nm - (slope_nm @ light_m)[..., None] * light_m


def _sweep_block(
    w_nm: Tensor,
    gram_nn: Tensor,
    cross_nm: Tensor,
    curvature_n: Tensor,
    block: slice,
    light_m: Tensor | None = None,
) -> None:
    """Minimize over the coordinates of a block in turn, in place."""
    rows_bm, gram_bb = w_nm[block], gram_nn[block, block]
    slope_bm = gram_nn[block] @ w_nm - cross_nm[block]
    for j, row_m in enumerate(rows_bm):
        moved_m = (row_m - _lighter(slope_bm[j], light_m) / curvature_n[block][j]).clamp_min_(0).sub_(row_m)
        row_m += moved_m
        slope_bm[j + 1 :].addr_(gram_bb[j, j + 1 :], moved_m)
