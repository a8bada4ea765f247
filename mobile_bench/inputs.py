"""How to feed a model and how to read its answer: size, scaling, channel order, labels, head.

Every pixel that any part of the suite shows to a model goes through this file, in training as
on a board, so that a difference in accuracy is never a difference in preprocessing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench.errors import DataError, InputError, unknown_name

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
CAFFE_MEAN = (103.939, 116.779, 123.68)

#: name -> (mean, std, channel order); a pixel p in 0..255 becomes (p - mean) / std.
SCALINGS: dict[str, tuple[tuple[float, ...], tuple[float, ...], str]] = {
    "raw": ((0.0,), (1.0,), "rgb"),
    "unit": ((0.0,), (255.0,), "rgb"),
    "signed": ((127.5,), (127.5,), "rgb"),
    "torch": (IMAGENET_MEAN, IMAGENET_STD, "rgb"),
    "caffe": (CAFFE_MEAN, (1.0,), "bgr"),
}
HEADS = ("softmax", "logits", "sigmoid")
RESIZES = ("stretch", "crop")


@dataclass(frozen=True)
class InputSpec:
    """What one image must look like when it enters a classifier, and what comes out.

    `mean` and `std` are in 0..255 pixel units, one value or one per channel, in the order the
    model sees the channels. `resize` is 'stretch' (the whole image) or 'crop' (the largest central
    part of the image that has the input's aspect ratio). `labels` may be empty; otherwise there is
    one per output.
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    order: str = "rgb"
    resize: str = "stretch"
    head: str = "softmax"
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("height", "width", "channels"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65_536:
                raise InputError(f"The input's {field} is not a positive whole number", received=repr(value))
        if isinstance(self.labels, str):
            raise InputError("The input's labels are one text", received=repr(self.labels), allowed="a list of names")
        for field, kind in (("mean", float), ("std", float), ("labels", str)):
            object.__setattr__(self, field, tuple(kind(v) for v in getattr(self, field)))
        if self.channels not in (1, 3):
            raise InputError("The input is not an image", received=f"{self.channels} channels", allowed="1 or 3")
        for field in ("mean", "std"):
            values = getattr(self, field)
            if len(values) not in (1, self.channels) or not np.all(np.isfinite(values)):
                raise InputError(
                    f"The input's {field} does not fit its channels",
                    received=values,
                    allowed=f"1 or {self.channels} finite numbers",
                )
        if min(self.std) <= 0:
            raise InputError("The input's std must be above 0", received=self.std)
        for field, allowed in (("order", ("rgb", "bgr")), ("resize", RESIZES), ("head", HEADS)):
            if getattr(self, field) not in allowed:
                raise unknown_name(f"input {field}", str(getattr(self, field)), allowed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.height, self.width, self.channels

    @property
    def scaling(self) -> str:
        """The name of the scaling, or 'custom'."""
        for name in SCALINGS:
            if self == self.with_scaling(name):
                return name
        return "custom"

    def with_scaling(self, name: str) -> InputSpec:
        """The same spec with a named scaling: raw, unit, signed, torch or caffe."""
        if name not in SCALINGS:
            raise unknown_name("scaling", name, SCALINGS)
        mean, std, order = SCALINGS[name]
        if self.channels == 1:
            mean, std, order = (float(np.mean(mean)),), (float(np.mean(std)),), "rgb"
        return dataclasses.replace(self, mean=mean, std=std, order=order)

    def fit(self, images: np.ndarray) -> np.ndarray:
        """Resize, crop and convert the channels of uint8 images.

        images: (batch, any height, any width, 1 or 3), RGB. Returns uint8 of
        (batch, height, width, channels), still RGB and in 0..255.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
            raise DataError(
                "Images have the wrong form",
                received=f"{images.dtype} of shape {images.shape}",
                allowed="uint8 of shape (batch, height, width, 1 or 3)",
            )
        if images.shape[1:3] != (self.height, self.width):
            if not len(images):
                return np.zeros((0, *self.shape), np.uint8)
            return np.stack([self._fit_one(image) for image in images])
        return _to_channels(images, self.channels)

    def _fit_one(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image

        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return self.fit_picture(picture)

    def fit_picture(self, picture) -> np.ndarray:
        """A PIL image to uint8 (height, width, channels), RGB, 0..255.

        A photo's EXIF orientation is applied, transparency is dropped, 16-bit grays keep their upper byte.
        """
        from PIL import Image, ImageOps

        picture = _eight_bit(ImageOps.exif_transpose(picture)).convert("L" if self.channels == 1 else "RGB")
        box = None
        if self.resize == "crop":
            zoom = min(picture.size[0] / self.width, picture.size[1] / self.height)
            wide, high = round(zoom * self.width), round(zoom * self.height)
            left, top = (picture.size[0] - wide) // 2, (picture.size[1] - high) // 2
            box = (left, top, left + wide, top + high)
        if picture.size != (self.width, self.height) or box:
            picture = picture.resize((self.width, self.height), Image.Resampling.BILINEAR, box=box)
        array = np.asarray(picture, np.uint8)
        return array[..., None] if array.ndim == 2 else array

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB of (batch, height, width, channels) to the float32 that the model takes."""
        if self.order == "bgr" and self.channels == 3:
            images = images[..., ::-1]
        scaled = images.astype(np.float32)
        scaled -= np.asarray(self.mean, np.float32)
        scaled /= np.asarray(self.std, np.float32)
        return scaled

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> InputSpec:
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict):
            raise InputError("An input spec is not an object", received=type(values).__name__)
        for name in values:
            if name not in known:
                raise unknown_name("field of an input spec", str(name), known)
        for name in ("height", "width", "channels"):
            if name not in values:
                raise InputError(f"An input spec has no {name}", received=", ".join(map(str, values)) or "nothing")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError("An input spec has a value of the wrong type", received=str(error)) from error


def override(spec: InputSpec, text: str) -> InputSpec:
    """Apply what a user wrote behind --input-spec to `spec`.

    text: 'scaling=unit,resize=crop,head=logits' (also height, width, size, order, labels=FILE,
    mean=127.5 or mean=a/b/c, std likewise), or the path of a JSON file with any InputSpec fields.
    """
    if text.endswith(".json"):
        try:
            values = json.loads(Path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError("The input spec file cannot be read", received=f"{text} ({error})") from error
        if not isinstance(values, dict):
            raise InputError("The input spec file is not a JSON object", received=text)
        scaling = values.pop("scaling", None)
        spec = InputSpec.from_dict({**spec.to_dict(), **values})
        return spec.with_scaling(str(scaling)) if scaling is not None else spec
    changes: dict[str, object] = {}
    seen: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key in seen:
            raise InputError(
                "An input spec says one thing twice",
                received=f"{key}={seen[key]} and {key}={value}",
                allowed="one of them",
            )
        seen[key] = value
        if not value:
            raise InputError("An input spec item has no value", received=repr(item), allowed="KEY=VALUE,KEY=VALUE")
        try:
            if key == "scaling":
                spec = spec.with_scaling(value)
            elif key == "size":
                changes["height"] = changes["width"] = int(value)
            elif key in ("height", "width", "channels"):
                changes[key] = int(value)
            elif key in ("mean", "std"):
                changes[key] = tuple(float(v) for v in value.split("/"))
            elif key == "labels":
                changes[key] = tuple(line for line in Path(value).read_text().splitlines() if line.strip())
            elif key in ("order", "resize", "head"):
                changes[key] = value
            else:
                raise unknown_name("input spec key", key, _OVERRIDES)
        except (ValueError, OSError) as error:
            raise InputError(f"The input spec's {key} cannot be used", received=f"{value!r} ({error})") from error
    return dataclasses.replace(spec, **changes)


_OVERRIDES = (
    "scaling", "size", "height", "width", "channels", "mean", "std", "labels", "order", "resize", "head",
)  # fmt: skip


def read_picture(path: str | Path, spec: InputSpec) -> np.ndarray:
    """One image file to uint8 (height, width, channels) as `spec` wants it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return spec.fit_picture(picture)
    except UnidentifiedImageError as error:
        raise DataError("A file is not an image", received=path, next_step="Remove it or replace it") from error
    except Exception as error:
        raise DataError(
            "An image cannot be read", received=f"{path} ({error})", next_step="Remove it or replace it"
        ) from error


def _eight_bit(picture):
    from PIL import Image

    if picture.mode == "F":
        raise DataError("An image has floating-point pixels", allowed="whole numbers of 8 or 16 bits a channel")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        # Pillow would cut every value above 255 to white.
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return picture


def _to_channels(images: np.ndarray, channels: int) -> np.ndarray:
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    # ITU-R 601 luma in fixed point, the very integers that Pillow's convert('L') uses.
    weighted = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]
