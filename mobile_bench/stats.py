"""What samples say: percentiles, intervals, frames per second, the Pareto front. Derived, never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mobile_bench.errors import InputError
from mobile_bench.records import Measurement

CONFIDENCE = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """One measurement in numbers. Times in milliseconds per inference (of `batch` images).

    median_low_ms and median_high_ms: the 95% interval of the median, over the fresh processes that made it where
    there were several (rounds > 1; rounds_interval), else within the one process: another can differ by more.
    spread: (p75 - p25) / median. outliers: samples above p75 by more than 1.5 (p75 - p25), as in Tukey 1977.
    fps: images per second at the median.
    """

    samples: int
    rounds: int
    median_ms: float
    median_low_ms: float
    median_high_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    spread: float
    outliers: int
    fps: float

    def meets(self, deadline_ms: float) -> bool:
        """Whether nine inferences of ten end within the deadline: p90 <= deadline_ms."""
        return self.p90_ms <= deadline_ms


def summarize(measurement: Measurement) -> Summary | None:
    """The Summary of a measurement that is 'ok', None for one that was refused or failed."""
    if measurement.status != "ok":
        return None
    latency_ms = np.asarray(measurement.latency_ms)
    median = float(np.median(latency_ms))
    groups = np.split(latency_ms, np.cumsum(measurement.rounds)[:-1]) if measurement.rounds else [latency_ms]
    low, high = median_interval(latency_ms) if len(groups) < 2 else rounds_interval(groups)
    p25, p75, p90, p95, p99 = percentiles(latency_ms, (25, 75, 90, 95, 99))
    return Summary(
        samples=len(latency_ms),
        rounds=len(groups),
        median_ms=median,
        median_low_ms=low,
        median_high_ms=high,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        min_ms=float(latency_ms.min()),
        max_ms=float(latency_ms.max()),
        spread=(p75 - p25) / median if median else 0.0,
        outliers=int(np.sum(latency_ms > p75 + 1.5 * (p75 - p25))),
        fps=1000 * measurement.batch / median if median else math.inf,
    )


def percentiles(values: Sequence[float], ranks: Sequence[float]) -> tuple[float, ...]:
    """Percentiles by linear interpolation: type 7 of Hyndman and Fan 1996 (The American Statistician 50:4)."""
    return tuple(float(v) for v in np.percentile(np.asarray(values, float), ranks))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval for the median that assumes nothing about the distribution but independent samples.

    From order statistics (David and Nagaraja 2003, Order Statistics, section 7.1): with B binomial(n, 1/2),
    [x(k), x(n+1-k)] covers the median with probability 1 - 2 P(B < k); k is the largest that keeps it at
    `confidence`. Below 6 samples no pair does at 95%, and the whole range is given. Timings in one process
    are correlated, so read it as a lower bound of the uncertainty.
    """
    ordered = np.sort(np.asarray(values, float))
    n = len(ordered)
    if n == 0:
        raise InputError("There is no median of no samples")
    k = max(1, _order_rank(n, (1 - confidence) / 2))
    return float(ordered[k - 1]), float(ordered[n - k])


