"""Where an activation is non-decreasing: what a certificate may rely on, by the exact class of the module."""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import activations
from transformers.models.bloom.modeling_bloom import BloomGelu
from typing_extensions import override


class MonotoneGELU(nn.Module):
    """GELU made non-decreasing: GELU(max(x, −0.75)), so the constant −0.1700 left of −0.75.

    GELU is x Φ(x) with the exact Φ. Its minimum lies at −0.75179; −0.75, to the right of it, is exact in fp32, fp16 and
    bf16 alike, so that a decreasing piece is left in none of them. The slope there is .0008.
    """

    FROM = -0.75
    """Left of it the function is constant."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x.clamp_min(self.FROM))


MONOTONE: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "monotone_gelu": MonotoneGELU}
"""The activations that ``constraint.activation`` offers, by its values."""


@dataclass(frozen=True)
class Monotonicity:
    """Where an activation is proved to be non-decreasing."""

    name: str
    """Class of the module."""
    least: float | None
    """It is non-decreasing on [least, ∞); −∞ means on all of ℝ, None that nothing is proved."""

    @property
    def everywhere(self) -> bool:
        """Whether it is non-decreasing on ℝ."""
        return self.least == -math.inf

    def __str__(self) -> str:
        if self.least is None:
            return "no"
        return "ℝ" if self.everywhere else f"[{self.least:g}, ∞)"


_EVERYWHERE: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.Sigmoid,
    nn.Tanh,
    activations.ReLUSquaredActivation,
    activations.LinearActivation,
    MonotoneGELU,
)

# Arguments of the minima, rounded up: to the right of them the activation does not decrease.
_FROM: dict[type[nn.Module], float] = {
    nn.SiLU: -1.2784,
    activations.SiLUActivation: -1.2784,
    activations.QuickGELUActivation: -0.7511,
    activations.GELUActivation: -0.7517,
    nn.GELU: -0.7517,
    activations.NewGELUActivation: -0.7524,
    activations.FastGELUActivation: -0.7524,
    activations.AccurateGELUActivation: -0.7524,
    activations.GELUTanh: -0.7524,
    BloomGelu: -0.7524,
}


def monotonicity_of(activation: nn.Module) -> Monotonicity:
    """Return where an activation module is non-decreasing; a subclass proves nothing, it may compute anything."""
    kind = type(activation)
    if kind in _EVERYWHERE:
        return Monotonicity(kind.__name__, -math.inf)
    return Monotonicity(kind.__name__, _FROM.get(kind))
