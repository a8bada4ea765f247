"""Class folders: their layouts, every kind of image, and every kind of damage."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobile_bench.inputs import InputSpec, read_picture
from tfopt import data
from tfopt.errors import DataError

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(path, size=(12, 10), mode="RGB"):
    """A real image file of random pixels; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = RANDOM.integers(0, 256, (size[1], size[0], *channels), np.uint8)
    Image.frombytes(mode, size, pixels.tobytes()).save(path)
    return path


def class_folders(root, classes=("cat", "dog"), count=40, suffix=".png"):
    for name in classes:
        for index in range(count):
            picture(root / name / f"{index:03}{suffix}")
    return root


def all_labels(loaded):
    return {str(path): label for name in ("train", "validation", "test")
            for path, label in zip(loaded[name].paths, loaded[name].labels)}  # fmt: skip


def test_plain_class_folders_are_split_by_hash(tmp_path):
    loaded = data.load(class_folders(tmp_path / "pets", count=80))
    assert loaded.name == "pets" and loaded.class_names == ("cat", "dog") and loaded.image_shape == (10, 12, 3)
    assert loaded.source == f"folder {tmp_path / 'pets'}" and loaded.note == ""
    labels = all_labels(loaded)
    assert len(labels) == 160 and all(("/dog/" in path) == bool(label) for path, label in labels.items())
    assert 100 < len(loaded["train"]) < 150


def test_train_and_test_folders_stay_apart(tmp_path):
    class_folders(tmp_path / "train", count=30)
    class_folders(tmp_path / "test", count=5)
    loaded = data.load(tmp_path)
    assert {os.path.relpath(p, tmp_path).split("/")[0] for p in loaded["test"].paths} == {"test"}
    assert len(loaded["test"]) == 10
    assert {os.path.relpath(p, tmp_path).split("/")[0] for p in loaded["validation"].paths} == {"train"}


def test_imagenet_layout_shows_numbers_on_val(tmp_path):
    for split, count in (("train", 30), ("val", 3)):
        for name in ("n02084071", "n01440764"):
            for index in range(count):
                picture(tmp_path / split / name / f"{name}_{index}.JPEG")
    loaded = data.load(tmp_path)
    assert loaded.class_names == ("n01440764", "n02084071")
    assert len(loaded["test"]) == 6 and all("/val/" in path for path in loaded["test"].paths)


def test_all_three_given_folders_are_kept(tmp_path):
    for split, count in (("training", 10), ("Validation", 4), ("testing", 3)):
        class_folders(tmp_path / split, count=count)
    loaded = data.load(tmp_path)
    assert [len(loaded[name]) for name in ("train", "validation", "test")] == [20, 8, 6]


def test_only_a_train_folder_is_split(tmp_path):
    class_folders(tmp_path / "train", count=40)
    loaded = data.load(tmp_path)
    assert sum(len(loaded[name]) for name in ("train", "validation", "test")) == 80


def test_a_class_of_trains_is_a_class(tmp_path):
    loaded = data.load(class_folders(tmp_path, ("bus", "train"), count=40))
    assert loaded.class_names == ("bus", "train")


def test_deeper_folders_links_and_leftovers(tmp_path):
    class_folders(tmp_path / "pets", count=30)
    picture(tmp_path / "pets/cat/tabby/young/deep.webp")
    picture(tmp_path / "elsewhere/linked.bmp")
    (tmp_path / "pets/dog/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pets/dog/round").symlink_to(tmp_path / "pets/dog")
    (tmp_path / "pets/dog/one.png").symlink_to(picture(tmp_path / "elsewhere2/file.png"))
    (tmp_path / "pets/bird").symlink_to(class_folders(tmp_path / "birds", ("all",), 20))
    (tmp_path / "pets/dog/._000.png").write_bytes(b"what macOS leaves")
    (tmp_path / "pets/dog/readme.txt").write_text("not an image, and not named like one")
    (tmp_path / "pets/__MACOSX").mkdir()
    labels = all_labels(data.load(tmp_path / "pets"))
    assert len(labels) == 30 + 1 + 30 + 2 + 20
    assert sum(label == 0 for label in labels.values()) == 20  # 'bird', the first by name


