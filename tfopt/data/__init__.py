"""Data sets: by name, from class folders, from an .npz, from arrays or a tf.data.Dataset.

data = tfopt.data.load("fashion_mnist")          # or "photos/", "images.npz"
data["validation"].labels
data = tfopt.data.from_arrays((x, y), test=(x2, y2), class_names=["cat", "dog"])
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tfopt.data.augment import AUGMENTATIONS
from tfopt.data.cache import cache_folder
from tfopt.data.folders import load_folder
from tfopt.data.sources import CLASSES, load_arrays
from tfopt.data.splits import (
    SPLITS,
    ImageData,
    Progress,
    Split,
    fingerprint_of,
    make_splits,
    missing_classes,
    pixel_hashes,
)  # fmt: skip
from tfopt.errors import DataError, unknown_name

__all__ = [
    "AUGMENTATIONS", "CLASSES", "SPLITS", "ImageData", "Split", "cache_folder", "from_arrays", "from_dataset", "load",
    "load_first", "parse",
]  # fmt: skip

#: (images, labels) names in an .npz, and the split they are.
_NPZ_PAIRS = (
    ("x_train", "y_train", "train"), ("images", "labels", "train"),
    ("x_val", "y_val", "validation"), ("x_test", "y_test", "test"),
)  # fmt: skip
_MOST_CLASSES = 100_000


def parse(text: str, default_split: str = "test") -> tuple[str, str]:
    """'NAME|PATH[:SPLIT]' to (name or path, split); a colon that belongs to the path stays there.

    Raises DataError if what stands behind the colon of a known data set is no split.
    """
    place, colon, split = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, default_split
    if split in SPLITS:
        return place, split
    if place in CLASSES or (len(place) > 1 and Path(place).expanduser().exists()):
        raise unknown_name("split", split, SPLITS, error=DataError)
    return text, default_split


def load(place: str | Path, progress: Progress | None = None) -> ImageData:
    """A data set by name (fashion_mnist, cifar10, cifar100, mnist, digits), folder or .npz file.

    A name wins over a folder of that name; say './digits' for the folder. progress: called with
    (done, total, {'what': 'checking images'}) while a folder is read for the first time.
    Raises DataError with what is missing, what was tried and what to do.
    """
    text = str(place)
    if text in CLASSES:
        (x_train, y_train, x_test, y_test), source = load_arrays(text, progress)
        return from_arrays(
            (x_train, y_train), test=(x_test, y_test), class_names=CLASSES[text], name=text, source=source
        )
    path = Path(text).expanduser()
    if os.path.isdir(path):
        return load_folder(path, progress)
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.exists():
        raise DataError(
            "This file is not a data set", received=path, allowed="a folder of class folders, or an .npz file"
        )
    raise unknown_name("data set, folder or .npz file", text, CLASSES, error=DataError)


def load_first(names: Sequence[str], progress: Progress | None = None) -> ImageData:
    """The first of some named data sets that can be had, and a note where it is not the first named.

    `load_first(["fashion_mnist", "digits"])` gives Fashion-MNIST from any of its sources, else the
    digits that come with scikit-learn. Raises the last one's DataError if there is none.
    """
    missed = []
    for name in names:
        try:
            data = load(name, progress)
        except DataError as problem:
            missed.append((name, problem))
            continue
        if not missed:
            return data
        reasons = "; ".join(f"{absent}: {problem}" for absent, problem in missed)
        note = f"{name} stands in for {missed[0][0]}, so the figures are not those of {missed[0][0]} ({reasons})"
        return dataclasses.replace(data, note=f"{note} {data.note}".rstrip())
    raise missed[-1][1] if missed else DataError("No data set is named")


def _load_npz(path: Path) -> ImageData:
    """x_train, y_train[, x_val, y_val][, x_test, y_test], or images, labels; optionally class_names."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds one bare array")
        with arrays:
            names = list(arrays.files)
            wanted = {name for *pair, _ in _NPZ_PAIRS for name in pair} | {"class_names"}
            arrays = {name: arrays[name] for name in names if name in wanted}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            "The .npz file cannot be read",
            received=f"{path} ({error})",
            allowed="arrays saved by numpy.savez, without pickled objects",
        ) from error
    parts = {}
    for images, labels, role in _NPZ_PAIRS:
        if (images in arrays) != (labels in arrays):
            raise DataError(
                f"The .npz file has {images} or {labels}, and not both", received=f"{path} with {', '.join(names)}"
            )
        if images in arrays and role not in parts:
            parts[role] = arrays[images], arrays[labels]
    if "train" not in parts:
        raise DataError(
            "The .npz file lacks its images or labels",
            received=f"{path} with {', '.join(names) or 'nothing'}",
            allowed="x_train and y_train (and x_val, y_val, x_test, y_test), or images and labels",
        )
    class_names = _names(arrays["class_names"]) if "class_names" in arrays else None
    return from_arrays(**parts, class_names=class_names, name=path.stem, source=f"file {path.resolve()}")


def _names(array: np.ndarray) -> list[str]:
    if array.ndim != 1:
        raise DataError("class_names is not a list", received=f"shape {array.shape}", allowed="one name a class")
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in array.tolist()]


