"""Images in four splits, and the batches that training reads.

train        what weights are fitted on
validation   where every choice is made: early stopping, thresholds, recipes
test         touched once, for the numbers shown
calibration  for quantization ranges; class-balanced, taken from train

A split holds either pixels (uint8, RGB) or the paths of image files, which are decoded only when
they are asked for. Which image falls into which split depends on a hash of the image's identity
(its pixels, or a file's path below the data set's folder and its size), never on order or chance.
Equal images always fall into one split, and never into train when they also lie in a given test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from mobile_bench.files import atomic_path
from mobile_bench.inputs import InputSpec, read_picture
from tfopt.data.augment import augment
from tfopt.data.cache import cache_folder
from tfopt.errors import DataError, InputError, Problem, unknown_name

SPLITS = ("train", "validation", "test", "calibration")
CALIBRATION_IMAGES = 200
IN_MEMORY_BYTES = 1 << 30
#: raised when the same file would be decoded to other pixels than before, so that cached pixels are dropped.
DECODER_VERSION = 2

#: (done, total, facts) -> None; facts['what'] says what is going on.
Progress = Callable[[int, int, dict], None]


@dataclass(frozen=True, eq=False)
class Split:
    """Some images with their labels.

    images: uint8 (count, height, width, channels), or None where `paths` is given.
    labels: int32 (count,). hashes: uint64 (count,), of each image's pixels or of its file's bytes.
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

    def stream(
        self, spec: InputSpec, batch_size: int, *, augmentation: str = "none", seed: int = 0,
        failures: list[Problem] | None = None,
    ):  # fmt: skip
        """An endless, shuffled, prefetched tf.data.Dataset of (images, labels) batches.

        Batch k is a function of (seed, k) alone, so a run repeats exactly and can be taken up in the
        middle. Files are decoded as they are needed: the split need not fit in memory. TensorFlow
        turns an error on an image into one of its own, so the original is put into `failures`.
        """
        import tensorflow as tf

        batch_size = min(batch_size, len(self))
        steps_per_epoch = max(1, len(self) // batch_size)

        @lru_cache(maxsize=3)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(len(self))

        def load(step: np.int64):
            epoch, position = divmod(int(step), steps_per_epoch)
            index = order(epoch)[position * batch_size : (position + 1) * batch_size]
            try:
                pixels = self.pixels(spec, index)
            except Problem as problem:
                if failures is not None:
                    failures.append(problem)
                raise
            pixels = augment(pixels, augmentation, np.random.default_rng((seed, epoch, position)))
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

    def decoded(
        self, spec: InputSpec, limit_bytes: int = IN_MEMORY_BYTES, progress: Progress | None = None
    ) -> ImageData:  # fmt: skip
        """The same data with its image files decoded once for `spec`, where they fit `limit_bytes`.

        The pixels are kept in the cache folder and mapped from there; a larger split stays files, and
        so does one that the disk has no room for (with a RuntimeWarning).
        """
        splits = {}
        for name, split in self.splits.items():
            if split.paths is not None and len(split) * int(np.prod(spec.shape)) <= limit_bytes:
                report = lambda done, total, what=f"decoding {name}": progress and progress(done, total, {"what": what})
                split = _decode(split, spec, report)
            splits[name] = split
        return dataclasses.replace(self, splits=splits)

    def limited(self, train: int | None = None, test: int | None = None) -> ImageData:
        """A smaller data set of the same kind: class-balanced parts of train and test."""
        splits = dict(self.splits)
        for name, count in (("train", train), ("test", test)):
            if count is not None:
                if not isinstance(count, int) or count < 1:
                    raise DataError(
                        f"The number of {name} images is out of range", received=count, allowed="1 and above"
                    )
                splits[name] = splits[name].balanced(count)
        suffix = f"-{train or 'all'}-{test or 'all'}"
        return dataclasses.replace(self, splits=splits, fingerprint=self.fingerprint + suffix)


def _decode(split: Split, spec: InputSpec, progress: Callable[[int, int], None]) -> Split:
    form = f"{spec.height}x{spec.width}x{spec.channels}-{spec.resize}-v{DECODER_VERSION}"
    known = hash64(np.ascontiguousarray(split.hashes).tobytes())
    cached = cache_folder() / "decoded" / f"{known:016x}-{form}.npy"
    images = _mapped(cached, (len(split), *spec.shape))
    if images is None:
        try:
            with atomic_path(cached) as temporary, open(temporary, "wb") as file:
                _write_pixels(file, split, spec, progress)
        except InputError as problem:
            warnings.warn(
                f"Images are decoded as they are needed, which is slower. {problem}", RuntimeWarning, stacklevel=3
            )
            return split
        images = np.load(cached, mmap_mode="r", allow_pickle=False)
    return Split(split.labels, split.hashes, images=images)


def _mapped(cached: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        images = np.load(cached, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.shape == shape else None


def _write_pixels(file, split: Split, spec: InputSpec, progress: Callable[[int, int], None]) -> None:
    """An .npy file, written a thousand images at a time: a memory map would kill the process on a full disk."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(split), *spec.shape)}
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, len(split), 1024):
        file.write(split.pixels(spec, slice(start, start + 1024)).tobytes())
        progress(min(start + 1024, len(split)), len(split))


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """uint64 (count,): one hash per image, the same on every machine."""
    return np.array([hash64(np.ascontiguousarray(image).tobytes()) for image in images], np.uint64)


def text_hashes(texts: list[str]) -> np.ndarray:
    """uint64 (count,): one hash per text; file names that are no valid text count as well."""
    return np.array([hash64(text.encode("utf-8", "surrogateescape")) for text in texts], np.uint64)


def hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def make_splits(
    train: Split, test: Split | None = None, validation: Split | None = None, *, identity: np.ndarray | None = None
) -> tuple[dict[str, Split], list[str]]:  # fmt: skip
    """The four splits, and what there is to say about them.

    A tenth of `train` becomes what is not given, chosen by `identity` (uint64 (count,), by default the
    hashes). Images of train or validation that also lie in the given test are left out, and said.
    """
    images, notes = len(train), []
    identity = train.hashes if identity is None else identity

    def apart(name: str, split: Split, others: dict[str, Split | None]) -> np.ndarray:
        kept = np.ones(len(split), bool)
        for other_name, other in others.items():
            if other is not None:
                shared = kept & np.isin(split.hashes, other.hashes)
                kept &= ~shared
                if shared.any():
                    notes.append(
                        f"{shared.sum()} images of {name} also lie in {other_name} and were left out of {name}."
                    )
        return kept

    if validation is not None:
        validation = validation.subset(np.flatnonzero(apart("validation", validation, {"test": test})))
    kept = apart("train", train, {"test": test, "validation": validation})
    tenth = _tenths(identity[kept], identity, (validation is None) * [0] + (test is None) * [1])
    if validation is None:
        validation = train.subset(np.flatnonzero(kept & (tenth == 0)))
        kept &= tenth != 0
    if test is None:
        test = train.subset(np.flatnonzero(kept & (tenth == 1)))
        kept &= tenth != 1
    train = train.subset(np.flatnonzero(kept))
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not len(split):
            raise DataError(
                f"No image is left for the {name} split",
                received=" ".join(
                    [f"{images} images to divide, {len(np.unique(identity))} of them different.", *notes]
                ),
                allowed="at least some tens of images",
                next_step="Add images, or say yourself which belong to train, validation and test",
            )
    splits = {"train": train, "validation": validation, "test": test, "calibration": train.balanced(CALIBRATION_IMAGES)}
    return splits, notes


def _tenths(present: np.ndarray, identity: np.ndarray, needed: list[int]) -> np.ndarray:
    """0 to 9 for each identity: its last decimal digit, or the one before.

    Images that an earlier division has put into one split all share their last digits, so that another
    division by it would leave a split empty.
    """
    last, before = identity % np.uint64(10), identity // np.uint64(10) % np.uint64(10)
    return last if np.isin(needed, present % np.uint64(10)).all() else before


def missing_classes(splits: dict[str, Split], class_names: tuple[str, ...]) -> list[str]:
    """A sentence for train and for test if classes have no image there."""
    notes = []
    for name in ("train", "test"):
        absent = np.setdiff1d(np.arange(len(class_names)), splits[name].labels)
        if len(absent):
            shown = ", ".join(class_names[i] for i in absent[:3]) + (", …" if len(absent) > 3 else "")
            notes.append(f"{name} has no image of {len(absent)} of the {len(class_names)} classes ({shown}).")
    return notes


def fingerprint_of(splits: dict[str, Split], class_names: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(repr(class_names).encode(), digest_size=8)
    for name in sorted(splits):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(splits[name].hashes).tobytes())
        digest.update(np.ascontiguousarray(splits[name].labels.astype(np.int32)).tobytes())
    return digest.hexdigest()
