"""Other processors than the CPU: loading their delegate, what it took, and whether it computes the same.

A delegate that is missing, that leaves operations to the CPU without being allowed to, or that computes
something else is a DelegateError; nothing is timed before that is known. An external delegate is a library
that exports tflite_plugin_create_delegate and tflite_plugin_destroy_delegate
(tensorflow/lite/delegates/external/external_delegate_interface.h); libedgetpu is one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.errors import DelegateError, InputError, ModelRefused, unknown_name
from mobile_bench.interpreter import Model, dequantize, load_runtime, open_model
from mobile_bench.records import Tensor

if TYPE_CHECKING:
    from mobile_bench.gpu import GpuModel

#: What a worker can run a file on. The CPU needs nothing of this module.
ACCELERATORS = ("cpu", "gpu", "edgetpu", "external")
EDGETPU_LIBRARY, EDGETPU_OPERATION = "libedgetpu.so.1", "edgetpu-custom-op"
_SYMBOLS = ("tflite_plugin_create_delegate", "tflite_plugin_destroy_delegate")

#: The largest difference from the CPU that is rounding, as a share of the output's largest value. GPUs and
#: neural processors may compute in half precision, 10 bits of mantissa, an error of 1e-3 for each layer and a few
#: percent after some tens of them; the Edge TPU computes in the same integers as the CPU.
TOLERANCE = {"gpu": 0.05, "external": 0.05, "edgetpu": 0.02}
#: A quantized output may be this many steps off all the same: the last operation rounds, and the one before it.
STEPS = 2
#: On how many random inputs the answers are compared: on one of them a softmax may hide what is wrong before it.
CHECKED_INPUTS = 3
#: Two classes whose scores lie closer together than this share of the largest are a tie, and either may win.
TIE = 0.01


@dataclass(frozen=True)
class Wanted:
    """What a job asks for. library: a path, or a name that the system's loader finds; options: as the library's
    manual names them. reference: a plain .tflite that the CPU runs for comparison; '' is the file itself."""

    accelerator: str
    library: str = ""
    options: dict[str, str] = field(default_factory=dict)
    allow_fallback: bool = False
    reference: str = ""

    @classmethod
    def of(cls, job: dict) -> Wanted | None:
        """None for the CPU. Job keys, all optional: accelerator, delegate, delegate_options, allow_fallback,
        reference."""
        name = job.get("accelerator", "cpu")
        if name not in ACCELERATORS:
            raise unknown_name("accelerator", str(name), ACCELERATORS)
        if name == "cpu":
            return None
        library = job.get("delegate") or (EDGETPU_LIBRARY if name == "edgetpu" else "")
        if name == "external" and not library:
            raise InputError(
                "An external delegate needs its library", received="none", allowed="the path of a .so",
                next_step="Say it with --delegate PATH",
            )  # fmt: skip
        if name == "gpu" and library:
            raise InputError(
                "The GPU is reached through the runtime itself, not through a library", received=library,
                next_step="Leave out --delegate, or take --accelerator external",
            )  # fmt: skip
        options = {str(key): str(value) for key, value in (job.get("delegate_options") or {}).items()}
        return cls(name, library, options, bool(job.get("allow_fallback")), job.get("reference") or "")


def open_on(wanted: Wanted | None, path: str, job: dict, size: tuple[int, int] | None) -> Model | GpuModel:
    """The file on the accelerator, or on the CPU for None, as open_model gives it. job: threads, runtime, batch, and
    on the CPU resize (see open_model).

    Raises DelegateError where the delegate is missing, fails, takes no operation, or leaves some to the CPU
    without leave.
    """
    if wanted is None:
        resize = job.get("resize", False)
        return open_model(path, job["threads"], job["runtime"], batch=job["batch"], size=size, resize=resize)
    # Should the delegate end the process, these are the last words of its log.
    print(f"{wanted.library or 'the GPU'} takes over {path}", file=sys.stderr, flush=True)
    if wanted.accelerator == "gpu":
        from mobile_bench.gpu import open_gpu

        return open_gpu(
            path, job["threads"], job["runtime"], batch=job["batch"], size=size, options=wanted.options,
            allow_fallback=wanted.allow_fallback,
        )  # fmt: skip
    library = load(wanted, job["runtime"])
    model = open_model(path, job["threads"], job["runtime"], batch=job["batch"], size=size, delegate=library)
    if not model.delegated_ops:
        edge_tpu = wanted.accelerator == "edgetpu" and EDGETPU_OPERATION not in model.fallback_ops
        raise DelegateError(
            "The delegate takes none of the file's operations", received=count_names(model.fallback_ops),
            next_step="Compile the file for the Edge TPU: edgetpu_compiler -s FILE, and measure what it writes"
            if edge_tpu
            else "See the delegate's manual for the operations and types that it takes, or measure on the CPU",
        )  # fmt: skip
    if model.fallback_ops:
        model.warnings = fallback_allowed(wanted.allow_fallback, model.delegated_ops, model.fallback_ops)
    model.facts = {"delegate": Path(wanted.library).name, "delegate_options": wanted.options}
    return model


def fallback_allowed(allowed: bool, delegated: Sequence[str], left: Sequence[str], why: str = "") -> tuple[str, ...]:
    """The warning that some operations run on the CPU; DelegateError where that is not allowed."""
    shares = f"{len(left)} of {len(delegated) + len(left)} operations"
    if not allowed:
        raise DelegateError(
            f"The accelerator leaves {shares} to the CPU", received=count_names(left) + (f". {why}" if why else ""),
            allowed="all of them on the accelerator",
            next_step="Replace these operations, or take --allow-fallback to time the two together",
        )  # fmt: skip
    return (f"the CPU ran {shares} ({count_names(left)}): this is not the speed of the accelerator alone",)


def load(wanted: Wanted, runtime: str = "auto") -> object:
    """The runtime's own object for a delegate's library; DelegateError where it cannot be had."""
    try:
        handle = ctypes.CDLL(wanted.library)
    except OSError as error:
        raise _not_loaded(wanted, error) from error
    missing = [name for name in _SYMBOLS if not hasattr(handle, name)]
    if missing:
        raise DelegateError(
            "The library is not a TFLite delegate", received=f"{wanted.library} without {' and '.join(missing)}",
            allowed="a library with the external delegate interface",
        )  # fmt: skip
    module = sys.modules[load_runtime(runtime).interpreter.__module__]
    try:
        return module.load_delegate(wanted.library, wanted.options)
    except (ValueError, RuntimeError) as error:
        # 'Failed to load delegate from PATH\nREASON', where the library may give no reason.
        reason = " ".join(str(error).partition("\n")[2].split())
        given = ", ".join(f"{key}={value}" for key, value in wanted.options.items())
        if wanted.accelerator == "edgetpu":
            step = "See that the Edge TPU is plugged in (lsusb shows 1a6e:089a or 18d1:9302) and that you may open it"
        else:
            step = "Check each --delegate-option, and that its device is there"
        raise DelegateError(
            f"The delegate {wanted.library} would not start",
            received=f"{reason or 'no reason given'} (options: {given or 'none'})", next_step=step,
        ) from error  # fmt: skip


def _not_loaded(wanted: Wanted, error: OSError) -> DelegateError:
    if wanted.accelerator == "edgetpu" and "cannot open shared object" in str(error):
        step = (
            "Install it: apt install libedgetpu1-std, from Coral's repository "
            "(deb https://packages.cloud.google.com/apt coral-edgetpu-stable main)"
        )
    elif "cannot open shared object" in str(error) and not os.path.exists(wanted.library):
        step = "Give the library's whole path on the device that is measured"
    else:
        step = f"Take the library that was built for this machine ({platform.machine()})"
    return DelegateError("The delegate's library cannot be loaded", received=error, next_step=step)


def apply(delegate: object, interpreter: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Let a delegate take what it can of a graph whose inputs have their shapes, before the CPU's own does.

    Gives the names of the operations that it took and of those that it left, each in the order of the file.
    Done here and not by the Interpreter's experimental_delegates: that lets the delegate in before the inputs
    are resized, and again after XNNPACK, when the two can no longer be told apart.
    """
    before = len(interpreter._get_ops_details())
    try:
        interpreter._interpreter.ModifyGraphWithDelegate(delegate._get_native_delegate_pointer())
    except (ValueError, RuntimeError) as error:
        raise DelegateError(
            "The delegate failed on this file", received=" ".join(str(error).split())[:400],
            next_step="See the delegate's manual for what it takes, or measure on the CPU",
        ) from error  # fmt: skip
    interpreter._delegates = [delegate]  # it must outlive the interpreter, which ends it
    operations = interpreter._get_ops_details()
    return split(operations[:before], operations[before:])


