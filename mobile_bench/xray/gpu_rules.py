"""What the GPU delegates of LiteRT have against an operation: the checks that all of them share.

Ported from CheckGpuDelegateCompatibility in tflite/tools/versioning/gpu_compatibility.cc. Each delegate's own
checks are in gpu_webgpu.py (ML Drift) and gpu_classic.py (OpenCL, OpenGL). A rule looks at one operation as the
delegate sees it: the weights behind a DEQUANTIZE of float16 constants are constants of the operation itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mobile_bench.flatbuffer import TensorInfo
from mobile_bench.xray.rules import Node, Rule, Verdict


def names(text: str) -> frozenset[str]:
    """Names between spaces."""
    return frozenset(text.split())


COMPATIBILITY = "tflite/tools/versioning/gpu_compatibility.cc"
ACTIVATIONS = ("NONE", "RELU", "RELU_N1_TO_1", "RELU6", "TANH")
UNARY = names("ABS CEIL COS ELU EXP FLOOR GELU LOG LOGICAL_NOT LOGISTIC NEG ROUND RSQRT SIGN SIN SQRT SQUARE TANH")
BINARY = names(
    "ATAN2 DIV EQUAL FLOOR_DIV FLOOR_MOD GREATER GREATER_EQUAL LOGICAL_AND LOGICAL_OR LESS LESS_EQUAL MAXIMUM "
    "MINIMUM NOT_EQUAL POW RIGHT_SHIFT STABLEHLO_REMAINDER STABLEHLO_SHIFT_LEFT SQUARED_DIFFERENCE SUB"
)
REDUCTIONS = names("SUM MEAN REDUCE_MAX REDUCE_MIN REDUCE_PROD REDUCE_ANY REDUCE_ALL")
COMPARISONS = names("GREATER GREATER_EQUAL LESS LESS_EQUAL EQUAL NOT_EQUAL")
#: What to write instead of an operation that a GPU has not, or not in this form.
INSTEAD = {
    "SQUEEZE": "Write it as a reshape to the same shape (keras.layers.Reshape)",
    "EXPAND_DIMS": "Write it as a reshape to the same shape (keras.layers.Reshape)",
    "SHAPE": "Convert with a fixed batch of 1, and shapes become constants",
    "LOG_SOFTMAX": "End the model with a softmax, or with the logits, and take the logarithm on the CPU",
    "L2_NORMALIZATION": "Write it as x * rsqrt(sum(x * x, axis=-1, keepdims=True))",
    "ARG_MIN": "Take the arg max of -x",
    "RELU_0_TO_1": "Write it as minimum(maximum(x, 0), 1)",
    "BROADCAST_TO": "Leave the broadcast to the operation that follows",
    "GATHER_ND": "Gather along one axis (GATHER)",
    "CONV_3D": "Split it into 2-D convolutions",
    "FILL": "Store the constant in the model",
}

#: How to get an older version of an operation.
_OLDER = {
    "FULLY_CONNECTED": "Quantize dense layers per tensor (the converter's option "
    "_experimental_disable_per_channel_quantization_for_dense_layers), or convert in float16 or int8"
}


def refusal(function: str, file: str = COMPATIBILITY) -> Callable[..., Verdict]:
    """A maker of verdicts that all stand in one function: no('reason', 'fix')."""
    return lambda reason, fix="": Verdict(reason, fix, f"{file}, {function}")


def first(node: Node, rules: Sequence[Rule]) -> Verdict | None:
    """What the first objecting rule says. An operation that lacks what every rule expects is none of TFLite's."""
    try:
        return next((verdict for rule in rules if (verdict := rule(node)) is not None), None)
    except (AttributeError, IndexError, TypeError):
        return Verdict("it lacks an input or an output that TFLite demands", "Convert it again", COMPATIBILITY)


def constant(tensor: TensorInfo | None) -> bool:
    return tensor is not None and tensor.constant_bytes > 0


def counts_of(node: Node) -> tuple[int, int]:
    """How many inputs are given at run time, and how many are constants."""
    return len(node.activations), sum(constant(tensor) for tensor in node.inputs)


