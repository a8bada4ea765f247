"""Images in four splits, and the batches that training reads.

train        what weights are fitted on
validation   where every choice is made: early stopping, thresholds, recipes
test         touched once, for the numbers shown
calibration  for quantization ranges; class-balanced, taken from train

A split holds either pixels (uint8, RGB) or the paths of image files, which are decoded only when
they are asked for. Which image falls into which split depends on a hash of the image's identity
(its pixels, or its path below the data set's folder), never on order or chance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from mobile_bench.files import atomic_path
from mobile_bench.inputs import InputSpec, read_picture
from tfopt.data.augment import augment
from tfopt.data.cache import cache_folder
from tfopt.errors import DataError, unknown_name

SPLITS = ("train", "validation", "test", "calibration")
CALIBRATION_IMAGES = 200
IN_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Split:
    """Some images with their labels.

    images: uint8 (count, height, width, channels), or None where `paths` is given.
    labels: int32 (count,). hashes: uint64 (count,), one per image.
    """

    labels: np.ndarray
    hashes: np.ndarray
    images: np.ndarray | None = None
    paths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> Split:
        pick = lambda array: None if array is None else array[index]
        return Split(self.labels[index], self.hashes[index], pick(self.images), pick(self.paths))

    def balanced(self, count: int) -> Split:
        """At most `count` images, as many of each class as there are, always the same ones."""
        ranks = np.empty(len(self), np.int64)
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels == label)
            ranks[members[np.argsort(self.hashes[members], kind="stable")]] = np.arange(len(members))
        return self.subset(np.sort(np.lexsort((self.hashes, ranks))[:count]))

    def pixels(self, spec: InputSpec, index: np.ndarray | slice = slice(None)) -> np.ndarray:
        """uint8 (count, spec.height, spec.width, spec.channels) of the images at `index`."""
        if self.images is not None:
            return spec.fit(self.images[index])
        paths = self.paths[index]
        if len(paths) < 16:
            pictures = [read_picture(path, spec) for path in paths]
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                pictures = list(pool.map(lambda path: read_picture(path, spec), paths))
        return np.stack(pictures) if pictures else np.zeros((0, *spec.shape), np.uint8)

    def batches(self, spec: InputSpec, batch_size: int = 256) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Once through the split, in order: (float32 images as the model takes them, int32 labels)."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield spec.normalize(self.pixels(spec, part)), self.labels[part]

    def stream(self, spec: InputSpec, batch_size: int, *, augmentation: str = "none", seed: int = 0):
        """An endless, shuffled, prefetched tf.data.Dataset of (images, labels) batches.

        Batch k is a function of (seed, k) alone, so a run repeats exactly and can be taken up in the
        middle. Files are decoded as they are needed: the split need not fit in memory.
        """
        import tensorflow as tf

        batch_size = min(batch_size, len(self))
        steps_per_epoch = max(1, len(self) // batch_size)
        orders: dict[int, np.ndarray] = {}

        def load(step: np.int64):
            epoch, position = divmod(int(step), steps_per_epoch)
            if epoch not in orders:
                for old in [e for e in orders if e < epoch - 1]:
                    del orders[old]
                orders[epoch] = np.random.default_rng((seed, epoch)).permutation(len(self))
            index = orders[epoch][position * batch_size : (position + 1) * batch_size]
            pixels = augment(self.pixels(spec, index), augmentation, np.random.default_rng((seed, epoch, position)))
            return spec.normalize(pixels), self.labels[index]

        def load_in_graph(step):
            images, labels = tf.numpy_function(load, [step], (tf.float32, tf.int32))
            images.set_shape((batch_size, *spec.shape))
            labels.set_shape((batch_size,))
            return images, labels

        return tf.data.Dataset.counter().map(load_in_graph, num_parallel_calls=2).prefetch(4)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: its splits, its classes, and where it came from.

    fingerprint changes whenever an image or a label does. `note` says in one sentence what a reader
    of a result must know, such as that another source had to stand in.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    fingerprint: str
    source: str
    image_shape: tuple[int, int, int]
    note: str = ""
    extra: dict = field(default_factory=dict)

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise unknown_name("split", split, self.splits, error=DataError)
        return self.splits[split]

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def decoded(self, spec: InputSpec, limit_bytes: int = IN_MEMORY_BYTES) -> ImageData:
        """The same data with its image files decoded once for `spec`, where they fit `limit_bytes`.

        The pixels are kept in the cache folder and mapped from there; a larger split stays files.
        """
        size = int(np.prod(spec.shape))
        splits = {}
        for name, split in self.splits.items():
            if split.paths is not None and len(split) * size <= limit_bytes:
                form = "x".join(map(str, spec.shape))
                known = hashlib.blake2b(np.ascontiguousarray(split.hashes).tobytes(), digest_size=8).hexdigest()
                cached = cache_folder() / "decoded" / f"{known}-{form}-{spec.resize}.npy"
                if not cached.exists():
                    with atomic_path(cached) as temporary, open(temporary, "wb") as file:
                        np.save(file, split.pixels(spec))
                split = Split(split.labels, split.hashes, images=np.load(cached, mmap_mode="r", allow_pickle=False))
            splits[name] = split
        return dataclasses.replace(self, splits=splits)

    def limited(self, train: int | None = None, test: int | None = None) -> ImageData:
        """A smaller data set of the same kind: class-balanced parts of train and test."""
        splits = dict(self.splits)
        for name, count in (("train", train), ("test", test)):
            if count is not None:
                splits[name] = splits[name].balanced(count)
        suffix = f"-{train or 'all'}-{test or 'all'}"
        return dataclasses.replace(self, splits=splits, fingerprint=self.fingerprint + suffix)


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """uint64 (count,): one hash per image, the same on every machine."""
    return np.array([_hash64(np.ascontiguousarray(image).tobytes()) for image in images], np.uint64)


def path_hashes(relative_paths: list[str]) -> np.ndarray:
    return np.array([_hash64(path.encode()) for path in relative_paths], np.uint64)


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def make_splits(train: Split, test: Split | None = None, validation: Split | None = None) -> dict[str, Split]:
    """Complete the four splits: a tenth of train for what is not given."""
    tenth = train.hashes % np.uint64(10)
    taken = np.zeros(len(train), bool)
    if validation is None:
        taken |= tenth == 0
        validation = train.subset(np.flatnonzero(tenth == 0))
    if test is None:
        taken |= tenth == 1
        test = train.subset(np.flatnonzero(tenth == 1))
    train = train.subset(np.flatnonzero(~taken))
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not len(split):
            raise DataError(f"No image is left for the {name} split", allowed="at least some tens of images")
    return {
        "train": train,
        "validation": validation,
        "test": test,
        "calibration": train.balanced(CALIBRATION_IMAGES),
    }


def fingerprint_of(splits: dict[str, Split], class_names: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(repr(class_names).encode(), digest_size=8)
    for name in sorted(splits):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(splits[name].hashes).tobytes())
        digest.update(np.ascontiguousarray(splits[name].labels.astype(np.int32)).tobytes())
    return digest.hexdigest()
