"""May a new file replace the old one? One verdict for people's continuous integration.

ACCEPT      nothing got worse by more than what is allowed, and the measurement is good enough to say so
REGRESSION  something got worse by more than that, beyond doubt
ANOMALOUS   it cannot be told: too noisy, too few images, or the two cannot be set side by side
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

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
        for what, percent, most, unit in (
            ("rise of the latency", 100 * self.slower, 1000, "percent"),
            ("rise of the file size", 100 * self.larger, 1000, "percent"),
            ("drop of the accuracy", self.points, 100, "points"),
        ):
            if not 0 <= percent <= most:
                raise InputError(
                    f"The allowed {what} is out of range", received=f"{percent:g} {unit}", allowed=f"0 to {most} {unit}"
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
    (McNemar 1947, Psychometrika 12:153; one-sided) finds it at 5%. It is accepted when the sample excludes such a
    drop: when largest_loss lies within the limit. Otherwise the sample is too small to tell.
    """
    lost = int(((old == labels) & (new != labels)).sum())
    won = int(((old != labels) & (new == labels)).sum())
    images = len(labels)
    points = 100 * (won - lost) / images
    most = 100 * largest_loss(lost, won, images)
    text = (
        f"{np.mean(old == labels):.2%} to {np.mean(new == labels):.2%} ({points:+.2f} points) on {images:,} images: "
        f"{lost} lost, {won} won; allowed -{allowed_points:g}"
    )
    chance = sign_test(lost, won)
    if -points > allowed_points and chance <= ACCURACY_LEVEL:
        return Check("accuracy", REGRESSION, f"{text}; chance alone does this with p = {chance:.2g}")
    if most <= allowed_points:
        return Check("accuracy", ACCEPT, f"{text}; a loss above {max(0.0, most):.2g} is excluded")
    doubt = f"{text}; a loss of {most:.2g} is not excluded (95%)"
    needed = images_needed(lost, won, images, allowed_points / 100)
    if needed is None:
        return Check("accuracy", ANOMALOUS, f"{doubt}: give more images or allow more")
    return Check("accuracy", ANOMALOUS, f"{doubt}: give more images, about {needed:,} if it goes on like this")


def largest_loss(lost: int, won: int, images: int) -> float:
    """The largest loss of accuracy, as a fraction, that `lost` and `won` among `images` do not exclude at 5%.

    The upper end of the one-sided score interval for the difference of paired proportions (Tango 1998, Statistics in
    Medicine 17:891, equations 9 and 10). Where none was won that promises too much, and the exact bound is taken
    instead (Clopper and Pearson 1934, Biometrika 26:404): about 3 / images where none was lost either.
    """
    z = NormalDist().inv_cdf(1 - ACCURACY_LEVEL)
    excluded = (
        (lambda loss: _score(lost, won, images, loss) >= z)
        if won
        else (lambda loss: _at_most(lost, images, loss) <= ACCURACY_LEVEL)
    )
    low, high = (lost - won) / images, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if excluded(middle) else (middle, high)
    return high


def _at_most(count: int, trials: int, chance: float) -> float:
    """The chance of `count` or fewer of `trials`, by the binomial distribution."""
    if not 0 < chance < 1:
        return float(chance == 0 or count == trials)
    counts = np.arange(count + 1)
    steps = np.log((trials - counts[1:] + 1) / counts[1:])  # from one binomial coefficient to the next
    logs = (
        np.concatenate(([0.0], np.cumsum(steps))) + counts * math.log(chance) + (trials - counts) * math.log1p(-chance)
    )
    return float(np.exp(logs).sum())


def _score(lost: int, won: int, images: int, loss: float) -> float:
    """By how many standard errors, under a true loss of `loss`, the loss that was seen lies below it."""
    # q: the most likely share of images that are won, given that the share lost is q + loss.
    b = (2 * images + won - lost) * loss - (lost + won)
    q = (math.sqrt(max(0.0, b * b + 8 * images * won * loss * (1 - loss))) - b) / (4 * images)
    variance = images * (2 * q + loss * (1 - loss))
    return (images * loss - (lost - won)) / math.sqrt(variance) if variance > 0 else math.inf


def images_needed(lost: int, won: int, images: int, allowed: float) -> int | None:
    """About how many images would exclude a loss above `allowed`, a fraction; None where no number would.

    The answers are taken to differ as often, and in the same direction, as on the images at hand.
    """
    loss = max(0.0, (lost - won) / images)
    if loss >= allowed:
        return None
    z = NormalDist().inv_cdf(1 - ACCURACY_LEVEL)
    fewest = math.log(ACCURACY_LEVEL) / math.log1p(-allowed) if allowed < 1 else 1
    return math.ceil(max(fewest, (lost + won) / images * (z / (allowed - loss)) ** 2))


def sign_test(lost: int, won: int) -> float:
    """P(at least `lost` of lost + won) when either is as likely."""
    total = lost + won
    return sum(math.comb(total, k) for k in range(lost, total + 1)) / 2**total if total else 1.0