def bhwc(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A shape of up to 4 dimensions as a GPU lays it out: (2, 8) is (2, 1, 1, 8), (5,) is (5, 1, 1, 1)."""
    first, *rest = shape or (1,)
    return (first, *([1] * (3 - len(rest))), *rest) if len(rest) < 4 else (first, *rest[:3])


def version(most: int, file: str) -> Rule:
    no = refusal("CheckMaxSupportedOpVersion", file)

    def rule(node: Node) -> Verdict | None:
        found = node.operator.version
        if found <= most:
            return None
        fix = _OLDER.get(node.op, "Convert it with an older converter, or another scheme")
        return no(f"it is of version {found}, and the delegate takes versions up to {most}", fix)

    return rule


def inputs(*allowed: tuple[int, int | None], outputs: int | None = 1, function: str = "CheckInputsConstsOutputs",
           file: str = COMPATIBILITY) -> Rule:  # fmt: skip
    """Allowed numbers of (runtime inputs, constant inputs); None is any number."""
    no = refusal(function, file)
    wanted = " or ".join(
        f"{runtime} computed" + ("" if constants is None else f" and {constants} constant")
        for runtime, constants in allowed
    )

    def rule(node: Node) -> Verdict | None:
        runtime, constants = counts_of(node)
        if not any(runtime == r and c in (None, constants) for r, c in allowed):
            return no(
                f"it has {runtime} computed and {constants} constant inputs, and the delegate takes {wanted}",
                "Convert with a fixed batch of 1, so that what depends on shapes alone becomes a constant",
            )
        if outputs is not None and len(node.outputs) != outputs:
            return no(f"it has {len(node.outputs)} outputs, and the delegate takes {outputs}")
        return None

    return rule


def activation(node: Node) -> Verdict | None:
    fused = node.options.get("fused_activation_function", "NONE")
    if fused in ACTIVATIONS or fused == "5":  # 5 is the sigmoid, which the schema does not name
        return None
    return refusal("IsActivationSupported")(f"it fuses the activation {fused}", "Make the activation its own layer")


def strides(node: Node) -> Verdict | None:
    names = ("stride_h", "stride_w", "dilation_h_factor", "dilation_w_factor", "filter_height", "filter_width")
    wrong = next((name for name in names if node.options.get(name, 1) <= 0), "")
    return refusal("CheckStridesAndDilation")(f"its {wrong} is {node.options[wrong]}") if wrong else None


def int32_axes(node: Node) -> Verdict | None:
    axes = node.input(1)
    if axes is None or axes.dtype == "int32":
        return None
    return refusal("CheckAxesAreInt32Const")(f"its axes are {axes.dtype}, and int32 is needed", "Convert it again")


def block_size(node: Node) -> Verdict | None:
    size = node.options["block_size"]
    if size > 1:
        return None
    return refusal("CheckGpuDelegateCompatibility")(f"its block_size is {size}, and more than 1 is needed", "Remove it")


def broadcasts(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes broadcast as NumPy's do."""
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(one), reversed(other)))


def broadcast(enhanced: bool) -> Rule:
    """ADD and MUL of two tensors of unlike rank. enhanced: any that NumPy could do, else three cases."""
    no = refusal("CheckAddMulBroadcastCompatibility")

    def rule(node: Node) -> Verdict | None:
        if len(node.inputs) != 2 or None in node.inputs:
            return refusal("CheckGpuDelegateCompatibility")(f"it has {len(node.inputs)} inputs, and 2 are needed")
        shorter, longer = sorted((tensor.shape for tensor in node.inputs), key=len)
        if len(shorter) == len(longer) or len(shorter) < 2:
            return None
        able = broadcasts(longer, shorter) if enhanced else _three_cases(longer, shorter)
        shapes = " and ".join(str(tensor.shape) for tensor in node.inputs)
        return None if able else no(f"it broadcasts {shapes}", "Reshape the smaller one to 4 dimensions before it")

    return rule


def _three_cases(longer: Sequence[int], shorter: Sequence[int]) -> bool:
    if len(longer) != 4:
        return False
    if len(shorter) == 3:
        return longer[0] == 1
    if len(shorter) == 2:
        return (longer[0] == 1 and tuple(shorter) == (1, 1)) or (longer[0], longer[3]) == tuple(shorter)
    return False


