"""How near a file comes to what the machine can do: the roofline of Williams, Waterman and Patterson 2009.

Roofline: An Insightful Visual Performance Model for Multicore Architectures, CACM 52(4). A machine computes at most
`peak` operations a second and moves at most `bandwidth` bytes a second, so that work of `intensity` operations a
byte cannot go faster than min(peak, intensity x bandwidth). Both are measured here, on the machine itself, in a
fresh process (`python -m mobile_bench.roofline job.json`) by numpy and the very runtime that runs the files:

- compute: dense layers and a convolution, made on the spot, for float32 and int8; 1 multiply-accumulate is 2 FLOP;
- memory: the Copy and Add kernels of STREAM (McCalpin 1995) over arrays of four times the last-level cache, and,
  for work whose tensors stay in the cache, over arrays that fit into it (Ilic, Pratas and Sousa 2014, Cache-aware
  Roofline Model, IEEE CAL 13(1)).

A roof is the best of several runs: what slows the machine lowers it, and nothing raises it.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.errors import InputError, ModelRefused, Problem
from mobile_bench.jobs import OnProgress, serve
from mobile_bench.records import Connection, Target

if TYPE_CHECKING:
    from mobile_bench.flatbuffer import Operator, TFLiteModel
    from mobile_bench.profile import OpTime

#: What the compute roofs are measured on: name -> (input, weights, output), all in the cache of a core or near it.
_DENSE = {
    "dense 1024x256x256": ((1024, 256), (256, 256), (1024, 256)),
    "dense 256x512x512": ((256, 512), (512, 512), (256, 512)),
}
_CONVOLUTION = {"convolution 56x56x64, 3x3": ((1, 56, 56, 64), (64, 3, 3, 64), (1, 56, 56, 64))}
WORKLOADS = {**_DENSE, **_CONVOLUTION}
#: Each is run for so long and so often at least.
_SECONDS, _LEAST_RUNS, _ROUNDS, _ROUND_S = 0.4, 5, 7, 0.03
#: Arrays of STREAM as multiples of the last-level cache, the least, and the most as a share of all memory.
_TIMES_CACHE, _LEAST_BYTES, _MEMORY_SHARE, _CACHED_SHARE = 4, 16 * 2**20, 1 / 16, 1 / 16
#: Where the system does not tell its cache: large enough to miss any, small enough to fit any.
_LARGE_CACHE, _SMALL_CACHE = 32 * 2**20, 2**20
_SMALL_INTEGERS = frozenset(("int8", "uint8", "int4", "uint4", "int2"))
#: Operations that compute, and whose multiply-accumulates opcost does not count.
_UNCOUNTED = frozenset(
    ("BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN", "CALL", "CONV_3D", "CONV_3D_TRANSPOSE", "CUSTOM",
     "DELEGATE", "IF", "LSTM", "RNN", "STABLEHLO_CONVOLUTION", "STABLEHLO_DOT_GENERAL", "STABLEHLO_WHILE", "SVDF",
     "UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN", "WHILE")
)  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """The roofs of one machine for one number of threads.

    gflops: float32, 10^9 operations a second. gops_int8: the same for int8, None where the runtime takes no such
    file. gbytes_s: 10^9 bytes a second to and from memory, cache_gbytes_s within the last-level cache of cache_bytes.
    raw: every run, {'float32': {workload: [GFLOP/s, ...]}, 'int8': ..., 'memory': {kernel: [GB/s, ...]}, 'cache': ...}.
    """

    threads: int
    gflops: float
    gops_int8: float | None
    gbytes_s: float
    cache_gbytes_s: float
    cache_bytes: int
    raw: dict
    device: dict = field(default_factory=dict)
    load_average: float | None = None
    warnings: tuple[str, ...] = ()

    def compute(self, kind: str) -> float:
        """The compute roof in GFLOP/s for 'float32' or 'int8' arithmetic."""
        return self.gops_int8 if kind == "int8" and self.gops_int8 else self.gflops

    def bandwidth(self, held_bytes: float) -> float:
        """The memory roof in GB/s for work on so many bytes: the cache's where they fill half of it at most."""
        return self.cache_gbytes_s if self.is_cached(held_bytes) else self.gbytes_s

    def is_cached(self, held_bytes: float) -> bool:
        return held_bytes <= self.cache_bytes / 2


