"""What LiteRT's WebGPU accelerator accepts and then computes wrongly, or dies of.

Nothing of it is written anywhere: each was found by running a file that isolates it, with the accelerator of
ai-edge-litert 2.3.0, and comparing its answers with the CPU's.
"""

from __future__ import annotations

import math

from mobile_bench.xray.gpu_rules import BINARY, bhwc, constant, counts_of
from mobile_bench.xray.rules import Node, Verdict

SEEN_IN = "ai-edge-litert 2.3.0"


def known_wrong(node: Node) -> str:
    """What the accelerator computes wrongly of this operation without saying so, '' where nothing is known."""
    wrong = _WRONG.get(node.op, _vector_of_integers)(node)
    return f"the GPU {wrong}, without an error (seen in {SEEN_IN})" if wrong else ""


def _seen(reason: str, fix: str) -> Verdict:
    return Verdict(reason, fix, f"seen with {SEEN_IN}")


def breaks(node: Node) -> Verdict | None:
    """Why the accelerator, which accepts this operation, then fails on the whole file or ends the process."""
    if node.op == "CONV_2D":
        groups, inside, outside = _groups(node)
        if groups > 1 and inside > 4 and (inside % 4 or outside % 4):
            return _seen(
                f"its {groups} groups of {inside} to {outside} channels end the process with an illegal instruction",
                "Make the channels of a group multiples of 4",
            )
    if node.op in ("SELECT", "SELECT_V2"):
        condition, made = bhwc(node.input(0).shape), bhwc(node.outputs[0].shape)
        if any(a not in (b, 1) for a, b in zip(condition, made)):
            return _seen(
                f"its condition of {node.input(0).shape} for {node.outputs[0].shape} stops the compilation",
                "Give the condition as many dimensions as the output has",
            )
    if node.op == "SPLIT" and node.options["num_splits"] == 1:
        return _seen("a split in 1 part ends the process", "Leave it out")
    return None


def _groups(node: Node) -> tuple[int, int, int]:
    """The groups of a CONV_2D, and the channels that each takes and gives."""
    inside = node.input(1).shape[3]
    groups = max(node.input(0).shape[3] // inside, 1) if inside else 1
    return groups, inside, node.outputs[0].shape[3] // groups


def _wrong_convolution(node: Node) -> str:
    kernel, (groups, inside, outside) = node.input(1), _groups(node)
    narrow = kernel.scales and kernel.dtype in ("int8", "int4")
    strides = (node.options["stride_h"], node.options["stride_w"])
    if narrow and kernel.shape[1:3] == (1, 1) and strides != (1, 1):
        pool = "a MaxPooling2D of size 1 with the strides and a convolution without them are computed rightly"
        return f"ignores the strides {strides} of a 1x1 convolution with {kernel.dtype} weights ({pool})"
    if groups == 1:
        return ""
    if narrow and (kernel.shape[1:3] == (1, 1) or inside == 1):
        return f"ignores the {groups} groups of a convolution with {kernel.dtype} weights"
    odd = (inside % 4 or outside % 4) and (inside, outside) != (1, 1)
    return (
        f"computes {groups} groups of {inside} to {outside} channels wrongly, which are no multiples of 4"
        if odd
        else ""
    )


def _wrong_sum(node: Node) -> str:
    which = [name for name in ("reverse", "exclusive") if node.options[name]]
    return f"ignores {' and '.join(which)}" if which else ""


def _wrong_padding(node: Node) -> str:
    paddings = node.constant(1)
    return "leaves out the padding of the batch" if paddings is not None and paddings[0].any() else ""


def _vector_of_integers(node: Node) -> str:
    if node.op not in (*BINARY, "ADD", "MUL") or counts_of(node)[0] != 1:
        return ""
    fixed = next(tensor for tensor in node.inputs if constant(tensor))
    many = fixed.dtype == "int32" and math.prod(fixed.shape) > 1
    return "has no shader for an int32 constant of more than one value, and gives anything" if many else ""


_WRONG = {
    "CONV_2D": _wrong_convolution, "CUMSUM": _wrong_sum, "PAD": _wrong_padding, "PADV2": _wrong_padding,
    "MIRROR_PAD": _wrong_padding,
}  # fmt: skip
