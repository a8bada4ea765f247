"""Why XNNPACK leaves an operation to the runtime's own kernels: its delegate's checks, as rules.

Ported from tflite/delegates/xnnpack/xnnpack_delegate.cc of LiteRT, one rule for each check that a converter's file
can fail. The delegate is silent about them (its log is switched off in every released build), so this is where a
reason comes from; where no rule objects, nobody knows why, and UNSAID says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mobile_bench.flatbuffer import TensorInfo
from mobile_bench.xray.rules import Node, Rule, Verdict, first_objection

_FILE = "tflite/delegates/xnnpack/xnnpack_delegate.cc"
_FLOATS, _QUANTIZED = ("float32", "float16"), ("int8", "uint8")
MOST_DIMENSIONS = 6
UNSAID = Verdict("XNNPACK left it and does not say why", "", "")
_TO_8_BITS = "Convert with the scheme int8, or leave the model in float32"


def why(node: Node) -> Verdict:
    """Why XNNPACK left this operation; UNSAID where no rule explains it."""
    return objection(node) or UNSAID


def objection(node: Node) -> Verdict | None:
    """What the delegate's checks have against this operation, None where our port of them finds nothing."""
    missing = Verdict(
        f"XNNPACK has no kernel for {node.operator.custom_code or node.op}", _INSTEAD.get(node.op, ""), _at("VisitNode")
    )
    return first_objection(node, _RULES, missing)


def stored(node: Node, tensor: TensorInfo | None) -> TensorInfo | None:
    """The constant that a tensor is, or that DENSIFY and DEQUANTIZE unpack it from; None where it is neither."""
    for _ in range(3):  # as deep as converters go: a damaged file may lead in a circle
        if tensor is None or tensor.constant_bytes:
            return tensor
        makers = (o for o in node.graph.operators if tensor.index in o.outputs and o.op in ("DEQUANTIZE", "DENSIFY"))
        source = next((o.inputs[0] for o in makers if o.inputs), -1)
        tensor = node.graph.tensors[source] if source >= 0 else None
    return None


def _at(function: str) -> str:
    return f"{_FILE}, {function}"


def _held(tensor: TensorInfo, types: Sequence[str]) -> str:
    """'' where the delegate takes this tensor's type and quantization, else what it found."""
    if tensor.dtype not in types:
        return tensor.dtype
    if tensor.dtype in _QUANTIZED and (len(tensor.scales) != 1 or tensor.quantized_dimension):
        return f"{tensor.dtype} with {len(tensor.scales)} scales, and one is needed"
    return ""


def _other(node: Node, allowed: Sequence[str], found: str) -> str:
    listed = " and ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))
    return f"{node.op} takes {listed}, and this one has {found}"


def _types(function: str, allowed: Sequence[str], fix: str = _TO_8_BITS, first: int = 0) -> Rule:
    """Input number `first` and the outputs have one of these types; 8-bit ones with a single scale."""

    def rule(node: Node) -> Verdict | None:
        given = node.input(first)
        found = next(filter(None, (_held(t, allowed) for t in (given, *node.outputs) if t is not None)), "")
        if not found:
            return None
        return Verdict(_other(node, allowed, found), fix, _at(function))

    return rule


def _all_types(function: str, allowed: Sequence[str], fix: str = _TO_8_BITS) -> Rule:
    """Every input and output has one of these types, and the same one."""

    def rule(node: Node) -> Verdict | None:
        tensors = [t for t in (*node.inputs, *node.outputs) if t is not None]
        found = next(filter(None, (_held(t, allowed) for t in tensors)), "")
        if found:
            return Verdict(_other(node, allowed, found), fix, _at(function))
        kinds = dict.fromkeys(t.dtype for t in tensors)
        if len(kinds) > 1:
            return Verdict(f"{node.op} mixes {' and '.join(kinds)}", _TO_8_BITS, _at(function))
        return None

    return rule


def _few_dimensions(node: Node) -> Verdict | None:
    for tensor in (*node.activations, *node.outputs):
        if len(tensor.shape) > MOST_DIMENSIONS:
            return Verdict(
                f"a tensor has {len(tensor.shape)} dimensions, and XNNPACK takes at most {MOST_DIMENSIONS}",
                "Merge dimensions before it", _at("CheckTensorShape"),
            )  # fmt: skip
    return None


def _activation(node: Node) -> Verdict | None:
    fused = node.options.get("fused_activation_function", "NONE")
    if fused in ("NONE", "RELU", "RELU_N1_TO_1", "RELU6"):
        return None
    return Verdict(
        f"it fuses the activation {fused}", "Make the activation a layer of its own",
        _at("ConvertActivationToOutputRange"),
    )  # fmt: skip


