"""Where an activation is non-decreasing: what a certificate may rely on, by the exact class of the module."""

import math
from dataclasses import dataclass

from torch import nn
from transformers import activations
from transformers.models.bloom.modeling_bloom import BloomGelu


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
