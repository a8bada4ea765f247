"""What the Edge TPU compiler leaves on the CPU, and why: Coral's documentation as rules (compiler 16, runtime 14).

DOC is the table that the rules follow. Two copies of it were at hand: a late one that ends with ResizeBilinear
(developer.axis.com, ARTPEC-7, supported ops) and an early one (dgist-datalab/Datalab_Intern, Edge_TPU) with the rest;
what stands in neither is marked 'from memory'. Where the table gives no figure, the rule is what published logs and
compiled twins (google-coral/test_data) show, and its source says so. A reason begins with the compiler's own words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mobile_bench.flatbuffer import TensorInfo, TFLiteModel
from mobile_bench.xray.rules import Node, Rule, Verdict, nodes

DOC = "https://coral.ai/docs/edgetpu/models-intro/#supported-operations"
REQUIREMENTS = "https://coral.ai/docs/edgetpu/models-intro/#model-requirements"
ISSUES = "https://github.com/google-coral/edgetpu/issues/"
_TWINS = "https://github.com/google-coral/test_data, "

#: The statuses in the compiler's table of operations; a mapped one has edgetpu_compiler.MAPPED.
SUBGRAPHS = "More than one subgraph is not supported"
VERSION = "Operation version not supported"
UNSPECIFIED = "Operation is otherwise supported, but not mapped due to some unspecified limitation"
TYPE = "Operation is working on an unsupported data type"
UNKNOWN = "Operation not supported"
RANK = "Tensor has unsupported rank (up to 3 innermost dimensions mapped)"

#: Softmax, last dimension. DOC says 16,000, but 16,384 are mapped (ricardodeazambuja/LibrEdgeTPU, *_128x128).
DOCUMENTED_CLASSES, MOST_CLASSES = 16_000, 16_384
#: Bytes of a resized image. Mapped were 0.5 MB (issue 31), left 5.0 MB (deeplab twins): the limit lies between them.
MOST_RESIZED_BYTES = 2 << 20
#: Values in one mean over height and width. Mapped were 8,192, left 32,768 (issue 461): the limit lies between them.
MOST_AVERAGED = 16_384
#: Bytes that a transpose reorders. Mapped were 82,944 (yolov8n at 192), left 112,896 (at 224) and 150,528 (issue 433).
MOST_TRANSPOSED_BYTES = 96 << 10
_8_BITS = ("int8", "uint8")
_INTEGERS = "Convert with the scheme int8: integer weights, activations, inputs and outputs"
_INDICES = (
    "Where it computes a shape, give the model a fixed batch before converting; leave other arithmetic on indices to "
    "the CPU, outside the model"
)


@dataclass(frozen=True)
class Objection(Verdict):
    """A Verdict with the compiler's status for it."""

    status: str = UNSPECIFIED


def no(status: str, found: str, fix: str, source: str) -> Objection:
    """An objection whose reason begins with the compiler's own words."""
    return Objection(f"{status}: {found}", fix, source, status)


def objection(node: Node) -> Objection | None:
    """Why the compiler leaves this operation whatever stands around it; None where it could map it.

    In the order in which the compiler seems to look: of its logs, TYPE stands at whatever gives something else than
    8-bit values (DEQUANTIZE, ARG_MIN, TFLite_Detection_PostProcess), even where the operation is not known.
    """
    rules = (_output_type, _known, _version, _input_type, *RULES.get(node.op, ()), _rank)
    return next((found for rule in rules if (found := rule(node)) is not None), None)


def is_quantized(model: TFLiteModel) -> bool:
    """Whether any operation gives quantized 8-bit values: without one the compiler says 'Model not quantized'."""
    return any(_held(tensor) for node in nodes(model) for tensor in node.outputs)


def _held(tensor: TensorInfo) -> bool:
    return tensor.dtype in _8_BITS and bool(tensor.scales)


def _called(tensor: TensorInfo) -> str:
    return tensor.dtype + (" without a scale" if tensor.dtype in _8_BITS and not tensor.scales else "")


def _values(node: Node) -> Iterable[TensorInfo]:
    """The inputs that change from inference to inference, but for sizes; an LSTM's own state is not ours to judge."""
    sizes = SIZES.get(node.op, ())
    given = (t for place, t in enumerate(node.inputs) if t is not None and place not in sizes and not t.constant_bytes)
    return (t for t in given if not t.is_variable and math.prod(t.shape) != 0)


def _name(node: Node) -> str:
    return node.operator.custom_code or node.op


def _output_type(node: Node) -> Objection | None:
    given = next(iter(node.outputs), None)
    if given is not None and _held(given):
        return None
    found = f"{_name(node)} gives {_called(given) if given else 'nothing'}, and the Edge TPU has 8-bit integers only"
    floats = given is None or given.dtype.startswith("float")
    return no(TYPE, found, _TYPE_FIXES.get(node.op, _INTEGERS if floats else _INDICES), REQUIREMENTS)


