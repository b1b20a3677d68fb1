"""Ways to keep a weight non-negative (or its sign); each is one object: map, inverse, membership test, derivative.

Shapes: v and w have any one shape, the same for all arguments of a call. ``apply_`` and ``pull_back_`` run once a step
over every constrained weight, so they work in place, in one or two kernels, without an autograd graph.
"""

import abc
import math

import torch
from torch import Tensor
from typing_extensions import override

Scale = float | Tensor
"""What a map needs beside V for one matrix: a number, or for ``sign_frozen`` each entry's sign (±1, int8)."""

FLOOR = 1e-8
"""Smallest weight that the inverse of a map without zeros is asked for; below it the slope is lost in rounding."""

FLATTEST = 0.01
"""Smallest slope by which a matched step is divided: it is at most 100 times the one in W."""

STEPS = ("raw", "matched")
"""How far a master moves: as the optimizer says, or so that the weight moves so far (``match_step_``)."""


class Parametrization(abc.ABC):
    """A map from unconstrained masters V to effective weights, which are W ≥ 0 (for ``sign_frozen``: W·sign ≥ 0)."""

    name: str
    contains_zero: bool
    """Whether some finite V gives W = 0 exactly."""
    revives_zero: bool
    """Whether an entry that is exactly 0 can be moved by a gradient."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abc.abstractmethod
    def apply_(self, v: Tensor, w: Tensor, scale: Scale) -> None:
        """Write map(v) into w, in place."""

    @abc.abstractmethod
    def pull_back_(self, grad: Tensor, v: Tensor, scale: Scale) -> None:
        """Turn a gradient with respect to W, in place, into the one with respect to V."""

    def match_step_(self, before: Tensor, v: Tensor, scale: Scale) -> None:
        """Turn a step that was made for W into the one of V that changes W as much, to first order; v in place.

        An optimizer moved v from ``before`` by Δ, computed from gradients with respect to W. With s the slope dW/dV at
        ``before``, V moves by Δ/s. Where the map is flat that has no bound and the first order no meaning, so |s|
        counts as at least ``FLATTEST``, and V moves by at most 1/β, over which a softplus changes its slope e-fold.
        """
        slope = torch.ones_like(before)
        self.pull_back_(slope, before, scale)
        slope.copy_(slope.abs().clamp_min_(FLATTEST).copysign_(slope))
        limit = 1 / scale if isinstance(scale, float) else 1.0
        v.sub_(before).div_(slope).clamp_(-limit, limit).add_(before)

    @abc.abstractmethod
    def inverse(self, w: Tensor) -> tuple[Tensor, Scale]:
        """Return masters whose map is ``w`` (within 2e-6 relative in fp32 over 1e-8…1e2), and the scale they need.

        The inverse is computed in fp64 and rounded once to the dtype of ``w``.
        """

    def contains(self, w: Tensor, scale: Scale = 1.0) -> bool:
        """Return whether every entry is a finite value of the map."""
        low = w * scale >= 0 if self.contains_zero else w > 0
        return bool((low & torch.isfinite(w)).all())

    def scale_for(self, w: Tensor) -> Scale:
        """Return the scale that fits a matrix; 1 where the map has none."""
        return 1.0


class Softplus(Parametrization):
    """W = ln(1 + e^V), the published map; its slope 1 − e^(−W) makes updates of small weights multiplicative."""

    name = "softplus"
    contains_zero = False
    revives_zero = False

    @override
    def apply_(self, v: Tensor, w: Tensor, scale: Scale) -> None:
        torch.ops.aten.softplus.out(v, scale, _THRESHOLD, out=w)

    @override
    def pull_back_(self, grad: Tensor, v: Tensor, scale: Scale) -> None:
        torch.ops.aten.softplus_backward.grad_input(grad, v, scale, _THRESHOLD, grad_input=grad)

    @override
    def inverse(self, w: Tensor) -> tuple[Tensor, Scale]:
        scale = self.scale_for(w)
        z = w.double().clamp_min(FLOOR).mul_(scale)
        # ln(e^z − 1), written so that neither a large nor a small z loses digits
        return z.add_(torch.log(-torch.expm1(-z))).div_(scale).to(w.dtype), scale


class ScaledSoftplus(Softplus):
    """W = softplus(βV)/β with one β ≈ 1/std(W) a matrix: a slope of order one where the weights are.

    β is a power of two, so that multiplying and dividing by it round nothing.
    """

    name = "scaled_softplus"

    @override
    def scale_for(self, w: Tensor) -> float:
        std = float(w.double().std())
        return 2.0 ** round(-math.log2(std)) if std > 0 and math.isfinite(std) else 1.0


class Square(Parametrization):
    """W = V²: reaches 0, but leaves it never (its slope there is 0)."""

    name = "square"
    contains_zero = True
    revives_zero = False

    @override
    def apply_(self, v: Tensor, w: Tensor, scale: Scale) -> None:
        torch.mul(v, v, out=w)

    @override
    def pull_back_(self, grad: Tensor, v: Tensor, scale: Scale) -> None:
        grad.mul_(v).mul_(2)

    @override
    def inverse(self, w: Tensor) -> tuple[Tensor, Scale]:
        return w.double().sqrt().to(w.dtype), 1.0


class Magnitude(Parametrization):
    """W = |V|, with slope 1 at the kink, so that a weight at 0 can move."""

    name = "magnitude"
    contains_zero = True
    revives_zero = True

    @override
    def apply_(self, v: Tensor, w: Tensor, scale: Scale) -> None:
        torch.abs(v, out=w)

    @override
    def pull_back_(self, grad: Tensor, v: Tensor, scale: Scale) -> None:
        torch.where(v < 0, -grad, grad, out=grad)

    @override
    def inverse(self, w: Tensor) -> tuple[Tensor, Scale]:
        return w.clone(), 1.0


class Projection(Parametrization):
    """W itself is trained and clamped at 0 after each step, as lattice models do: exact zeros that can revive."""

    name = "projection"
    contains_zero = True
    revives_zero = True

    @override
    def apply_(self, v: Tensor, w: Tensor, scale: Scale) -> None:
        w.clamp_min_(0)

    @override
    def pull_back_(self, grad: Tensor, v: Tensor, scale: Scale) -> None:
        """Do nothing: the gradient of V = W is already there."""

    @override
    def inverse(self, w: Tensor) -> tuple[Tensor, Scale]:
        return w, 1.0


class Annealed(Projection):
    """Projection that comes step by step: W = W⁺ − λW⁻ with λ falling from 1 to 0, and W ≥ 0 from then on.

    W itself is trained. After each step what is below 0 is multiplied by λ's new value over its old one: entries that
    nothing else moves follow λ exactly, and one that a gradient lifts above 0 is free of it. The scale is λ.
    """

    @override
    def apply_(self, v: Tensor, w: Tensor, scale: Scale) -> None:
        if scale == 0:
            w.clamp_min_(0)

    def shrink_(self, w: Tensor, factor: float) -> None:
        """Multiply what is below 0, in place."""
        torch.nn.functional.leaky_relu_(w, factor)


class SignFrozen(Projection):
    """W itself is trained, and clamped at 0 after each step where it has left the sign that it started with.

    A control: the sparser search space and the lost signs' freedom of a constraint, without its order. 0 counts as
    positive.
    """

    name = "sign_frozen"

    @override
    def apply_(self, v: Tensor, w: Tensor, scale: Scale) -> None:
        w.masked_fill_(w * scale < 0, 0)

    @override
    def inverse(self, w: Tensor) -> tuple[Tensor, Scale]:
        return w, self.scale_for(w)

    @override
    def scale_for(self, w: Tensor) -> Scale:
        return 1 - 2 * torch.signbit(w).to(torch.int8)


_THRESHOLD = 20.0
"""Above it torch's softplus is the identity, exact to 2e-9."""

PARAMETRIZATIONS: dict[str, Parametrization] = {
    p.name: p for p in (Softplus(), ScaledSoftplus(), Square(), Magnitude(), Projection(), SignFrozen())
}
"""Every parametrization, by its name."""