@dataclass(frozen=True)
class Work:
    """What a file or an operation must do for one inference. None where the file does not say; `note` tells why.

    flop: 2 for each multiply-accumulate, nothing for the rest. moved_bytes: each operation's tensors once. held_bytes:
    what has to fit into the cache for all of it to stay there. kind: 'float32' or 'int8', of most of the work.
    """

    flop: int | None
    moved_bytes: int | None
    held_bytes: int | None
    kind: str = "float32"
    note: str = ""


@dataclass(frozen=True)
class Attained:
    """What became of some work: its speed beside its roof. All but name and time_ms are None where note tells why.

    gflops: attained. intensity: FLOP a byte. roof_gflops: min(peak, intensity x bandwidth). roof_ms: the least time it
    could take. share: roof_ms / time_ms. bound: 'compute' or 'memory', whichever is the lower roof. cached: whether
    the memory roof is the cache's. layer, op: for a single operation.
    """

    name: str
    time_ms: float
    kind: str = ""
    gflops: float | None = None
    intensity: float | None = None
    roof_gflops: float | None = None
    roof_ms: float | None = None
    share: float | None = None
    bound: str = ""
    cached: bool = False
    note: str = ""
    layer: str = ""

    @property
    def lost_ms(self) -> float | None:
        """The time that could be won at most: none where the roof is passed, for roofs are measured too."""
        return None if self.roof_ms is None else max(0.0, self.time_ms - self.roof_ms)


def attained(name: str, time_ms: float, work: Work, peak: Peak, layer: str = "") -> Attained:
    """Set a time beside the roofs. Work without arithmetic is bound by memory, and its share is one of bandwidth."""
    if work.flop is None or work.moved_bytes is None or not work.moved_bytes or not time_ms > 0:
        note = work.note or ("it was too short to be timed" if not time_ms > 0 else "it moves nothing")
        return Attained(name, time_ms, work.kind, note=note, layer=layer)
    held = work.moved_bytes if work.held_bytes is None else work.held_bytes
    intensity, top = work.flop / work.moved_bytes, peak.compute(work.kind)
    slope = intensity * peak.bandwidth(held)
    compute_ms, memory_ms = work.flop / top / 1e6, work.moved_bytes / peak.bandwidth(held) / 1e6
    roof_ms = max(compute_ms, memory_ms)
    return Attained(
        name, time_ms, work.kind, work.flop / time_ms / 1e6, intensity, min(top, slope), roof_ms, roof_ms / time_ms,
        "compute" if compute_ms >= memory_ms else "memory", peak.is_cached(held), work.note, layer,
    )  # fmt: skip


def work_of(model: TFLiteModel, operator: Operator) -> Work:
    """One operation's work, from the shapes in the file."""
    from mobile_bench.opcost import cost_of

    cost, tensors = cost_of(model, operator), model.main.tensors
    weights = [tensors[i].dtype for i in operator.inputs[1:2] if i >= 0]
    first = [tensors[i].dtype for i in operator.inputs[:1] if i >= 0]
    kind = "int8" if _SMALL_INTEGERS & {*(weights if cost.macs else first)} else "float32"
    if operator.op in _UNCOUNTED:
        return Work(None, None, None, kind, f"what {operator.custom_code or operator.op} computes is not known")
    if None in (cost.macs, cost.bytes_read, cost.bytes_written):
        return Work(None, None, None, kind, "the file leaves its size open")
    moved = cost.bytes_read + cost.bytes_written
    return Work(2 * cost.macs, moved, moved, kind)


