"""The .tflite of one layer with other numbers of channels, made from the converter's own file in a millisecond.

A layer is converted once with numbers of channels that occur nowhere else in it (primes). In a copy, each dimension,
and each number in a constant shape, that is one of these becomes another. Weights are noise: times do not depend on
their values. `same_form` tells whether a copy is what the converter makes at these numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


def free_numbers(taken: Iterable[int], count: int) -> list[int]:
    """Numbers that stand for channels alone: none of them, nor a product of two, is `taken`."""
    taken = set(taken)
    found: list[int] = []
    for prime in _PRIMES:
        if prime not in taken and not taken & {prime * other for other in (*found, prime)}:
            found.append(prime)
        if len(found) == count:
            return found
    raise ValueError(f"no numbers left beside {sorted(taken)}")


def widened(content: bytes, changes: Mapping[int, int], seed: int = 0) -> bytes:
    """A copy of a file in which every dimension of `changes` has its new size: {13: 64, 17: 128}."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, random = schema.ModelT.InitFromPackedBuf(content, 0), np.random.default_rng(seed)
    filled: dict[int, np.ndarray] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            before = _numbers(tensor.shape)
            tensor.shape = _mapped(before, changes)
            if tensor.shapeSignature is not None and len(_numbers(tensor.shapeSignature)):
                tensor.shapeSignature = _mapped(_numbers(tensor.shapeSignature), changes)
            _rescale(tensor, before)
            buffer = model.buffers[tensor.buffer]
            if buffer.data is None or not len(buffer.data):
                continue
            own = np.asarray(buffer.data, np.uint8)
            if (before != tensor.shape).any():
                filled[tensor.buffer] = _noise(tensor.type, tensor.shape, own, before, random)
            elif tensor.type == schema.TensorType.INT32:
                filled[tensor.buffer] = _mapped(own.view(np.int32), changes).view(np.uint8)
        for operator in graph.operators:
            options = operator.builtinOptions
            if getattr(options, "newShape", None) is not None:
                options.newShape = _mapped(_numbers(options.newShape), changes)
    for index, data in filled.items():
        model.buffers[index].data = data
    builder = flatbuffers.Builder(len(content) + sum(data.size for data in filled.values()) + 1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def same_form(one: bytes, other: bytes) -> bool:
    """Whether two files have the same operations on the same tensors, shapes as constants included."""
    return _form(one) == _form(other)


def _form(content: bytes) -> tuple:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    codes = [(code.builtinCode, code.version) for code in model.operatorCodes]
    graphs = []
    for graph in model.subgraphs:
        described = lambda index, graph=graph: None if index < 0 else _tensor_form(model, graph.tensors[index])
        graphs.append([
            (codes[operator.opcodeIndex], *map(described, (*operator.inputs, *operator.outputs)))
            for operator in graph.operators
        ])  # fmt: skip
    return tuple(map(tuple, graphs))


def _tensor_form(model, tensor) -> tuple:
    from ai_edge_litert import schema_py_generated as schema

    data = model.buffers[tensor.buffer].data
    constant = data is not None and len(data) > 0
    # Small whole numbers are shapes and axes; a bias of int32 is a weight.
    is_shape = constant and tensor.type == schema.TensorType.INT32 and not _scales(tensor)
    values = tuple(np.asarray(data, np.uint8).view(np.int32).tolist()) if is_shape else ()
    return (*_numbers(tensor.shape).tolist(), tensor.type, constant, _scales(tensor), values)


def _scales(tensor) -> int:
    scale = getattr(tensor.quantization, "scale", None)
    return 0 if scale is None else len(scale)


def _numbers(values) -> np.ndarray:
    return np.array([] if values is None else values, np.int32)


def _mapped(values: np.ndarray, changes: Mapping[int, int]) -> np.ndarray:
    made = values.copy()
    for old, new in changes.items():
        made[values == old] = new
    return made


def _rescale(tensor, before: np.ndarray) -> None:
    """One scale a channel for as many channels as there are now."""
    known = tensor.quantization
    if known is None or _scales(tensor) < 2:
        return
    count = int(tensor.shape[known.quantizedDimension])
    if count != before[known.quantizedDimension]:
        known.scale = np.resize(np.asarray(known.scale, np.float32), count)
        known.zeroPoint = np.resize(np.asarray(known.zeroPoint, np.int64), count)


def _noise(kind: int, shape, own: np.ndarray, before: np.ndarray, random: np.random.Generator) -> np.ndarray:
    from ai_edge_litert import schema_py_generated as schema

    count, size = int(np.prod(shape)), own.size // max(int(np.prod(before)), 1)
    if kind == schema.TensorType.FLOAT32:
        return random.normal(0, 0.1, count).astype(np.float32).view(np.uint8)
    if kind == schema.TensorType.INT8:
        return random.integers(-127, 128, count, np.int8).view(np.uint8)
    return np.zeros(count * size, np.uint8)