def split(operations: Sequence[dict], kernels: Sequence[dict]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which operations the kernels of a delegate stand for: those between a kernel's inputs and its outputs.

    Each dict: index, op_name, inputs and outputs (tensors), as the runtime's _get_ops_details gives them.
    """
    makers = {int(tensor): operation for operation in operations for tensor in operation["outputs"]}
    taken: set[int] = set()
    for kernel in kernels:
        known, wanted = {int(tensor) for tensor in kernel["inputs"]}, [int(tensor) for tensor in kernel["outputs"]]
        while wanted:
            tensor = wanted.pop()
            if tensor in known or tensor not in makers:
                continue
            known.add(tensor)
            taken.add(makers[tensor]["index"])
            wanted += [int(needed) for needed in makers[tensor]["inputs"]]
    return tuple(o["op_name"] for o in operations if o["index"] in taken), tuple(
        o["op_name"] for o in operations if o["index"] not in taken
    )


def check(
    wanted: Wanted | None, model: Model | GpuModel, path: str, job: dict, size: tuple[int, int] | None,
    inputs: Callable[[int], Sequence[np.ndarray]],
) -> float | None:  # fmt: skip
    """The largest drift (see drift_of) of `model` from the CPU; None for a model on the CPU.

    inputs: seed -> the values to compute. `model` has just run once on those of job's seed, and keeps them; the
    CPU is given the same inputs in the same order, because a file may have a memory. Raises DelegateError where
    an answer differs by more than rounding, or another class wins.
    """
    if wanted is None:
        return None
    plain = _reference(wanted, model, path, job, size)
    drifts = []
    for seed in range(job["seed"], job["seed"] + CHECKED_INPUTS):
        values = inputs(seed)
        plain.set_inputs(*values)
        plain.run()
        if seed > job["seed"]:
            model.set_inputs(*values)
            model.run()
        pairs = zip(model.get_outputs(), plain.get_outputs(), plain.outputs)
        drifts += [_check_output(answer, expected, tensor, wanted, model.said) for answer, expected, tensor in pairs]
    model.set_inputs(*inputs(job["seed"]))
    return max(drifts, default=0.0)


def _reference(wanted: Wanted, model: Model, path: str, job: dict, size: tuple[int, int] | None) -> Model:
    """What the accelerator should compute, on the CPU."""
    try:
        plain = open_model(wanted.reference or path, job["threads"], job["runtime"], batch=job["batch"], size=size)
    except ModelRefused as error:
        if wanted.reference:
            raise
        raise DelegateError(
            "Nothing tells whether the accelerator computes the right thing: the CPU cannot run this file",
            received=error.received, next_step="Give the file that it was compiled from with --reference FILE",
        ) from error  # fmt: skip
    for side, here, there in (("inputs", model.inputs, plain.inputs), ("outputs", model.outputs, plain.outputs)):
        if [(t.shape, t.dtype) for t in here] != [(t.shape, t.dtype) for t in there]:
            given, step = "The reference has other {} than the file", "Give the very file that it was compiled from"
            if not wanted.reference:
                given, step = "The delegate gives other {} than the CPU", "Measure with a batch of 1"
            raise DelegateError(
                given.format(side), received=[(t.shape, t.dtype) for t in (there if wanted.reference else here)],
                allowed=[(t.shape, t.dtype) for t in (here if wanted.reference else there)], next_step=step,
            )  # fmt: skip
    return plain


def drift_of(answer: np.ndarray, expected: np.ndarray, tensor: Tensor) -> float:
    """The largest |answer - expected| of the dequantized values, divided by the largest |expected|.

    Of whole numbers without a scale, such as classes or indices: the share that differs.
    """
    if tensor.dtype == "bool" or (not tensor.scale and np.issubdtype(np.dtype(tensor.dtype), np.integer)):
        return float(np.mean(answer != expected)) if answer.size else 0.0
    one, other = dequantize(answer, tensor).astype(np.float64), dequantize(expected, tensor).astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        apart = float(np.max(np.abs(one - other), where=~same, initial=0.0))
    if apart == 0:
        return 0.0
    largest = float(np.max(np.abs(other), where=np.isfinite(other), initial=0.0))
    return apart / largest if largest and not np.isnan(apart) else float("inf")


def _check_output(answer: np.ndarray, expected: np.ndarray, tensor: Tensor, wanted: Wanted, said: str) -> float:
    drift, tolerance = drift_of(answer, expected, tensor), TOLERANCE[wanted.accelerator]
    values = dequantize(expected, tensor)
    largest = float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))
    step = tensor.scale / largest if tensor.scale and largest else 0.0
    tolerance = max(tolerance, (STEPS + 0.5) * step)  # half a step against the rounding of floats
    found = []
    if not drift <= tolerance:
        found.append(f"differs from the CPU by {drift:.2%} of its largest value (tolerance {tolerance:.2%})")
    if len(tensor.shape) == 2 and tensor.shape[1] > 1:
        lost = _lost_classes(dequantize(answer, tensor), values, max(TIE, (STEPS + 0.5) * step) * largest)
        found += [f"names class {b} where the CPU names {a}" for a, b in lost[:1]]
    if found:
        half = wanted.accelerator == "gpu" and "enforce_f32" not in wanted.options
        fix = "--delegate-option enforce_f32=true, or " if half else ""
        raise DelegateError(
            "The accelerator computes something else than the CPU",
            received=f"output {tensor.name!r} {' and '.join(found)}{f'. The accelerator said: {said}' if said else ''}",
            allowed="the CPU's answer up to rounding",
            next_step=f"Do not use this file on it. Try {fix}the file in another precision, or find the operation "
            "that is wrong and replace it",
        )  # fmt: skip
    return drift


def _lost_classes(answers: np.ndarray, expected: np.ndarray, tie: float) -> list[tuple[int, int]]:
    """(the CPU's class, the accelerator's) for each image of the batch where they differ, ties left out."""
    pairs = [(int(a), int(b)) for a, b in zip(expected.argmax(axis=1), answers.argmax(axis=1))]
    return [(a, b) for row, (a, b) in zip(expected, pairs) if a != b and row[a] - row[b] > tie]


def count_names(names: Sequence[str]) -> str:
    """('ADD', 'ADD', 'MUL') as '2 ADD, 1 MUL', the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common()) or "none"