def work_of_file(model: TFLiteModel) -> Work:
    """A whole file's work. Operations on constants alone are done once, before the first inference, and not counted."""
    from mobile_bench.arena import arena_of

    constants = {tensor.index for tensor in model.main.tensors if tensor.constant_bytes}
    parts = []
    for operator in model.main.operators:
        if operator.inputs and all(index in constants for index in operator.inputs if index >= 0):
            constants.update(operator.outputs)
        else:
            parts.append(work_of(model, operator))
    unknown = next((part for part in parts if part.flop is None), None)
    if unknown or not parts:
        return Work(None, None, None, note=unknown.note if unknown else "it has no operation")
    flop = {kind: sum(part.flop for part in parts if part.kind == kind) for kind in ("float32", "int8")}
    try:
        arena = arena_of(model)
        held = arena.arena_bytes + arena.persistent_bytes + sum(t.constant_bytes for t in model.main.tensors)
    except Problem as problem:
        return Work(None, None, None, note=problem.what)
    return Work(sum(flop.values()), sum(part.moved_bytes for part in parts), held, max(flop, key=flop.get))


def by_operation(model: TFLiteModel, times: Sequence[OpTime], peak: Peak) -> tuple[Attained, ...]:
    """Each profiled step beside its roof, the dearest first; one that cannot be found in the file has a time only."""
    from mobile_bench.profile import match_operators

    operators = model.main.operators
    places = match_operators(times, [operator.op for operator in operators])
    unmatched = Work(None, None, None, note="which operation of the file it is cannot be told")
    rows = [
        attained(t.node_type, t.avg_ms, unmatched if at is None else work_of(model, operators[at]), peak, t.layer)
        for t, at in zip(times, places)
    ]
    return tuple(sorted(rows, key=lambda row: -row.time_ms))


def measure_peak(
    target: Target = Target(), *, connection: Connection | None = None, on_progress: OnProgress | None = None,  # noqa: B008 - frozen
    timeout_s: float = 600, wait_s: float = 3600,
) -> Peak:  # fmt: skip
    """Measure the roofs of a machine for target.threads threads; some ten seconds, in a fresh process there.

    Raises InputError for a phone by adb, which has no Python, and for a runtime that is not there; JobFailed and
    TransportError as transports do. Waits up to wait_s for another measurement on that machine.
    """
    from mobile_bench.lock import one_at_a_time
    from mobile_bench.measure import check_can_run
    from mobile_bench.transports import transport_for

    if target.transport == "adb":
        raise InputError(
            "The roofs of a phone cannot be measured by adb: it has no Python", received=target.name,
            allowed="local, or ssh://user@host",
        )  # fmt: skip
    check_can_run(target)
    transport = transport_for(target, connection)
    job = {"threads": target.threads, "runtime": target.runtime}
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress), transport:
        found = transport.run("mobile_bench.roofline", job, files={}, on_progress=on_progress, timeout_s=timeout_s)
    return Peak(**{**found, "warnings": tuple(found["warnings"])})


def measure_here(job: dict, emit: Callable[..., None]) -> dict:
    """The child's side: the fields of Peak. job: threads, runtime."""
    from mobile_bench import device, trust
    from mobile_bench.interpreter import load_runtime

    threads, cores = job["threads"], device.usable_cores()
    if threads > cores:
        raise InputError(
            "The roofs cannot be measured with more threads than cores: they would wait for each other",
            received=f"{threads} threads", allowed=f"1 to {cores} on this machine",
        )  # fmt: skip
    runtime = load_runtime(job["runtime"])
    facts, load_average, cache = device.describe(), device.load_average(), _cache_bytes()
    before = trust.read_state()
    emit("log", text=f"measuring the roofs for {threads} thread(s): memory")
    size = max(_TIMES_CACHE * (cache or _LARGE_CACHE), _LEAST_BYTES)
    allowed = max(_LEAST_BYTES, int(facts.get("memory_bytes", 2**40) * _MEMORY_SHARE))
    raw = {"memory": _stream(threads, min(size, allowed))}
    raw["cache"] = _stream(threads, int((cache or _SMALL_CACHE) * _CACHED_SHARE))
    for kind in ("float32", "int8"):
        emit("log", text=f"measuring the roofs for {threads} thread(s): {kind}")
        raw[kind] = {name: _compute(name, kind, threads, job["runtime"]) for name in WORKLOADS}
    during = trust.between(before, trust.read_state())
    warnings = trust.warnings_of(facts, load_average, threads, during, True, 0)
    if size > allowed:
        warnings.append(f"the memory allows arrays of {allowed:,} bytes only, less than 4 times the cache")
    best = {name: max((max(runs) for runs in kernels.values() if runs), default=None) for name, kernels in raw.items()}
    if best["float32"] is None:
        raise ModelRefused("The runtime refused the float32 file that the roof is measured on", received=runtime)
    return {
        "threads": threads, "gflops": best["float32"], "gops_int8": best["int8"], "gbytes_s": best["memory"],
        "cache_gbytes_s": max(best["cache"], best["memory"]), "cache_bytes": cache or _SMALL_CACHE, "raw": raw,
        "device": {**facts, "runtime": runtime.name, "runtime_version": runtime.version, "during": during},
        "load_average": load_average, "warnings": warnings,
    }  # fmt: skip


