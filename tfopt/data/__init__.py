"""Data sets: by name, from class folders, from an .npz, from arrays or a tf.data.Dataset.

    data = tfopt.data.load("fashion_mnist")          # or "photos/", "images.npz"
    data["validation"].labels
    data = tfopt.data.from_arrays((x, y), test=(x2, y2), class_names=["cat", "dog"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tfopt.data.augment import AUGMENTATIONS
from tfopt.data.cache import cache_folder
from tfopt.data.folders import load_folder
from tfopt.data.sources import CLASSES, load_arrays
from tfopt.data.splits import SPLITS, ImageData, Split, fingerprint_of, make_splits, pixel_hashes
from tfopt.errors import DataError, unknown_name

__all__ = [
    "AUGMENTATIONS", "CLASSES", "SPLITS", "ImageData", "Split", "cache_folder", "from_arrays", "from_dataset", "load",
    "parse",
]  # fmt: skip


def parse(text: str, default_split: str = "test") -> tuple[str, str]:
    """'NAME|PATH[:SPLIT]' to (name or path, split)."""
    place, colon, split = text.rpartition(":")
    if colon and split in SPLITS:
        return place, split
    if colon and place in CLASSES:
        raise unknown_name("split", split, SPLITS, error=DataError)
    return text, default_split


def load(place: str | Path) -> ImageData:
    """A data set by name (fashion_mnist, cifar10, cifar100, mnist, digits), folder or .npz file.

    Raises DataError with what is missing, what was tried and what to do.
    """
    text = str(place)
    if text in CLASSES:
        (x_train, y_train, x_test, y_test), source = load_arrays(text)
        return from_arrays((x_train, y_train), test=(x_test, y_test), class_names=CLASSES[text], name=text, source=source)
    path = Path(text).expanduser()
    if path.is_dir():
        return load_folder(path)
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.exists():
        raise DataError("This file is not a data set", received=path, allowed="a folder of class folders, or an .npz file")
    raise unknown_name("data set or folder", text, CLASSES, error=DataError)


def _load_npz(path: Path) -> ImageData:
    """x_train, y_train[, x_test, y_test], or images, labels; optionally class_names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            "The .npz file cannot be read",
            received=f"{path} ({error})",
            allowed="arrays saved by numpy.savez, without pickled objects",
        ) from error
    pairs = [("x_train", "y_train"), ("images", "labels")]
    pair = next((p for p in pairs if set(p) <= set(arrays)), None)
    if pair is None:
        raise DataError(
            "The .npz file lacks its images or labels",
            received=f"{path} with {', '.join(arrays) or 'nothing'}",
            allowed="x_train and y_train (and x_test and y_test), or images and labels",
        )
    test = (arrays["x_test"], arrays["y_test"]) if {"x_test", "y_test"} <= set(arrays) else None
    names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    return from_arrays(
        (arrays[pair[0]], arrays[pair[1]]), test=test, class_names=names, name=path.stem, source=f"file {path.resolve()}"
    )


def from_arrays(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray] | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
    source: str = "arrays given from Python",
) -> ImageData:
    """A data set from (images, labels) pairs.

    images: uint8, or floats that are whole numbers of 0..255, of shape (count, height, width) or
    (count, height, width, 1 or 3). labels: integers from 0, shape (count,) or (count, 1).
    What is not given is split off `train`, a tenth each.
    """
    given = {"train": train, "test": test, "validation": validation}
    parts = {key: _part(key, *pair) for key, pair in given.items() if pair is not None}
    highest = max(int(part.labels.max()) for part in parts.values())
    if class_names is None:
        class_names = [str(label) for label in range(highest + 1)]
    if highest >= len(class_names):
        raise DataError("A label has no class name", received=f"label {highest}", allowed=f"0 to {len(class_names) - 1}")
    if len(class_names) < 2:
        raise DataError("The labels are all of one class", allowed="two classes or more")
    splits = make_splits(parts["train"], parts.get("test"), parts.get("validation"))
    class_names = tuple(map(str, class_names))
    return ImageData(
        name=name,
        class_names=class_names,
        splits=splits,
        fingerprint=fingerprint_of(splits, class_names),
        source=source,
        image_shape=tuple(parts["train"].images.shape[1:]),
    )


def from_dataset(train, test=None, validation=None, class_names=None, name: str = "tf.data") -> ImageData:
    """A data set from tf.data.Datasets of (image, label), batched or not, images in 0..255.

    They are read once and kept as uint8 arrays.
    """
    pairs = [None if dataset is None else _collect(dataset) for dataset in (train, test, validation)]
    return from_arrays(*pairs, class_names=class_names, name=name, source="a tf.data.Dataset given from Python")


def _collect(dataset) -> tuple[np.ndarray, np.ndarray]:
    element = dataset.element_spec
    if not isinstance(element, (tuple, list)) or len(element) != 2:
        raise DataError("The tf.data.Dataset has the wrong elements", received=element, allowed="(image, label) pairs")
    batched = element[0].shape.rank == 4
    images, labels = [], []
    for image, label in dataset.as_numpy_iterator():
        images.append(_as_uint8("dataset", image if batched else image[None]))
        labels.append(np.atleast_1d(label))
    if not images:
        raise DataError("The tf.data.Dataset is empty")
    return np.concatenate(images), np.concatenate(labels)


def _part(key: str, images: np.ndarray, labels: np.ndarray) -> Split:
    images, labels = np.asarray(images), np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise DataError(
            f"The {key} images have the wrong shape",
            received=images.shape,
            allowed="(count, height, width) or (count, height, width, 1 or 3)",
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"The {key} labels do not fit the images",
            received=f"{labels.dtype} of shape {labels.shape} for {len(images)} images",
            allowed=f"integers from 0 of shape ({len(images)},)",
        )
    images = _as_uint8(key, images)
    return Split(labels=labels.astype(np.int32), hashes=pixel_hashes(images), images=images)


def _as_uint8(key: str, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.number) or not np.all(np.isfinite(images)):
        raise DataError(f"The {key} images have values that are not finite numbers", received=images.dtype)
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 255 or (high <= 1 and np.issubdtype(images.dtype, np.floating)):
        raise DataError(
            f"The {key} images are already scaled",
            received=f"values from {low:g} to {high:g}",
            allowed="pixels of 0..255; the scaling belongs to the model's input spec",
        )
    return np.round(images).astype(np.uint8)
