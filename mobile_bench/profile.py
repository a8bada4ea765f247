"""What each operation of a .tflite costs, by the profiler inside the ai-edge-litert wheel.

`profile(path)` runs a file in a fresh process (`python -m mobile_bench.profile job.json`), first as it is and
then with LiteRT's profiler on, and reads the profiler's own table. Delegates give their own names for their
own operations; which layer of the Keras model each belongs to is worked out from the tensors' names,
and left empty where that would be a guess.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.errors import InputError, JobFailed, Problem
from mobile_bench.jobs import OnProgress, serve
from mobile_bench.records import Connection, Target

if TYPE_CHECKING:
    from mobile_bench.flatbuffer import TFLiteModel
    from mobile_bench.inputs import InputSpec

RUNTIME, DELEGATE = "ai-edge-litert", "XNNPACK"
_LOCAL = Target()
MOST_RUNS = 10_000
#: What XNNPACK calls the work of a TFLite operation; convolutions and dense layers are matched apart.
_XNNPACK_OPS = {
    "Add": "ADD", "Average Pooling": "AVERAGE_POOL_2D", "Batch Matrix Multiply": "BATCH_MATMUL",
    "Constant Pad": "PAD", "Deconvolution": "TRANSPOSE_CONV", "Divide": "DIV", "HardSwish": "HARD_SWISH",
    "Hardswish": "HARD_SWISH", "Leaky ReLU": "LEAKY_RELU", "Max Pooling": "MAX_POOL_2D", "Mean": "MEAN",
    "Multiply": "MUL", "PReLU": "PRELU", "Resize Bilinear": "RESIZE_BILINEAR", "Sigmoid": "LOGISTIC",
    "Softmax": "SOFTMAX", "Subtract": "SUB", "Sum": "SUM", "Tanh": "TANH", "Transpose": "TRANSPOSE",
}  # fmt: skip
_MATRIX, _DEPTHWISE = ("CONV_2D", "FULLY_CONNECTED"), ("DEPTHWISE_CONV_2D",)
#: What ends a layer's path in a tensor's name, besides TensorFlow's own operations, which are capitalized.
_INSIDE = {"batchnorm", "moments", "while", "einsum", "strided_slice"}
_WEIGHTED = re.compile(r"(convolution|conv2d_transpose|depthwise|depthwise_Fold|Conv2D(_Fold)?|MatMul|[Ee]insum)\d*$")
_DEPTHWISE_OP = re.compile(r"DepthwiseConv2d(Native)?\d*$")
_TRAILING = re.compile(r"(Relu|BiasAdd|FusedBatchNorm|batchnorm|Elu|Selu|Softmax|Sigmoid|add_fold)")
_WRAPPER = re.compile(r"^(quant|prune_low_magnitude|cluster)_(?=.)")
_CALL = re.compile(r"^(Stateful)?PartitionedCall(_\d+)?(:\d+)?$")


@dataclass(frozen=True)
class OpTime:
    """One operation in the order they ran.

    name: the runtime's label, such as '[Delegate]:3'. avg_ms: per inference. share: of the sum of all
    operations. calls: in all runs. delegate: '' where the runtime's own kernel ran it. layer: the Keras
    layer, or '' where the file does not say for certain.
    """

    index: int
    node_type: str
    name: str
    avg_ms: float
    share: float
    calls: int
    delegate: str
    layer: str = ""


@dataclass(frozen=True)
class GroupTime:
    """Operations of one type or one layer together."""

    name: str
    count: int
    avg_ms: float
    share: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """What the operations of one file cost.

    total_ms: the sum over operations, per inference. profiled_median_ms, unprofiled_median_ms: of whole
    inferences by the clock in the same process, with the profiler on and without it.
    """

    ops: tuple[OpTime, ...]
    by_type: tuple[GroupTime, ...]
    by_layer: tuple[GroupTime, ...]
    total_ms: float
    profiled_median_ms: float
    unprofiled_median_ms: float
    runs: int
    threads: int
    runtime: str
    delegate_note: str
    layer_note: str


def profile(
    tflite: str | Path, target: Target = _LOCAL, *, connection: Connection | None = None, runs: int = 50,
    spec: InputSpec | None = None, seed: int = 0, on_progress: OnProgress | None = None, timeout_s: float = 900,
    wait_s: float = 3600,
) -> Profile:  # fmt: skip
    """Profile a file on a target's CPU, averaged over `runs` inferences on random input.

    By adb it is benchmark_model that profiles, with any of its accelerators. Raises InputError (no such file, no
    runtime that can), ModelRefused (not a .tflite, or LiteRT will not take it), JobFailed (the library crashed;
    only the child process ends) or TransportError.
    """
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.lock import one_at_a_time
    from mobile_bench.measure import check_can_run
    from mobile_bench.transports import transport_for

    if not isinstance(runs, int) or not 1 <= runs <= MOST_RUNS:
        raise InputError("runs is out of range", received=runs, allowed=f"1 to {MOST_RUNS}")
    check_can_run(target)
    if target.transport != "adb" and (target.accelerator != "cpu" or target.runtime not in ("auto", RUNTIME)):
        raise InputError(
            "Only the CPU is profiled, and only by ai-edge-litert", received=f"{target.accelerator}, {target.runtime}"
        )
    check_is_tflite(tflite)
    job = {
        "threads": target.threads, "runtime": RUNTIME, "runs": runs, "seed": seed,
        "spec": spec.to_dict() if spec else None,
    }  # fmt: skip
    transport = transport_for(target, connection)
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress), transport:
        found = transport.run(
            "mobile_bench.profile", job, files={"tflite": Path(tflite)}, on_progress=on_progress, timeout_s=timeout_s
        )
    ops = parse_summary(found["summary"], runs) if "summary" in found else _from_tool(found["ops"])
    ops, layer_note = _with_layers(ops, tflite)
    return Profile(
        ops, groups(ops, "node_type"), groups(ops, "layer"), sum(op.avg_ms for op in ops), found["profiled_median_ms"],
        found["unprofiled_median_ms"], runs, target.threads, found["runtime"], _delegate_note(ops, runs), layer_note,
    )  # fmt: skip


def profile_in_this_process(job: dict, emit: Callable[..., None]) -> dict:
    """The child's side. job: tflite, threads, runs, seed, spec (a dict or None)."""
    from mobile_bench import litert_c
    from mobile_bench.inputs import InputSpec
    from mobile_bench.interpreter import open_model
    from mobile_bench.worker import random_inputs, time_runs, warm_up

    library, version = litert_c.load()
    spec = InputSpec.from_dict(job["spec"]) if job["spec"] else None
    emit("progress", stage="load")
    # The legacy Interpreter says better what is wrong with a file, and what its inputs are.
    known = open_model(
        job["tflite"], job["threads"], RUNTIME, batch=1, size=(spec.height, spec.width) if spec else None
    )
    inputs, values = known.inputs, random_inputs(known, spec, job["seed"])
    del known
    medians, summary = {}, ""
    for profiling in (False, True):
        model = litert_c.CompiledModel(
            library, job["tflite"], inputs, values, threads=job["threads"], profiling=profiling
        )
        emit("progress", stage="warm-up")
        warm_up(model)
        emit("progress", stage="timing", runs=job["runs"])
        times: list[float] = []
        measure = lambda: times.extend(time_runs(model, job["runs"]))  # noqa: B023 - called before the next round
        if profiling:
            summary = model.profile(measure)
        else:
            measure()
        model.run()  # checks what the bare calls did not: that the model still runs
        medians[profiling] = statistics.median(times)
    return {
        "summary": summary,
        "unprofiled_median_ms": medians[False],
        "profiled_median_ms": medians[True],
        "runtime": f"{RUNTIME} {version}",
    }


