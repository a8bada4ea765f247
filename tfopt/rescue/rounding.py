"""Choose whole numbers for a layer's weights so that the layer's answer, not each weight, is nearest to the float one.

For one output with float weights w on the inputs x that the layer really gets, and quantized weights v, the error
E[(w x - v x)^2] is a quadratic form in v - w. Rounding one weight at a time, each error passed on to the weights not
yet rounded, is optimal brain quantization (Frantar et al. 2023, GPTQ, arXiv:2210.17323); for the few weights of a
depthwise channel a second pass moves single weights by one step while that helps. That weights need not go to their
nearest number is the point of AdaRound (Nagel et al. 2020, arXiv:2004.10568). The bias takes up the difference of the
means (Nagel et al. 2019, data-free quantization, arXiv:1906.04721, section 4.2).

Also fitting the weights to what the layers before have lost (Li et al. 2025, GPTAQ, arXiv:2504.02692) was tried with
100 images: it learns those images, and does worse on others.
"""

from __future__ import annotations

import numpy as np

from tfopt.rescue.moments import Moments

#: How strongly weights are held to the float ones whatever the images say, as a share of the inputs' mean variance.
HOLD = 0.1
_DAMPING, _BLOCK, _PASSES = 1e-4, 64, 3
LIMIT = 127
#: Candidates for the scale, as shares of the largest weight / 127. A finer grid that cuts the largest weight off
#: may be better, and for a few weights a coarser one that happens to fit.
SHARES_DENSE = (1.0, 0.95, 0.9, 0.85)
SHARES_DEPTHWISE = tuple(np.linspace(0.9, 1.6, 121))


def corrected_bias(
    weights: np.ndarray, bias: np.ndarray, rounded: np.ndarray, moments: Moments
) -> np.ndarray:  # fmt: skip
    """The bias that gives a layer's answer its float mean.

    weights, rounded: (outputs, n), what the float and the quantized layer multiply with. bias: (outputs,).
    """
    along = (lambda w, mean: (w * mean).sum(1)) if moments.seen.ndim == 2 else (lambda w, mean: w @ mean)
    return bias + along(weights, moments.true) - along(rounded, moments.seen)


def round_dense(weights: np.ndarray, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights (outputs, n) and their scales (outputs,) for float weights (outputs, n)."""
    metric, ideal = _metric(moments.within), weights.astype(np.float64)
    base = np.maximum(np.abs(ideal).max(axis=1) / LIMIT, 1e-10)
    best = np.full(len(ideal), np.inf)
    chosen, scales = np.zeros(ideal.shape, np.int8), base.copy()
    factor = _factor(metric)
    for share in SHARES_DENSE:
        numbers = _pass_on(ideal, factor, base * share)
        error = numbers * (base * share)[:, None] - ideal
        loss = ((error @ metric) * error).sum(axis=1)
        better = loss < best
        best[better], chosen[better], scales[better] = loss[better], numbers[better], (base * share)[better]
    return chosen, scales


def round_depthwise(weights: np.ndarray, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights (channels, n) and their scales (channels,); each channel has moments of its own."""
    chosen, scales = np.zeros(weights.shape, np.int8), np.zeros(len(weights))
    for channel, row in enumerate(weights.astype(np.float64)):
        metric, ideal = _metric(moments.within[channel]), row[None]
        base = max(np.abs(ideal).max() / LIMIT, 1e-10)
        steps = base * np.asarray(SHARES_DEPTHWISE)
        # Every candidate of the scale is one row.
        rows = np.repeat(ideal, len(steps), axis=0)
        numbers = _nudge(_pass_on(rows, _factor(metric), steps), rows, metric, steps)
        error = numbers * steps[:, None] - rows
        best = np.argmin(((error @ metric) * error).sum(axis=1))
        chosen[channel], scales[channel] = numbers[best], steps[best]
    return chosen, scales


def _metric(within: np.ndarray) -> np.ndarray:
    return within + (HOLD * np.trace(within) / len(within) + 1e-8) * np.eye(len(within))


def _factor(metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order in which weights are rounded, and the upper Cholesky factor of the inverse metric in it."""
    order = np.argsort(-np.diag(metric))
    damped = metric + _DAMPING * np.mean(np.diag(metric)) * np.eye(len(metric))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    return order, np.linalg.cholesky((inverse + inverse.T) / 2).T


def _pass_on(ideal: np.ndarray, factor: tuple[np.ndarray, np.ndarray], scales: np.ndarray) -> np.ndarray:
    order, upper = factor
    left, numbers = ideal[:, order].copy(), np.zeros_like(ideal)
    for start in range(0, ideal.shape[1], _BLOCK):
        end = min(start + _BLOCK, ideal.shape[1])
        errors = np.zeros((len(ideal), end - start))
        for at in range(start, end):
            numbers[:, order[at]] = np.clip(np.round(left[:, at] / scales), -LIMIT, LIMIT)
            errors[:, at - start] = (left[:, at] - numbers[:, order[at]] * scales) / upper[at, at]
            left[:, at:end] -= errors[:, at - start, None] * upper[at, at:end]
        left[:, end:] -= errors @ upper[start:end, end:]
    return numbers


def _nudge(numbers: np.ndarray, ideal: np.ndarray, metric: np.ndarray, scales: np.ndarray) -> np.ndarray:
    error = numbers * scales[:, None] - ideal
    for _ in range(_PASSES):
        for at in range(numbers.shape[1]):
            step = np.round(-(error @ metric[:, at]) / (metric[at, at] * scales))
            moved = np.clip(numbers[:, at] + step, -LIMIT, LIMIT)
            error[:, at] += (moved - numbers[:, at]) * scales
            numbers[:, at] = moved
    return numbers