def _constant(number: int, what: str, function: str) -> Rule:
    """Input `number` is stored in the file, or unpacked from there by DEQUANTIZE or DENSIFY."""

    def rule(node: Node) -> Verdict | None:
        tensor = node.input(number)
        if tensor is None or stored(node, tensor):
            return None
        return Verdict(f"its {what} is computed at run time", f"Make the {what} a constant", _at(function))

    return rule


def _weights(function: str) -> Rule:
    """A kernel and its bias: the input's own type, or 8-bit ones under float where XNNPACK can do that."""

    def rule(node: Node) -> Verdict | None:
        given, kernel, bias = node.input(0), node.input(1), node.input(2)
        if given is None or kernel is None:
            return None
        if bias is None and node.op != "FULLY_CONNECTED":
            return Verdict("it has no bias", "Give the layer a bias (use_bias=True)", _at(function))
        narrow = ("int8", "int4", "int2") if node.op == "FULLY_CONNECTED" else ("int8",)
        dynamic = given.dtype in _FLOATS and kernel.dtype in narrow and node.op != "DEPTHWISE_CONV_2D"
        static = given.dtype == "int8" and kernel.dtype in narrow
        floats = given.dtype in _FLOATS and kernel.dtype in _FLOATS
        if kernel.dtype == given.dtype or dynamic or static or floats:
            return None
        mixed = f"{kernel.dtype} weights under {given.dtype} values"
        fix = (
            "Convert with the scheme int8 or float32: dynamic-range depthwise kernels are the runtime's own"
            if node.op == "DEPTHWISE_CONV_2D" and given.dtype in _FLOATS
            else _TO_8_BITS
        )
        return Verdict(f"{node.op} does not take {mixed}", fix, _at(function))

    return rule


def _old_version(node: Node) -> Verdict | None:
    if node.operator.version == 8:
        return Verdict("FULLY_CONNECTED of version 8 has sparse weights", "Convert without sparsity", _at("VisitNode"))
    form = node.options.get("weights_format", "DEFAULT")
    if form != "DEFAULT":
        return Verdict(f"its weights are stored as {form}", "Convert again", _at("CheckFullyConnectedParams"))
    return None


def _count(least: int, most: int, of: str, function: str) -> Rule:
    def rule(node: Node) -> Verdict | None:
        count = len(node.inputs if of == "inputs" else node.outputs)
        if least <= count <= most:
            return None
        return Verdict(
            f"it has {count} {of}, and XNNPACK takes {least} to {most}", f"Do it in steps of at most {most}",
            _at(function),
        )  # fmt: skip

    return rule


def _same_quantization(node: Node) -> Verdict | None:
    given, made = node.input(0), next(iter(node.outputs), None)
    if given is None or made is None or made.dtype not in _QUANTIZED:
        return None
    if (given.scales, given.zero_points) == (made.scales, made.zero_points):
        return None
    return Verdict(
        f"its output is quantized otherwise than its input (scales {_first(made)} and {_first(given)})",
        "Quantize again with one range for both", _at("VisitReshapeNode"),
    )  # fmt: skip


def _first(tensor: TensorInfo) -> str:
    return f"{tensor.scales[0]:.4g}" if tensor.scales else "none"


def _beta(node: Node) -> Verdict | None:
    beta = node.options.get("beta", 1.0)
    if beta == 1.0:
        return None
    return Verdict(f"its beta is {beta:g}, not 1", "Scale before the softmax", _at("VisitSoftmaxNode"))


def _plain_slice(node: Node) -> Verdict | None:
    for mask in ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask"):
        if node.options.get(mask):
            return Verdict(
                f"its {mask} is {node.options[mask]}, not 0",
                "Slice with a range (x[:, 0:1]) and reshape, instead of x[:, 0]", _at("VisitStridedSliceNode"),
            )  # fmt: skip
    strides = node.constant(3)
    if strides is not None and any(int(n) != 1 for n in strides.reshape(-1)):
        return Verdict(
            f"it slices with the strides {[int(n) for n in strides.reshape(-1)]}, and XNNPACK with 1 only",
            "Slice without a step", _at("VisitStridedSliceNode"),
        )  # fmt: skip
    return None


def _real_axes(node: Node) -> Verdict | None:
    axes = node.constant(1)
    if axes is not None and axes.size == 0:
        return Verdict("it reduces over no axis", "Leave it out", _at("VisitReduceNode"))
    return None


def _known_shape(node: Node) -> Verdict | None:
    shape = node.input(1)
    if shape is None or shape.constant_bytes:
        return None
    return Verdict(
        "its new shape is computed at run time", "Convert with a fixed batch: the shape is then a constant",
        _at("VisitReshapeNode"),
    )  # fmt: skip


def _one_kind_of_8_bits(node: Node) -> Verdict | None:
    given, made = node.input(0), next(iter(node.outputs), None)
    if given is None or made is None or given.dtype not in _QUANTIZED or given.dtype == made.dtype:
        return None
    return Verdict(
        f"it goes from {given.dtype} to {made.dtype}",
        "Convert with int8 inputs and outputs, as the values inside are",
        _at("VisitUnaryNode"),
    )


