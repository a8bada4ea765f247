"""What TFLite's GPU delegate, with OpenCL or OpenGL as on Android, has against an operation.

Ported from tflite/delegates/gpu/common/model_builder.cc of LiteRT (the IsSupported of each parser, then
GetOpsToReplace); OpenGL's own limits from tflite/delegates/gpu/gl. An operation that passes the checks and that
OpenGL has no shader for makes the delegate give up on the whole file. Never run here: there is no phone.
"""

from __future__ import annotations

from mobile_bench.xray.gpu_rules import BINARY, COMPARISONS, INSTEAD, UNARY, compatible, first, names, refusal, version
from mobile_bench.xray.rules import Node, Rule, Verdict

FILE = "tflite/delegates/gpu/common/model_builder.cc"
_REGISTRY = "tflite/delegates/gpu/gl/kernels/registry.cc"
_NOT_HERE = names(
    "ATAN2 CEIL ROUND LOGICAL_NOT LOGICAL_OR RIGHT_SHIFT STABLEHLO_REMAINDER STABLEHLO_SHIFT_LEFT REDUCE_ANY "
    "REDUCE_ALL REVERSE_V2 TOPK_V2"
)
_CUSTOM = names("Convolution2DTransposeBias MaxPoolingWithArgmax2D MaxUnpooling2D Resampler")
_LOGICAL = COMPARISONS | {"LOGICAL_AND"}
#: What OpenGL's registry has no shader for, of the operations that pass the checks.
_NO_SHADER = _LOGICAL | names(
    "BATCH_MATMUL CAST CUMSUM GATHER ONE_HOT REDUCE_MAX REDUCE_MIN REDUCE_PROD SUM SELECT SELECT_V2 SIGN SPLIT SPLIT_V "
    "TRANSPOSE UNPACK"
)


def objection(node: Node) -> Verdict | None:
    """What the delegate's checks have against this operation, None where it passes them."""
    name = node.operator.custom_code if node.op == "CUSTOM" else node.op
    if node.op not in _RULES and not (node.op == "CUSTOM" and name in _CUSTOM):
        no = refusal("NewOperationParser", FILE)
        return no(f"the GPU delegate has no {name}", INSTEAD.get(node.op, ""))
    rules = (*_RULES.get(node.op, ()), _types)
    return first(node, rules)


def _types(node: Node) -> Verdict | None:
    given = {"float32", "float16", "int8", "uint8"}
    made = set(given)
    if node.op in _LOGICAL:
        made |= {"bool"}
    if node.op == "CAST":
        given, made = given | {"bool", "int32"}, made | {"bool", "int32"}
    if node.op in ("ONE_HOT", "GATHER"):
        given |= {"int32"}
    if node.op in ("SELECT", "SELECT_V2", "LOGICAL_AND"):
        given |= {"bool"}
    no = refusal("IsAllAllowedTensors", FILE)
    for tensor in (*node.inputs, *node.outputs):
        if tensor is not None and len(tensor.shape) > 4:
            return no(
                f"a tensor has {len(tensor.shape)} dimensions, and at most 4 are taken", "Merge dimensions before it"
            )
    for tensors, allowed in ((node.activations, given), (node.outputs, made)):
        for tensor in tensors:
            if not tensor.is_variable and tensor.dtype not in allowed:
                fix = "Compute it in float32" if tensor.dtype != "int16" else "Convert with the scheme int8 or float16"
                return no(f"a tensor is {tensor.dtype}, and {node.op} takes {', '.join(sorted(allowed))}", fix)
    return None


def _logical(node: Node) -> Verdict | None:
    """A comparison must feed exactly one CAST or SELECT, of float."""
    no = refusal("ElementwiseOperationParser::IsSupported", FILE)
    users = [o for o in node.graph.operators if node.operator.outputs[0] in o.inputs]
    if len(users) != 1:
        return no(f"{len(users)} operations use what it gives, and exactly 1 must", "Compare once for each use")
    dtype = node.graph.tensors[users[0].outputs[0]].dtype
    if users[0].op in ("CAST", "SELECT", "SELECT_V2") and dtype in ("float16", "float32"):
        return None
    return no(f"{users[0].op} uses what it gives, and CAST or SELECT to float must", "Cast it to float32 at once")


def _cast(node: Node) -> Verdict | None:
    no, source, target = refusal("CastOperationParser::IsSupported", FILE), node.input(0), node.outputs[0]
    floats = ("float16", "float32")
    if source.dtype == "bool" and target.dtype in floats:
        users = [o for o in node.graph.operators if source.index in o.inputs]
        used = [o for o in node.graph.operators if target.index in o.inputs]
        if not any(source.index in o.outputs for o in node.graph.operators) or len(users) != 1:
            return no("its booleans do not come from one operation for it alone", "Compare right before it")
        return None if len(used) == 1 else no("what it makes of booleans is an output, or used more than once")
    pairs = (source.dtype in floats and target.dtype == "bool", {source.dtype, target.dtype} <= {"float32", "int32"})
    return None if any(pairs) else no(f"it goes from {source.dtype} to {target.dtype}", "Cast to float32 or int32")