def rounds_interval(rounds: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval for the median of all samples, from samples in rounds that are independent of each other.

    Within a process samples are correlated, and memory layout and placement are drawn anew only with the next
    one, so only rounds count (Kalibera and Jones 2013, Rigorous Benchmarking in Reasonable Time): Student's
    interval over the logarithms of their medians, laid around the median of all samples. Two rounds or more.
    """
    medians = np.log([max(float(np.median(samples)), 1e-9) for samples in rounds])
    count = len(medians)
    if count < 2:
        raise InputError("An interval over rounds needs two rounds or more", received=count)
    half = student_quantile((1 + confidence) / 2, count - 1) * float(medians.std(ddof=1)) / math.sqrt(count)
    middle = float(np.median(np.concatenate([np.asarray(samples, float) for samples in rounds])))
    return middle * math.exp(-half), middle * math.exp(half)


def _order_rank(n: int, tail: float) -> int:
    """The largest k with P(B < k) <= tail for B binomial(n, 1/2); 0 where even k = 1 is too much."""
    if n > 5000:  # the normal approximation is within one rank here, and the exact sum is slow
        return math.floor(n / 2 + NormalDist().inv_cdf(tail) * math.sqrt(n) / 2)
    limit, total, k = int(tail * 2**53) * 2**n >> 53, 0, 0
    while (total := total + math.comb(n, k)) <= limit:
        k += 1
    return k


def ratio_interval(logs: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a ratio from the logarithms of paired ratios, one an independent round.

    The bootstrap-t of the mean (Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5):
    rounds are resampled, and each resample's mean is judged by its own standard error; it follows skew, which a
    noisy machine brings. Student's interval, which bears rare extremes better, is joined to it: the wider side of
    either counts. With a dozen rounds the plain percentile bootstrap is too narrow. Below 6 rounds InputError is
    raised. The same logs give the same interval.
    """
    values = np.asarray(logs, float)
    count = len(values)
    if count < 6 or not np.isfinite(values).all():
        raise InputError("A ratio's interval needs 6 finite rounds or more", received=f"{count} rounds")
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(count)
    if error == 0:
        return math.exp(mean), math.exp(mean)
    drawn = values[np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(count)
    # A resample of one value many times has no spread of its own; it must not decide the tails.
    errors = np.maximum(errors, error / 10)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn.mean(axis=1) - mean) / errors, (tail, 1 - tail))
    student = student_quantile(1 - tail, count - 1)
    return math.exp(mean - max(high, student) * error), math.exp(mean - min(low, -student) * error)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t above the median, to 4 digits: 2.201 for (0.975, 11). By integrating its density."""
    x = np.linspace(0, 200, 400_001)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    beyond = 200 * density[-1] / freedom / (x[1] - x[0])  # the tail falls as x^-(freedom + 1)
    return float(np.interp((probability - 0.5) * 2 * (area[-1] + beyond), area, x))


def wilson_interval(correct: int, images: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a proportion by Wilson 1927 (JASA 22:158): sound near 0 and 1, where p +- z s is not.

    correct of `images` were right; gives (low, high) as fractions of 1.
    """
    if not 0 <= correct <= images or images < 1:
        raise InputError("A proportion needs 0 <= correct <= images", received=f"{correct} of {images}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, z2n = correct / images, z * z / images
    middle = (p + z2n / 2) / (1 + z2n)
    half = z / (1 + z2n) * math.sqrt(p * (1 - p) / images + z2n / (4 * images))
    low = 0.0 if correct == 0 else max(0.0, middle - half)
    high = 1.0 if correct == images else min(1.0, middle + half)
    return low, high


def pareto(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Indices of the rows that no other row beats, in the order given.

    points: one row a variant, such as (top1, latency_ms, size_bytes); directions: 'max' or 'min' for each
    column, such as ('max', 'min', 'min'). A row is beaten by one that is at least as good in every column
    and better in one; equal rows stay together. A row with a missing value (None or NaN) is never on the
    front and beats nobody.
    """
    for direction in directions:
        if direction not in ("max", "min"):
            raise InputError("A Pareto direction is unknown", received=repr(direction), allowed="max, min")
    signs = np.array([1.0 if direction == "max" else -1.0 for direction in directions])
    rows = [[math.nan if v is None else float(v) for v in row] for row in points]
    if any(len(row) != len(signs) for row in rows):
        raise InputError("A Pareto row has not one value for each direction", allowed=f"{len(signs)} values")
    gains = np.array(rows, float).reshape(len(rows), len(signs)) * signs
    whole = ~np.isnan(gains).any(axis=1)
    front = []
    for index in np.flatnonzero(whole):
        others = gains[whole]
        beaten = (others >= gains[index]).all(axis=1) & (others > gains[index]).any(axis=1)
        if not beaten.any():
            front.append(int(index))
    return front
