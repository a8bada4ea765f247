"""What a .tflite says about how to feed it: the InputSpec that conversion put into its metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from mobile_bench.errors import InputError, Problem
from mobile_bench.inputs import InputSpec, override

METADATA_KEY = "tfopt"
# Places of fields in the tables of the TFLite schema (tensorflow/compiler/mlir/lite/schema/schema.fbs).
_MODEL_BUFFERS, _MODEL_METADATA = 4, 6
_METADATA_NAME, _METADATA_BUFFER = 0, 1
_BUFFER_DATA = 0


def find_spec(tflite: str | Path, text: str = "", *, shape: tuple[int, int, int] | None = None) -> InputSpec:
    """How to feed a file: from variant.json beside it, else from its own metadata, else from `text`.

    text: what the user wrote behind --input-spec; it changes what was found. shape: (height, width,
    channels) to start from where nothing is known, and then `text` must say the scaling. Raises
    InputError where nothing does, because a guessed scaling costs accuracy without a word.
    """
    known = recorded_spec(tflite)
    if known is None and text.endswith(".json") and shape:
        return override(InputSpec(*shape), text)
    if known is None:
        says_scaling = any(part.strip().startswith(("scaling=", "mean=")) for part in text.split(","))
        if shape is None or not says_scaling:
            raise InputError(
                "The file does not say how its images are scaled",
                received=tflite,
                allowed="raw (0..255), unit (0..1), signed (-1..1), torch, caffe",
                next_step="Say it with --input-spec scaling=signed (add head=logits where it has no softmax)",
            )
        known = InputSpec(*shape)
    return override(known, text) if text else known


def recorded_spec(tflite: str | Path) -> InputSpec | None:
    """The spec in variant.json beside a file, or in the file itself, or None."""
    record = Path(tflite).parent / "variant.json"
    try:
        spec = json.loads(record.read_text(encoding="utf-8")).get("spec") if record.is_file() else None
        if spec:
            return InputSpec.from_dict(spec)
        return embedded_spec(Path(tflite).read_bytes())
    except (OSError, ValueError, AttributeError, Problem):
        return None


def embedded_spec(content: bytes) -> InputSpec | None:
    """The spec in a .tflite's metadata under the key 'tfopt'; None where it is absent or damaged."""
    try:
        model = _indirect(content, 0)
        buffers = list(_tables(content, model, _MODEL_BUFFERS))
        for entry in _tables(content, model, _MODEL_METADATA):
            if _bytes(content, _field(content, entry, _METADATA_NAME)) == METADATA_KEY.encode():
                place = _field(content, entry, _METADATA_BUFFER)
                index = _unpack("<I", content, place) if place else 0
                data = _bytes(content, _field(content, buffers[index], _BUFFER_DATA))
                return InputSpec.from_dict(json.loads(data))
    except (struct.error, IndexError, ValueError, Problem):
        return None
    return None


def _field(content: bytes, table: int, number: int) -> int:
    """Where field `number` of a table lies, or 0 where it is absent."""
    vtable = table - _unpack("<i", content, table)
    if 4 + 2 * number >= _unpack("<H", content, vtable):
        return 0
    offset = _unpack("<H", content, vtable + 4 + 2 * number)
    return table + offset if offset else 0


def _tables(content: bytes, table: int, number: int) -> Iterator[int]:
    place = _field(content, table, number)
    if place:
        vector = _indirect(content, place)
        for index in range(min(_unpack("<I", content, vector), len(content) // 4)):
            yield _indirect(content, vector + 4 + 4 * index)


def _bytes(content: bytes, place: int) -> bytes:
    if not place:
        return b""
    vector = _indirect(content, place)
    length = _unpack("<I", content, vector)
    return content[vector + 4 : vector + 4 + length]


def _indirect(content: bytes, place: int) -> int:
    return place + _unpack("<I", content, place)


def _unpack(form: str, content: bytes, place: int) -> int:
    if place < 0:
        raise IndexError(place)  # struct would count from the end
    return struct.unpack_from(form, content, place)[0]
