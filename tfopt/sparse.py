"""Sparse storage of a pruned model's weights: by the converter, and taken back where LiteRT could not open the file.

A sparse weight is unpacked by a DENSIFY in front of its operation. LiteRT's XNNPACK, in use unless one says otherwise,
unpacks int8 weights for int8 convolutions only: with those of a FULLY_CONNECTED, or of an operation of dynamic range,
it refuses the whole file ("failed to delegate", LiteRT 2.3, xnnpack_delegate.cc: there it reads the packed tensor).

Nor is what the converter packs always what it was given: where it packs blocks of 4 or 16 inputs and their number is
not a multiple of that, it drops the rest of each row, or goes past its end (TensorFlow 2.21).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

_CSR = 1
_REFUSED = "LiteRT's XNNPACK takes sparse int8 weights for int8 convolutions only"
_CUT = "the converter packs them in blocks that do not fit into a row"


def sparsified(content: bytes) -> tuple[bytes, list[str]]:
    """A .tflite with sparse weights where the converter finds enough zeros, and which had to stay dense, and why."""
    from tensorflow.lite.python.convert import mlir_sparsify

    return _dense_again(mlir_sparsify(content), content)


def _dense_again(sparse: bytes, dense: bytes) -> tuple[bytes, list[str]]:
    """`sparse` with the weights of `dense` where XNNPACK would refuse them, or where they are no longer the same."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, whole = (schema.ModelT.InitFromPackedBuf(part, 0) for part in (sparse, dense))
    (graph, *_), (whole_graph, *_) = model.subgraphs, whole.subgraphs
    kinds = schema.BuiltinOperator
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    code_of = lambda operator: codes[operator.opcodeIndex]
    unpacking = {op.outputs[0]: op for op in graph.operators if code_of(op) == kinds.DENSIFY}
    stand_for = unpacked(sparse)
    why: dict[int, str] = {}  # weights that are stored densely
    # But for the DENSIFYs, the operations are those of the dense file, in its order.
    working = (op for op in graph.operators if code_of(op) != kinds.DENSIFY)
    for operator, original in zip(working, whole_graph.operators, strict=True):
        index = int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
        packed_index = unpacking[index].inputs[0] if index in unpacking else index
        weight, packed = graph.tensors[index], graph.tensors[packed_index]
        if index < 0 or packed.sparsity is None:
            continue
        data = whole.buffers[whole_graph.tensors[original.inputs[1]].buffer].data
        image = operator.inputs[2 if code_of(operator) == kinds.TRANSPOSE_CONV else 0]
        dynamic = graph.tensors[image].type == schema.TensorType.FLOAT32
        refused = weight.type == schema.TensorType.INT8 and (dynamic or code_of(operator) == kinds.FULLY_CONNECTED)
        dense_values = stand_for.get(packed_index)
        if refused and index in unpacking:
            why[index] = _REFUSED
        elif dense_values is None or not _same(dense_values, data):
            why[index] = _CUT
        else:
            continue
        buffer, packed.buffer, packed.sparsity = packed.buffer, 0, None  # where a DENSIFY read it, nobody does now
        weight.buffer, model.buffers[buffer].data = buffer, data
    if not why:
        return sparse, []
    graph.operators = [op for op in graph.operators if not (code_of(op) == kinds.DENSIFY and op.outputs[0] in why)]
    builder = flatbuffers.Builder(len(dense) + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    notes = [f"{n} weights are stored densely: {reason}" for reason, n in Counter(why.values()).items()]
    return bytes(builder.Output()), notes


def unpacked(content: bytes) -> dict[int, np.ndarray]:
    """The sparse constants of a .tflite's first subgraph as the dense arrays they stand for, by tensor.

    A constant's numbers lie in the order of `traversalOrder`; where a level is CSR, only some places of it are there.
    The levels past the tensor's own dimensions are places within a block, whose dimensions `blockMap` names
    (schema.fbs, SparsityParameters). Left out: those of other types, and those that name places outside the tensor.
    """
    from ai_edge_litert import schema_py_generated as schema

    types = {getattr(schema.TensorType, name.upper()): name for name in ("int8", "float16", "float32")}
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    found = {}
    for index, tensor in enumerate(model.subgraphs[0].tensors):
        packed = model.buffers[tensor.buffer].data
        if tensor.sparsity is None or packed is None or tensor.type not in types:
            continue
        values = np.frombuffer(np.asarray(packed, np.uint8).tobytes(), types[tensor.type])
        places = _places(tensor.sparsity, len(tensor.shape))
        if np.any(tensor.shape <= places.T) or places.shape[1] > len(values):
            continue
        found[index] = dense = np.zeros(tensor.shape, values.dtype)
        dense[tuple(places)] = values[: places.shape[1]]
    return found


def _same(values: np.ndarray, data) -> bool:
    """Whether a buffer holds these numbers; -0 is not stored, and is 0."""
    return np.array_equal(values.ravel(), np.frombuffer(np.asarray(data, np.uint8).tobytes(), values.dtype))


def _places(sparsity, dimensions: int) -> np.ndarray:
    """Where each stored number belongs: (dimensions, numbers)."""
    order, blocks = list(sparsity.traversalOrder), [] if sparsity.blockMap is None else list(sparsity.blockMap)
    levels = np.zeros((len(order), 1), int)
    sizes = {}
    for level, form in zip(order, sparsity.dimMetadata, strict=True):
        count = levels.shape[1]
        if form.format == _CSR:
            often, inside = np.diff(form.arraySegments.values), np.asarray(form.arrayIndices.values, int)
        else:
            often, inside = np.full(count, form.denseSize), np.tile(np.arange(form.denseSize), count)
            sizes[level] = form.denseSize
        levels = np.repeat(levels, often, axis=1)
        levels[level] = inside
    places = levels[:dimensions]
    for number, dimension in enumerate(blocks):
        block = dimensions + number
        places[dimension] = places[dimension] * sizes[block] + levels[block]
    return places
