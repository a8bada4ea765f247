"""What LiteRT's WebGPU accelerator has against an operation.

Ported from ml_drift_delegate/tflite/model_builder.cc and operation_parser.cc of LiteRT: the IsSupported of each
operation's parser, then the types of GetOpsToReplaceWithOptions. Held against the accelerator of ai-edge-litert
2.3.0; mobile_bench.xray.gpu asks it again where there is a GPU.
"""

from __future__ import annotations

import math

from mobile_bench.flatbuffer import TensorInfo
from mobile_bench.xray import gpu_rules as shared
from mobile_bench.xray.gpu_rules import bhwc, constant, counts_of, names, refusal
from mobile_bench.xray.rules import Node, Rule, Verdict

FILE = "ml_drift_delegate/tflite/model_builder.cc"
_PARSER = "ml_drift_delegate/tflite/operation_parser.cc"
_FLOAT_LIKE = ("float32", "float16", "int4", "int8", "uint8", "int32")
_INTEGERS, _UNSIGNED = {"int8", "int16", "int32"}, {"uint8", "uint16", "uint32"}
_LOGICAL = names("LOGICAL_AND LOGICAL_OR LOGICAL_NOT")
_BF16 = names(
    "ABS ADD ATAN2 STABLEHLO_CBRT CEIL STABLEHLO_CLAMP CONV_2D COS DIV EXP FLOOR GATHER LOG LOGISTIC MAXIMUM MINIMUM "
    "MUL NEG POW ROUND RSQRT SIGN SIN SQRT SUB TANH"
)
_INTEGER_OPS = names(
    "ABS ADD ATAN2 COS DIV FLOOR_DIV FLOOR_MOD MAXIMUM MINIMUM MUL NEG REDUCE_MAX REDUCE_MIN REDUCE_PROD RIGHT_SHIFT "
    "SIGN SIN STABLEHLO_CLAMP SUB SUM STABLEHLO_REMAINDER TILE STABLEHLO_SHIFT_LEFT"
)
_ANY_TYPE = names(
    "STABLEHLO_BROADCAST_IN_DIM BITCAST CAST CONCATENATION DYNAMIC_UPDATE_SLICE GATHER PACK PAD PADV2 RESHAPE "
    "REVERSE_V2 SELECT SELECT_V2 SLICE STRIDED_SLICE TRANSPOSE"
)
#: The accelerator knows these, and their checks are not ported: they are taken to pass, and the report says so.
UNCHECKED = names(
    "BITCAST DYNAMIC_UPDATE_SLICE EMBEDDING_LOOKUP LSTM STABLEHLO_BROADCAST_IN_DIM STABLEHLO_CBRT STABLEHLO_CLAMP "
    "STABLEHLO_COMPOSITE"
)
CUSTOM = names(
    "custom_call.GroupNorm custom_call.LayerNorm custom_call.RmsNorm custom_call.PixelShuffle "
    "custom_call.absolute_positional_embedding custom_call.rotary_positional_embedding Convolution2DTransposeBias "
    "MaxPoolingWithArgmax2D MaxUnpooling2D Resampler"
)


def objection(node: Node) -> Verdict | None:
    """What the accelerator has against this operation, None where it takes it."""
    name = node.operator.custom_code if node.op == "CUSTOM" else node.op
    known = node.op in _RULES or node.op in UNCHECKED or (node.op == "CUSTOM" and name in CUSTOM)
    if not known:
        no = refusal("NewOperationParser", FILE)
        return no(f"the WebGPU accelerator has no {name}", shared.INSTEAD.get(node.op, ""))
    rules = (*_RULES.get(node.op, ()), _few_dimensions, _types, _one_scale)
    return shared.first(node, rules)


def _types(node: Node) -> Verdict | None:
    given, made = _allowed(node.op)
    for tensors, allowed, side in ((node.activations, given, "input"), (node.outputs, made, "output")):
        for tensor in tensors:
            if not tensor.is_variable and tensor.dtype not in allowed:
                listed = ", ".join(sorted(allowed))
                return refusal("IsAllAllowedTensors", FILE)(
                    f"its {side} is {tensor.dtype}, and {node.op} takes {listed}", _cast(tensor.dtype)
                )
    return None


def _cast(dtype: str) -> str:
    return "Convert with the scheme int8, float16 or float32" if dtype == "int16" else "Compute it in float32"


