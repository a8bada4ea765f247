"""Write the smallest .tflite there is: one dense or convolution layer, for measuring what a machine can do.

The FlatBuffers format needs no library for that: tables, each with a table of its fields' offsets before it, and
vectors; every reference leads forward (FlatBuffers, Internals).
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_FLOAT32, _INT32, _INT8 = 0, 2, 9
#: The schema's numbers: (operator, its options' type, its options, its version for float32, for int8).
_DENSE = (9, 8, {}, 1, 4)
_CONVOLUTION = (3, 1, {0: 0, 1: 1, 2: 1}, 1, 3)
_ALIGNMENT = 16


def one_layer(
    shape: tuple[int, ...], weights: tuple[int, ...], output: tuple[int, ...], *, int8: bool = False, seed: int = 0
) -> bytes:
    """A file of one layer with random weights.

    Dense: shape (rows, in), weights (out, in), output (rows, out). Convolution with stride 1 and SAME padding: shape
    (batch, height, width, in), weights (out, rows, columns, in), output (batch, height, width, out).
    """
    random = np.random.default_rng(seed)
    values = random.integers(-127, 128, weights, np.int8) if int8 else random.standard_normal(weights, np.float32)
    operator, options_type, options, *versions = _DENSE if len(shape) == 2 else _CONVOLUTION
    dtype = _INT8 if int8 else _FLOAT32
    # input, weights, bias, output; the bias has the scale that the runtime asks for: input's times weights'
    rows = ((shape, dtype, 0, 0.01), (weights, dtype, 1, 0.01), (weights[:1], _INT32 if int8 else _FLOAT32, 2, 1e-4),
            (output, dtype, 0, 1.0))  # fmt: skip
    tensors = []
    for tensor_shape, tensor_dtype, buffer, scale in rows:
        quantization = {4: {2: np.array([scale], "<f4"), 3: np.zeros(1, "<i8")}} if int8 else {}
        tensors.append({0: _indices(*tensor_shape), 1: tensor_dtype, 2: buffer, **quantization})
    step = {0: 0, 1: _indices(0, 1, 2), 2: _indices(3), 3: options_type, 4: options}
    return _file(
        {
            0: 3,
            1: [{0: operator, 2: versions[int8], 3: operator}],
            2: [{0: tensors, 1: _indices(0), 2: _indices(3), 3: [step]}],
            4: [{}, {0: _raw(values)}, {0: np.zeros(4 * weights[0], np.uint8)}],
        }
    )


def _indices(*values: int) -> np.ndarray:
    return np.array(values, "<i4")


def _raw(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(values.astype(values.dtype.newbyteorder("<")).tobytes(), np.uint8)


def _file(root: dict) -> bytes:
    out = bytearray(8)
    out[4:8] = b"TFL3"
    struct.pack_into("<I", out, 0, _write(out, root))
    return bytes(out)


def _write(out: bytearray, value: Any) -> int:
    """Append a table (dict: field number -> value), a vector of tables (list) or of numbers; where it begins."""
    if isinstance(value, dict):
        return _table(out, value)
    if isinstance(value, list):
        _pad(out, 4)
        place = len(out)
        out += struct.pack("<I", len(value)) + bytes(4 * len(value))
        for number, item in enumerate(value):
            _refer(out, place + 4 + 4 * number, item)
        return place
    _pad(out, _ALIGNMENT, 4)  # the elements, which follow the length, lie on a border
    place = len(out)
    out += struct.pack("<I", len(value)) + value.tobytes()
    return place


def _table(out: bytearray, fields: dict) -> int:
    """A table whose fields all take 4 bytes: a shorter number is the start of a longer one in little-endian order."""
    slots = max(fields, default=-1) + 1
    _pad(out, 4)
    if slots % 2:
        out += bytes(2)  # so that the table, after 4 + 2 x slots bytes, lies on a border of 4
    start = len(out)
    offsets = (4 + 4 * slot if slot in fields else 0 for slot in range(slots))
    out += struct.pack(f"<{2 + slots}H", 4 + 2 * slots, 4 + 4 * slots, *offsets)
    place = len(out)
    out += struct.pack("<i", place - start) + bytes(4 * slots)
    for slot, value in fields.items():
        if isinstance(value, int):
            struct.pack_into("<i", out, place + 4 + 4 * slot, value)
        else:
            _refer(out, place + 4 + 4 * slot, value)
    return place


def _refer(out: bytearray, at: int, value: Any) -> None:
    struct.pack_into("<I", out, at, _write(out, value) - at)


def _pad(out: bytearray, border: int, ahead: int = 0) -> None:
    out += bytes(-(len(out) + ahead) % border)
