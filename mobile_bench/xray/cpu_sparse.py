"""Whether XNNPACK would run a file's convolutions by its sparse kernels: predicted, never measured here.

The conditions: tflite/delegates/xnnpack/README.md, 'Sparse Inference', and xnn_subgraph_rewrite_for_nchw in XNNPACK's
src/subgraph.c. Only ARM and other machines without AVX take the way at all (xnn_is_chw_compatible_config): on x86 with
AVX a pruned file runs by the dense kernels, at their speed. What it is good for: Elsen et al. 2019, Fast Sparse
ConvNets (arXiv:1911.09723).
"""

from __future__ import annotations

import math

import numpy as np

from mobile_bench.tflite_ops import BITS
from mobile_bench.xray.cpu_rules import stored
from mobile_bench.xray.rules import Node

#: More than this share of the weights of all 1x1 convolutions together must be zero.
LEAST_ZEROS = 2 / 3
#: A share of zeros from which on somebody pruned the file, and wants to know.
_PRUNED = 0.3
_INSIDE = frozenset((
    "ABS", "ADD", "CEIL", "CONV_2D", "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE", "ELU", "FLOOR", "HARD_SWISH", "LEAKY_RELU",
    "LOGISTIC", "MEAN", "MUL", "NEG", "PAD", "RELU", "RELU6", "RELU_N1_TO_1", "RESIZE_BILINEAR", "ROUND", "SQUARE",
))  # fmt: skip


UNMEASURED = "predicted from XNNPACK's conditions for ARM, not measured here; on x86 with AVX only dense kernels run"


def missing(nodes: tuple[Node, ...]) -> list[str]:
    """What a file lacks for XNNPACK's sparse kernels, and so what to change; [] where they would run it."""
    narrow = [node for node in nodes if _is_1x1(node)]
    return _missing(nodes, narrow, _share(narrow), _packed(nodes))


def sparse_note(nodes: tuple[Node, ...]) -> str:
    """A sentence on sparse kernels, '' where the file has no zeros to speak of."""
    narrow = [node for node in nodes if _is_1x1(node)]
    share, packed = _share(narrow), _packed(nodes)
    if not packed and share < _PRUNED:
        return ""
    lacking = _missing(nodes, narrow, share, packed)
    if lacking:
        return f"Sparse kernels: no ({UNMEASURED}). Missing: {'; '.join(lacking)}"
    return f"Sparse kernels: the 1x1 convolutions ({len(narrow)}, {share:.0%} zeros) qualify ({UNMEASURED})"


def _packed(nodes: tuple[Node, ...]) -> bool:
    return any(node.op == "DENSIFY" for node in nodes)


def _share(narrow: list[Node]) -> float:
    """The zeros in the weights of all 1x1 convolutions together."""
    counted = [found for node in narrow if (found := _zeros(node)) is not None]
    total = sum(of for _, of in counted)
    return sum(zeros for zeros, _ in counted) / total if total else 0.0


def _missing(nodes: tuple[Node, ...], narrow: list[Node], share: float, packed: bool) -> list[str]:
    missing = []
    if not packed:
        missing.append("weights in TFLite's sparse form (DENSIFY)")
    if not narrow:
        missing.append("a 1x1 convolution")
    elif any((given := node.input(0)) is None or given.dtype not in ("float32", "float16") for node in narrow):
        missing.append("float values: the sparse kernels have no 8-bit form")
    elif share <= LEAST_ZEROS:
        missing.append(f"zeros in more than two thirds of the 1x1 convolutions' weights (they have {share:.0%})")
    starts = [node.operator.index for node in nodes if _opens(node)]
    ends = [node.operator.index for node in nodes if node.op in ("MEAN", "DEPTH_TO_SPACE")]
    if not starts:
        missing.append("a first 3x3 convolution of stride 2 on 3 channels")
    if not ends:
        missing.append("a MEAN over the image, or DEPTH_TO_SPACE, at the end")
    if starts and ends:
        between = {n.op for n in nodes if starts[0] < n.operator.index < ends[-1]} - {"DENSIFY", "DEQUANTIZE"}
        if strangers := sorted(between - _INSIDE):
            missing.append(f"an unbroken way: {', '.join(strangers)} in between")
    return missing


def _is_1x1(node: Node) -> bool:
    kernel = node.input(1) if node.op == "CONV_2D" else None
    plain = all(node.options.get(name, 1) == 1 for name in ("stride_h", "stride_w"))
    return kernel is not None and len(kernel.shape) == 4 and tuple(kernel.shape[1:3]) == (1, 1) and plain


def _opens(node: Node) -> bool:
    kernel = node.input(1) if node.op == "CONV_2D" else None
    if kernel is None or len(kernel.shape) != 4:
        return False
    return tuple(kernel.shape[1:]) == (3, 3, 3) and node.options.get("stride_h") == node.options.get("stride_w") == 2


def _zeros(node: Node) -> tuple[int, int] | None:
    """(zeros, all) of a convolution's weights, None where they cannot be read. Sparse ones store what is not zero."""
    tensor = stored(node, node.input(1))
    if tensor is None:
        return None
    count = math.prod(tensor.shape)
    if tensor.sparse:
        return max(0, count - tensor.constant_bytes * 8 // BITS.get(tensor.dtype, 32)), count
    values = node.model.constant(tensor)
    if values is None:
        return None
    zero = tensor.zero_points[0] if len(tensor.zero_points) == 1 else 0
    return int(np.count_nonzero(values == zero)), count