def _four_dimensions(node: Node) -> Verdict | None:
    """What TFLite itself asks of a CONV_2D; the rules that follow rely on it."""
    no, shapes = refusal("Prepare", "tflite/kernels/conv.cc"), [t.shape for t in (*node.inputs[:2], node.outputs[0])]
    if len(shapes) < 3 or any(len(shape) != 4 for shape in shapes) or 0 in shapes[1]:
        return no(f"its input, kernel and output are {', '.join(map(str, shapes))}, and 4 dimensions are needed")
    return None


def _depthwise(node: Node) -> Verdict | None:
    no = refusal("CheckDepthwiseConvGpuDelegateCompatibility")
    given, kernel, bias, made = node.input(0), node.input(1), node.input(2), node.outputs[0]
    for name, tensor in (("input", given), ("filter", kernel), ("output", made)):
        if len(tensor.shape) != 4:
            return no(f"its {name} has {len(tensor.shape)} dimensions, and 4 are needed")
    if given.shape[0] != made.shape[0]:
        return no(f"its batch goes from {given.shape[0]} to {made.shape[0]}")
    if kernel.shape[3] != made.shape[3]:
        return no(f"its filter makes {kernel.shape[3]} channels and its output has {made.shape[3]}")
    if made.shape[3] != given.shape[3] * node.options["depth_multiplier"]:
        return no(f"its depth_multiplier {node.options['depth_multiplier']} does not lead to its output's channels")
    if bias is not None and math.prod(bias.shape) != made.shape[3]:
        return no(f"its bias has {math.prod(bias.shape)} values for {made.shape[3]} channels")
    return None


def _cumsum(node: Node) -> Verdict | None:
    given, axis = node.input(0), node.input(1)
    floats = given.dtype in ("float32", "float16") and node.outputs[0].dtype == given.dtype
    if len(node.inputs) == 2 and floats and axis.dtype == "int32" and constant(axis):
        return None
    return refusal("CheckCumsumGpuDelegateCompatibility")(
        f"it sums {given.dtype} along an axis that is {axis.dtype}, and float values and a constant int32 are needed"
    )


def _keep_dims(node: Node) -> Verdict | None:
    no = refusal("CheckGpuDelegateCompatibility")
    if node.options["weights_format"] != "DEFAULT":
        return no(f"its weights are stored as {node.options['weights_format']}", "Convert it again")
    if len(node.activations) > 2:
        return no("its weights and its bias are computed at run time", "Make the bias a constant")
    if constant(node.input(0)):
        return no("its input is a constant")
    if node.options["keep_num_dims"] and len(node.input(0).shape) != len(node.outputs[0].shape):
        return no("it keeps the number of dimensions, and its output has another", "Reshape before it")
    return None


def _indices(node: Node) -> Verdict | None:
    no, given = refusal("CheckGpuDelegateCompatibility"), node.input(1)
    if len(given.shape) != 1:
        return no(f"its indices have {len(given.shape)} dimensions, and 1 is needed", "Flatten the indices")
    return None if given.dtype == "int32" else no(f"its indices are {given.dtype}, and int32 is needed", "Cast them")


def _select(node: Node) -> Verdict | None:
    no = refusal("CheckSelectV2GpuDelegateCompatibility")
    if len(node.inputs) != 3 or len(node.outputs) != 1:
        return no(f"it has {len(node.inputs)} inputs, and 3 are needed")
    condition, made = node.input(0), node.outputs[0].shape
    if condition.dtype not in ("bool", "float16", "float32"):
        return no(f"its condition is {condition.dtype}, and bool or float is needed", "Compare with 0 first")
    if len(condition.shape) > len(made) or any(a not in (b, 1) for a, b in zip(condition.shape[::-1], made[::-1])):
        return no(f"its condition of {condition.shape} does not broadcast to {made}")
    for tensor in node.inputs[1:]:
        shape = tensor.shape
        if shape and shape != made and (len(shape) > 1 or shape[0] > 1):
            return no(f"it chooses from a tensor of {shape} for an output of {made}", "Broadcast it before")
    return None


