"""What is in the image files of a folder: each is opened once and known by its content from then on."""

from __future__ import annotations

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mobile_bench.files import atomic_path
from tfopt.data.cache import cache_folder
from tfopt.data.splits import Progress, hash64, text_hashes
from tfopt.errors import DataError, InputError

_CHUNK = 2048
#: how a whole file of that format ends; such a file need not be decoded to be believed.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def content_hashes(paths: list[str], stamps: list[str], root: Path, progress: Progress | None = None) -> np.ndarray:
    """uint64 (count,): a hash of every file's bytes. A file that is no whole image raises DataError.

    stamps: relative name, size and time of change of each file, as one text; a file whose stamp is
    known from an earlier run is not opened again. The errors of all damaged files come as one.
    """
    place = cache_folder() / "index" / f"{hash64(str(root).encode()):016x}.npy"
    keys = text_hashes(stamps)
    hashes, missing = _recall(place, keys)
    todo = np.flatnonzero(missing)
    damaged: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(todo), _CHUNK):
            part = todo[start : start + _CHUNK]
            for index, (value, reason) in zip(part, pool.map(_inspect, [paths[i] for i in part])):
                hashes[index] = value
                if reason:
                    damaged.append(f"{paths[index]} ({reason})")
            if progress:
                progress(min(start + _CHUNK, len(todo)), len(todo), {"what": "checking images"})
    if damaged:
        shown = "; ".join(damaged[:5]) + (f"; and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        raise DataError(
            "An image cannot be read" if len(damaged) == 1 else f"{len(damaged)} images cannot be read",
            received=shown,
            next_step="Remove or replace " + ("it" if len(damaged) == 1 else "them"),
        )
    if len(todo):
        _remember(place, keys, hashes)
    return hashes


def _inspect(path: str) -> tuple[int, str]:
    """(hash of the content, why it is no image or '')."""
    from PIL import Image, UnidentifiedImageError

    try:
        content = Path(path).read_bytes()
        if not content:
            return 0, "the file is empty"
        with Image.open(io.BytesIO(content)) as picture:
            ending = _ENDINGS.get(picture.format)
            if ending is None or ending not in content[-64:]:
                picture.load()
    except UnidentifiedImageError:
        return 0, "the file is not an image"
    except OSError as error:
        return 0, str(error.strerror or error)
    except Exception as error:  # noqa: BLE001 - decoders fail on damaged files in whatever way they like
        return 0, str(error) or type(error).__name__
    return hash64(content), ""


def _recall(place: Path, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, which of them are still unknown)."""
    hashes, missing = np.zeros(len(keys), np.uint64), np.ones(len(keys), bool)
    try:
        known = np.load(place, allow_pickle=False)
        order = np.searchsorted(known[0], keys).clip(0, known.shape[1] - 1)
        found = known[0][order] == keys
    except (OSError, ValueError, IndexError, EOFError):
        return hashes, missing
    hashes[found] = known[1][order][found]
    return hashes, ~found


def _remember(place: Path, keys: np.ndarray, hashes: np.ndarray) -> None:
    order = np.argsort(keys)
    try:
        with atomic_path(place) as temporary, open(temporary, "wb") as file:
            np.save(file, np.stack([keys[order], hashes[order]]))
    except InputError as problem:
        warnings.warn(f"The images will be checked again next time. {problem}", RuntimeWarning, stacklevel=3)


def same_content(identity: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """The identities in which images of equal content share one: that of the lowest."""
    _, group = np.unique(contents, return_inverse=True)
    lowest = np.full(group.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, group, identity)
    return lowest[group]
