"""Splits, the batches that training reads, and one preprocessing for arrays, files, cache and stream."""

from __future__ import annotations

import os
import resource

import numpy as np
import pytest
from PIL import Image

from mobile_bench.inputs import InputSpec, read_picture
from tfopt import data
from tfopt.data.augment import augment
from tfopt.errors import DataError, InputError

SPECS = {
    "same": InputSpec(16, 20, 3),
    "gray": InputSpec(16, 20, 1),
    "smaller": InputSpec(9, 7, 3),
    "larger gray": InputSpec(33, 31, 1),
    "square crop": InputSpec(12, 12, 3, resize="crop"),
    "crop at the same size": InputSpec(16, 20, 3, resize="crop"),
    "wide crop": InputSpec(8, 20, 3, resize="crop"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TFOPT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def images():
    """uint8 (150, 16, 20, 3) with structure at every scale, and labels of 0..2."""
    random = np.random.default_rng(1)
    coarse = random.integers(0, 256, (150, 4, 5, 3)).repeat(4, 1).repeat(4, 2)
    return ((coarse + random.integers(0, 256, (150, 16, 20, 3))) // 2).astype(np.uint8), random.integers(0, 3, 150)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for index, (image, label) in enumerate(zip(*images)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{index:04}.png")
    return root


def test_the_splits_share_no_image_and_lose_none(images):
    loaded = data.from_arrays(images)
    parts = [set(loaded[name].hashes.tolist()) for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 150
    assert all(parts)


def test_the_order_of_the_images_does_not_move_them(images):
    x, y = images
    order = np.random.default_rng(3).permutation(len(x))
    first, second = data.from_arrays((x, y)), data.from_arrays((x[order], y[order]))
    for name in data.SPLITS:
        assert set(first[name].hashes.tolist()) == set(second[name].hashes.tolist())


def test_a_new_image_moves_no_old_one(images):
    x, y = images
    before, after = data.from_arrays((x[:-1], y[:-1])), data.from_arrays((x, y))
    for name in ("train", "validation", "test"):
        assert set(before[name].hashes.tolist()) <= set(after[name].hashes.tolist())


def test_duplicates_share_a_split_and_do_not_leak_into_a_given_test(images):
    x, y = images
    loaded = data.from_arrays((np.concatenate([x, x]), np.concatenate([y, y])))
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not np.isin(loaded[a].hashes, loaded[b].hashes).any()
    given = data.from_arrays((x, y), test=(x[:5], y[:5]), validation=(x[3:9], y[3:9]))
    assert [len(given[n]) for n in ("train", "validation", "test")] == [141, 4, 5]
    assert (
        "2 images of validation also lie in test" in given.note and "5 images of train also lie in test" in given.note
    )


def test_calibration_comes_from_train_with_every_class_alike():
    random = np.random.default_rng(0)
    y = np.r_[np.zeros(900, int), np.ones(150, int), np.full(150, 2)]
    loaded = data.from_arrays((random.integers(0, 256, (1200, 4, 4, 1), np.uint8), y))
    calibration = loaded["calibration"]
    assert np.isin(calibration.hashes, loaded["train"].hashes).all()
    assert len(calibration) == 200 and np.ptp(np.bincount(calibration.labels)) <= 1


def test_the_fingerprint_changes_with_one_pixel_or_label(images):
    x, y = images
    reference = data.from_arrays((x, y)).fingerprint
    assert data.from_arrays((x.copy(), y.copy())).fingerprint == reference
    pixel, label = x.copy(), y.copy()
    pixel[7, 3, 2, 1] ^= 1
    label[7] = (label[7] + 1) % 3
    assert data.from_arrays((pixel, y)).fingerprint != reference
    assert data.from_arrays((x, label)).fingerprint != reference
    assert data.from_arrays((x, y), class_names=["a", "b", "c"]).fingerprint != reference


def test_a_limited_data_set_is_balanced_and_has_its_own_fingerprint(images):
    loaded = data.from_arrays(images)
    smaller = loaded.limited(train=30, test=6)
    assert len(smaller["train"]) == 30 and np.ptp(np.bincount(smaller["train"].labels)) <= 1
    assert len(smaller["test"]) == 6 and smaller.fingerprint != loaded.fingerprint
    assert smaller["validation"] is loaded["validation"]


@pytest.mark.parametrize("name", SPECS)
def test_arrays_files_cache_and_stream_show_the_same_pixels(images, folder, name):
    """Float32 inputs of the model, image by image, on four ways to it."""
    spec = SPECS[name].with_scaling("torch")
    stored = data.load(folder)
    split = stored["train"]
    originals = {str(path): images[0][int(os.path.basename(path)[:4])] for path in split.paths}
    expected = np.stack([spec.normalize(read_picture(path, spec)[None])[0] for path in split.paths])
    arrays = np.stack([originals[path] for path in split.paths])
    np.testing.assert_array_equal(spec.normalize(spec.fit(arrays)), expected)
    for source in (split, stored.decoded(spec)["train"]):
        np.testing.assert_array_equal(np.concatenate([x for x, _ in source.batches(spec, 32)]), expected)
        batch, labels = next(iter(source.stream(spec, 16, seed=3)))
        index = np.random.default_rng((3, 0)).permutation(len(split))[:16]
        np.testing.assert_array_equal(batch, expected[index])
        np.testing.assert_array_equal(labels, split.labels[index])


def test_a_folder_larger_than_memory_allows_stays_files(folder):
    spec = InputSpec(16, 20, 3)
    stored = data.load(folder)
    size = 16 * 20 * 3 * len(stored["train"])
    half = stored.decoded(spec, limit_bytes=size - 1)
    assert half["train"].paths is not None and half["test"].images is not None
    assert stored.decoded(spec, limit_bytes=size)["train"].images is not None


def test_decoding_reports_how_far_it_is_and_happens_once(folder):
    spec, seen = InputSpec(8, 8, 3), []
    stored = data.load(folder)
    first = stored.decoded(spec, progress=lambda *args: seen.append(args))
    total = len(stored["train"])
    assert (total, total, {"what": "decoding train"}) in seen
    seen.clear()
    second = stored.decoded(spec, progress=lambda *args: seen.append(args))
    assert not seen
    np.testing.assert_array_equal(first["train"].images, second["train"].images)


def test_half_a_file_in_the_cache_is_made_again(folder, own_cache):
    spec = InputSpec(8, 8, 3)
    expected = np.array(data.load(folder).decoded(spec)["train"].images)
    for file in (own_cache / "decoded").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    np.testing.assert_array_equal(data.load(folder).decoded(spec)["train"].images, expected)


def test_a_full_disk_is_told_and_leaves_no_half_file(folder, own_cache):
    """The limit on a file's size stands in for the disk's end: the same failing write."""
    spec = InputSpec(64, 64, 3)
    stored = data.load(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="decoded as they are needed.*Free some space"):
            loaded = stored.decoded(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loaded["train"].images is None
    np.testing.assert_array_equal(loaded["train"].pixels(spec), stored["train"].pixels(spec))
    assert not [file for file in (own_cache / "decoded").iterdir() if file.stat().st_size < 64 * 64 * 3]
    assert all(len(np.load(file, mmap_mode="r")) for file in (own_cache / "decoded").iterdir())


def test_the_stream_repeats_exactly_and_sees_every_image_once_an_epoch(images):
    spec = InputSpec(16, 20, 3).with_scaling("raw")
    split = data.from_arrays(images)["train"]
    steps = len(split) // 16
    take = lambda seed: [
        x.numpy() for x, _ in split.stream(spec, 16, augmentation="crop_flip", seed=seed).take(steps + 2)
    ]
    first, again, other = take(0), take(0), take(1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other[0])
    plain = np.concatenate([x.numpy() for x, _ in split.stream(spec, 16, seed=0).take(steps)]).astype(np.uint8)
    assert len(np.unique(plain.reshape(len(plain), -1), axis=0)) == steps * 16
    assert next(iter(split.stream(spec, 5000)))[0].shape[0] == len(split)


def test_the_stream_keeps_the_error_that_names_the_file(folder, tmp_path):
    import shutil

    import tensorflow as tf

    shutil.copytree(folder, tmp_path / "copy")
    split = data.load(tmp_path / "copy")["train"]
    with open(split.paths[0], "wb") as file:
        file.write(b"spoilt")
    failures = []
    with pytest.raises(tf.errors.OpError):
        for _ in split.stream(InputSpec(8, 8, 3), len(split), failures=failures).take(1):
            pass
    assert isinstance(failures[0], DataError) and split.paths[0] in str(failures[0])


def test_augmentations(images):
    x = images[0][:64]
    random = lambda: np.random.default_rng(0)
    np.testing.assert_array_equal(augment(x, "none", random()), x)
    flipped = augment(x, "flip", random())
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(flipped, x)])
    np.testing.assert_array_equal(flipped[mirrored], x[mirrored][:, :, ::-1])
    assert 16 < mirrored.sum() < 48
    cropped = augment(x, "crop", random())
    assert cropped.shape == x.shape and cropped.dtype == np.uint8
    # Two rows and columns of border at most: what lies further inside must turn up in each crop.
    for before, after in zip(x, cropped):
        windows = np.lib.stride_tricks.sliding_window_view(after, (12, 16, 3)).reshape(-1, 12, 16, 3)
        assert (windows == before[2:-2, 2:-2]).all((1, 2, 3)).any()
    with pytest.raises(InputError, match=r"no augmentation.*crop_flip"):
        augment(x, "rotate", random())