def _known(node: Node) -> Objection | None:
    if node.op in RULES:
        return None
    return no(UNKNOWN, f"{_name(node)} is not in Coral's table", INSTEAD.get(node.op, ""), DOC)


def _version(node: Node) -> Objection | None:
    newest, fix, source = _MAPPED_VERSIONS.get(node.op, (node.operator.version, "", ""))
    if node.operator.version <= newest:
        return None
    return no(VERSION, f"{node.op} is of version {node.operator.version}, and up to {newest} is mapped", fix, source)


def _input_type(node: Node) -> Objection | None:
    found = next((t for t in _values(node) if not _held(t)), None)
    if found is None:
        return None
    return no(UNSPECIFIED, f"{node.op} reads {_called(found)}", _TYPE_FIXES.get(node.op, _INTEGERS), REQUIREMENTS)


def _rank(node: Node) -> Objection | None:
    for tensor in (*_values(node), *node.outputs):
        if any(n > 1 for n in tensor.shape[:-3]):
            batch = len(tensor.shape) == 4
            fix = "Convert with a batch of 1" if batch else "Merge dimensions, or leave this to the CPU at the end"
            return no(RANK, f"a tensor of {node.op} has the shape {tensor.shape}", fix, REQUIREMENTS)
    return None


def _no_activation(node: Node) -> Objection | None:
    fused = node.options.get("fused_activation_function", "NONE")
    if fused == "NONE":
        return None
    return no(UNSPECIFIED, f"{node.op} fuses {fused}", "Move the activation before this layer", DOC)


def _same_dilation(node: Node) -> Objection | None:
    y, x = node.options.get("dilation_h_factor", 1), node.options.get("dilation_w_factor", 1)
    kernel = node.input(1)
    # Across a kernel that is one value wide it means nothing: 3 x 1 at 2 x 1 is mapped (fredriktegnell/edgetpu-tcn).
    if y == x or (kernel is not None and 1 in kernel.shape[1:3]):
        return None
    return no(UNSPECIFIED, f"its dilation is {y} x {x}", f"Use one dilation_rate for both, say {max(y, x)}", DOC)


def _constant_weights(*places: int) -> Rule:
    def rule(node: Node) -> Objection | None:
        if all(t is None or t.constant_bytes for place in places for t in (node.input(place),)):
            return None
        return no(UNSPECIFIED, "its weights are computed at run time", "Make them constants", REQUIREMENTS)

    return rule


def _zero_padding(node: Node) -> Objection | None:
    constants = [n for n, tensor in enumerate(node.inputs) if tensor is not None and tensor.constant_bytes]
    if not constants:
        return None
    stored, tensor = node.constant(constants[0]), node.input(constants[0])
    zero = tensor.zero_points[0] if tensor.zero_points else 0
    if len(node.operator.inputs) == 2 and stored is not None and (stored == zero).all():
        return None
    return no(
        UNSPECIFIED, "it appends a constant that is not zeros, or to more than one tensor",
        "Append constants outside the model, or zeros to one tensor only (ZeroPadding2D)", DOC,
    )  # fmt: skip


def _one_row(node: Node) -> Objection | None:
    if node.options.get("weights_format", "DEFAULT") != "DEFAULT":
        return no(UNSPECIFIED, f"its weights are {node.options['weights_format']}", "Convert again", DOC)
    shape = node.outputs[0].shape
    if math.prod(shape[:-1]) == 1:
        return None
    return no(
        UNSPECIFIED, f"its output {shape} has more than one row",
        "Use a convolution of size 1 in place of Dense on a sequence, or a batch of 1", DOC,
    )  # fmt: skip


def _axes(node: Node, place: int) -> tuple[int, ...] | None:
    """The axes in a constant input, counted from 0, of what the operation reads."""
    stored, read = node.constant(place), next(iter(_values(node)), None)
    if stored is None or read is None or stored.dtype.kind != "i":
        return None
    return tuple(int(axis) % max(len(read.shape), 1) for axis in stored.ravel())


def _not_batch(what: str, place: int, source: str = DOC) -> Rule:
    def rule(node: Node) -> Objection | None:
        if 0 not in (_axes(node, place) or ()) or node.options.get("num_splits") == 1:
            return None
        return no(UNSPECIFIED, f"it {what} the batch dimension", "Use another axis than 0", source)

    return rule


def _mean(node: Node) -> Objection | None:
    axes, read = _axes(node, 1), next(iter(_values(node)), None)
    if axes is None or read is None:
        return None
    last = len(read.shape) - 1
    if last in axes and read.shape[last] % 4:
        return no(
            UNSPECIFIED, f"it averages over {read.shape[last]} channels", "Use a multiple of 4 channels", DOC
        )  # fmt: skip
    count = math.prod(read.shape[axis] for axis in set(axes) if axis != last)
    if count > MOST_AVERAGED:
        return no(
            UNSPECIFIED, f"it averages {count:,} values at once", "Pool in two steps, AveragePooling2D first",
            f"{ISSUES}461 (seen, no figure is documented)",
        )  # fmt: skip
    return None