def softmax_beta(node: Node) -> Verdict | None:
    beta = node.options["beta"]
    if beta == 1:
        return None
    return refusal("CheckGpuDelegateCompatibility")(
        f"its beta is {beta:g}, and 1 is needed", "Scale the logits before it"
    )


def corners(node: Node) -> Verdict | None:
    if not (node.options["align_corners"] and node.options["half_pixel_centers"]):
        return None
    return refusal("CheckGpuDelegateCompatibility")("it has both align_corners and half_pixel_centers", "Drop one")


def _paddings(node: Node) -> Verdict | None:
    no = refusal("CheckGpuDelegateCompatibility")
    if node.op == "MIRROR_PAD" and node.options["mode"] != "REFLECT":
        return no(f"its mode is {node.options['mode']}, and only REFLECT is taken", "Use the mode 'reflect'")
    shape = node.input(1).shape
    if shape not in ((3, 2), (4, 2)):
        return no(f"it pads a tensor of {shape[0]} dimensions, and 3 or 4 are needed", "Reshape before it")
    return None


def masks(file: str = COMPATIBILITY, function: str = "CheckGpuDelegateCompatibility") -> Rule:
    """STRIDED_SLICE: no ellipsis, new axis or dropped axis."""
    no = refusal(function, file)

    def rule(node: Node) -> Verdict | None:
        for name in ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask"):
            if node.options[name]:
                fix = (
                    "Slice with 0:1 instead of the index 0, and reshape after it"
                    if name[0] == "s"
                    else "Write the slice out"
                )
                return no(f"it has a {name} of {node.options[name]}", fix)
        return None if len(node.inputs) >= 4 else no(f"it has {len(node.inputs)} inputs, and 4 are needed")

    return rule


def ranks(*allowed: int) -> Rule:
    def rule(node: Node) -> Verdict | None:
        found = len(node.input(0).shape)
        if found in allowed:
            return None
        wanted = " or ".join(map(str, allowed))
        return refusal("CheckGpuDelegateCompatibility")(
            f"its input has {found} dimensions, and {wanted} are needed", "Reshape before it"
        )

    return rule


def _one_hot(node: Node) -> Verdict | None:
    no = refusal("CheckOneHotGpuDelegateCompatibility")
    shape, axis, ends = node.input(0).shape, node.options["axis"], node.inputs[2:4]
    if node.input(0).dtype != "int32" or (axis != -1 and (not shape or axis != shape[-1])):
        return no(f"its indices are {node.input(0).dtype} and its axis is {axis}; int32 and -1 are needed")
    if any(n != 1 for n in shape[(len(shape) > 3) : -1]):
        return no(f"its indices have the shape {shape}", "Reshape to (batch, 1, 1, 1)")
    if any(t.dtype != "float32" or not constant(t) or math.prod(t.shape) > 1 for t in ends):
        return no("its on and off values are no constant float32 scalars")
    return None


