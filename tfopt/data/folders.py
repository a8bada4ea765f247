"""Class folders on disk, with or without train/ and test/; ImageNet's layout is the same thing.

    DATA/CLASS/*.jpg                                  split by hash: 80% train, 10% validation, 10% test
    DATA/{train,test}/CLASS/*.jpg                     a tenth of train becomes validation
    DATA/{train,val}/CLASS/*.JPEG                     ImageNet: val is what numbers are shown on
    DATA/{train,val,test}/CLASS/*.png                 all three as they are

Classes are the names of the folders, sorted: the index of a class is its place in that order, as in
ImageNet and in keras.utils.image_dataset_from_directory. Images may lie deeper inside a class folder.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from tfopt.data.index import Progress, content_hashes, same_content
from tfopt.data.sources import CIFAR10_CLASSES
from tfopt.data.splits import ImageData, Split, fingerprint_of, make_splits, missing_classes, text_hashes
from tfopt.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_ROLES = {"train": "train", "training": "train", "val": "validation", "validation": "validation", "valid": "validation",
          "test": "test", "testing": "test"}  # fmt: skip
_JPEG_NOTE = (
    "CIFAR-10 (JPEG): lossy copies of CIFAR-10's images, so figures on them are never set beside published "
    "CIFAR-10 figures."
)


def load_folder(folder: Path, progress: Progress | None = None) -> ImageData:
    """The splits of a folder of class folders; every file is checked, nothing is decoded yet."""
    folder = folder.resolve()
    roles = _roles(folder)
    if len(roles) == 1:
        folder, roles = next(iter(roles.values())), {}
    top = roles.get("train", folder)
    class_names = tuple(child.name for child in _subfolders(top))
    if len(class_names) < 2:
        raise _no_classes(top, class_names)
    listed = {role: _list_part(path, class_names) for role, path in (roles or {"train": folder}).items()}
    parts, identity = _hashed(listed, folder, progress)
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    splits, notes = make_splits(parts["train"], parts.get("test"), parts.get("validation"), identity=identity)
    notes += missing_classes(splits, class_names)
    shape = _common_shape(splits["train"].paths)
    name = folder.name
    if _is_cifar10_jpeg(class_names, parts["train"].paths, shape):
        name = "cifar10-jpeg"
        notes.insert(0, _JPEG_NOTE)
    return ImageData(
        name=name,
        class_names=class_names,
        splits=splits,
        fingerprint=fingerprint_of(splits, class_names),
        source=f"folder {folder}",
        image_shape=shape,
        note=" ".join(notes),
    )


def _roles(folder: Path) -> dict[str, Path]:
    """The train, validation and test folders; a folder 'train' that holds images itself is a class of trains."""
    children = _subfolders(folder)
    roles: dict[str, Path] = {}
    for child in children:
        role = _ROLES.get(child.name.lower())
        if role is None:
            continue
        if role in roles:
            raise DataError(
                f"Two folders could be the {role} split",
                received=f"{roles[role].name}/ and {child.name}/ in {folder}",
                next_step="Rename or move one of them",
            )
        roles[role] = child
    divided = [role for role, child in roles.items() if _subfolders(child)]
    if "train" in divided:
        return roles
    if len(divided) == len(children) == 1:
        return roles
    if divided and len(divided) == len(children):
        raise DataError("The folder has no train/", received=f"{folder} with {', '.join(c.name for c in children)}")
    return {}


def _list_part(part: Path, class_names: tuple[str, ...]) -> list[list[str]]:
    """The image files of each class, sorted."""
    present = [child.name for child in _subfolders(part)]
    unknown = [name for name in present if name not in class_names]
    if not present:
        raise DataError(
            f"{part.name}/ has no class folders",
            received=f"{part} with {len(list(part.iterdir()))} loose files",
            allowed=f"{part.name}/CLASS/*.jpg with the classes of train/",
            next_step="Sort its images into class folders, or move it away",
        )
    if unknown:
        raise DataError(
            f"{part.name}/ has class folders that train/ does not have",
            received=", ".join(unknown[:5]),
            allowed=", ".join(class_names[:10]) + (" …" if len(class_names) > 10 else ""),
        )
    found = [_pictures(part / name) if name in present else [] for name in class_names]
    for name, files in zip(class_names, found):
        if name in present and not files:
            raise DataError(
                "A class folder is empty",
                received=part / name,
                allowed="images as " + ", ".join(sorted(SUFFIXES)),
                next_step="Add images to it or remove the folder",
            )
    return found


def _pictures(folder: Path) -> list[str]:
    """Every image file below `folder`, sorted; links to folders are followed, in circles only once."""

    def refuse(error: OSError):
        raise DataError("A folder of images cannot be read", received=f"{error.filename} ({error.strerror})") from error

    found, entered = [], set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [os.path.join(place, name) for name in files if _is_picture(name)]
    return sorted(found)


def _hashed(
    listed: dict[str, list[list[str]]], root: Path, progress: Progress | None
) -> tuple[dict[str, Split], np.ndarray]:
    """A Split for each role, and what the images of 'train' are told apart by when it is divided."""
    roles = list(listed)
    paths = [path for role in roles for files in listed[role] for path in files]
    labels = [label for role in roles for label, files in enumerate(listed[role]) for _ in files]
    identities, stamps = [], []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError("An image cannot be read", received=f"{path} ({error.strerror})") from error
        relative = Path(path).relative_to(root).as_posix()
        identities.append(f"{relative}:{status.st_size}")
        stamps.append(f"{relative}:{status.st_size}:{status.st_mtime_ns}")
    contents = content_hashes(paths, stamps, root, progress)
    identity = same_content(text_hashes(identities), contents)
    everything = Split(np.array(labels, np.int32), contents, paths=np.array(paths, object))
    ends = np.cumsum([sum(map(len, listed[role])) for role in roles])
    spans = {role: np.arange(end - sum(map(len, listed[role])), end) for role, end in zip(roles, ends)}
    return {role: everything.subset(span) for role, span in spans.items()}, identity[spans["train"]]


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not _hidden(child.name))
    except OSError as error:
        raise DataError("The data folder cannot be read", received=f"{folder} ({error.strerror})") from error


def _hidden(name: str) -> bool:
    """What systems leave in folders: .git, ._photo.jpg, __MACOSX."""
    return name.startswith((".", "__"))


def _is_picture(name: str) -> bool:
    return not _hidden(name) and os.path.splitext(name)[1].lower() in SUFFIXES


def _no_classes(folder: Path, class_names: tuple[str, ...]) -> DataError:
    inside = folder / class_names[0] if class_names else None
    deeper = inside is not None and len(_subfolders(inside)) > 1
    return DataError(
        "The folder has no class folders" if not class_names else "The folder has only one class folder",
        received=f"{folder} with {', '.join(class_names) or 'no folders'}",
        allowed="FOLDER/CLASS/*.jpg, or FOLDER/train/CLASS/*.jpg and FOLDER/test/CLASS/*.jpg, with two classes or more",
        next_step=f"Did you mean {inside}?" if deeper else None,
    )


def _common_shape(paths: np.ndarray) -> tuple[int, int, int]:
    """The most frequent (height, width) of some files, and 3 channels if any of them has colours."""
    from PIL import Image, ImageOps

    sizes, colours = Counter(), False
    for path in paths[:: max(1, len(paths) // 32)]:
        with Image.open(path) as picture:
            colours |= picture.mode not in ("1", "L", "LA", "I", "F") and not picture.mode.startswith("I;")
            sizes[ImageOps.exif_transpose(picture).size] += 1
    width, height = sizes.most_common(1)[0][0]
    return height, width, 3 if colours else 1


def _is_cifar10_jpeg(class_names: tuple[str, ...], paths: np.ndarray, shape: tuple[int, int, int]) -> bool:
    return (
        set(class_names) == set(CIFAR10_CLASSES)
        and shape == (32, 32, 3)
        and all(str(path).lower().endswith((".jpg", ".jpeg")) for path in paths)
    )
