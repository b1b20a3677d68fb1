"""Exact non-negative least squares: the solution of scipy, from any guess, degenerate problems included."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls as reference

from isotone.constraint.nnls import solve
from isotone.constraint.pivoting import pivot


def problem(seed: int, n: int = 60, num_tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of very unlike sizes, of which some are nearly the same, and a target that needs both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, n, dtype=torch.float64, generator=generator).abs()
    x = x * torch.logspace(1, -1, n, dtype=torch.float64)
    x[:, 8] = x[:, 9] * (1 + 0.01 * torch.randn(num_tokens, dtype=torch.float64, generator=generator))
    w = torch.randn(n, dtype=torch.float64, generator=generator)
    return x, x @ w + torch.randn(num_tokens, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("guess", ["none", "all", "some"])
def test_solution_is_that_of_scipy_from_any_guess(seed: int, guess: str) -> None:
    x, y = problem(seed)
    start = {"none": torch.zeros(60), "all": torch.ones(60), "some": torch.arange(60) % 3}[guess].double()
    w = pivot(x.T @ x, x.T @ y, (x.square().sum(0) * y.square().sum()).sqrt(), start)
    assert w is not None
    expected, best = reference(x.numpy(), y.numpy())
    assert (w >= 0).all()
    assert float((x @ w - y).norm()) == pytest.approx(best, rel=1e-9)
    assert np.count_nonzero(w) == np.count_nonzero(expected)


def test_a_target_that_nothing_helps_gets_no_weights() -> None:
    x, _ = problem(0)
    w = pivot(x.T @ x, -x.sum(0), torch.ones(60).double(), torch.ones(60).double())
    assert w is not None
    assert not w.any()


def test_what_sweeps_do_not_fit_is_solved_exactly() -> None:
    """Behind outlying inputs the sweeps alone would go on and on."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    u = drawn(2000, 100) * torch.logspace(0.7, -1.5, 100, dtype=torch.float64)
    x = torch.nn.functional.silu(u @ drawn(100, 1000)) * (u @ drawn(100, 1000).abs())  # a gated network's hidden units
    x[:, 7] *= 100
    y = x @ drawn(1000, 6)
    gram, cross, size = x.T @ x, y.T @ x, y.square().sum(0)
    w, missed, sweeps = solve(gram, cross, size, torch.zeros(6, 1000).double())
    assert sweeps < 50
    assert missed < 1e-6  # sweeps alone end below TOLERANCE, or not at all
    _, best = reference(x.numpy(), y[:, 0].numpy(), maxiter=10_000)
    assert float((x @ w[0] - y[:, 0]).norm()) == pytest.approx(best, rel=1e-3)


def test_a_problem_that_cannot_be_solved_so_is_left_to_the_sweeps() -> None:
    indefinite, ones = -torch.ones(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert pivot(indefinite, ones, ones, ones) is None
