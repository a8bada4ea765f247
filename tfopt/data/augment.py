"""Augmentation of one batch of uint8 images, in NumPy: the same pixels on every machine."""

from __future__ import annotations

import numpy as np

from tfopt.errors import unknown_name

AUGMENTATIONS = ("none", "flip", "crop", "crop_flip")


def augment(images: np.ndarray, name: str, random: np.random.Generator) -> np.ndarray:
    """images: uint8 (batch, height, width, channels); returns the same shape.

    'flip' mirrors half of them; 'crop' shifts each by up to an eighth of its size over a mirrored
    border (He et al. 2015 use 4 of 32 pixels); 'crop_flip' does both.
    """
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    if "crop" in name:
        images = _shift(images, random)
    if "flip" in name:
        mirrored = random.random(len(images)) < 0.5
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return images


def _shift(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    _, height, width, _ = images.shape
    reach = max(1, height // 8), max(1, width // 8)
    padded = np.pad(images, ((0, 0), (reach[0],) * 2, (reach[1],) * 2, (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    rows = random.integers(0, 2 * reach[0] + 1, len(images))
    columns = random.integers(0, 2 * reach[1] + 1, len(images))
    return np.moveaxis(windows[np.arange(len(images)), rows, columns], 1, -1)
