"""TFLite's benchmark_model: its command line, and what it prints.

One invocation makes one load, some warm-up runs and some timed ones, on random inputs of its own, and prints
aggregates only. Texts of all versions are read: with percentiles or without, with logcat's prefixes or without.
The tool's own flags are documented in tensorflow/lite/tools/benchmark/README.md.
"""

from __future__ import annotations

import math
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from mobile_bench.errors import DelegateError, InputError, JobFailed, ModelRefused, Problem
from mobile_bench.flatbuffer import read_model
from mobile_bench.inputs import InputSpec
from mobile_bench.records import Target

_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
_STAT = re.compile(rf"\b(count|first|curr|min|max|avg|std|median|p\d+)={_NUMBER}", re.I)
_STATS_LINE = re.compile(r"\bcount=\d+")
_INIT = re.compile(rf"Initialized session in {_NUMBER}\s*ms\b")
_TIMINGS = re.compile(r"[Ii]nference timings in us: (.*)")
_TIMING = re.compile(rf"\b(Init|First inference|Warmup \(avg\)|Warmup|Inference \(avg\)|Inference|no stats): {_NUMBER}")
_MEMORY = re.compile(rf"Memory footprint delta from the start of the tool \(MB\):.*\boverall={_NUMBER}")
_PEAK = re.compile(rf"Overall peak memory footprint \(MB\) via periodic monitoring: {_NUMBER}")
_APPLIED = re.compile(
    r"[Aa]pplied (\S+) delegate, and the model graph will be (completely|partially) executed (?:by|w/) the delegate"
    r"(?: w/ (\d+) delegate kernels)?"
)
_NOT_APPLIED = re.compile(
    r"Though (\S+) delegate is (?:explicitly )?applied, the model graph will not be executed by the delegate"
)
_ERROR = re.compile(r"\b(?:ERROR|FATAL)\b:?\s*(.*)|\b[EF]/?\s*tflite\s*(?:\(\s*\d+\))?\s*:\s*(.*)")
_UNKNOWN_FLAGS = re.compile(r"Unconsumed cmdline flags:(.*)")
_REFUSAL = re.compile(
    r"Failed to (?:load|parse|mmap)\w*\b.*model|Failed to construct interpreter|"
    r"Failed to initialize (?:the interpreter|model loader)|Failed to allocate tensors|"
    r"Unresolved custom op|Didn't find op for builtin opcode|Op builtin_code out of range|not a valid Flatbuffer|"
    r"failed to prepare",
    re.I,
)
_NO_DELEGATE = re.compile(
    r"Disallowed CPU fallback|Failed to (?:apply|create|load|initialize)\w*\b.*delegate|delegate is not supported", re.I
)
_EXTENTS = {"completely": "full", "partially": "partial"}


@dataclass(frozen=True)
class Report:
    """What one invocation printed; None for what its version does not print.

    std_ms to p95_ms are of the timed runs within this one invocation. delegated: 'full', 'partial', 'none', or
    'not asked' where no delegate is spoken of; XNNPACK counts only where there is no other. ignored_flags: those
    that the tool was built without, which it does not refuse.
    """

    init_ms: float | None
    first_inference_ms: float | None
    warmup_avg_ms: float | None
    runs: int
    avg_ms: float
    min_ms: float | None = None
    max_ms: float | None = None
    std_ms: float | None = None
    median_ms: float | None = None
    p5_ms: float | None = None
    p95_ms: float | None = None
    peak_memory_bytes: int | None = None
    memory_overall_bytes: int | None = None
    delegated: str = "not asked"
    delegate_kernels: int | None = None
    errors: tuple[str, ...] = ()
    ignored_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpTime:
    """One node of a profile: its type (CONV_2D, or a delegate's name), mean time of a run, and calls a run."""

    node_type: str
    avg_ms: float
    times_called: int
    name: str


