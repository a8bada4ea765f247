"""Which images, how many, and which ranges: on a trained model, and on distributions whose best clipping is known."""

from __future__ import annotations

import numpy as np
import pytest

from mobile_bench.flatbuffer import read_model
from mobile_bench.inputs import InputSpec
from tfopt import calibration, convert, convert_worker, models
from tfopt.errors import ConversionError, DataError, InputError
from tfopt.schemes import parse

SPEC = InputSpec(8, 8, 3)
LABELS = np.array([0] * 50 + [1] * 10 + [2] * 5)


def test_any_number_of_images_is_class_balanced_and_always_the_same():
    order = calibration.balanced_order(LABELS)
    assert sorted(order) == list(range(65))
    for count in (3, 6, 15):
        assert np.bincount(LABELS[order[:count]], minlength=3).tolist() == [count // 3] * 3
    assert np.bincount(LABELS[order[:35]]).tolist() == [20, 10, 5], "a class that has no more leaves its turn"
    np.testing.assert_array_equal(order, calibration.balanced_order(LABELS))
    assert (order[:15] != calibration.balanced_order(LABELS, seed=1)[:15]).any()


def test_images_are_taken_from_a_split_in_that_order(digits, spec):
    split = digits["calibration"]
    order = calibration.balanced_order(split.labels, seed=3)
    chosen = calibration.choose(split, spec, 20, seed=3)
    np.testing.assert_array_equal(chosen, split.pixels(spec, order[:20]))
    assert len(calibration.choose(split, spec, calibration.AUTO)) == len(calibration.choose(split, spec)) == len(split)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES / 255, "already scaled.*before: the input spec scales"),
        (IMAGES / 127.5 - 1, "already scaled"),
        (np.where(IMAGES > 250, np.nan, IMAGES), "not numbers.*NaN"),
        (IMAGES.astype(np.float32) + 0.5, "not bytes.*astype"),
        (IMAGES.astype(np.int64) * 256, "not bytes"),
        (IMAGES[0], "wrong shape"),
        (IMAGES[..., :2], "wrong shape"),
        (IMAGES.transpose(0, 3, 1, 2), "wrong shape"),
        (IMAGES[:0], "no image"),
        (np.array(["a"]), "wrong shape"),
    ],
)
def test_images_that_no_camera_gives_are_refused(images, said):
    with pytest.raises(DataError, match=said):
        calibration.choose(images, SPEC)


def test_plain_images_are_taken():
    np.testing.assert_array_equal(calibration.choose(IMAGES, SPEC, 3), IMAGES[:3])


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "some"])
def test_a_number_of_images_that_does_not_exist(wrong):
    with pytest.raises(InputError, match="auto, or 1 and above"):
        calibration.check_options(wrong, "minmax")
    with pytest.raises(InputError, match="Did you mean percentile"):
        calibration.check_options("auto", "percentil")


def counted(values):
    low, high = float(values.min()), float(values.max())
    return np.histogram(values, calibration.BINS, (low, high))[0], low, high


def narrowed(way, values):
    count, low, high = counted(values)
    return calibration.narrowed(way, {7: (low, high)}, {7: count})[7]


def squared_error(values, low, high):
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return np.mean((scale * (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) - values) ** 2)


RNG = np.random.default_rng(0)
LONG_TAIL = np.concatenate([RNG.normal(0, 1, 200_000), [60.0, -40.0]])
RELU = np.maximum(np.concatenate([RNG.normal(0, 1, 200_000), [50.0]]), 0)
EVEN = RNG.uniform(-1, 3, 200_000)


@pytest.mark.parametrize("way", calibration.WAYS[1:])
def test_an_outlier_is_clipped_and_zero_stays(way):
    low, high = narrowed(way, LONG_TAIL)
    assert 0.9 * LONG_TAIL.min() < low < -1.5 and 1.5 < high < 0.9 * LONG_TAIL.max()
    low, high = narrowed(way, RELU)
    assert low == 0 and 1.5 < high < 0.95 * RELU.max()


@pytest.mark.parametrize("way", calibration.WAYS[1:])
def test_values_that_fill_their_range_are_hardly_clipped(way):
    low, high = narrowed(way, EVEN)
    assert -1 <= low < -0.9 and 2.7 < high <= 3


def test_percentile_leaves_a_ten_thousandth_out_at_each_end():
    low, high = narrowed("percentile", LONG_TAIL)
    width = 100 / calibration.BINS
    assert np.percentile(LONG_TAIL, 0.01) == pytest.approx(low, abs=2 * width)
    assert np.percentile(LONG_TAIL, 99.99) == pytest.approx(high, abs=2 * width)


@pytest.mark.parametrize("values", [LONG_TAIL, RELU, EVEN], ids=["tail", "relu", "even"])
def test_mse_has_the_least_error_of_all(values):
    error = {way: squared_error(values, *narrowed(way, values)) for way in calibration.WAYS[1:]}
    whole = squared_error(values, min(values.min(), 0), max(values.max(), 0))
    assert error["mse"] <= 1.05 * min(error["percentile"], error["entropy"], whole)
    # No pair of ends on a fine grid does much better.
    ends = [(values.min() * a, values.max() * b) for a in np.linspace(0.05, 1, 24) for b in np.linspace(0.05, 1, 24)]
    assert error["mse"] <= 1.3 * min(squared_error(values[::20], *pair) for pair in ends) + 0.3 * error["mse"]