def compatible(enhanced: bool) -> Mapping[str, tuple[Rule, ...]]:
    """The shared checks of each operation. enhanced: whether ADD and MUL broadcast as NumPy does."""
    one, convolution = inputs((1, None)), inputs((1, None), (2, None), function="CheckConvolutionInputOutput")
    table = {
        "ADD": (broadcast(enhanced),), "ADD_N": (), "MUL": (broadcast(enhanced), activation),
        "AVERAGE_POOL_2D": (one, strides, activation), "MAX_POOL_2D": (one, strides, activation),
        "BATCH_MATMUL": (inputs((0, None), (1, None), (2, None)),), "CAST": (one,), "CONCATENATION": (),
        "CONV_2D": (convolution, strides, activation, _four_dimensions), "CUMSUM": (_cumsum,),
        "DENSIFY": (inputs((0, None)),), "DEPTHWISE_CONV_2D": (convolution, strides, activation, _depthwise),
        "DEPTH_TO_SPACE": (one, block_size), "SPACE_TO_DEPTH": (one, block_size),
        "DEQUANTIZE": (_no_int16,), "FULLY_CONNECTED": (_keep_dims,),
        "GATHER": (inputs((2, 0), (1, 1)), _indices), "HARD_SWISH": (one,), "ONE_HOT": (_one_hot,),
        "PACK": (), "QUANTIZE": (one,), "RELU": (), "RELU6": (), "RELU_N1_TO_1": (), "LEAKY_RELU": (), "PRELU": (),
        "RESHAPE": (one,), "RESIZE_BILINEAR": (one, corners), "RESIZE_NEAREST_NEIGHBOR": (one,),
        "REVERSE_V2": (inputs((1, 1)), int32_axes), "SELECT": (_select,), "SELECT_V2": (_select,),
        "SLICE": (ranks(3, 4),), "SOFTMAX": (softmax_beta,), "SPLIT": (), "SPLIT_V": (),
        "STRIDED_SLICE": (masks(), ranks(3, 4)), "TILE": (one,), "TOPK_V2": (inputs((1, None), outputs=2),),
        "TRANSPOSE": (one,), "TRANSPOSE_CONV": (convolution, strides),
        **dict.fromkeys(("PAD", "PADV2", "MIRROR_PAD"), (one, _paddings)),
        **dict.fromkeys(REDUCTIONS, (inputs((1, 1)), int32_axes)),
        **dict.fromkeys(UNARY, (inputs((1, 0)),)),
        **dict.fromkeys(BINARY, (inputs((2, 0), (1, 1)), activation)),
    }  # fmt: skip
    return table


def _no_int16(node: Node) -> Verdict | None:
    if node.input(0).dtype != "int16":
        return None
    return refusal("CheckGpuDelegateCompatibility")("it unpacks int16", "Convert with the scheme int8 or float16")


#: Inputs that must be known before the first inference, or the output's size is open: the inputs' numbers.
_SIZES = {
    "RESHAPE": (1,), "FILL": (0,), "RANGE": (0, 1, 2), "TILE": (1,), "PAD": (1,), "PADV2": (1,), "MIRROR_PAD": (1,),
    "RESIZE_BILINEAR": (1,), "RESIZE_NEAREST_NEIGHBOR": (1,), "BROADCAST_TO": (1,), "TOPK_V2": (1,), "SLICE": (1, 2),
    "STRIDED_SLICE": (1, 2, 3), "ARG_MAX": (1,), "ARG_MIN": (1,), "ONE_HOT": (1,), "TRANSPOSE": (1,), "SPLIT": (0,),
    "EXPAND_DIMS": (1,), "SPLIT_V": (1, 2), "TRANSPOSE_CONV": (0,), "SPACE_TO_BATCH_ND": (1, 2), "SCATTER_ND": (2,),
    "BATCH_TO_SPACE_ND": (1, 2), **dict.fromkeys(REDUCTIONS, (1,)),
}  # fmt: skip
_ALWAYS_OPEN = names("WHERE UNIQUE IF WHILE NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SEGMENT_SUM")
#: What TFLite computes when it prepares a graph, where all that it needs is known then (SetTensorToPersistentRo).
_EARLY = REDUCTIONS | names("BROADCAST_ARGS CONCATENATION GATHER MUL RANGE RESHAPE STRIDED_SLICE TILE")


def open_sizes(every: Sequence[Node]) -> dict[int, Verdict]:
    """Why no delegate takes any of a file in which a size depends on values, for each operation; {} where none does."""
    known: set[int] = set()
    for node in every:
        given = node.operator.inputs
        settled = [tensor < 0 or constant(node.inputs[n]) or tensor in known for n, tensor in enumerate(given)]
        needed = [settled[n] for n in _SIZES.get(node.op, ()) if n < len(settled)]
        if node.op in _ALWAYS_OPEN or not all(needed):
            why = f"the file has tensors whose size is open until it runs, first what operation {node.operator.index} "
            fix = "Convert with a fixed batch of 1, and use a reshape to fixed sizes"
            verdict = Verdict(f"{why}({node.op}) gives", fix, "tflite/core/subgraph.cc, ModifyGraphWithDelegateImpl")
            return {other.operator.index: verdict for other in every}
        if node.op in ("SHAPE", "RANK") or (node.op in _EARLY and all(settled)):
            known.update(node.operator.outputs)
    return {}