def _table() -> dict[str, tuple[Rule, ...]]:
    floats, any8 = _FLOATS, (*_FLOATS, *_QUANTIZED)
    table: dict[str, tuple[Rule, ...]] = {}

    def put(names: str, *rules: Callable[[Node], Verdict | None]) -> None:
        table.update({name: (_few_dimensions, *rules) for name in names.split()})

    logits = "End the model with the scores before it (logits): the largest is the same class"
    pool = "Use GlobalAveragePooling2D (MEAN) where it covers the whole image: XNNPACK has that in 8 bits"
    put(
        "ABS CEIL COS EXP FLOOR GELU HARD_SWISH LOG NEG RELU_N1_TO_1 RELU RELU6 ROUND RSQRT SIN SQRT SQUARE",
        _all_types("VisitUnaryNode", floats, "Replace it by an activation that has an 8-bit kernel, such as a fused "
                   "ReLU, or leave the model in float32"),
    )  # fmt: skip
    put("ELU", _all_types("VisitUnaryNode", (*floats, "int8")))
    put("LOGISTIC TANH LEAKY_RELU", _all_types("VisitUnaryNode", any8))
    put("DEQUANTIZE")
    put("QUANTIZE", _types("VisitUnaryNode", any8), _one_kind_of_8_bits)
    put("ADD SUB MUL", _all_types("VisitBinaryNode", any8), _activation)
    put(
        "DIV MAXIMUM MINIMUM PRELU SQUARED_DIFFERENCE",
        _all_types("VisitBinaryNode", floats, "Leave this part of the model in float32"),
    )
    put("SOFTMAX", _beta, _all_types("VisitSoftmaxNode", floats, logits))
    put("AVERAGE_POOL_2D", _all_types("VisitAveragePool2DNode", floats, pool), _activation)
    put("MAX_POOL_2D", _types("VisitMaxPool2DNode", any8), _activation)
    for op, visit in (("CONV_2D", "VisitConv2DNode"), ("DEPTHWISE_CONV_2D", "VisitDepthwiseConv2DNode")):
        put(op, _types(visit, any8), _constant(1, "kernel", visit), _weights(visit), _activation)
    put("TRANSPOSE_CONV", _types("VisitTransposeConvNode", any8, first=2))
    full = "VisitFullyConnectedNode"
    put("FULLY_CONNECTED", _old_version, _types(full, any8), _weights(full), _activation)
    put("BATCH_MATMUL", _types("VisitBatchMatMulNode", any8))
    put("CONCATENATION", _count(2, 5, "inputs", "VisitConcatenationNode"), _all_types("VisitConcatenationNode", any8))
    put("SPLIT", _count(2, 4, "outputs", "VisitSplitNode"), _types("VisitSplitNode", any8, first=1))
    reduce = "VisitReduceNode"
    put("MEAN SUM REDUCE_MAX REDUCE_MIN", _types(reduce, any8), _constant(1, "list of axes", reduce), _real_axes)
    put("PAD", _types("VisitPadNode", any8), _constant(1, "padding", "VisitPadNode"))
    put("RESHAPE", _types("VisitReshapeNode", any8), _same_quantization, _known_shape)
    resize = "VisitResizeBilinearNode"
    put("RESIZE_BILINEAR", _types(resize, any8), _constant(1, "size", resize))
    put("SLICE", _types("VisitSliceNode", any8), _constant(1, "start", "VisitSliceNode"))
    cut = "VisitStridedSliceNode"
    put("STRIDED_SLICE", _plain_slice, _types(cut, any8), _constant(1, "start", cut), _constant(2, "end", cut))
    put("TRANSPOSE", _types("VisitTransposeNode", any8), _constant(1, "order", "VisitTransposeNode"))
    put("DEPTH_TO_SPACE", _types("VisitDepthToSpaceNode", any8))
    put("SPACE_TO_DEPTH", _types("VisitSpaceToDepthNode", any8))
    put("EXPAND_DIMS", _types("VisitExpandDimsNode", any8))
    # Known to VisitNode, with checks that are not ported: nothing is guessed about them.
    put("ASSIGN_VARIABLE DENSIFY READ_VARIABLE STABLEHLO_COMPOSITE VAR_HANDLE")
    return table


_RULES = _table()
#: What can stand in for an operation that XNNPACK has no kernel for.
_INSTEAD = {
    "SQUEEZE": "Use RESHAPE instead",
    "PADV2": "Pad with zeros (PAD)",
    "RESIZE_NEAREST_NEIGHBOR": "Resize bilinearly (RESIZE_BILINEAR)",
    "PACK": "Take a fixed batch: it mostly comes of a shape that is computed at run time",
    "SHAPE": "Take a fixed batch: the shape is then known when the model is converted",
}