def parse_summary(text: str, runs: int) -> tuple[OpTime, ...]:
    """The 'Run Order' table of LiteRT's profile summary.

    The table rounds times to a microsecond but shares to a thousandth of a percent, and gives the sum over
    all runs in whole microseconds: where they agree, share x sum is the better average.
    """
    lines = iter(text.splitlines())
    columns = next((_columns(line) for line in lines if "[avg ms]" in line.lower()), None)
    if not columns or not {"node type", "avg ms", "%", "times called", "name"} <= set(columns):
        raise JobFailed("LiteRT gave no table of operations that can be read", received=text[:300] or "nothing")
    # Types and names hold spaces; only the numbers between them do not.
    row = re.compile(r"^\s*(.+?)" + r"\s+(-?[\d.]+%?|-?nan%?|-?inf%?)" * (len(columns) - 2) + r"\s+(\S.*?)\s*$")
    rows = []
    for line in lines:
        match = row.match(line)
        if not match:
            break
        rows.append(dict(zip(columns, match.groups())))
    if not rows:
        raise JobFailed("LiteRT's profile names no operation", received=text[:300])
    rounded = [_number(found["avg ms"]) for found in rows]
    shares = [_number(found["%"]) / 100 for found in rows]
    whole = re.search(r"Timings \(microseconds\):.*?\bcurr=([\d.e+]+)", text)
    total_ms = float(whole[1]) / runs / 1000 if whole else 0.0
    if total_ms and abs(total_ms - sum(rounded)) <= 0.0006 * len(rows) + 0.02 * total_ms:
        times = [share * total_ms for share in shares]
    else:
        times = rounded
    total = sum(times)
    return tuple(
        OpTime(
            index, found["node type"].removeprefix("Delegate/"), found["name"], time,
            time / total if total else 0.0, int(_number(found["times called"])), DELEGATE if _delegated(found) else "",
        )
        for index, (found, time) in enumerate(zip(rows, times))
    )  # fmt: skip


