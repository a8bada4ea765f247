"""Class folders on disk, with or without train/ and test/; ImageNet's layout is the same thing.

    DATA/CLASS/*.jpg                                  split by hash: 80% train, 10% validation, 10% test
    DATA/{train,test}/CLASS/*.jpg                     a tenth of train becomes validation
    DATA/{train,val}/CLASS/*.JPEG                     ImageNet: val is what numbers are shown on
    DATA/{train,val,test}/CLASS/*.png                 all three as they are
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mobile_bench.inputs import InputSpec, read_picture
from tfopt.data.splits import ImageData, Split, fingerprint_of, make_splits, path_hashes
from tfopt.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_ROLES = {"train": "train", "training": "train", "val": "validation", "validation": "validation", "valid": "validation",
          "test": "test", "testing": "test"}  # fmt: skip


def load_folder(folder: Path) -> ImageData:
    folder = folder.resolve()
    roles = {_ROLES[child.name.lower()]: child for child in _subfolders(folder) if child.name.lower() in _ROLES}
    if roles and "train" not in roles and len(roles) == 1:
        folder, roles = next(iter(roles.values())), {}
    class_names = tuple(sorted(child.name for child in _subfolders(roles.get("train", folder))))
    if len(class_names) < 2:
        raise DataError(
            "The folder has no class folders",
            received=f"{folder} with {len(class_names)} folders of images",
            allowed="FOLDER/CLASS/*.jpg, or FOLDER/train/CLASS/*.jpg and FOLDER/test/CLASS/*.jpg",
        )
    if roles:
        parts = {role: _read_part(path, class_names, folder) for role, path in roles.items()}
        if "test" not in parts and "validation" in parts:
            parts["test"] = parts.pop("validation")
        splits = make_splits(parts["train"], parts.get("test"), parts.get("validation"))
    else:
        splits = make_splits(_read_part(folder, class_names, folder))
    first = splits["train"].paths[0]
    return ImageData(
        name=folder.name,
        class_names=class_names,
        splits=splits,
        fingerprint=fingerprint_of(splits, class_names),
        source=f"folder {folder}",
        image_shape=_shape_of(first),
    )


def _read_part(part: Path, class_names: tuple[str, ...], root: Path) -> Split:
    unknown = sorted(child.name for child in _subfolders(part) if child.name not in class_names)
    if unknown:
        raise DataError(
            f"{part.name}/ has class folders that train/ does not have",
            received=", ".join(unknown[:5]),
            allowed=", ".join(class_names[:10]) + (" …" if len(class_names) > 10 else ""),
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(p for p in (part / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(
                "A class folder is empty",
                received=part / name,
                allowed="images as " + ", ".join(sorted(SUFFIXES)),
                next_step="Add images to it or remove the folder",
            )
        paths += found
        labels += [label] * len(found)
    identities = [f"{p.relative_to(root).as_posix()}:{p.stat().st_size}" for p in paths]
    return Split(
        labels=np.array(labels, np.int32), hashes=path_hashes(identities), paths=np.array([str(p) for p in paths])
    )


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError as error:
        raise DataError("The data folder cannot be read", received=f"{folder} ({error.strerror})") from error


def _shape_of(path: str) -> tuple[int, int, int]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            gray = picture.mode in ("L", "1", "I", "I;16")
            width, height = picture.size
    except OSError:
        read_picture(path, InputSpec(1, 1, 1))  # raises the error that names the file
        raise
    return height, width, 1 if gray else 3
