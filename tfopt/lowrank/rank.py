"""How many singular values of a kernel are signal."""

from __future__ import annotations

import math

import numpy as np


def by_energy(values: np.ndarray, energy: float) -> int:
    """The least rank that keeps that share of the squared singular values."""
    kept = np.cumsum(values**2) / max(float(np.sum(values**2)), 1e-30)
    # Rounding may leave the full sum a hair below 1; then all values are needed.
    return min(len(values), int(np.searchsorted(kept, energy * (1 - 1e-12))) + 1)


def by_variational_bayes(values: np.ndarray, shape: tuple[int, int]) -> int:
    """The rank of a matrix of that shape under noise of unknown variance, at least 1.

    The global solution of empirical variational Bayesian matrix factorization is analytic (Nakajima, Sugiyama, Babacan
    and Tomioka 2013, JMLR 14, theorem 2 and corollary 2): a singular value is kept where it exceeds a threshold that
    depends on the noise's variance alone, and that variance minimizes a free energy in one variable.
    """
    from scipy.optimize import minimize_scalar

    short, long = sorted(shape)
    alpha = short / long
    squares = np.sort(values.astype(np.float64) ** 2)[::-1][:short]
    if squares.size == 0 or squares[0] <= 0:
        return 1
    tau = 2.5129 * math.sqrt(alpha)
    limit = (1 + tau) * (1 + alpha / tau)

    def free_energy(log_variance: float) -> float:
        x = np.maximum(squares / (long * math.exp(log_variance)), 1e-300)
        small, large = x[x <= limit], x[x > limit]
        shrunk = _shrunk(large, alpha)
        return float(
            np.sum(small - np.log(small)) + np.sum(large - shrunk) + np.sum(np.log((shrunk + 1) / large))
            + alpha * np.sum(np.log(shrunk / alpha + 1))
        )  # fmt: skip

    # Equation 30: between what the smallest values alone explain, and all of them as noise.
    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)
    tail = squares[most:]
    low = max(float(squares[min(most, short - 1)]) / (long * limit), float(np.mean(tail)) / long, 1e-300)
    high = float(np.sum(squares)) / (short * long)
    if not low < high:
        variance = high
    else:
        # The free energy has several valleys; a grid finds the deepest, the search its bottom.
        grid = np.linspace(math.log(low), math.log(high), 64)
        at = int(np.argmin([free_energy(value) for value in grid]))
        bounds = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
        variance = math.exp(minimize_scalar(free_energy, bounds=bounds, method="bounded").x)
    return max(1, int(np.sum(squares > long * variance * limit)))


def _shrunk(x: np.ndarray, alpha: float) -> np.ndarray:
    gap = x - (1 + alpha)
    return 0.5 * (gap + np.sqrt(np.maximum(gap**2 - 4 * alpha, 0)))