def test_entropy_looks_at_both_signs_as_tensorrt_does():
    low, high = narrowed("entropy", LONG_TAIL)
    assert low == pytest.approx(-high), "one threshold for both"
    assert narrowed("entropy", -RELU)[1] == 0


@pytest.fixture(scope="module")
def maker(trained_file, digits):
    """The converter's side of one trained model with sixty calibration images, in this process."""
    import tensorflow as tf

    loaded = models.load(trained_file)
    image = tf.TensorSpec((1, *loaded.spec.shape), tf.float32, name="image")
    graph = tf.function(lambda image: loaded.model(image, training=False)).get_concrete_function(image)
    owner = tf.Module()
    owner.kept = [weight.value for weight in loaded.model.weights]
    images = calibration.choose(digits["calibration"], loaded.spec, 60)
    return convert_worker.Maker(tf, graph, owner, loaded.spec, images, 60)


def test_auto_stops_where_the_ranges_settle(maker):
    content, asked = maker.calibrated
    assert asked == calibration.Count(60, 60, "as asked")
    same = np.repeat(maker.images[:16], 8, axis=0)
    _, count = calibration.calibrate(content, same, maker.spec, calibration.AUTO)
    # The 8 copies of each image stand together: 16 images hold 2 of them, 128 all.
    assert count.used == 128 and "there are no more" in count.why and "of 16 tensors" in count.why
    again = np.tile(maker.images[:16], (8, 1, 1, 1))
    _, count = calibration.calibrate(content, again, maker.spec, calibration.AUTO)
    assert (count.used, count.offered) == (32, 128) and "from 16 to 32 images 100% of 16 tensors" in count.why
    _, count = calibration.calibrate(content, maker.images[:5], maker.spec, calibration.AUTO)
    assert count.used == 5 and "too few to see" in count.why


def test_ranges_are_those_of_the_tensors_themselves(maker):
    content, _ = maker.calibrated
    known, counts = calibration.ranges_of(content), calibration.histograms(content, maker.images, maker.spec)
    entry = read_model(content).main.inputs[0]
    pixels = maker.spec.normalize(maker.images)
    assert known[entry] == pytest.approx((pixels.min(), pixels.max()))
    assert set(counts) == set(known) - {entry}, "the image keeps its range"
    graph = read_model(content).main
    # The calibrator also notes in an input of an ADD what the ADD writes there: that range is too wide.
    written_to = {index for op in graph.operators if op.op == "ADD" for index in op.inputs}
    for index, count in counts.items():
        assert count.sum() == 60 * np.prod(graph.tensors[index].shape)
        assert index in written_to or (count[0] and count[-1])


@pytest.mark.parametrize("way", calibration.WAYS[1:])
def test_the_file_has_the_scales_of_the_chosen_ranges(way, maker):
    content, _ = maker.calibrated
    names = {tensor.index: tensor.name for tensor in read_model(content).main.tensors}
    known = calibration.ranges_of(content)
    ranges = calibration.narrowed(way, known, maker._counts)
    np.testing.assert_allclose(
        [calibration.ranges_of(calibration.with_ranges(content, ranges))[i] for i in ranges], list(ranges.values()),
        rtol=1e-6,
    )  # fmt: skip
    scales = lambda made: {t.name: t.scales[0] for t in read_model(made).main.tensors if t.dtype == "int8" and t.scales}
    plain, clipped = scales(maker._quantized(parse("int8"), "minmax")), scales(maker._quantized(parse("int8"), way))
    relu = [i for i, (low, _) in known.items() if low == 0 and i in ranges and names[i] in plain]
    assert len(relu) >= 5
    found = [clipped[names[i]] / plain[names[i]] for i in relu if "Mean" not in names[i] and "Softmax" not in names[i]]
    expected = [
        ranges[i][1] / known[i][1] for i in relu if "Mean" not in names[i] and "Softmax" not in names[i]
    ]  # fmt: skip
    assert np.median(np.abs(np.array(found) - expected)) < 0.01 and min(found) < 0.999


@pytest.mark.slow
def test_best_is_the_one_that_agrees_best_on_other_images(trained_file, digits, tmp_path, monkeypatch):
    loaded = models.load(trained_file)
    done = convert.convert(
        trained_file, loaded.spec, ["int8", "int16x8"], tmp_path, calibration=digits["calibration"], work=tmp_path,
        calibration_images=40, ranges="best", validation=digits["validation"],
    )  # fmt: skip
    facts = done[0].calibration
    assert (facts["used"], facts["why"], facts["scored_on"]) == (40, "as asked", min(200, len(digits["validation"])))
    scores = facts["candidates"]
    assert tuple(scores) == calibration.WAYS
    best = scores[facts["ranges"]]
    assert all((-best["agreement"], best["mse"]) <= (-score["agreement"], score["mse"]) for score in scores.values())
    assert len({score["mse"] for score in scores.values()}) == 4
    assert done[1].calibration["ranges"] == "minmax", "16 bits have no need to clip"
    assert done[0].within_tolerance and done[1].difference < done[0].difference


def test_ranges_are_never_chosen_by_the_images_they_were_found_on(digits, spec, tmp_path, trained_file):
    same = digits["calibration"]
    with pytest.raises(ConversionError, match="images that they were not found on"):
        convert.convert(
            trained_file, spec, ["int8"], tmp_path, calibration=same, work=tmp_path, ranges="best", validation=same
        )  # fmt: skip
    apart = convert._apart(digits["validation"], same, spec, 0)
    known = {image.tobytes() for image in same.pixels(spec)}
    assert len(apart) and not any(image.tobytes() in known for image in apart)