def from_arrays(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray] | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
    source: str = "arrays given from Python",
) -> ImageData:
    """A data set from (images, labels) pairs.

    images: 0..255, of shape (count, height, width) or (count, height, width, 1 or 3); floats are
    rounded. labels: integers from 0, shape (count,) or (count, 1). What is not given is split off
    `train`, a tenth each. Raises DataError for anything else, such as images already scaled to 0..1.
    """
    given = {"train": train, "test": test, "validation": validation}
    for key, pair in given.items():
        if pair is not None and not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise DataError(
                f"The {key} data is not a pair", received=type(pair).__name__, allowed="(images, labels)",
                next_step="Call from_arrays((images, labels), test=(images, labels))",
            )  # fmt: skip
    parts = {key: _part(key, *pair) for key, pair in given.items() if pair is not None}
    highest = max(int(part.labels.max()) for part in parts.values())
    if class_names is None:
        class_names = [str(label) for label in range(highest + 1)]
    if highest >= len(class_names):
        raise DataError(
            "A label has no class name", received=f"label {highest}", allowed=f"0 to {len(class_names) - 1}"
        )
    if len(class_names) < 2:
        raise DataError("The labels are all of one class", allowed="two classes or more")
    splits, notes = make_splits(parts["train"], parts.get("test"), parts.get("validation"))
    class_names = tuple(map(str, class_names))
    return ImageData(
        name=name,
        class_names=class_names,
        splits=splits,
        fingerprint=fingerprint_of(splits, class_names),
        source=source,
        image_shape=tuple(parts["train"].images.shape[1:]),
        note=" ".join(notes + missing_classes(splits, class_names)),
    )


def from_dataset(train, test=None, validation=None, class_names=None, name: str = "tf.data") -> ImageData:
    """A data set from tf.data.Datasets of (image, label), batched or not, images in 0..255.

    They are read once and kept as uint8 arrays, in an order of their own: a shuffled Dataset gives
    the same data every time.
    """
    pairs = [None if dataset is None else _collect(dataset) for dataset in (train, test, validation)]
    return from_arrays(*pairs, class_names=class_names, name=name, source="a tf.data.Dataset given from Python")


def _collect(dataset) -> tuple[np.ndarray, np.ndarray]:
    element = dataset.element_spec
    if not isinstance(element, (tuple, list)) or len(element) != 2:
        raise DataError("The tf.data.Dataset has the wrong elements", received=element, allowed="(image, label) pairs")
    if int(dataset.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise DataError("The tf.data.Dataset never ends", next_step="Remove its repeat(), or add take(batches)")
    images, labels = [], []
    highest = 0.0
    for image, label in dataset.as_numpy_iterator():
        label = np.asarray(label)
        if label.ndim == 0 or len(label) != len(image):
            image, label = image[None], label[None]
        if len(image):
            _check_pixels("dataset", image)
            highest = max(highest, float(image.max()))
            floating = np.issubdtype(image.dtype, np.floating)
            images.append(np.round(image).astype(np.uint8))
            labels.append(label)
    if not images:
        raise DataError("The tf.data.Dataset is empty")
    if floating and highest <= 1:
        raise _scaled("dataset", 0, highest)
    try:
        pixels, labels = np.concatenate(images), np.concatenate(labels)
    except ValueError as error:
        shapes = sorted({str(image.shape[1:]) for image in images})
        raise DataError(
            "The images of the tf.data.Dataset differ in shape",
            received=", ".join(shapes[:4]),
            next_step="Resize them to one shape in its map()",
        ) from error
    order = np.argsort(pixel_hashes(pixels), kind="stable")
    return pixels[order], labels[order]


def _part(key: str, images: np.ndarray, labels: np.ndarray) -> Split:
    try:
        images, labels = np.asarray(images), np.asarray(labels)
    except ValueError as error:
        raise DataError(f"The {key} images or labels differ in shape", received=error) from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise DataError(
            f"The {key} images have the wrong shape",
            received=images.shape,
            allowed="(count, height, width) or (count, height, width, 1 or 3)",
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        one_hot = labels.ndim == 2 and len(labels) == len(images)
        raise DataError(
            f"The {key} labels do not fit the images",
            received=f"{labels.dtype} of shape {labels.shape} for {len(images)} images",
            allowed=f"integers from 0 of shape ({len(images)},)",
            next_step="If they are one-hot, give labels.argmax(-1)" if one_hot else None,
        )
    if labels.min() < 0 or labels.max() >= _MOST_CLASSES:
        raise DataError(
            f"The {key} labels are no class indices",
            received=f"{labels.min()} to {labels.max()}",
            allowed=f"integers from 0 to below {_MOST_CLASSES}",
        )
    images = _as_uint8(key, images)
    return Split(labels=labels.astype(np.int32), hashes=pixel_hashes(images), images=images)


def _as_uint8(key: str, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    _check_pixels(key, images)
    if np.issubdtype(images.dtype, np.floating) and images.max() <= 1:
        raise _scaled(key, images.min(), images.max())
    return np.round(images).astype(np.uint8)


def _check_pixels(key: str, images: np.ndarray) -> None:
    if not (np.issubdtype(images.dtype, np.integer) or np.issubdtype(images.dtype, np.floating)):
        raise DataError(f"The {key} images are not numbers", received=images.dtype, allowed="pixels of 0..255")
    if not np.all(np.isfinite(images)):
        raise DataError(f"The {key} images have values that are not finite numbers", allowed="pixels of 0..255")
    if images.min() < 0 or images.max() > 255:
        raise _scaled(key, images.min(), images.max())


def _scaled(key: str, low: float, high: float) -> DataError:
    return DataError(
        f"The {key} images are already scaled, or have more than 8 bits a pixel",
        received=f"values from {low:g} to {high:g}",
        allowed="pixels of 0..255; the scaling belongs to the model's input spec",
    )