def _pack(node: Node) -> Objection | None:
    axis = node.options.get("axis", 0) % max(len(node.outputs[0].shape), 1)
    return None if axis else no(UNSPECIFIED, "it packs along the batch dimension", "Stack along another axis", DOC)


def _pad(node: Node) -> Objection | None:
    pads = node.constant(1)
    if pads is None or not pads.ravel()[:2].any():
        return None
    return no(UNSPECIFIED, "it pads the batch dimension", "Pad height and width only", DOC)


def _alpha(node: Node) -> Objection | None:
    alpha = node.input(1)
    if alpha is None or math.prod(alpha.shape[:-1]) == 1:
        return None
    return no(UNSPECIFIED, f"its alpha has the shape {alpha.shape}", "Set shared_axes=[1, 2] on the PReLU", DOC)


def _resize(node: Node) -> Objection | None:
    read, out = next(iter(_values(node)), None), node.outputs[0]
    size = math.prod(out.shape)
    if size > MOST_RESIZED_BYTES:
        return no(
            UNSPECIFIED, f"its output {out.shape} is {size / 1e6:.1f} MB, and large ones are left on the CPU",
            "Enlarge less inside the model, and the rest of the way on the CPU",
            f"{DOC} (size-dependent); the figure: {ISSUES}31 and {_TWINS}deeplab*",
        )  # fmt: skip
    spatial = read.shape[1:3] if read is not None else ()
    if node.op == "RESIZE_BILINEAR" and spatial == (1, 1) and out.shape[1:3] != (1, 1):
        return no(
            UNSPECIFIED, f"it enlarges one pixel to {out.shape[1]} x {out.shape[2]}",
            "Repeat the pixel instead (keras.ops.tile): Tile is mapped", f"{_TWINS}deeplabv3_mnv2_pascal_quant",
        )  # fmt: skip
    return None


def _softmax(node: Node) -> Objection | None:
    """DOC takes one row only, but version 16 maps more: yolov8n's (jveitchmichaelis/edgetpu-yolo, its logs)."""
    shape = node.outputs[0].shape
    if not shape or shape[-1] <= MOST_CLASSES:
        return None
    fix = "Give out the logits, or divide the classes among several heads"
    return no(UNSPECIFIED, f"it has {shape[-1]:,} classes, and {MOST_CLASSES:,} is the most", fix, DOC)


def _squeeze(node: Node) -> Objection | None:
    read = next(iter(_values(node)), None)
    if read is None:
        return None
    given = [axis % max(len(read.shape), 1) for axis in node.options.get("squeeze_dims", ())]
    dropped = given or [axis for axis, n in enumerate(read.shape) if n == 1]
    if all(math.prod(read.shape[:axis]) == 1 for axis in dropped):
        return None
    return no(
        UNSPECIFIED, f"it takes a dimension out of the middle of {read.shape}",
        "Squeeze leading dimensions only, or use Reshape", DOC,
    )  # fmt: skip


def _plain_slice(node: Node) -> Objection | None:
    strides = node.constant(3)
    if strides is not None and (strides != 1).any():
        found = f"its strides are {tuple(int(n) for n in strides.ravel())}"
        return no(UNSPECIFIED, found, "Take every value, or use a strided convolution or pooling", DOC)
    masks = [name for name in ("ellipsis_mask", "new_axis_mask") if node.options.get(name)]
    if masks:
        fix = "Write every axis out: x[:, 1:3, :, :], and Reshape for a new axis"
        return no(UNSPECIFIED, f"it uses {' and '.join(masks)}", fix, DOC)
    return None


def _transpose(node: Node) -> Objection | None:
    read, order = next(iter(_values(node)), None), node.constant(1)
    if read is None or order is None:
        return None
    size = math.prod(read.shape)
    moved = [axis for axis in order.ravel().tolist() if 0 <= axis < len(read.shape) and read.shape[axis] > 1]
    if moved == sorted(moved) or size <= MOST_TRANSPOSED_BYTES:
        return None
    return no(
        UNSPECIFIED, f"it reorders {size:,} values at once", "Keep channels last, or transpose smaller parts",
        f"{ISSUES}433, edward62740/EdgeTPU-MOT yolov8n and its twin (seen, no figure is documented)",
    )  # fmt: skip