def arguments(
    remote_model: str, target: Target, *, runs: int, warmup_runs: int, warmup_secs: float = 0.1, min_secs: float = 0.0,
    max_secs: float = 150.0, delegate: str = "", full_delegation: bool = False, profile: str = "",
    memory: bool = True, inputs: dict[str, tuple[int, ...]] | None = None,
    value_files: dict[str, str] | None = None, output: str = "",
) -> list[str]:  # fmt: skip
    """The tool's arguments, one string each, not quoted for any shell.

    min_secs 0 makes it exactly `runs` runs unless max_secs ends it before. delegate: the path there of an external
    delegate's library. profile: a file there for the times of each operator, as CSV. inputs: name -> shape, for
    a file whose shapes are not as wanted; value_files: name -> file there with the raw tensor; output: a file there
    for the raw output tensors.
    """
    found = {
        "graph": remote_model, "num_threads": target.threads, "num_runs": runs, "min_secs": min_secs,
        "max_secs": max_secs, "warmup_runs": warmup_runs, "warmup_min_secs": warmup_secs,
    }  # fmt: skip
    if target.accelerator == "cpu":
        found["use_xnnpack"] = True
    elif target.accelerator in ("gpu", "nnapi"):
        found[f"use_{target.accelerator}"] = True
    elif target.accelerator == "external" and delegate:
        found["external_delegate_path"] = delegate
    else:
        raise InputError(
            "benchmark_model needs the path of the delegate's library" if target.accelerator == "external"
            else "benchmark_model does not know that accelerator",
            received=target.accelerator, allowed="cpu, gpu, nnapi, or external with a library",
        )  # fmt: skip
    if full_delegation and target.accelerator != "cpu":
        found["require_full_delegation"] = True
    if profile:
        found |= {"enable_op_profiling": True, "op_profiling_output_mode": "csv", "op_profiling_output_file": profile}
    if memory:
        found["report_peak_memory_footprint"] = True
    if inputs:
        found["input_layer"] = ",".join(inputs)
        found["input_layer_shape"] = ":".join(",".join(map(str, shape)) for shape in inputs.values())
    if value_files:
        # A colon in a name, as Keras makes them, is written twice (SplitInputLayerNameAndValueFile).
        pairs = (":".join(text.replace(":", "::") for text in pair) for pair in value_files.items())
        found["input_layer_value_files"] = ",".join(pairs)
    if output:
        found["output_filepath"] = output
    return [f"--{name}={_text(value)}" for name, value in found.items()]


def parse(text: str) -> Report:
    """What one invocation printed. Raises JobFailed where it is cut short or its times are impossible.

    A last line without its end counts as cut: half a number is a number too.
    """
    lines = [line.rstrip("\r\n") for line in text.splitlines(keepends=True) if line.endswith("\n")]
    stats, timings, init_ms, memory = None, None, None, {}
    delegates: list[tuple[str, str, int | None]] = []
    errors, ignored = [], []
    for line in lines:
        if _STATS_LINE.search(line) and timings is None:
            stats = {name.lower(): _number(value) for name, value in _STAT.findall(line)}
        elif found := _TIMINGS.search(line):
            timings = {name: _number(value) for name, value in _TIMING.findall(found[1])}
            if math.isnan(timings.get("Warmup (avg)", 0)):  # no warm-up run, so 0 / 0
                del timings["Warmup (avg)"]
                timings.pop("First inference", None)
        elif found := _INIT.search(line):
            init_ms = _number(found[1])
        elif found := _MEMORY.search(line):
            memory["overall"] = _number(found[1])
        elif found := _PEAK.search(line):
            memory["peak"] = _number(found[1])
        elif found := _APPLIED.search(line):
            delegates.append((found[1], _EXTENTS[found[2]], int(found[3]) if found[3] else None))
        elif found := _NOT_APPLIED.search(line):
            delegates.append((found[1], "none", 0))
        elif found := _UNKNOWN_FLAGS.search(line):
            ignored += re.findall(r"--(\w+)", found[1])
        elif found := _ERROR.search(line):
            errors.append((found[1] or found[2] or "").strip())
    average_us = timings and _first(timings, "Inference (avg)", "Inference", "no stats")
    if average_us is None or stats is None or not stats.get("count"):
        raise JobFailed(
            "benchmark_model's result was cut short", received=" | ".join(lines[-4:])[-600:] or None,
            allowed="a line 'Inference timings in us: …' after one of 'count=…'",
        )  # fmt: skip
    if "avg" in stats and abs(stats["avg"] - average_us) > 0.02 * abs(average_us):
        raise JobFailed(
            "benchmark_model's result was cut short: its two averages differ, so a line is missing",
            received=f"{stats['avg']:g} and {average_us:g} us",
        )
    if "curr" in stats and "avg" not in stats:  # one run, or all the same
        stats |= {"avg": stats["curr"], "min": stats["curr"], "max": stats["curr"]}
    times = [init_ms, *timings.values(), *stats.values(), *memory.values()]
    if any(not math.isfinite(value) or value < 0 for value in times if value is not None):
        raise JobFailed(
            "benchmark_model reports times that cannot be: the device's clock went backwards, or a run failed",
            received=" | ".join(line for line in lines if _STATS_LINE.search(line) or _TIMINGS.search(line))[-600:],
            next_step="Measure again",
        )  # fmt: skip
    init_us = timings.get("Init")
    # The tool may put XNNPACK under another delegate for what that one leaves.
    asked = [entry for entry in delegates if "xnnpack" not in entry[0].lower()] or delegates
    return Report(
        init_ms=init_us / 1e3 if init_us is not None else init_ms,
        first_inference_ms=_ms(timings.get("First inference")),
        warmup_avg_ms=_ms(_first(timings, "Warmup (avg)", "Warmup")),
        runs=int(stats["count"]),
        avg_ms=average_us / 1e3,
        **{f"{name}_ms": _ms(stats.get(name)) for name in ("min", "max", "std", "median", "p5", "p95")},
        peak_memory_bytes=_bytes(memory.get("peak")),
        memory_overall_bytes=_bytes(memory.get("overall")),
        delegated=asked[-1][1] if asked else "not asked",
        delegate_kernels=asked[-1][2] if asked else None,
        errors=tuple(errors),
        ignored_flags=tuple(ignored),
    )