def _allowed(op: str) -> tuple[set[str], set[str]]:
    given = {"float32", "float16", "bool", "int2", "int4", "int8", "uint8"}
    made = {"float32", "float16", "int8", "uint8"}
    if op == "ARG_MAX":
        made = {"int32"}
    if op in ("REDUCE_ALL", "REDUCE_ANY"):
        given, made = {"bool"}, {"bool"}
    if op in ("EMBEDDING_LOOKUP", "ONE_HOT"):
        given |= {"int32"}
    if op in shared.COMPARISONS:
        given, made = given | _INTEGERS | _UNSIGNED, made | {"bool"}
    if op in _LOGICAL:
        given, made = {"bool", *_INTEGERS}, {"bool", *_INTEGERS}
    if op == "TOPK_V2":
        made |= {"int32"}
    if op in _BF16:
        given, made = given | {"bfloat16"}, made | {"bfloat16"}
    if op in _INTEGER_OPS:
        given, made = given | _INTEGERS, made | _INTEGERS
    if op in _ANY_TYPE:
        more = _INTEGERS | _UNSIGNED | {"bool", "bfloat16"}
        given, made = given | more, made | more
    return given, made


def _few_dimensions(node: Node) -> Verdict | None:
    for tensor in (*node.inputs, *node.outputs):
        if tensor is not None and len(tensor.shape) > 4:
            no = refusal("IsAllAllowedTensors", FILE)
            return no(
                f"a tensor has {len(tensor.shape)} dimensions, and at most 4 are taken", "Merge dimensions before it"
            )
    return None


def _one_scale(node: Node) -> Verdict | None:
    joined = node.inputs if node.op in ("CONCATENATION", "PACK", "SELECT", "SELECT_V2") else node.activations
    for tensor in (*joined, *node.outputs):
        if tensor is not None and tensor.dtype in ("int8", "uint8") and len(tensor.scales) > 1:
            no = refusal("PreCheckReadValueByTensorIdx", _PARSER)
            return no(f"a computed tensor has {len(tensor.scales)} scales, and 1 is taken", "Convert it again")
    return None


def _unreadable(tensor: TensorInfo | None, types=_FLOAT_LIKE) -> str:
    """Why a tensor cannot be read as a constant of these types, '' where it can."""
    if not constant(tensor):
        return "computed at run time"
    if tensor.sparse:
        return "stored sparsely"
    return "" if tensor.dtype in types else f"{tensor.dtype}"


def _readable(number: int, what: str, types=_FLOAT_LIKE, dimensions: tuple[int, ...] = ()) -> Rule:
    no = refusal("PreCheckReadTensor", _PARSER)

    def rule(node: Node) -> Verdict | None:
        tensor = node.input(number)
        found = _unreadable(tensor, types)
        if not found and dimensions and len(tensor.shape) not in dimensions:
            found = f"of {len(tensor.shape)} dimensions"
        fix = "Make it a constant" if found.startswith("computed") else "Convert it again"
        return no(f"its {what} is {found}", fix) if found else None

    return rule


def _weights(node: Node) -> Verdict | None:
    """A kernel of 4 dimensions that is a constant, unless it is one of two computed inputs."""
    return None if counts_of(node)[0] == 2 else _readable(1, "kernel", dimensions=(4,))(node)


def _runtime_input(node: Node) -> Verdict | None:
    return refusal("IsSupported", FILE)("its input is a constant") if constant(node.input(0)) else None


def _quantized_weights(node: Node) -> Verdict | None:
    weights = node.input(1)
    if weights.scales and weights.dtype not in ("int8", "int4", "int2"):
        no = refusal("PreCheckReadQuantizedValueByTensorIdx", _PARSER)
        return no(f"its weights are {weights.dtype}, and int8, int4 or int2 are taken", "Convert with the scheme int8")
    return None


def _matmul(node: Node) -> Verdict | None:
    no, second = refusal("BatchedMatMulOperationParser::IsSupported", FILE), node.input(1)
    runtime = counts_of(node)[0]
    if runtime == 2:
        return None
    if runtime == 1 and constant(second) and len(second.shape) in (2, 3, 4):
        return _readable(1, "second matrix")(node)
    return no("its first matrix is the constant one", "Swap and transpose the two matrices")


def _in_range(number: int, of: int = 0, fixed: str = "") -> Rule:
    """Input `number` (or the option `fixed`) holds axes of input `of`, which has 1 to 4 dimensions."""
    no = refusal("PreCheckAxisFromIndex", _PARSER)

    def rule(node: Node) -> Verdict | None:
        rank = len(node.outputs[0].shape if node.op == "PACK" else node.input(of).shape)
        if not fixed and node.constant(number) is None:
            return no("its axis is computed at run time", "Make the axis a constant")
        axes = [node.options[fixed]] if fixed else node.constant(number).reshape(-1).tolist()
        wrong = next((axis for axis in axes if not -rank <= axis < rank), None)
        return no(f"its axis {wrong} is none of {rank} dimensions", "Reshape before it") if wrong is not None else None

    return rule


