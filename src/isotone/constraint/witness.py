"""Search for an ordered pair of reachable inputs that a feed-forward network maps out of order.

A norm's outputs are u = γ ⊙ x̂ + β with ‖x̂‖ < √d (its eps makes the inside of the sphere reachable), and Σx̂ = 0 for
LayerNorm. A witness is u ≤ u′ in every coordinate with F_k(u) > F_k(u′) for some k, checked in fp64 with the exported
weights. Finding none proves nothing. Shapes: N starting points, d width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isotone.constraint.tracing import Norm

NUM_STARTS = 64
NUM_STEPS = 20
_LENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_REACH = 0.9
"""Starting points stay within this share of √d, so that there is room for a step up."""


@dataclass(frozen=True)
class Witness:
    """An ordered pair that proves a network is not monotone: output ``output`` falls by ``drop``."""

    lower: Tensor
    upper: Tensor
    output: int
    drop: float


def find_witness(network: Callable[[Tensor], Tensor], norm: Norm, num_outputs: int) -> Witness | None:
    """Return an ordered reachable pair on which the network decreases, or None if the search finds none.

    Random points, and points on the ray along which every pre-activation of a non-negative network sinks, are moved
    against the gradient of the steepest descending slope among ordered directions.

    Args:
        network: maps fp64 inputs (N, d) to (N, outputs) on the device of the norm's weights.
        norm: what feeds the network.
        num_outputs: number of coordinates of the network's output.
    """
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in norm.module.parameters()), torch.device("cpu"))
    gain, offset = norm.gain.to(device), norm.offset.to(device)
    x_Nd = _starts(norm, generator).to(device)
    outputs_N = torch.randint(num_outputs, (len(x_Nd),), generator=generator).to(device)
    for _ in range(NUM_STEPS):
        x_Nd.requires_grad_()
        value_N = network(gain * x_Nd + offset).gather(1, outputs_N[:, None])[:, 0]
        (slope_Nd,) = torch.autograd.grad(value_N.sum(), x_Nd, create_graph=True)
        descent_N, rise_Nd = _steepest_descent(slope_Nd, norm, gain)
        if bool((descent_N < 0).any()):
            found = _confirm(network, norm, x_Nd.detach(), rise_Nd, outputs_N, descent_N.detach())
            if found is not None:
                return found
        (move_Nd,) = torch.autograd.grad(descent_N.sum(), x_Nd, allow_unused=True)
        if move_Nd is None:
            return None
        length_N1 = move_Nd.norm(dim=1, keepdim=True)
        others_N = torch.randint(num_outputs, (len(x_Nd),), generator=generator).to(device)
        outputs_N = torch.where(length_N1[:, 0] > 0, outputs_N, others_N)  # nowhere to go: look at another output
        x_Nd = _inside(x_Nd.detach() - move_Nd / length_N1.clamp_min(1e-30) * (0.1 * x_Nd.shape[1] ** 0.5), norm)
    return None


def _starts(norm: Norm, generator: torch.Generator) -> Tensor:
    d = len(norm.gain)
    x_Nd = torch.randn(NUM_STARTS, d, dtype=torch.float64, generator=generator)
    radius_N1 = torch.rand(NUM_STARTS, 1, dtype=torch.float64, generator=generator)
    random_Nd = x_Nd / x_Nd.norm(dim=1, keepdim=True) * radius_N1 * d**0.5
    depth_N1 = torch.linspace(0, _REACH, NUM_STARTS, dtype=torch.float64)[:, None]
    return _inside(torch.cat([random_Nd, -depth_N1 * norm.gain.sign()]), norm)


def _inside(x_Nd: Tensor, norm: Norm) -> Tensor:
    if norm.kind == "layer_norm":
        x_Nd = x_Nd - x_Nd.mean(1, keepdim=True)
    limit = _REACH * x_Nd.shape[1] ** 0.5
    return x_Nd * (limit / x_Nd.norm(dim=1, keepdim=True).clamp_min(limit))


def _steepest_descent(slope_Nd: Tensor, norm: Norm, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most negative slope along a direction of x̂ that raises u, and that direction.

    ``slope_Nd`` is ∂F_k/∂x̂ = γ ⊙ ∂F_k/∂u. A step of x̂_i by sign(γ_i) raises u_i. Without a mean that must stay 0 each
    such step is free; with it (LayerNorm) a positive gain is paired with a negative one, or with a gain of 0.
    """
    raising_Nd = slope_Nd * gain.sign()  # slope when x̂_i moves so that u_i rises
    rows = torch.arange(len(slope_Nd), device=slope_Nd.device)
    rise_Nd = torch.zeros_like(slope_Nd)
    if norm.kind == "rms_norm":
        best_N, at_N = raising_Nd.masked_fill(gain == 0, torch.inf).min(1)
        rise_Nd[rows, at_N] = gain.sign()[at_N]
        return best_N, rise_Nd.detach()
    total_N = torch.zeros_like(raising_Nd[:, 0])
    for sign in (1.0, -1.0):
        # a gain of 0 can take up either sign without moving u
        free = (gain.sign() == sign) | (gain == 0)
        best_N, at_N = raising_Nd.masked_fill(~free, torch.inf).min(1)
        total_N = total_N + best_N
        rise_Nd[rows, at_N] += sign
    return total_N, rise_Nd.detach()


def _confirm(
    network: Callable[[Tensor], Tensor], norm: Norm, x_Nd: Tensor, rise_Nd: Tensor, outputs_N: Tensor, descent_N: Tensor
) -> Witness | None:
    """Evaluate finite steps along promising directions; return the first real decrease beyond rounding."""
    gain, offset = norm.gain.to(x_Nd.device), norm.offset.to(x_Nd.device)
    for n in descent_N.argsort()[:8].tolist():
        k = int(outputs_N[n])
        for length in _LENGTHS:
            higher = x_Nd[n] + length * rise_Nd[n]
            if float(higher.norm()) >= len(gain) ** 0.5:
                continue
            lower_u, upper_u = gain * x_Nd[n] + offset, gain * higher + offset
            low, high = network(torch.stack([lower_u, upper_u]))[:, k].tolist()
            if bool((upper_u >= lower_u).all()) and low - high > 1e-9 * (1 + abs(low)):
                return Witness(lower_u, upper_u, k, low - high)
    return None