def _from_tool(rows: list[dict]) -> tuple[OpTime, ...]:
    """The nodes of benchmark_model's own table."""
    total = sum(row["avg_ms"] for row in rows)
    return tuple(
        OpTime(
            index, row["node_type"].removeprefix("Delegate/"), row["name"], row["avg_ms"],
            row["avg_ms"] / total if total else 0.0, row["times_called"],
            DELEGATE if _delegated({"node type": row["node_type"], "name": row["name"]}) else "",
        )
        for index, row in enumerate(rows)
    )  # fmt: skip


def _columns(line: str) -> list[str]:
    return [name.strip().lower() for name in re.findall(r"\[([^\]]+)\]", line)]


def _number(text: str) -> float:
    value = float(text.rstrip("%"))
    return value if abs(value) < float("inf") else 0.0  # 'nan%': nothing took a whole microsecond


def _delegated(row: dict[str, str]) -> bool:
    return row["node type"].startswith("Delegate/") or row["name"].startswith("[Delegate]")


def groups(ops: Iterable[OpTime], field: str) -> tuple[GroupTime, ...]:
    """Operations added up by 'node_type' or 'layer', the dearest first."""
    found: dict[str, list[OpTime]] = {}
    for op in ops:
        found.setdefault(getattr(op, field), []).append(op)
    made = [
        GroupTime(name, len(of), sum(o.avg_ms for o in of), sum(o.share for o in of), sum(o.calls for o in of))
        for name, of in found.items()
    ]
    return tuple(sorted(made, key=lambda group: -group.avg_ms))


def _delegate_note(ops: Sequence[OpTime], runs: int) -> str:
    delegated = [op for op in ops if op.delegate]
    note = (
        f"{len(delegated)} of {len(ops)} steps ran in {DELEGATE}, {sum(op.share for op in delegated):.1%} of the time; "
        "the library counts whole microseconds, so shorter steps show less than they take"
    )
    seen = max(op.calls for op in ops)
    return note if seen >= runs else f"{note}; its memory held {seen} of {runs} runs"


def _with_layers(ops: tuple[OpTime, ...], tflite: str | Path) -> tuple[tuple[OpTime, ...], str]:
    from mobile_bench.flatbuffer import read_model

    try:
        model = read_model(tflite)
    except Problem as problem:
        return ops, f"no layers: the file's own names cannot be read ({problem.what})"
    places = match_operators(ops, [operator.op for operator in model.main.operators])
    layers = layers_of(model)
    ops = tuple(replace(op, layer="" if place is None else layers[place]) for op, place in zip(ops, places))
    known = sum(bool(op.layer) for op in ops)
    return ops, (
        f"{known} of {len(ops)} steps have a layer: the runtime's own kernels by their place in the file, "
        f"{DELEGATE}'s by order, where the file holds as many operations of that kind; the rest are left empty"
    )