def _argmax_axis(node: Node) -> Verdict | None:
    axis = node.input(1)
    if axis.dtype == "int32" and math.prod(axis.shape) == 1:
        return None
    return refusal("PreReadTensor", _PARSER)(f"its axis is {axis.dtype}, and one int32 is needed", "Convert it again")


def _elementwise(node: Node) -> Verdict | None:
    """Operations on two tensors: which of them may be constant, equal, or of another rank."""
    no, given = refusal("ElementwiseOperationParser::IsSupported", FILE), node.inputs
    runtime = counts_of(node)[0]
    if len(given) != 2 or runtime == 0:
        return no(f"it has {len(given)} inputs, {runtime} of them computed, and 2 are needed", "Split it")
    if runtime == 1:
        fixed = next(tensor for tensor in given if constant(tensor))
        floats = ("float32", "float16")
        readable = fixed.dtype in (*floats, "int32") or (fixed.scales and fixed.dtype in ("int8", "uint8", "int4"))
        if math.prod(fixed.shape) == 1 and not readable:
            return no(f"its constant is {fixed.dtype}", "Compute in float32")
        return no("its constant is stored sparsely", "Convert without sparsity") if fixed.sparse else None
    if given[0].index == given[1].index:
        if node.op in ("ADD", "MUL"):
            return None
        return no("both its inputs are the same tensor", f"Replace {node.op} of a tensor and itself")
    one, other = given[0].shape, given[1].shape
    if len(one) != len(other):
        if not shared.broadcasts(one, other):
            return no(f"it broadcasts {one} and {other}", "Reshape one of them before it")
        if not one or not other:
            return no(f"it broadcasts {one} and {other}, and a scalar must be a constant", "Reshape the scalar to (1,)")
    return None


def _alpha(node: Node) -> Verdict | None:
    no, alpha = refusal("PReLUOperationParser::IsSupported", FILE), node.input(1)
    found = _unreadable(alpha)
    if found:
        return no(f"its alpha is {found}", "Make alpha a constant")
    linear = bool(alpha.shape) and math.prod(alpha.shape[:-1]) == 1
    channels = bhwc(node.input(0).shape)
    if linear and alpha.shape[-1] == channels[3]:
        return None
    whole = len(alpha.shape) in (3, 4) and (len(alpha.shape) == 3 or alpha.shape[0] == 1)
    if not linear and whole and tuple(alpha.shape[-3:]) == channels[1:]:
        return None
    return no(f"its alpha of {alpha.shape} fits no channel of {node.input(0).shape}", "Use shared_axes=[1, 2]")


def _dequantize(node: Node) -> Verdict | None:
    no, given = refusal("DequantizeOperationParser::IsSupported", FILE), node.input(0)
    if constant(given):
        if len(given.shape) in (2, 3, 4):
            return _readable(0, "input")(node)
        return no(f"it unpacks a constant of {len(given.shape)} dimensions, and 2 to 4 are taken", "Convert in float32")
    if not given.scales:
        return no("its input has no scale, as after DENSIFY", "Convert without sparsity")
    return None


def _quantize(node: Node) -> Verdict | None:
    if node.outputs[0].scales:
        return None
    return refusal("QuantizeOperationParser::IsSupported", FILE)("its output has no scale", "Convert it again")


def _slice(node: Node) -> Verdict | None:
    no, shape = refusal("SliceOperationParser::IsSupported", FILE), node.input(0).shape
    if constant(node.input(0)):
        return no("its input is a constant")
    begin, size = _int32s(node, 1), _int32s(node, 2)
    if begin is None or size is None:
        return no("its begin and size are no constants of int32", "Slice by fixed numbers")
    if len(begin) != len(size) or not shape or not (len(begin) == len(shape) or (len(begin), len(shape)) == (3, 4)):
        return no(f"it slices {len(shape)} dimensions by {len(begin)} numbers", "Slice every dimension")
    begin, size = [0] * (len(shape) - len(begin)) + begin, list(shape[: len(shape) - len(size)]) + size
    ends = [b + (n - b if s == -1 else s) for b, s, n in zip(begin, size, shape)]
    made = [(e + n if e < 0 else e) - b for b, e, n in zip(begin, ends, shape)]
    if bhwc(made) != bhwc(node.outputs[0].shape):
        return no(f"it gives {tuple(made)} where the file says {node.outputs[0].shape}", "Convert it again")
    return None


