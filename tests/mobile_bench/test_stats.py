"""Percentiles, intervals and the Pareto front against published and brute-force values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_bench.errors import InputError
from mobile_bench.records import Measurement, Target
from mobile_bench.stats import median_interval, pareto, percentiles, rounds_interval, summarize, wilson_interval


def measurement(latency_ms, **fields):
    return Measurement("r", "latency", "s", Target(), fields.pop("status", "ok"), latency_ms=latency_ms, **fields)


def test_percentiles_interpolate():
    assert percentiles([4, 1, 3, 2], (0, 50, 90, 100)) == pytest.approx((1, 2.5, 3.7, 4))


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (50, (18, 33)), (100, (40, 61))])
def test_the_median_interval_takes_the_tabled_ranks(n, ranks):
    """As tabled for the sign test, for instance in Conover 1999, Practical Nonparametric Statistics."""
    shuffled = np.random.default_rng(0).permutation(np.arange(1, n + 1))
    assert median_interval(shuffled) == ranks


@pytest.mark.parametrize("n", [6, 7, 31, 200, 999])
def test_the_median_interval_is_the_narrowest_that_covers(n):
    low, _ = median_interval(np.arange(1, n + 1))
    tail = lambda k: sum(math.comb(n, i) for i in range(k)) / 2**n
    assert tail(int(low)) <= 0.025 < tail(int(low) + 1)


def test_the_two_ways_to_the_ranks_agree_where_they_meet():
    exact, approximate = median_interval(range(5000)), median_interval(range(5001))
    assert abs(exact[0] - approximate[0]) <= 1 and abs(exact[1] - approximate[1]) <= 1


def test_few_samples_give_the_whole_range_and_none_an_error():
    assert median_interval([3, 1, 2]) == (1, 3)
    with pytest.raises(InputError):
        median_interval([])


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_wilson_gives_newcombes_figures(correct, images, low, high):
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3."""
    assert wilson_interval(correct, images) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_stays_within_0_and_1(pair):
    correct, images = pair
    low, high = wilson_interval(correct, images)
    assert 0 <= low <= correct / images <= high <= 1


def test_an_impossible_proportion_is_refused():
    for pair in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError):
            wilson_interval(*pair)


def test_a_summary():
    samples = tuple(float(v) for v in range(1, 101))
    found = summarize(measurement(samples))
    assert (found.samples, found.median_ms, found.min_ms, found.max_ms) == (100, 50.5, 1, 100)
    assert (found.median_low_ms, found.median_high_ms) == (40, 61)
    assert found.p90_ms == pytest.approx(90.1) and found.p99_ms == pytest.approx(99.01)
    assert found.fps == pytest.approx(1000 / 50.5)
    assert found.spread == pytest.approx(49.5 / 50.5)


def test_the_deadline_is_met_by_nine_of_ten():
    found = summarize(measurement((10.0,) * 89 + (50.0,) * 11))
    assert found.median_ms == 10 and not found.meets(33.3) and found.meets(50)


def test_frames_per_second_count_the_images_of_a_batch():
    assert summarize(measurement((20.0,) * 9, batch=4)).fps == pytest.approx(200)


def test_what_was_not_measured_has_no_summary():
    assert summarize(measurement((), status="failed", reason="crashed")) is None


def test_the_front():
    rows = [(0.9, 10), (0.8, 5), (0.8, 5), (0.7, 6), (0.95, 30), (None, 1), (0.99, float("nan"))]
    assert pareto(rows, ("max", "min")) == [0, 1, 2, 4]
    assert pareto([], ("max", "min")) == []
    with pytest.raises(InputError, match="up"):
        pareto(rows, ("up", "min"))
    with pytest.raises(InputError, match="2 values"):
        pareto([(1, 2, 3)], ("max", "min"))


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=20))
def test_the_front_is_what_nobody_beats(rows):
    gain = lambda row: (row[0], -row[1], -row[2])
    beats = lambda a, b: all(x >= y for x, y in zip(gain(a), gain(b))) and gain(a) != gain(b)
    expected = [i for i, row in enumerate(rows) if not any(beats(other, row) for other in rows)]
    assert pareto(rows, ("max", "min", "min")) == expected


def test_the_interval_over_rounds_is_students():
    """Medians e^0, e^0.01, e^0.02: standard deviation 0.01, t(0.975, 2) = 4.3027, so 0.024842 to each side."""
    low, high = rounds_interval([[math.exp(value)] * 3 for value in (0.0, 0.01, 0.02)])
    assert math.log(low) == pytest.approx(0.01 - 4.3027 * 0.01 / math.sqrt(3), abs=1e-5)
    assert math.log(high) == pytest.approx(0.01 + 4.3027 * 0.01 / math.sqrt(3), abs=1e-5)
    assert rounds_interval([[2.0], [2.0]]) == (2.0, 2.0)
    with pytest.raises(InputError, match="two rounds"):
        rounds_interval([[1.0, 2.0]])


def test_the_interval_over_rounds_covers():
    """Rounds that differ by 1% and samples within by 5%: 95% of the intervals hold the true median."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        rounds = [np.exp(random.normal(random.normal(0, 0.01), 0.05, 200)) for _ in range(4)]
        low, high = rounds_interval(rounds)
        held += low <= 1 <= high
    assert 0.92 <= held / 400 <= 0.98
