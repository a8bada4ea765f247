"""May a new file replace the old one? One verdict for people's continuous integration.

ACCEPT      nothing got worse by more than what is allowed, and the measurement is good enough to say so
REGRESSION  something got worse by more than that, beyond doubt
ANOMALOUS   it cannot be told: too noisy, too few images, or the two cannot be set side by side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from mobile_bench.compare import Verdict
from mobile_bench.errors import InputError

ACCEPT, REGRESSION, ANOMALOUS = "ACCEPT", "REGRESSION", "ANOMALOUS"
EXIT_CODES = {ACCEPT: 0, REGRESSION: 1, ANOMALOUS: 3}
#: The chance that a drop in accuracy on the sample is taken for real when there is none.
ACCURACY_LEVEL = 0.05


@dataclass(frozen=True)
class Check:
    """One property judged: what was found, in words with its numbers."""

    name: str
    verdict: str
    text: str


@dataclass(frozen=True)
class Limits:
    """What may get worse: latency and size as fractions (0.03: 3%), top-1 as points (0.5: half a percent)."""

    slower: float = 0.03
    larger: float = 0.01
    points: float = 0.5

    def __post_init__(self):
        for name, most in (("slower", 10.0), ("larger", 10.0), ("points", 100.0)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(
                    f"The allowed worsening ({name}) is out of range",
                    received=getattr(self, name),
                    allowed=f"0 to {most:g}",
                )


def overall(checks: Sequence[Check]) -> str:
    """A proven regression outweighs a doubt, and a doubt outweighs all that is well."""
    verdicts = {check.verdict for check in checks}
    return next((verdict for verdict in (REGRESSION, ANOMALOUS) if verdict in verdicts), ACCEPT)


def judge_latency(found: Verdict, allowed: float) -> Check:
    """By the interval of the ratio new over old: wholly above the limit, wholly below it, or across it."""
    limit = 1 + allowed
    text = (
        f"{found.ratio - 1:+.2%} ({found.confidence:.0%} interval {found.low - 1:+.2%} to {found.high - 1:+.2%}), "
        f"{found.reference_ms:.4g} to {found.median_ms:.4g} ms; allowed {allowed:+.2%}"
    )
    if found.low > limit:
        return Check("latency", REGRESSION, text)
    if found.high <= limit:
        return Check("latency", ACCEPT, text)
    return Check("latency", ANOMALOUS, f"{text}: too noisy to tell; measure with more --seconds")


def judge_size(new_bytes: int, old_bytes: int, allowed: float) -> Check:
    worse = new_bytes > old_bytes * (1 + allowed)
    text = f"{old_bytes:,} to {new_bytes:,} bytes ({new_bytes / old_bytes - 1:+.2%}); allowed {allowed:+.2%}"
    return Check("size", REGRESSION if worse else ACCEPT, text)


def judge_accuracy(new: np.ndarray, old: np.ndarray, labels: np.ndarray, allowed_points: float) -> Check:
    """By the images on which exactly one of the two is right.

    new, old, labels: int (images,). A drop beyond the limit is a regression when McNemar's exact test
    (McNemar 1947, Psychometrika 12:153; one-sided) finds it at 5%; otherwise the sample is too small to tell.
    """
    lost = int(((old == labels) & (new != labels)).sum())
    won = int(((old != labels) & (new == labels)).sum())
    images = len(labels)
    points = 100 * (won - lost) / images
    chance = sign_test(lost, won)
    text = (
        f"{np.mean(old == labels):.2%} to {np.mean(new == labels):.2%} ({points:+.2f} points) on {images:,} images: "
        f"{lost} lost, {won} won; allowed -{allowed_points:g}"
    )
    if -points <= allowed_points:
        return Check("accuracy", ACCEPT, text)
    if chance <= ACCURACY_LEVEL:
        return Check("accuracy", REGRESSION, f"{text}; chance alone does this with p = {chance:.2g}")
    return Check("accuracy", ANOMALOUS, f"{text}; chance alone does this with p = {chance:.2g}: give more images")


def sign_test(lost: int, won: int) -> float:
    """P(at least `lost` of lost + won) when either is as likely."""
    total = lost + won
    return sum(comb(total, k) for k in range(lost, total + 1)) / 2**total if total else 1.0