def _int32s(node: Node, number: int) -> list[int] | None:
    tensor, values = node.input(number), node.constant(number)
    if values is None or tensor.dtype != "int32" or not tensor.shape:
        return None
    return values.reshape(-1).tolist()


def _strided(node: Node) -> Verdict | None:
    no, shape = refusal("StridedSliceOperationParser::IsSupported", FILE), node.input(0).shape
    parts = [_int32s(node, number) for number in (1, 2, 3)]
    if None in parts:
        return no("its begin, end or strides are no constants of int32", "Slice by fixed numbers")
    missing = len(shape) - len(parts[0])
    if missing == 0 and not _keeps_batch(node, parts):
        fix = "Slice with : and not with numbers along the first axis"
        return no(f"it cuts the first axis of {shape}, the batch, by numbers", fix)
    if missing not in (0, 1):
        return no(f"it slices {len(shape)} dimensions by {len(parts[0])} numbers", "Slice every dimension")
    filled = [[0] * missing + parts[0], [*shape[:missing], *parts[1]], [1] * missing + parts[2]]
    made = []
    for axis, (begin, end, stride, size) in enumerate(zip(*filled, shape)):
        begin, end = (begin + size if begin < 0 else begin), (end + size if end < 0 else end)
        begin = 0 if node.options["begin_mask"] >> axis & 1 else begin
        end = size if node.options["end_mask"] >> axis & 1 else end
        if stride <= 0:
            return no(f"its stride is {stride}, and more than 0 is needed", "Reverse with REVERSE_V2 (tf.reverse)")
        made.append(-((begin - end) // stride))
    if bhwc(made) != bhwc(node.outputs[0].shape):
        fix = "End the slice at the tensor's own size, not beyond it"
        return no(f"its end lies outside of {shape}: {tuple(made)} is no {node.outputs[0].shape}", fix)
    return None


def _keeps_batch(node: Node, parts: list[list[int]]) -> bool:
    """Whether the first axis is left whole or cut to its first element: as seen in 2.3.0, not in the source."""
    begin = 0 if node.options["begin_mask"] & 1 else parts[0][0]
    return begin == 0 and bool(node.options["end_mask"] & 1 or (parts[1][0] > 0 and node.outputs[0].shape[0] == 1))


def _pad(node: Node) -> Verdict | None:
    no = refusal("PadOperationParser::IsSupported", FILE)
    if _int32s(node, 1) is None:
        return no("its paddings are no constants of int32", "Pad by fixed numbers")
    if node.op == "PADV2" and len(node.inputs) == 3:
        return _readable(2, "value")(node)
    return None


def _topk(node: Node) -> Verdict | None:
    k = node.input(1)
    if constant(k) and math.prod(k.shape) == 1:
        return None
    return refusal("TopKOperationParser::IsSupported", FILE)("its k is no constant", "Make k a constant")


def _perm(node: Node) -> Verdict | None:
    no, perm = refusal("TransposeOperationParser::IsSupported", FILE), _int32s(node, 1)
    if perm is None:
        return no("its permutation is no constant of int32", "Make it a constant")
    return None if 2 <= len(perm) <= 4 else no(f"it permutes {len(perm)} dimensions, and 2 to 4 are taken", "Reshape")


def _one_hot(node: Node) -> Verdict | None:
    no, shape, axis = refusal("OneHotOperationParser::IsSupported", FILE), node.input(0).shape, node.options["axis"]
    if len(node.inputs) < 4:
        return no(f"it has {len(node.inputs)} inputs, and 4 are needed")
    if axis != -1 and (not shape or axis != shape[-1]):
        return no(f"its axis is {axis}, and -1 is needed", "Use axis=-1")
    return no(f"its indices have {shape[3]} channels", "Reshape") if len(shape) == 4 and shape[3] != 1 else None


def _table() -> dict[str, tuple[Rule, ...]]:
    common = shared.compatible(enhanced=True)
    versions = {
        "ABS": 5, "FLOOR_DIV": 3, "MAXIMUM": 4, "MINIMUM": 4, "MUL": 8, "ADD": 6, "GELU": 3, "ADD_N": 6,
        "CONCATENATION": 6, "CONV_2D": 6, "CUMSUM": 1, "DEPTHWISE_CONV_2D": 6, "DEQUANTIZE": 3, "FULLY_CONNECTED": 14,
        "ONE_HOT": 1, "PRELU": 1, "PAD": 5, "PADV2": 5, "MIRROR_PAD": 5, "AVERAGE_POOL_2D": 2, "MAX_POOL_2D": 2,
        "QUANTIZE": 2, "RELU": 2, "RELU6": 2, "RELU_N1_TO_1": 2, "LEAKY_RELU": 2, "RESHAPE": 1, "RESIZE_BILINEAR": 3,
        "RESIZE_NEAREST_NEIGHBOR": 3, "SELECT": 1, "SELECT_V2": 1, "SLICE": 8, "SOFTMAX": 4, "SPACE_TO_DEPTH": 2,
        "STRIDED_SLICE": 2, "TOPK_V2": 1, "TRANSPOSE_CONV": 3, "TRANSPOSE": 9,
    }  # fmt: skip
    unary, whole = dict.fromkeys(shared.UNARY, ()), shared.inputs((1, 0), function="ValidateSupport", file=_PARSER)
    own = {
        **unary, **dict.fromkeys((*shared.BINARY, "ADD", "ADD_N", "MUL"), (_elementwise,)),
        **dict.fromkeys(shared.REDUCTIONS, (_in_range(1),)),
        "ARG_MAX": (shared.inputs((1, 1), function="ValidateSupport", file=_PARSER), _argmax_axis, _in_range(1)),
        "BATCH_MATMUL": (_matmul,), "CAST": (whole,), "CONCATENATION": (shared.activation,),
        "CONV_2D": (_runtime_input,),
        "DEPTHWISE_CONV_2D": (_weights,), "TRANSPOSE_CONV": (_weights,), "DEQUANTIZE": (_dequantize,),
        "FULLY_CONNECTED": (_quantized_weights, shared.activation), "GATHER": (_same_type,), "ONE_HOT": (_one_hot,),
        "PACK": (_pack_axis,), "PRELU": (_alpha,), "PAD": (_pad,), "PADV2": (_pad,), "MIRROR_PAD": (_pad,),
        "QUANTIZE": (_quantize,), **dict.fromkeys(("RELU", "RELU6", "RELU_N1_TO_1", "LEAKY_RELU"), (whole,)),
        "REVERSE_V2": (_in_range(1),), "SELECT": (_constants_are_scalars,), "SELECT_V2": (_constants_are_scalars,),
        "SLICE": (_slice,), "SOFTMAX": (whole, shared.softmax_beta),
        "SPACE_TO_DEPTH": (whole,), "SPLIT": (_split(0, 1),),
        "SPLIT_V": (shared.inputs((1, 2), outputs=None), _split(2, 0)),
        "STRIDED_SLICE": (shared.masks(FILE, "StridedSliceOperationParser"), _strided),
        "TOPK_V2": (_topk,), "TRANSPOSE": (_perm,), "UNPACK": (_unpack,),
    }  # fmt: skip
    # For these the accelerator does not ask the shared checks.
    alone = ("ARG_MAX", "CAST", "ONE_HOT", "SLICE", "STRIDED_SLICE", "PRELU", "UNPACK")
    table = {}
    for op in {*common, *own} - {"DENSIFY"}:
        most = versions.get(op, 2 if op in (*shared.UNARY, *shared.BINARY) else 0)
        before = (shared.version(most, _PARSER),) if most else ()
        table[op] = (*before, *(() if op in alone else common.get(op, ())), *own.get(op, ()))
    return table


def _constants_are_scalars(node: Node) -> Verdict | None:
    no = refusal("CheckSelectV2GpuDelegateCompatibility")
    wide = next((t.shape for t in node.inputs[1:] if constant(t) and math.prod(t.shape) > 1), None)
    return no(f"it chooses from a constant of {wide}, and a scalar is needed", "Use a scalar") if wide else None


def _same_type(node: Node) -> Verdict | None:
    one, other = node.input(0).dtype, node.outputs[0].dtype
    no = refusal("GatherOperationParser::IsSupported", FILE)
    return None if one == other else no(f"it gathers {one} as {other}", "Cast after it")


def _pack_axis(node: Node) -> Verdict | None:
    return None if len(node.inputs) == 1 else _in_range(0, fixed="axis")(node)


def _split(axis: int, of: int) -> Rule:
    return lambda node: None if node.options["num_splits"] == 1 else _in_range(axis, of)(node)


def _unpack(node: Node) -> Verdict | None:
    return None if node.options["num"] == 1 else _in_range(0, fixed="axis")(node)


_RULES = _table()


def unchecked(node: Node) -> bool:
    """Whether it is taken to pass because its checks are not ported."""
    return node.op in UNCHECKED or node.op == "CUSTOM"
