"""How much one operator of a .tflite computes and moves, from the shapes in the file."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mobile_bench.flatbuffer import Operator, Subgraph, TensorInfo, TFLiteModel
from mobile_bench.tflite_ops import BITS


@dataclass(frozen=True, slots=True)
class OpCost:
    """Multiply-accumulates, and the bytes of an operator's tensors; None where the file does not fix them.

    bytes_read: inputs, constants included, a tensor used twice counted once. bytes_written: outputs. Both
    are what must pass at least once, not what caches make of it.
    """

    macs: int | None
    bytes_read: int | None
    bytes_written: int | None


def cost_of(model: TFLiteModel, operator: Operator, subgraph: Subgraph | None = None) -> OpCost:
    """What an operator of `subgraph` (else of model.main) costs for one inference at the shapes in the file.

    macs is 0 for all but CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED, TRANSPOSE_CONV and BATCH_MATMUL; a bias
    and an activation count nothing. An open batch counts as the 1 that the file gives it; any other open
    dimension makes the cost None.
    """
    tensors = (subgraph or model.main).tensors
    # Shapes are the file's word, so an operator may have fewer tensors or dimensions than it should.
    inputs = [tensors[i] if i >= 0 else None for i in operator.inputs]
    outputs = [tensors[i] for i in operator.outputs]
    used = {t.index: t for t in inputs if t is not None}
    written = {t.index: t for t in outputs}
    return OpCost(_macs(operator, inputs, outputs), _bytes(used.values()), _bytes(written.values()))


def macs_of(model: TFLiteModel, operator: Operator, subgraph: Subgraph | None = None) -> int | None:
    """The multiply-accumulates of one operator: cost_of(...).macs."""
    return cost_of(model, operator, subgraph).macs


def _macs(operator: Operator, inputs: list[TensorInfo | None], outputs: list[TensorInfo]) -> int | None:
    if operator.op not in _RULES:
        return 0
    rule, ranks = _RULES[operator.op]
    places = [*inputs[: len(ranks) - 1], outputs[0] if outputs else None]
    if len(places) != len(ranks):
        return None
    shapes = []
    for tensor, rank in zip(places, ranks):
        if rank is None:
            continue
        shape = _closed(tensor) if tensor else None
        if shape is None or (len(shape) != rank if rank > 0 else len(shape) < -rank):
            return None
        shapes.append(shape)
    return rule(operator.options, *shapes)


def _conv(options: dict, weights: tuple[int, ...], output: tuple[int, ...]) -> int:
    """Weights (out, height, width, in per group): each makes one product per output position."""
    return prod(output[:3]) * prod(weights)


def _fully_connected(options: dict, weights: tuple[int, ...], output: tuple[int, ...]) -> int:
    """Weights (out, in), output (..., out)."""
    return prod(output) * weights[1]


def _transpose_conv(options: dict, weights: tuple[int, ...], image: tuple[int, ...], output: tuple[int, ...]) -> int:
    """Weights (out, height, width, in), image (batch, height, width, in): each meets every input position."""
    return prod(image[:3]) * prod(weights)


def _batch_matmul(options: dict, left: tuple[int, ...], output: tuple[int, ...]) -> int:
    """Left (..., rows, inner), or (..., inner, rows) under adj_x; output (..., rows, columns)."""
    return prod(output) * left[-2 if options.get("adj_x") else -1]


# op -> its rule and the ranks of its inputs and its output; None: not asked for, -2: at least two.
_RULES = {
    "CONV_2D": (_conv, (None, 4, 4)),
    "DEPTHWISE_CONV_2D": (_conv, (None, 4, 4)),
    "FULLY_CONNECTED": (_fully_connected, (None, 2, -1)),
    "TRANSPOSE_CONV": (_transpose_conv, (None, 4, 4, 4)),
    "BATCH_MATMUL": (_batch_matmul, (-2, None, -2)),
}


def _closed(tensor: TensorInfo) -> tuple[int, ...] | None:
    """The tensor's shape where all of it but the batch is fixed, else None."""
    is_open = any(n < 0 for n in tensor.shape) or any(n < 0 for n in tensor.shape_signature[1:])
    return None if is_open else tensor.shape


def _bytes(tensors) -> int | None:
    total = 0
    for tensor in tensors:
        shape = _closed(tensor)
        if tensor.constant_bytes:
            total += tensor.constant_bytes
        elif shape is None or tensor.dtype not in BITS:
            return None
        else:
            total += (prod(shape) * BITS[tensor.dtype] + 7) // 8
    return total
