"""The Edge TPU: what edgetpu_compiler would map of a file, as predicted from the file, and what it says where it is.

Without -a the compiler makes one piece for the Edge TPU: the first of TFLite's partitions. What is supported but
needs something that the CPU makes behind it stays on the CPU as well. Compiled twins in google-coral/test_data show
both: in movenet_single_pose_lightning_ptq operations 0 and 1 stay, 2 to 88 are mapped, and so are the branches from 100
and 106 on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mobile_bench.edgetpu_compiler import CUSTOM_OP, MAPPED, TOOL, Compiled, compile_model, find_compiler, left_on_cpu
from mobile_bench.errors import ModelRefused, Problem
from mobile_bench.flatbuffer import TFLiteModel, read_model
from mobile_bench.profile import layers_of
from mobile_bench.xray.edgetpu_refusal import refusal
from mobile_bench.xray.edgetpu_rules import (
    DOC,
    DOCUMENTED_CLASSES,
    SUBGRAPHS,
    Objection,
    is_quantized,
    objection,
)
from mobile_bench.xray.partition import partitions
from mobile_bench.xray.report import OpVerdict, XrayReport, arena_bytes, weights_of
from mobile_bench.xray.rules import Node, nodes

#: 8 MB in all, a part of which the executable takes: the compiler reports 6.9 to 7.9 MiB for parameters.
CACHE_BYTES = round(6.9 * 2**20)
_CACHE = "https://coral.ai/docs/edgetpu/compiler/#parameter-data-caching"
#: From this size on, in bytes, the table's 'might not be mapped for large tensor sizes' is worth a word.
_LARGE_BYTES = 2 << 20
_SIZE_DEPENDENT = ("RESHAPE", "CONCATENATION", "LOGISTIC")


def look(model: TFLiteModel, tflite: str | Path | bytes, *, backend: str, ask: bool) -> XrayReport:
    """Where each operation of the main graph would run after edgetpu_compiler (version 16, without -a).

    ask: also compile the file, where this machine has the compiler; what it says is set beside the prediction.
    A file that is compiled already is reported as it is.
    """
    every, notes = nodes(model), []
    if any(node.operator.custom_code == CUSTOM_OP for node in every):
        return _as_compiled(model, every, backend)
    refused = refusal(model)
    found = [objection(node) for node in every]
    pieces = () if refused else partitions(model.main, [verdict is None for verdict in found])
    mapped = set(pieces[0] if pieces else ())
    later = {} if refused else _later(every, found, mapped)
    found = [refused if verdict is None and refused else later.get(n, verdict) for n, verdict in enumerate(found)]
    asked, said, disagreements = ("", {}, ())
    if ask:
        asked, said, disagreements = _ask(model, tflite, found, notes)
    layers = layers_of(model)
    ops = tuple(_verdict(node, found[n], layers[n], said.get(n, "")) for n, node in enumerate(every))
    weights = weights_of(model, sorted(mapped))
    notes[:0] = _refusal_notes(model, refused) + list(
        filter(None, (_pieces_note(found), _memory_note(weights, mapped)))
    )
    notes += filter(None, (_doubt_note(every, mapped), _graphs_note(model)))
    arena = arena_bytes(model, notes)
    notes.append(f"Predicted from Coral's documentation for compiler 16 without -a, not compiled: {DOC}")
    return XrayReport(
        "edgetpu", backend, ops, int(bool(mapped)), weights, arena, asked, disagreements, tuple(notes),
    )  # fmt: skip


def _verdict(node: Node, found: Objection | None, layer: str, said: str) -> OpVerdict:
    name = node.operator.custom_code or node.op
    if found is None:
        return OpVerdict(node.operator.index, name, "delegate", layer=layer, said=said)
    return OpVerdict(node.operator.index, name, "cpu", found.reason, found.fix, found.source, layer=layer, said=said)


def _later(every: Sequence[Node], found: Sequence[Objection | None], mapped: set[int]) -> dict[int, Objection]:
    """Why supported operations are not in the first piece: what they wait for runs on the CPU, behind that piece."""
    before = _ancestors(every)
    piece = sum(1 << n for n in mapped)
    # What runs on the CPU in front of the piece stops nothing: the piece itself waits for it.
    waited = {n for n in range(len(every)) if any(before[m] >> n & 1 for m in mapped)}
    stops = [n for n, verdict in enumerate(found) if verdict is not None and n not in waited]
    later = {}
    for number, verdict in enumerate(found):
        if verdict is None and number not in mapped:
            mine = [n for n in stops if before[number] >> n & 1]
            stop = next((n for n in mine if before[n] & piece), mine[0] if mine else number)
            name = f"operation {stop} ({every[stop].operator.custom_code or every[stop].op})"
            later[number] = Objection(
                f"{SUBGRAPHS}: it needs what {name} makes on the CPU", f"Change {name}, or move it behind this one",
                "https://github.com/google-coral/edgetpu/issues/461", SUBGRAPHS,
            )  # fmt: skip
    return later


def _ancestors(every: Sequence[Node]) -> list[int]:
    """For each operation the ones it needs, directly or not: bit n stands for operation n."""
    makers: dict[int, int] = {}
    needed: list[int] = []
    for number, node in enumerate(every):
        places = {makers[tensor] for tensor in node.operator.inputs if tensor in makers}
        mask = 0
        for place in places:
            mask |= needed[place] | 1 << place
        needed.append(mask)
        makers.update(dict.fromkeys(node.operator.outputs, number))
    return needed


def _as_compiled(model: TFLiteModel, every: Sequence[Node], backend: str) -> XrayReport:
    layers, notes = layers_of(model), ["This file is compiled for the Edge TPU already: this is what its compiler did"]
    reason, fix = "the compiler left it on the CPU", "Look at the .tflite that this file was compiled from"
    ops = []
    for number, node in enumerate(every):
        name = node.operator.custom_code or node.op
        taken = name == CUSTOM_OP
        where = OpVerdict(number, name, "delegate", layer=layers[number], said="delegate")
        left = OpVerdict(number, name, "cpu", reason, fix, "this file", layers[number], "cpu")
        ops.append(where if taken else left)
    pieces = [op.index for op in ops if op.runs_on == "delegate"]
    arena = arena_bytes(model, notes)
    return XrayReport("edgetpu", backend, tuple(ops), len(pieces), weights_of(model, pieces), arena, notes=tuple(notes))


def _ask(
    model: TFLiteModel, tflite: str | Path | bytes, found: Sequence[Objection | None], notes: list[str]
) -> tuple[str, dict[int, str], tuple[str, ...]]:
    """(who was asked, what it says of each operation, where its word is not ours)."""
    if not find_compiler():
        notes.append(f"Nobody was asked: there is no {TOOL} on this machine (x86-64 Linux only)")
        return "", {}, ()
    try:
        compiled = compile_model(tflite)
    except ModelRefused as problem:
        notes.append(f"Asked: {problem}")
        mine = sum(verdict is None for verdict in found)
        against = (f"{TOOL} refuses the file ({problem.received}), ours maps {mine} operations",) if mine else ()
        return TOOL, dict.fromkeys(range(len(found)), "cpu"), against
    except Problem as problem:
        notes.append(f"{TOOL} gave no answer: {problem}")
        return "", {}, ()
    notes.append(_said_note(compiled))
    return f"{TOOL} {compiled.version}", _said(model, compiled), tuple(_differences(model, compiled, found))


def _said(model: TFLiteModel, compiled: Compiled) -> dict[int, str]:
    """Where the compiler put each operation; empty where its model cannot be set beside the file."""
    try:
        left = left_on_cpu(model, read_model(compiled.content))
    except Problem:
        left = None
    count = len(model.main.operators)
    # Its table is the second witness: an operation whose tensors were renamed would be taken for mapped.
    if left is None or count - len(left) != compiled.mapped:
        return {}
    return {n: "cpu" if n in left else "delegate" for n in range(count)}


def _differences(model: TFLiteModel, compiled: Compiled, found: Sequence[Objection | None]):
    """Sentences on operations and statuses that the compiler counts otherwise than we do."""
    theirs: Counter = Counter()
    for row in compiled.table:
        theirs[row.op, row.status] += row.count
    ours = Counter(
        (operator.op, MAPPED if verdict is None else verdict.status)
        for operator, verdict in zip(model.main.operators, found)
    )
    for op, status in sorted(theirs.keys() | ours.keys()):
        if theirs[op, status] != ours[op, status]:
            yield f"{op}, '{status}': {TOOL} says {theirs[op, status]}, ours {ours[op, status]}"


def _said_note(compiled: Compiled) -> str:
    kept, streamed = compiled.on_chip_bytes, compiled.streamed_bytes
    memory = ""
    if kept is not None and streamed is not None:
        memory = f"; parameters: {_mib(kept)} kept on the chip, {_mib(streamed)} sent again for every inference"
    return f"{TOOL} {compiled.version}: {compiled.mapped} operations mapped, {compiled.left} left{memory}"


def _refusal_notes(model: TFLiteModel, refused: Objection | None) -> list[str]:
    notes = []
    if not is_quantized(model):
        notes.append(
            "Nothing in this file is quantized to 8 bits: edgetpu_compiler ends with 'Model not quantized'. Convert "
            "with the scheme int8 and calibration images"
        )
    if refused:
        notes.append(f"{refused.reason}: nothing runs on the Edge TPU. {refused.fix}")
    return notes


def _pieces_note(found: Sequence[Objection | None]) -> str:
    later = sum(verdict is not None and verdict.status == SUBGRAPHS for verdict in found)
    if not later:
        return ""
    return (
        f"{later} of the operations on the CPU are supported, but come behind one that is not: the Edge TPU gets one "
        "piece only"
    )


def _memory_note(weights: int, mapped: set[int]) -> str:
    if not mapped:
        return ""
    fits = "they should fit into its memory" if weights <= CACHE_BYTES else "a part of them is sent for every inference"
    return (
        f"Estimate: {_mib(weights)} of parameters for the Edge TPU, of whose 8 MB about {_mib(CACHE_BYTES)} hold them: "
        f"{fits} ({_CACHE})"
    )


def _doubt_note(every: Sequence[Node], mapped: set[int]) -> str:
    doubtful = [n for n in sorted(mapped) if _is_doubtful(every[n])]
    if not doubtful:
        return ""
    names = ", ".join(f"{n} ({every[n].op})" for n in doubtful[:5]) + (", …" if doubtful[5:] else "")
    return f"May stay on the CPU after all, for Coral's documentation promises less than the compiler has done: {names}"


def _is_doubtful(node: Node) -> bool:
    """Where the table is vaguer than our rules, or stricter than what the compiler has been seen to do."""
    shape = node.outputs[0].shape
    if node.op == "SOFTMAX":
        return math.prod(shape[:-1]) > 1 or math.prod(shape) > DOCUMENTED_CLASSES
    return node.op in _SIZE_DEPENDENT and math.prod(shape) > _LARGE_BYTES


def _graphs_note(model: TFLiteModel) -> str:
    return f"Only the main graph of {len(model.subgraphs)} is shown" if len(model.subgraphs) > 1 else ""


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
