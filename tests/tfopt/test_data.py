"""Data from arrays, .npz files and tf.data, and what --data accepts."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tfopt import data
from tfopt.errors import DataError


@pytest.fixture
def digit_arrays(digits):
    test = digits["test"]
    return test.images[:300], test.labels[:300]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fashion_mnist", ("fashion_mnist", "test")),
        ("digits:train", ("digits", "train")),
        ("/data/photos:validation", ("/data/photos", "validation")),
        (r"C:\photos", (r"C:\photos", "test")),
        (r"C:\photos:calibration", (r"C:\photos", "calibration")),
        ("/data/a:b/photos", ("/data/a:b/photos", "test")),
        ("/data/a:b/photos:train", ("/data/a:b/photos", "train")),
    ],
)
def test_place_and_split_are_told_apart(text, expected):
    assert data.parse(text) == expected


def test_a_folder_whose_name_ends_like_a_split_is_a_folder(tmp_path):
    (tmp_path / "odd:train").mkdir()
    assert data.parse(f"{tmp_path}/odd:train") == (f"{tmp_path}/odd:train", "test")


def test_a_wrong_split_lists_those_that_exist(tmp_path):
    for place in ("digits", tmp_path):
        with pytest.raises(
            DataError, match=r"no split.*'tset'.*calibration, test, train, validation.*Did you mean test"
        ):
            data.parse(f"{place}:tset")


def test_a_wrong_name_lists_those_that_exist():
    with pytest.raises(DataError, match=r"cifar10, cifar100, digits.*Did you mean fashion_mnist"):
        data.load("fashion_minst")


def test_a_file_that_is_no_data_set(tmp_path):
    (tmp_path / "notes.txt").write_text("cats")
    with pytest.raises(DataError, match="not a data set"):
        data.load(tmp_path / "notes.txt")


def test_digits_have_four_splits(digits):
    assert {name: digits[name].images.shape[1:] for name in data.SPLITS} == dict.fromkeys(data.SPLITS, (8, 8, 1))
    assert sum(len(digits[name]) for name in ("train", "validation", "test")) == 1797
    assert digits.image_shape == (8, 8, 1)
    with pytest.raises(DataError, match="no split"):
        digits["training"]


def _saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_with_all_splits(tmp_path, digit_arrays):
    x, y = digit_arrays
    file = _saved(
        tmp_path / "mine.npz", x_train=x[:200], y_train=y[:200], x_val=x[200:240], y_val=y[200:240],
        x_test=x[240:], y_test=y[240:], class_names=np.array([b"zero", *[str(i).encode() for i in range(1, 10)]]),
        unrelated=np.zeros(3),
    )  # fmt: skip
    loaded = data.load(file)
    assert loaded.name == "mine" and loaded.class_names[0] == "zero"
    assert len(loaded["test"]) == 60 and len(loaded["validation"]) <= 40
    np.testing.assert_array_equal(loaded["test"].images, x[240:])


def test_npz_of_images_and_labels_is_split(tmp_path, digit_arrays):
    x, y = digit_arrays
    loaded = data.load(_saved(tmp_path / "mine.npz", images=x[..., 0], labels=y[:, None]))
    assert sum(len(loaded[name]) for name in ("train", "validation", "test")) == 300
    assert loaded["train"].images.shape[1:] == (8, 8, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: {"x_train": x / 255.0, "y_train": y}, "already scaled.*belongs to the model's input spec"),
        (lambda x, y: {"x_train": x.astype(np.float32) - 127, "y_train": y}, "already scaled"),
        (lambda x, y: {"x_train": x.astype(np.uint16) * 257, "y_train": y}, "more than 8 bits"),
        (lambda x, y: {"x_train": np.where(x == 0, np.nan, x), "y_train": y}, "not finite"),
        (lambda x, y: {"x_train": x > 3, "y_train": y}, "not numbers"),
        (lambda x, y: {"x_train": x[..., None], "y_train": y}, r"wrong shape.*\(300, 8, 8, 1, 1\)"),
        (lambda x, y: {"x_train": np.repeat(x, 4, -1), "y_train": y}, "wrong shape"),
        (lambda x, y: {"x_train": x[:0], "y_train": y[:0]}, "wrong shape"),
        (lambda x, y: {"x_train": x, "y_train": y[:-1]}, "labels do not fit"),
        (lambda x, y: {"x_train": x, "y_train": y.astype(np.float32)}, "labels do not fit"),
        (lambda x, y: {"x_train": x, "y_train": np.eye(10)[y]}, r"one-hot, give labels.argmax\(-1\)"),
        (lambda x, y: {"x_train": x, "y_train": y - 1}, "no class indices.*-1 to 8"),
        (lambda x, y: {"x_train": x, "y_train": y * 10**8}, "no class indices"),
        (lambda x, y: {"x_train": x, "y_train": y * 0}, "all of one class"),
        (lambda x, y: {"x_train": x, "y_train": y, "class_names": ["a", "b"]}, "label 9.*0 to 1"),
        (lambda x, y: {"x_train": x, "y_train": y, "class_names": [["a"], ["b"]]}, "not a list"),
        (lambda x, y: {"x_train": x, "y_train": y, "x_test": x}, "x_test or y_test, and not both"),
        (lambda x, y: {"pictures": x, "y_train": y}, "y_train, and not both.*pictures"),
        (lambda x, y: {"pictures": x}, "lacks its images or labels.*pictures"),
        (lambda x, y: {"x_train": x[:6], "y_train": y[:6]}, "No image is left for .* split.*6 images"),
        (
            lambda x, y: {"x_train": x, "y_train": y, "x_test": x, "y_test": y},
            "for the train split.*300 images of train also lie in test",
        ),
        (lambda x, y: {"x_train": x, "y_train": y.astype(object)}, "cannot be read.*without pickled objects"),
    ],
)  # fmt: skip
def test_bad_npz_is_one_clear_error(tmp_path, digit_arrays, change, message):
    with pytest.raises(DataError, match=message):
        data.load(_saved(tmp_path / "bad.npz", **change(*digit_arrays)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"hello", pickle.dumps({"x_train": 1})])
def test_damaged_npz_is_one_clear_error(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read.*bad\.npz"):
        data.load(tmp_path / "bad.npz")


def test_npz_cut_short_or_bare(tmp_path, digit_arrays):
    whole = _saved(tmp_path / "whole.npz", images=digit_arrays[0], labels=digit_arrays[1]).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (tmp_path / "flipped.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with open(tmp_path / "bare.npz", "wb") as file:
        np.save(file, digit_arrays[0])
    for name in ("cut", "flipped", "bare", "missing"):
        with pytest.raises(DataError, match=f"cannot be read.*{name}"):
            data.load(tmp_path / f"{name}.npz")


def test_arrays_from_python(digit_arrays):
    x, y = digit_arrays
    loaded = data.from_arrays((x.astype(np.float64), y), class_names="abcdefghij", name="mine")
    for name in data.SPLITS:
        np.testing.assert_array_equal(loaded[name].images, data.from_arrays((x, y))[name].images)
    assert loaded["train"].images.dtype == np.uint8
    with pytest.raises(DataError, match="differ in shape"):
        data.from_arrays(([x[0], x[0, :4]], [0, 1]))


@pytest.mark.parametrize("form", ["single", "batched", "flat", "flat batched", "float", "column labels"])
def test_tf_data_in_every_form_is_the_same_data(digit_arrays, form):
    import tensorflow as tf

    x, y = digit_arrays
    reference = data.from_dataset(tf.data.Dataset.from_tensor_slices((x, y)))
    images = x[..., 0] if "flat" in form else x.astype(np.float32) if form == "float" else x
    labels = y[:, None] if form == "column labels" else y
    given = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(300, seed=5)
    if "batched" in form or form == "column labels":
        given = given.batch(32)
    loaded = data.from_dataset(given)
    assert loaded.fingerprint == reference.fingerprint
    np.testing.assert_array_equal(loaded["train"].images, reference["train"].images)
    np.testing.assert_array_equal(loaded["train"].labels, reference["train"].labels)


def test_bad_tf_data_is_one_clear_error(digit_arrays):
    import tensorflow as tf

    x, y = digit_arrays
    pairs = tf.data.Dataset.from_tensor_slices((x, y))
    sizes = tf.data.Dataset.from_generator(
        lambda: iter([(x[0], 0), (x[1, :5], 1)]),
        output_signature=(tf.TensorSpec((None, None, 1), tf.uint8), tf.TensorSpec((), tf.int32)),
    )
    for dataset, message in [
        (pairs.map(lambda image, label: image), "wrong elements"),
        (pairs.repeat(), r"never ends.*repeat\(\)"),
        (pairs.take(0), "empty"),
        (pairs.map(lambda image, label: (tf.cast(image, tf.float32) / 255, label)), "already scaled"),
        (sizes, r"differ in shape.*\(5, 8, 1\), \(8, 8, 1\)"),
    ]:
        with pytest.raises(DataError, match=message):
            data.from_dataset(dataset)


def test_what_was_one_split_can_be_divided_again(digits):
    """The images of validation share the last digit of their hashes, by which they were chosen."""
    for name in ("train", "validation"):
        again = data.from_arrays((digits[name].images, digits[name].labels))
        assert sum(len(again[part]) for part in ("train", "validation", "test")) == len(digits[name])