def _compute(name: str, kind: str, threads: int, runtime: str) -> list[float]:
    """GFLOP/s of each run of one workload; none where the runtime will not take it."""
    from math import prod

    from mobile_bench.interpreter import open_model
    from mobile_bench.tiny_file import one_layer
    from mobile_bench.worker import random_inputs, time_runs, warm_up

    shape, weights, output = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roof.tflite"
        path.write_bytes(one_layer(shape, weights, output, int8=kind == "int8"))
        try:
            model = open_model(path, threads, runtime, batch=shape[0])
            model.set_inputs(*random_inputs(model, None, 0))
            times_ms, _ = warm_up(model)
            times_ms = time_runs(model, max(_LEAST_RUNS, int(1000 * _SECONDS / max(min(times_ms), 1e-3))))
        except ModelRefused:
            return []
    flop = 2 * prod(output) * prod(weights[1:])
    return [flop / time_ms / 1e6 for time_ms in times_ms if time_ms > 0]


def _stream(threads: int, array_bytes: int) -> dict[str, list[float]]:
    """GB/s of STREAM's Copy (a = b) and Add (a = b + c), counted as STREAM does: 2 and 3 arrays a pass.

    Each of the arrays has array_bytes, shared out over the threads; numpy lets go of the interpreter's lock.
    """
    import numpy as np

    length = max(64, array_bytes // 8 // threads)
    arrays = [[np.full(length, value) for value in (1.0, 2.0, 3.0)] for _ in range(threads)]
    kernels = {"copy": (2, lambda a, b, c: np.copyto(a, b)), "add": (3, lambda a, b, c: np.add(b, c, out=a))}
    found = {}
    for name, (passes, kernel) in kernels.items():
        started = time.perf_counter()
        kernel(*arrays[0])
        kernel(*arrays[0])
        repeats = max(1, int(_ROUND_S / max((time.perf_counter() - started) / 2, 1e-7)))
        moved = passes * 8 * length * threads * repeats / 1e9
        found[name] = [moved / seconds for seconds in _rounds(kernel, arrays, repeats)]
    return found


def _rounds(kernel: Callable, arrays: list, repeats: int) -> list[float]:
    """Seconds from the first thread's start to the last one's end, once a round."""
    line, spans, seconds = threading.Barrier(len(arrays) + 1), [(0.0, 0.0)] * len(arrays), []

    def work(number: int) -> None:
        mine = arrays[number]
        for _ in range(_ROUNDS):
            line.wait()
            started = time.perf_counter()
            for _ in range(repeats):
                kernel(*mine)
            spans[number] = (started, time.perf_counter())
            line.wait()

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(arrays))]
    for worker in workers:
        worker.start()
    for _ in range(_ROUNDS):
        line.wait()
        line.wait()
        seconds.append(max(end for _, end in spans) - min(start for start, _ in spans))
    for worker in workers:
        worker.join()
    return seconds


def _cache_bytes(root: str | Path = "/") -> int | None:
    """The last-level cache of the first core, None where the system does not tell."""
    sizes = []
    for path in Path(root).glob("sys/devices/system/cpu/cpu0/cache/index*/size"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        number, unit = text[:-1], {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:])
        if unit and number.isdigit():
            sizes.append(int(number) * unit)
    return max(sizes, default=None)


if __name__ == "__main__":
    serve(measure_here)
