"""The CPU: which operations XNNPACK takes of a very file, as the runtime itself reports it.

The file is run once, in a child process, by ai-edge-litert with the delegate that it applies by default; what it
took is read from its own list of operations. Why it left the rest it does not say: mobile_bench.xray.cpu_rules does.
"""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from mobile_bench.errors import JobFailed, Problem
from mobile_bench.flatbuffer import TFLiteModel
from mobile_bench.jobs import run_job, serve
from mobile_bench.profile import layers_of
from mobile_bench.xray.cpu_rules import objection, why
from mobile_bench.xray.cpu_sparse import sparse_note
from mobile_bench.xray.report import OpVerdict, XrayReport, arena_bytes, weights_of
from mobile_bench.xray.rules import Node, nodes

RUNTIME = "ai-edge-litert"
#: Height and width that stand in where a file leaves them open.
OPEN_SIZE = 224
_TIMEOUT_S = 300
_ANSWERS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"}


def look(model: TFLiteModel, tflite: str | Path | bytes, *, backend: str, ask: bool) -> XrayReport:
    """Where each operation of the main graph runs on this machine's CPU.

    ask: also name the kernels by LiteRT's profiler. Raises ModelRefused where the runtime cannot load the file, by
    name of the operation that stops it, and JobFailed where it crashes on it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite" if isinstance(tflite, bytes) else Path(tflite).resolve()
        if isinstance(tflite, bytes):
            path.write_bytes(tflite)
        found = _run(path, Path(folder))
        kernels = _profiled(path) if ask else ""
    taken = set(found["taken"])
    every, layers = nodes(model), layers_of(model)
    ops = tuple(_verdict(node, node.operator.index in taken, layers[node.operator.index]) for node in every)
    mine = [node for node in every if node.operator.index in taken]
    notes = [_kernels_note(mine), kernels, sparse_note(every), found["note"]]
    notes.append(f"Seen on this machine ({platform.machine()}); a phone's build of the runtime may differ in version")
    if len(model.subgraphs) > 1:
        notes.append(f"Only the main graph of {len(model.subgraphs)} is shown")
    return XrayReport(
        "cpu", backend, ops, found["partitions"], weights_of(model, sorted(taken)), arena_bytes(model, notes),
        f"XNNPACK in {found['runtime']}", tuple(_disagreements(mine)), tuple(filter(None, notes)),
    )  # fmt: skip


def _run(path: Path, folder: Path) -> dict:
    try:
        return run_job("mobile_bench.xray.cpu", {"tflite": str(path)}, folder, timeout_s=_TIMEOUT_S)
    except JobFailed as failure:
        raise JobFailed(
            "The runtime failed on this file", received=f"{failure.what}: {failure.received}",
            next_step="Convert the model again; mobile-bench run would fail on it too",
        ) from failure  # fmt: skip


def _verdict(node: Node, taken: bool, layer: str) -> OpVerdict:
    name = node.operator.custom_code if node.op == "CUSTOM" else node.op
    if taken:
        return OpVerdict(node.operator.index, name, "delegate", layer=layer, said="delegate")
    against = why(node)
    return OpVerdict(
        node.operator.index, name, "cpu", against.reason, against.fix, against.source, layer=layer, said="cpu"
    )


def _disagreements(taken: Iterable[Node]) -> Iterable[str]:
    """Where XNNPACK took what our port of its checks would have refused: the runtime is the one that is right."""
    for node in taken:
        against = objection(node)
        if against:
            yield f"operation {node.operator.index} ({node.op}): XNNPACK took it, our rule says: {against.reason}"


def _kernels_note(taken: Iterable[Node]) -> str:
    """'Kernels: 5 float (f32), 1 dynamic-range (qd8)', of the operations with weights that XNNPACK took."""
    counts = Counter(kind for node in taken if (kind := kernel_kind(node)))
    return "Kernels: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) if counts else ""


def kernel_kind(node: Node) -> str:
    """XNNPACK's family of kernels for an operation with weights, by the types of its values; '' for any other."""
    if node.op not in _ANSWERS:
        return ""
    first, second = (2, 1) if node.op == "TRANSPOSE_CONV" else (0, 1)
    values, weights = node.input(first), node.input(second)
    if values is None or weights is None:
        return ""
    if values.dtype == "int8":
        return "int8 (qs8)"
    if values.dtype == "uint8":
        return "uint8 (qu8)"
    return "dynamic-range (qd8)" if weights.dtype in ("int8", "int4", "int2") else "dense float (f32)"


def _profiled(path: Path) -> str:
    from mobile_bench.profile import profile

    try:
        steps = profile(path, runs=1).ops
    except Problem as problem:
        return f"LiteRT's profiler gave no kernels: {problem.what}"
    counts = Counter(step.node_type for step in steps if step.delegate)
    return "By LiteRT's profiler: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())


def look_in_this_process(job: dict, emit: Callable[..., None]) -> dict:
    """The child's side. job: tflite. Gives taken (indices of operators), partitions, runtime and note."""
    import numpy as np

    from mobile_bench.delegates import split
    from mobile_bench.flatbuffer import read_model
    from mobile_bench.interpreter import load_runtime, refusal_of

    runtime = load_runtime(RUNTIME)
    path = Path(job["tflite"])
    count = len(read_model(path).main.operators)
    try:
        interpreter = runtime.interpreter(model_path=str(path), num_threads=1)
        note = _close(interpreter)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError, MemoryError) as error:
        raise refusal_of(error, path) from error
    listed = interpreter._get_ops_details()
    # split gives names in the file's order: an operation's number is as good a name.
    numbered = [{**details, "op_name": int(details["index"])} for details in listed]
    taken, _ = split(numbered[:count], numbered[count:])
    try:
        for details in interpreter.get_input_details():
            interpreter.set_tensor(details["index"], np.zeros(details["shape"], details["dtype"]))
        interpreter.invoke()
    except (ValueError, RuntimeError) as error:
        failed = f"It loads, but a first inference of zeros fails: {' '.join(str(error).split())[:200]}"
        note = f"{note}. {failed}" if note else failed
    return {"taken": list(taken), "partitions": len(listed) - count, "runtime": str(runtime), "note": note}


def _close(interpreter) -> str:
    """Give open heights and widths a size; what was chosen, as a note."""
    note = ""
    for details in interpreter.get_input_details():
        signature = [int(n) for n in details["shape_signature"]]
        if len(signature) == 4 and min(signature[1:]) < 0:
            shape = [1 if n < 0 else n for n in signature[:1]] + [OPEN_SIZE if n < 0 else n for n in signature[1:]]
            interpreter.resize_tensor_input(details["index"], shape)
            note = f"The file leaves its input's size open: looked at with {tuple(shape)}"
    return note


if __name__ == "__main__":
    serve(look_in_this_process)