def test_every_kind_of_image_has_the_pixels_a_person_sees(tmp_path):
    """Grayscale, RGBA, palette, CMYK, 16 bits, one bit, a turned photo: to RGB of the wanted size."""
    spec = InputSpec(10, 12, 3)
    gray = np.asarray(Image.open(picture(tmp_path / "l.png", mode="L")))
    np.testing.assert_array_equal(read_picture(tmp_path / "l.png", spec), np.repeat(gray[..., None], 3, -1))
    rgba = np.asarray(Image.open(picture(tmp_path / "rgba.png", mode="RGBA")))
    np.testing.assert_array_equal(read_picture(tmp_path / "rgba.png", spec), rgba[..., :3])
    palette = Image.fromarray(rgba[..., :3]).quantize(16)
    palette.save(tmp_path / "p.gif")
    np.testing.assert_array_equal(read_picture(tmp_path / "p.gif", spec), np.asarray(palette.convert("RGB")))
    assert read_picture(picture(tmp_path / "cmyk.jpg", mode="CMYK"), spec).shape == (10, 12, 3)
    Image.fromarray(gray > 127).save(tmp_path / "bits.png")
    assert set(np.unique(read_picture(tmp_path / "bits.png", spec))) == {0, 255}
    deep = gray.astype(np.uint16) << 8 | 17
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png", InputSpec(10, 12, 1))[..., 0], gray)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(rgba[..., :3]).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png", InputSpec(12, 10, 3)),
                                  np.rot90(rgba[..., :3], -1))  # fmt: skip
    Image.fromarray(RANDOM.random((10, 12)).astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif.*floating-point"):
        read_picture(tmp_path / "float.tif", spec)


def test_gray_folders_have_one_channel_and_mixed_ones_three(tmp_path):
    for name in ("a", "b"):
        for index in range(40):
            picture(tmp_path / name / f"{index}.png", mode="L")
    assert data.load(tmp_path).image_shape == (10, 12, 1)
    for index in range(60):
        picture(tmp_path / "a" / f"colour{index}.png", size=(20, 18))
    assert data.load(tmp_path).image_shape[2] == 3


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


DAMAGE = {
    "truncated.jpg": _truncate,
    "truncated.png": _truncate,
    "truncated.bmp": _truncate,
    "empty.jpg": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("a text named like an image"),
    "dangling.png": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_unreadable_image_is_named_before_anything_starts(tmp_path, name):
    class_folders(tmp_path, count=20)
    DAMAGE[name](picture(tmp_path / "dog" / name, size=(60, 60)))
    with pytest.raises(DataError, match=rf"An image cannot be read.*{name}.*") as raised:
        data.load(tmp_path)
    assert raised.value.exit_code == 2


def test_all_unreadable_images_come_as_one_error(tmp_path):
    class_folders(tmp_path, count=20)
    for index in range(7):
        (tmp_path / "cat" / f"bad{index}.png").write_text("x")
    with pytest.raises(DataError, match=r"7 images cannot be read.*bad0\.png.*bad4\.png.*and 2 more.*them"):
        data.load(tmp_path)


@pytest.fixture
def no_superuser():
    """Root may read everything, so it becomes somebody else for the time of a test."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.fixture
def open_folder():
    """A folder that everybody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pets/cat/003.png", r"An image cannot be read.*cat/003\.png \(Permission denied"),
        ("pets/cat", r"A folder of images cannot be read.*cat \(Permission denied"),
        ("pets", r"The data folder cannot be read.*pets \(Permission denied"),
    ],
)
def test_what_may_not_be_read_is_named(open_folder, request, place, message):
    class_folders(open_folder / "pets", count=20)
    (open_folder / place).chmod(0)
    request.getfixturevalue("no_superuser")
    with pytest.raises(DataError, match=message):
        data.load(open_folder / "pets")


def test_a_file_that_breaks_later_is_named_when_it_is_needed(tmp_path):
    loaded = data.load(class_folders(tmp_path, count=40))
    victim = loaded["train"].paths[3]
    with open(victim, "wb") as file:
        file.write(b"")
    with pytest.raises(DataError, match=r"not an image|cannot be read") as raised:
        loaded.decoded(InputSpec(10, 12, 3))
    assert victim in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train/fish").mkdir(), "class folder is empty.*train/fish"),
        (lambda root: class_folders(root / "test", ("fish",), 2), "test/ has class folders that train/ does not.*fish"),
        (
            lambda root: (shutil.rmtree(root / "test"), picture(root / "test/loose.png")),
            "test/ has no class folders.*1 loose",
        ),
        (lambda root: shutil.rmtree(root / "train/dog"), "only one class folder.*train with cat"),
        (lambda root: class_folders(root / "Test", count=1), "Two folders could be the test split"),
        (lambda root: (shutil.rmtree(root / "train"), class_folders(root / "val", count=2)), "has no train/"),
        (lambda root: [shutil.rmtree(root / name) for name in ("train", "test")], "has no class folders"),
    ],
)
def test_wrong_layouts_are_one_clear_error(tmp_path, spoil, message):
    class_folders(tmp_path / "train", count=12)
    class_folders(tmp_path / "test", count=2)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load(tmp_path)


