"""What makes the Edge TPU's compiler end without compiling anything, whatever the single operations are."""

from __future__ import annotations

from mobile_bench.flatbuffer import TFLiteModel
from mobile_bench.tflite_ops import BUILTINS
from mobile_bench.xray.edgetpu_rules import INSTEAD, ISSUES, REQUIREMENTS, SIZES, Objection, no
from mobile_bench.xray.rules import Node, nodes

#: Not a status of one operation: the compiler prints no table.
REFUSED = "The compiler refuses the whole file"
#: The newest version that compiler 16 reads, from what it said of the next one.
_VERSIONS = {
    "CONV_2D": (5, f"{ISSUES}631"),
    "EXP": (1, "https://github.com/google-coral/libedgetpu/issues/71"),
    "FULLY_CONNECTED": (9, "tensorflow/lite/kernels/register.cc of TensorFlow 2.5 (from memory)"),
    "QUANTIZE": (2, f"{ISSUES}879"),
    "TRANSPOSE_CONV": (3, f"{ISSUES}845"),
}
#: 'Op builtin_code out of range: 150' is GELU; which of those before it are read is not known.
_FIRST_UNREAD = BUILTINS.index("GELU")


def refusal(model: TFLiteModel) -> Objection | None:
    """Why the compiler ends without compiling anything; None where it takes the file."""
    for node in nodes(model):
        found = _unreadable(node) or _unsized(node)
        if found:
            return found
    for index in model.main.inputs:
        tensor = model.main.tensors[index] if index >= 0 else None
        if tensor is not None and any(n < 0 for n in tensor.shape_signature[1:]):
            return no(
                REFUSED, f"its input {tensor.name!r} leaves its size open {tensor.shape_signature}",
                "Convert the model with a fixed input size", REQUIREMENTS,
            )  # fmt: skip
    return None


def _unreadable(node: Node) -> Objection | None:
    newest, source = _VERSIONS.get(node.op, (node.operator.version, ""))
    fix = "Convert with an older TensorFlow: the compiler is from 2021 and reads what TensorFlow 2.5 wrote"
    if node.operator.version > newest:
        found = f"{node.op} is of version {node.operator.version}, and it reads up to {newest}"
        return no(REFUSED, found, fix, source)
    number = BUILTINS.index(node.op) if node.op in BUILTINS else len(BUILTINS)
    if number >= _FIRST_UNREAD:
        return no(REFUSED, f"it cannot read {node.op}", INSTEAD.get(node.op, fix), f"{ISSUES}667")
    return None


def _unsized(node: Node) -> Objection | None:
    """A tensor that gets its size only at run time: TFLite then gives no operation of the file to a delegate."""
    given = (node.input(place) for place in SIZES.get(node.op, ()))
    asked = {tensor.index for tensor in given if tensor is not None and not tensor.constant_bytes}
    computed = asked and (
        asked & set(node.graph.inputs) or any(asked & set(operator.outputs) for operator in node.graph.operators)
    )
    if not computed and node.op not in ("WHERE", "UNIQUE"):
        return None
    return no(
        REFUSED, f"what {node.op} (operation {node.operator.index}) gives gets its size only at run time",
        "Give the model a fixed batch before converting, keras.Input(…, batch_size=1): its shapes are then constants",
        f"{ISSUES}829; model requirements: {REQUIREMENTS}",
    )  # fmt: skip