_CONVOLUTION = (_same_dilation, _constant_weights(1, 2))
_PLAIN = (
    "ADD EXPAND_DIMS L2_NORMALIZATION LOGISTIC LSTM MAXIMUM MINIMUM MUL QUANTIZE RELU RELU6 RELU_N1_TO_1 RESHAPE RSQRT "
    "SLICE SPACE_TO_DEPTH SQUARED_DIFFERENCE SUB TANH UNIDIRECTIONAL_SEQUENCE_LSTM "
    "TILE"  # not in the table, yet mapped: deeplab_mobilenet_edgetpu_slim_cityscapes_quant and its twin
)
_MEMORY = f"{DOC} (from memory)"
#: What the compiler may map, and under which conditions.
RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(_PLAIN.split(), ()),
    "AVERAGE_POOL_2D": (_no_activation,),
    "MAX_POOL_2D": (_no_activation,),
    "CONCATENATION": (_no_activation, _zero_padding),
    "CONV_2D": _CONVOLUTION,
    "DEPTHWISE_CONV_2D": _CONVOLUTION,
    "FULLY_CONNECTED": (_constant_weights(1, 2), _one_row),
    "MEAN": (_not_batch("averages over", 1), _mean),
    "PACK": (_pack,),
    "PAD": (_pad,),
    "PRELU": (_alpha,),
    "REDUCE_MAX": (_not_batch("reduces", 1),),
    "REDUCE_MIN": (_not_batch("reduces", 1),),
    "RESIZE_BILINEAR": (_resize,),
    "RESIZE_NEAREST_NEIGHBOR": (_resize,),
    "SOFTMAX": (_softmax,),
    "SPLIT": (_not_batch("splits", 0, _MEMORY),),
    "SQUEEZE": (_squeeze,),
    "STRIDED_SLICE": (_plain_slice,),
    "SUM": (_not_batch("sums over", 1, _MEMORY),),
    "TRANSPOSE": (_transpose,),
    "TRANSPOSE_CONV": (_constant_weights(1, 3),),
}
#: The inputs that decide how large the output is.
SIZES = {
    **dict.fromkeys(("RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "PAD", "PADV2", "MIRROR_PAD"), (1,)),
    **dict.fromkeys(("TILE", "BROADCAST_TO", "EXPAND_DIMS", "TRANSPOSE", "TOPK_V2", "ARG_MAX", "ARG_MIN"), (1,)),
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ANY"), (1,)),
    **dict.fromkeys(("SLICE", "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"), (1, 2)),
    **dict.fromkeys(("SPLIT", "TRANSPOSE_CONV", "FILL"), (0,)),
    "STRIDED_SLICE": (1, 2, 3),
    "RANGE": (0, 1, 2),
}
#: The newest version that is mapped, where that is less than what is read.
_MAPPED_VERSIONS = {
    "ADD": (
        3, "Keep sums of 64-bit integers (top-k, box decoding) out of the model: they raise the version of every ADD",
        "edward62740/EdgeTPU-MOT yolov10n and its twin (seen: 2 is mapped, 4 is left)",
    ),
}  # fmt: skip
_IO = "Convert with integer inputs and outputs (inference_input_type and inference_output_type int8 or uint8)"
_TYPE_FIXES = {
    "ARG_MAX": "Give out the scores, and take the arg max on the CPU",
    "ARG_MIN": "Give out the scores, and take the arg min on the CPU",
    "CAST": "Feed integers, and convert outside the model",
    "CUSTOM": "Keep it as the last operation: it runs on the CPU, and nothing should follow it",
    "DEQUANTIZE": _IO,
    "QUANTIZE": _IO,
}
INSTEAD = {
    "ABS": "Use Maximum of x and -x, or train with ReLU",
    "BATCH_MATMUL": "Use a Dense or a convolution with constant weights",
    "BATCH_TO_SPACE_ND": "Use dilation_rate in the convolution, and convert with a TensorFlow that keeps it there",
    "BIDIRECTIONAL_SEQUENCE_LSTM": "Use a plain LSTM: only one direction is supported",
    "DEPTH_TO_SPACE": "Use Conv2DTranspose",
    "DIV": "Multiply by the reciprocal",
    "ELU": "Use ReLU, or PReLU with shared_axes=[1, 2]",
    "GATHER": "Use slices with fixed bounds",
    "GELU": "Use ReLU or ReLU6, and train again",
    "HARD_SWISH": "Write it as x * relu6(x + 3) / 6: Add, ReLU6 and Mul are supported",
    "LEAKY_RELU": "Use ReLU, or PReLU with shared_axes=[1, 2]",
    "NEG": "Use Sub from zero",
    "PADV2": "Pad with zeros",
    "POW": "Multiply x by itself",
    "SPACE_TO_BATCH_ND": "Use dilation_rate in the convolution, and convert with a TensorFlow that keeps it there",
    "SPLIT_V": "Split into equal parts",
    "SQUARE": "Multiply x by itself",
    "UNPACK": "Use slices with fixed bounds",
}
