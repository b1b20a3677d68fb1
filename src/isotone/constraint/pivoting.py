"""Exact non-negative least squares of one output, from a good guess: block principal pivoting.

Inputs are free (weight above 0, slope 0) or held (weight 0, slope not below 0). The problem is solved on the free ones,
and all that came out on the wrong side change sets at once; where that does not lessen their number for a while, only
the last of them does, which ends for certain (Júdice & Pires 1994; Kim & Park 2011, Algorithm 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor

_EXCHANGES = 3
"""How often all may change sets without there being fewer wrong ones."""

_MAX_PIVOTS = 100

_ROUNDING = 1e-9
"""Slopes above minus this, in the units of a correlation, are 0."""


def pivot(
    gram_nn: Tensor, cross_n: Tensor, unit_n: Tensor, start_n: Tensor, check: Callable[[], None] = lambda: None
) -> Tensor | None:
    """Return argmin ½ wᵀGw − cᵀw over w ≥ 0; None where 100 pivots, or G's rounding, do not let it be found.

    Args:
        gram_nn: G, positive definite, fp64.
        cross_n: c.
        unit_n: in which slopes are measured.
        start_n: whose positive entries are taken to be the free ones.
        check: called before each pivot; raises to leave.
    """
    free_n = start_n > 0
    fewest, left = len(cross_n) + 1, _EXCHANGES
    for _ in range(_MAX_PIVOTS):
        check()
        free_f = free_n.nonzero().flatten()
        rows_fn = gram_nn[free_f]
        factor_ff, failed = torch.linalg.cholesky_ex(rows_fn[:, free_f])
        if failed:
            return None
        w_f = torch.cholesky_solve(cross_n[free_f, None], factor_ff).flatten()
        w_n = torch.zeros_like(cross_n).index_copy_(0, free_f, w_f)
        slope_n = w_f @ rows_fn - cross_n
        wrong_n = torch.where(free_n, w_n < 0, slope_n < -_ROUNDING * unit_n)
        number = int(wrong_n.sum())
        if number == 0:
            return w_n
        if number < fewest:
            fewest, left = number, _EXCHANGES
        elif left > 0:
            left -= 1
        else:
            wrong_n = wrong_n & (torch.arange(len(wrong_n), device=wrong_n.device) == wrong_n.nonzero().max())
        free_n = free_n ^ wrong_n
    return None