def match_operators(ops: Sequence[OpTime], kinds: Sequence[str]) -> list[int | None]:
    """For each profiled operation, which of the file's it is; None where that is not certain.

    kinds: the file's operations in order, such as ['CONV_2D', 'SOFTMAX']. '[Builtin]:5' is the file's
    operation 5. A delegate says neither: the n-th of its operations of a kind is taken for the n-th
    such in the file, only where there are as many, each could be the other, and no order is broken.
    """
    places: list[int | None] = [None] * len(ops)
    for at, op in enumerate(ops):
        label = re.fullmatch(r"\[Builtin\]:(\d+)", op.name)
        if not op.delegate and label and int(label[1]) < len(kinds) and kinds[int(label[1])] == op.node_type:
            places[at] = int(label[1])
    taken = set(places)
    free = [place for place in range(len(kinds)) if place not in taken]
    nodes: dict[tuple[str, ...], list[int]] = {}
    for at, op in enumerate(ops):
        if op.delegate and (family := _family(op.node_type)):
            nodes.setdefault(family, []).append(at)
    for family, members in nodes.items():
        candidates = [place for place in free if kinds[place] in family]
        if len(candidates) == len(members) and all(
            _could_be(ops[at].node_type, kinds[place]) for at, place in zip(members, candidates)
        ):
            for at, place in zip(members, candidates):
                places[at] = place
    matched = [place for op, place in zip(ops, places) if op.delegate and place is not None]
    if matched != sorted(matched):
        return [None if op.delegate else place for op, place in zip(ops, places)]
    return places


def _family(node_type: str) -> tuple[str, ...]:
    """The kinds of TFLite operation that a delegate's operation may be; () for its own helpers."""
    work = node_type.split(" (")[0]
    if work == "Convolution":
        return _DEPTHWISE if node_type.endswith("DWConv") else _MATRIX
    if work == "Fully Connected":
        return _MATRIX  # a 1x1 convolution runs as one
    return (_XNNPACK_OPS[work],) if work in _XNNPACK_OPS else ()


def _could_be(node_type: str, kind: str) -> bool:
    return kind != "FULLY_CONNECTED" or node_type.startswith("Fully Connected")


def layers_of(model: TFLiteModel) -> list[str]:
    """The Keras layer of each operation of a file, '' where its tensors do not name one.

    The output's name says it; the model's last output is renamed by the converter, so there the weights'
    name does. Keras 3 adds '_1' to the model's and every layer's name on export: taken off where all have it.
    """
    tensors = model.main.tensors
    named = lambda index: tensors[index].name or "" if 0 <= index < len(tensors) else ""
    layers = []
    for operator in model.main.operators:
        found = layer_of(named(operator.outputs[0])) if len(operator.outputs) else ""
        weighted = operator.op in (*_MATRIX, *_DEPTHWISE) and len(operator.inputs) > 1
        layers.append(found or (layer_of(named(operator.inputs[1])) if weighted else ""))
    names = [named(operator.outputs[0]) for operator in model.main.operators if len(operator.outputs)]
    roots = {_segments(part)[0] for name in names for part in name.split(";") if len(_segments(part)) > 2}
    scopes = {segment for layer in layers if layer for segment in layer.split("/")}
    if len(scopes) > 1 and all(scope.endswith("_1") for scope in (*scopes, *roots)):
        layers = ["/".join(segment.removesuffix("_1") for segment in layer.split("/")) for layer in layers]
    return layers


def layer_of(tensor_name: str) -> str:
    """The Keras layer in a tensor's name, '' where there is none.

    'resnet8/conv1_act/Relu;resnet8/conv1/Conv2D' -> 'conv1': of fused operations the one with weights
    counts, else the one that is no activation. 'StatefulPartitionedCall:0' -> ''.
    """
    parts = [segments for part in tensor_name.split(";") if len(segments := _segments(part)) > 1]
    if not parts:
        return ""
    weighted = [part for part in parts if _WEIGHTED.fullmatch(part[-1]) or _DEPTHWISE_OP.fullmatch(part[-1])]
    working = [part for part in parts if not any(_TRAILING.match(segment) for segment in part[-2:])]
    first = _layer(parts[0])
    layers = [_layer(part) for part in weighted or working or parts[:1]]
    # A constant that several layers share brings a stranger's name in: stay near the operation's own.
    return max(layers, key=lambda layer: (_shared(layer, first), -len(layer)))


def _segments(part: str) -> list[str]:
    segments = [segment for segment in re.sub(r":\d+$", "", part.strip()).split("/") if segment]
    while segments and _CALL.match(segments[0]):
        segments = segments[1:]
    return segments


def _layer(segments: list[str]) -> str:
    """model/layer/Operation -> layer; with two parts only, the model's name is missing."""
    scopes = segments[1:-1] if len(segments) > 2 else segments[:1]
    inside = (i for i, s in enumerate(scopes) if i and (s in _INSIDE or s[0].isupper()))
    return "/".join(_WRAPPER.sub("", scope) for scope in scopes[: next(inside, len(scopes))])


def _shared(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    serve(profile_in_this_process)