def wanted_shapes(tflite: Path, batch: int, spec: InputSpec | None) -> tuple[dict | None, tuple[int, ...]]:
    """name -> shape for the tool where the file's own shapes will not do, and the shape of the first input.

    A file that cannot be read here is left to the tool to refuse.
    """
    try:
        graph = read_model(tflite).subgraphs[0]
        inputs = [graph.tensors[index] for index in graph.inputs]
    except (Problem, IndexError):
        return None, ()
    shapes = {}
    for tensor in inputs:
        shape = [max(1, n) for n in tensor.shape]
        shapes[tensor.name] = [batch, *shape[1:]] if shape else []
        if spec and len(shape) == 4 and any(n < 0 for n in tensor.shape_signature[1:]):
            shapes[tensor.name][1:3] = spec.height, spec.width
    if not inputs:
        return None, ()
    asked = any(list(tensor.shape) != shapes[tensor.name] for tensor in inputs)
    return (shapes if asked else None), tuple(shapes[inputs[0].name])


def doubts(samples: list[Report], wanted: int, timeout_s: float | None) -> list[str]:
    """What makes a measurement of several invocations doubtful, one sentence each."""
    found = []
    if len(samples) < wanted:
        found.append(f"{len(samples)} of {wanted} samples fitted into {timeout_s:g} s: measure with a longer limit")
    if samples[-1].delegated in ("partial", "none"):
        found.append(
            f"the delegate ran {samples[-1].delegated.replace('partial', 'part')} of the model; the CPU the rest"
        )
    if ignored := sorted({flag for sample in samples for flag in sample.ignored_flags}):
        found.append(
            f"this benchmark_model does not know {', '.join('--' + flag for flag in ignored)}: take a newer one"
        )
    if len({sample.runs for sample in samples}) > 1:
        found.append("the samples are averages of differing numbers of runs: compare them with care")
    return found


def failure(text: str, code: int, accelerator: str = "cpu") -> Problem:
    """The error for an invocation that ended with another exit code than 0, by its last lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = " | ".join(lines[-4:])[-600:] or None
    if code > 128:
        try:
            name = signal.Signals(code - 128).name
        except ValueError:
            name = f"signal {code - 128}"
        return JobFailed(
            f"benchmark_model was ended by {name} on the device", received=last,
            next_step="If it crashed, the tool or the delegate cannot bear this file: convert it again or try another",
        )  # fmt: skip
    if accelerator != "cpu" and _NO_DELEGATE.search(text):
        return DelegateError(
            f"The {accelerator} delegate does not run the whole model", received=last,
            next_step="Measure on the CPU, make the model of operations that it has, or allow the fallback",
        )  # fmt: skip
    if _REFUSAL.search(text):
        return ModelRefused("benchmark_model on the device refused the model", received=last)
    if code in (126, 127):
        return JobFailed(
            "benchmark_model cannot be started on the device", received=last,
            next_step="Take the binary that was built for its processor, such as android_aarch64",
        )  # fmt: skip
    return JobFailed(f"benchmark_model ended with exit code {code}", received=last)


def parse_op_profile(csv_text: str) -> tuple[OpTime, ...]:
    """The nodes of a profile in the order they ran; JobFailed where there is no table.

    Of several tables it is the first after 'Operator-wise', which is of the timed runs and not of loading.
    """
    _, found, tail = csv_text.partition("Operator-wise Profiling Info")
    header, nodes = None, []
    for line in (tail if found else csv_text).splitlines():
        cells = [cell.strip() for cell in line.split(",", len(header) - 1 if header else -1)]
        if cells[0] == "node type":
            if header:
                break
            header = [cell.lower() for cell in cells]
            missing = {"avg_ms", "times called", "name"} - set(header)
            if missing:
                raise JobFailed("A profile lacks a column", received=line.strip()[:300], allowed=", ".join(missing))
        elif header and len(cells) == len(header):
            row = dict(zip(header, cells))
            try:
                avg_ms, called = float(row["avg_ms"]), float(row["times called"])
                if not (0 <= avg_ms < math.inf and 0 <= called < 1e12):
                    raise ValueError("out of range")
            except ValueError as error:
                raise JobFailed("A profile's line cannot be read", received=line.strip()[:300]) from error
            nodes.append(OpTime(row["node type"], avg_ms, int(called), row["name"]))
        elif header:
            break
    if not nodes:
        raise JobFailed("The profile holds no operators", received=csv_text.strip()[:200] or "nothing")
    return tuple(nodes)


def _number(text: str) -> float:
    return float(text)


def _first(values: dict[str, float], *names: str) -> float | None:
    return next((values[name] for name in names if name in values), None)


def _ms(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds / 1e3


def _bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None else round(megabytes * 2**20)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