def _two_dimensions(node: Node) -> Verdict | None:
    shape = next((t.shape for t in node.inputs[1:] if t in node.activations and len(t.shape) == 2), None)
    no = refusal("CheckSelectV2GpuDelegateCompatibility")
    return no(f"it chooses from a computed tensor of {shape}", "Reshape to 4 dimensions before it") if shape else None


def breaks_opengl(node: Node) -> Verdict | None:
    """OpenGL's own limits: why it gives up on a whole file that holds this operation."""
    if node.op in _NO_SHADER or node.op == "UNPACK":
        return refusal("Registry", _REGISTRY)(f"OpenGL has no shader for {node.op}", "Choose OpenCL, or replace it")
    no = refusal("GenerateCode", f"tflite/delegates/gpu/gl/kernels/{_KERNELS.get(node.op, 'registry')}.cc")
    if node.op == "MEAN":
        known = node.constant(1)
        axes = [] if known is None else sorted(int(axis) % 4 for axis in known.reshape(-1))
        if len(node.input(0).shape) != 4 or axes != [1, 2]:
            return no(f"it averages over the axes {axes}, and OpenGL over height and width only", "Choose OpenCL")
    if node.op in ("CONV_2D", "DEPTHWISE_CONV_2D") and len(node.activations) > 1:
        return no("its kernel is computed at run time", "Make the kernel a constant")
    if node.op == "CONV_2D" and node.input(1).shape[3] != node.input(0).shape[3]:
        groups = node.input(0).shape[3] // node.input(1).shape[3]
        return no(f"it has {groups} groups, and OpenGL takes 1", "Split it into convolutions of one group")
    if node.op in ("PAD", "PADV2", "MIRROR_PAD"):
        paddings = node.constant(1)
        if paddings is not None and paddings.shape[0] == 4 and paddings[0].any():
            return no("it pads the batch", "Pad height, width and channels only")
    if node.op == "ADD" and len(node.activations) == 2 and node.input(0).shape != node.input(1).shape:
        return no(f"it adds {node.input(0).shape} and {node.input(1).shape}", "Broadcast before it")
    return None


_KERNELS = {
    "MEAN": "mean", "CONV_2D": "conv", "DEPTHWISE_CONV_2D": "depthwise_conv", "PAD": "pad", "PADV2": "pad",
    "MIRROR_PAD": "pad", "ADD": "add",
}  # fmt: skip


def _table() -> dict[str, tuple[Rule, ...]]:
    shared = compatible(enhanced=False)
    versions = {
        "CONCATENATION": 2, "CONV_2D": 6, "CUMSUM": 1, "DENSIFY": 1, "DEPTHWISE_CONV_2D": 6, "DEQUANTIZE": 3, "MUL": 3,
        "ADD": 2, "ADD_N": 2, "FULLY_CONNECTED": 9, "GATHER": 1, "ONE_HOT": 1, "PRELU": 1, "PAD": 2, "PADV2": 2,
        "MIRROR_PAD": 2, "AVERAGE_POOL_2D": 2, "MAX_POOL_2D": 2, "QUANTIZE": 2, "RELU": 2, "RELU6": 2,
        "RELU_N1_TO_1": 2, "RELU_0_TO_1": 2, "LEAKY_RELU": 2, "RESHAPE": 1, "RESIZE_BILINEAR": 3,
        "RESIZE_NEAREST_NEIGHBOR": 3, "SELECT": 1, "SELECT_V2": 1, "SLICE": 2, "SOFTMAX": 2, "SPACE_TO_DEPTH": 2,
        "STRIDED_SLICE": 4, "TRANSPOSE_CONV": 3, "TRANSPOSE": 4, **dict.fromkeys((*UNARY, *BINARY), 2),
    }  # fmt: skip
    choice = (*shared["SELECT_V2"], _two_dimensions)
    own = {
        "CAST": (_cast,),
        "SELECT": choice,
        "SELECT_V2": choice,
        **dict.fromkeys(_LOGICAL, (_logical,)),
        "RELU_0_TO_1": (),
        "UNPACK": (),
        "LSTM": (),
    }
    return {
        op: (*((version(versions[op], FILE),) if op in versions else ()), *own.get(op, shared.get(op, ())))
        for op in {*shared, *own} - _NOT_HERE
    }


_RULES = _table()