def test_a_wrapping_folder_is_pointed_out(tmp_path):
    class_folders(tmp_path / "unpacked", count=2)
    with pytest.raises(DataError, match=rf"Did you mean {tmp_path}/unpacked\?"):
        data.load(tmp_path)


def test_a_class_missing_from_test_is_said(tmp_path):
    class_folders(tmp_path / "train", ("cat", "dog", "fish"), 20)
    class_folders(tmp_path / "test", ("cat", "dog"), 3)
    assert "test has no image of 1 of the 3 classes (fish)" in data.load(tmp_path).note


def test_one_image_a_class_loads_and_says_what_is_missing(tmp_path):
    for index in range(60):
        picture(tmp_path / f"n{index:08}" / "only.jpg")
    loaded = data.load(tmp_path)
    assert len(loaded.class_names) == 60
    assert "train has no image of" in loaded.note


def test_equal_images_fall_into_one_split_and_never_leak_into_test(tmp_path):
    class_folders(tmp_path / "train", count=40)
    class_folders(tmp_path / "test", count=5)
    for index, file in enumerate(sorted((tmp_path / "train/cat").glob("*.png"))):
        shutil.copy(file, tmp_path / "train/cat" / f"zz-copy{index}.png")
    shutil.copy(tmp_path / "test/dog/001.png", tmp_path / "train/dog/leaked.png")
    loaded = data.load(tmp_path)
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not np.isin(loaded[a].hashes, loaded[b].hashes).any()
    assert "1 images of train also lie in test" in loaded.note
    assert len(loaded["test"]) == 10 and len(loaded["train"]) + len(loaded["validation"]) == 120


def test_the_fingerprint_follows_pixels_labels_and_nothing_else(tmp_path):
    class_folders(tmp_path / "a", count=30, suffix=".bmp")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = data.load(tmp_path / "a")
    assert data.load(tmp_path / "b").fingerprint == first.fingerprint
    file = tmp_path / "b/cat/005.bmp"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1  # one pixel, the size as before
    file.write_bytes(content)
    changed = data.load(tmp_path / "b")
    assert changed.fingerprint != first.fingerprint
    spec = InputSpec(10, 12, 3)
    index = list(changed["train"].paths).index(str(file)) if str(file) in changed["train"].paths else None
    if index is not None:  # no stale pixels from the cache either
        first.decoded(spec)
        np.testing.assert_array_equal(changed.decoded(spec)["train"].images[index], read_picture(file, spec))
    shutil.move(tmp_path / "a/cat/005.bmp", tmp_path / "a/dog/moved.bmp")
    assert data.load(tmp_path / "a").fingerprint not in (first.fingerprint, changed.fingerprint)


def test_checked_files_are_not_opened_again_until_they_change(tmp_path):
    class_folders(tmp_path, count=20)
    seen = []
    note = lambda done, total, facts: seen.append((done, total, facts["what"]))
    first = data.load(tmp_path, progress=note)
    assert seen == [(40, 40, "checking images")]
    assert data.load(tmp_path, progress=note).fingerprint == first.fingerprint
    assert len(seen) == 1
    picture(tmp_path / "cat/new.png")
    data.load(tmp_path, progress=note)
    assert seen[1:] == [(1, 1, "checking images")]


def test_cifar10_in_jpeg_is_never_taken_for_cifar10(tmp_path):
    from tfopt.data.sources import CIFAR10_CLASSES

    for name in CIFAR10_CLASSES:
        for index in range(12):
            picture(tmp_path / "jpeg" / name / f"{index}.jpg", size=(32, 32))
            picture(tmp_path / "png" / name / f"{index}.png", size=(32, 32))
    jpeg = data.load(tmp_path / "jpeg")
    assert jpeg.name == "cifar10-jpeg" and "never set beside published CIFAR-10 figures" in jpeg.note
    lossless = data.load(tmp_path / "png")
    assert lossless.name == "png" and "JPEG" not in lossless.note
