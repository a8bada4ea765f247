"""The GPU, through the CompiledModel of ai-edge-litert and its WebGPU accelerator, with the face of a Model.

A GPU computes while the call that started it has long returned: only `run` and the reading of its outputs
together are its latency, and that is what `run` and `bare_invoke` do here. It can answer wrongly while it says
that all is well (in LiteRT 2.3, CUMSUM with `reverse`, and a strided 1x1 convolution with int8 weights), so
mobile_bench.delegates compares its answers with the CPU's before they are timed.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobile_bench.delegates import fallback_allowed
from mobile_bench.errors import DelegateError, InputError, ModelRefused
from mobile_bench.flatbuffer import Operator, TensorInfo, TFLiteModel, read_model
from mobile_bench.interpreter import Model, Runtime, check_is_tflite, listening, load_runtime, refusal_of, wanted_shape
from mobile_bench.litert_c import check_atomics
from mobile_bench.records import Tensor

RUNTIME = "ai-edge-litert"
#: Where a partition's operations cannot be told apart, one of these stands for each.
NOT_NAMED = "not named"
TIMED = "run and read of the output"
_COUNT = re.compile(r"(\w+) operations will run on the GPU, and (?:the remaining|all) (\d+) operations")
_ADAPTER = re.compile(r"Selected adapter: (.+?), arch=.*backend=(\w+), adapterType=(.+)")
_ODD = re.compile(r"^W\d{4} .*gpu_model_builder\.cc:\d+\] (.+)$", re.MULTILINE)
_UNSUPPORTED = "operations are not supported by GPU delegate"


class GpuModel(Model):
    """A .tflite on the GPU. What Model says holds; `run` returns when the outputs have been read.

    facts: accelerator (its name, interface and kind), fully_accelerated, timed.
    """

    def __init__(
        self, runtime: Runtime, compiled: object, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...],
        places: tuple[list[int], list[int]],
    ):  # fmt: skip
        self.runtime, self.inputs, self.outputs = runtime, inputs, outputs
        self.delegated_ops, self.fallback_ops, self.facts = (), (), {}
        self._compiled = compiled
        self._given, self._answers = compiled.create_input_buffers(0), compiled.create_output_buffers(0)
        # Buffers lie in the order of the signature, inputs and outputs in that of the graph.
        self._to = [self._given[place] for place in places[0]]
        self._from = [
            (self._answers[place], *_as_buffer(int(np.prod(tensor.shape)), np.dtype(tensor.dtype)))
            for place, tensor in zip(places[1], outputs)
        ]
        self._read: list[np.ndarray] = []

    def set_inputs(self, *values: np.ndarray) -> None:
        for buffer, value, tensor in zip(self._to, values, self.inputs):
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ModelRefused(
                    "The file's input has another shape or type",
                    received=(value.shape, value.dtype.name), allowed=(tensor.shape, tensor.dtype),
                )  # fmt: skip
            buffer.write(np.ascontiguousarray(value).reshape(-1).view(_as_buffer(0, value.dtype)[1]))

    def run(self) -> None:
        try:
            self._run_and_read()
        except (ValueError, RuntimeError) as error:
            raise DelegateError("The GPU failed while it ran the file", received=_flat(error)) from error

    def get_outputs(self) -> list[np.ndarray]:
        return [v.view(tensor.dtype).reshape(tensor.shape).copy() for v, tensor in zip(self._read, self.outputs)]

    @property
    def bare_invoke(self):
        """The run and the reading of all outputs: what a timer should call."""
        return self._run_and_read

    def _run_and_read(self) -> None:
        self._compiled.run_by_index(0, self._given, self._answers)
        self._read = [buffer.read(count, dtype) for buffer, count, dtype in self._from]


def _as_buffer(count: int, dtype: np.dtype) -> tuple[int, np.dtype]:
    """What LiteRT's buffers take for `count` values: 64-bit integers pass as pairs of 32 bits, which they lack."""
    return (2 * count, np.dtype(np.int32)) if dtype in (np.int64, np.uint64) else (count, dtype)


def open_gpu(
    path: str | Path, threads: int = 1, runtime: str = "auto", *, batch: int = 1,
    size: tuple[int, int] | None = None, options: dict[str, str] | None = None, allow_fallback: bool = False,
) -> GpuModel:  # fmt: skip
    """Load a .tflite on the GPU; threads are for what the CPU runs of it, the rest is as in open_model.

    options: fields of LiteRT's GpuOptions, such as {'enforce_f32': 'true'}. Raises DelegateError where there is
    no GPU, where it fails, where it takes nothing, or where it leaves operations to the CPU and that is not
    allowed.
    """
    check_cpu(platform.machine(), Path("/proc/cpuinfo"))
    if runtime not in ("auto", RUNTIME):
        raise InputError("Only LiteRT reaches the GPU", received=f"the runtime {runtime}", allowed=RUNTIME)
    found = load_runtime(RUNTIME)
    check_is_tflite(path)
    content = read_model(path)
    gpu_options = _gpu_options(options or {})
    lines: list[bytes] = []
    try:
        with listening(lines):
            model, full = _open(found, path, content, threads, batch, size, gpu_options, allow_fallback)
    except (ValueError, RuntimeError, MemoryError) as error:
        text = _text(lines)
        sys.stderr.write(text)
        _refuse_fallback(text, content, allow_fallback)
        raise _failure(error, text, Path(path)) from error
    except BaseException:
        sys.stderr.write(_text(lines))
        raise
    text = _text(lines)
    sys.stderr.write(text)
    model.delegated_ops, model.fallback_ops, why = placement(text, content.main.operators, full)
    if not model.delegated_ops:
        raise DelegateError("The GPU takes none of the file's operations", received=why or "no reason given")
    if model.fallback_ops:
        model.warnings = fallback_allowed(allow_fallback, model.delegated_ops, model.fallback_ops, why)
    adapter = _ADAPTER.search(text)
    kind = adapter[3].strip() if adapter else ""
    odd = _ODD.search(text)
    if odd:
        model.said = odd[1].strip()
        model.warnings += (f"the GPU accelerator warned when it took the file: {model.said}",)
    model.facts = {
        "accelerator": f"{adapter[1]} ({adapter[2]}, {kind})" if adapter else "GPU",
        "fully_accelerated": not model.fallback_ops, "timed": TIMED,
    }  # fmt: skip
    if "software" in kind.lower():
        model.warnings += (
            f"the GPU is {adapter[1]}, which is software on the CPU: its answers are those of a GPU, its times are "
            "not; measure where there is one",
        )
    return model


def _open(
    found: Runtime, path: str | Path, content: TFLiteModel, threads: int, batch: int, size: tuple[int, int] | None,
    gpu_options: object, allow_fallback: bool,
) -> tuple[GpuModel, bool]:  # fmt: skip
    from ai_edge_litert import compiled_model as litert

    accelerators = litert.HardwareAccelerator.GPU
    if allow_fallback:
        accelerators |= litert.HardwareAccelerator.CPU
    compiled = litert.CompiledModel.from_file(
        str(path),
        options=litert.Options(
            hardware_accelerators=accelerators, cpu_options=litert.CpuOptions(num_threads=threads),
            gpu_options=gpu_options,
        ),
    )  # fmt: skip
    signature = compiled.get_signature_by_index(0)
    key, names, graph = signature["key"], signature["inputs"], content.main
    tensors = [graph.tensors[compiled.get_input_tensor_details(key)[name]["index"]] for name in names]
    for place, tensor in enumerate(tensors):
        now = list(tensor.shape)
        wanted = wanted_shape(tensor.name, now, list(tensor.shape_signature or tensor.shape), batch, size)
        if wanted != now:
            compiled.resize_input_tensor(place, wanted, strict=False)
    sides = []
    for details, order, sought in (
        (compiled.get_input_tensor_details(key), names, graph.inputs),
        (compiled.get_output_tensor_details(key), signature["outputs"], graph.outputs),
    ):
        numbers = [details[name]["index"] for name in order]
        if sorted(numbers) != sorted(sought):
            raise ModelRefused(
                "The file's signature leaves out some of its inputs or outputs", received=len(numbers),
                allowed=len(sought),
            )  # fmt: skip
        places = [numbers.index(number) for number in sought]
        sides.append((tuple(_tensor(details[order[place]], graph.tensors[numbers[place]]) for place in places), places))
    # Asked only now: a resize lets the GPU go, and asking for the shapes brings it back.
    full = compiled.is_fully_accelerated()
    (inputs, to), (outputs, from_) = sides
    return GpuModel(found, compiled, inputs, outputs, (to, from_)), full


def placement(text: str, operators: Sequence[Operator], full: bool) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """The operations on the GPU, those left to the CPU, and why, from what the GPU printed.

    It says how many it takes, and which kinds it does not know, unless it takes all. `full` is what LiteRT says: with
    the CPU allowed that is true as well where XNNPACK has the rest, and so it counts only where no number was
    printed. Where more are left than those, the others run on the CPU because they stand between them, and which ones
    is not said: 'not named' stands for each.
    """
    names = [operator.custom_code or operator.op for operator in operators]
    counts = _COUNT.findall(text)
    if not counts:
        return (tuple(names), (), "") if full else ((), tuple(names), "")
    why = _unsupported(text)
    unknown = {line.partition(":")[0] for line in why}
    taken = int(counts[-1][0]) if counts[-1][0].isdigit() else 0
    on_gpu = [name for name in names if name not in unknown]
    on_cpu = [name for name in names if name in unknown]
    if len(on_gpu) != taken:
        on_gpu = [NOT_NAMED] * taken
        on_cpu += [NOT_NAMED] * (len(names) - taken - len(on_cpu))
    return tuple(on_gpu), tuple(on_cpu[: len(names) - taken]), "; ".join(why)


def check_cpu(machine: str, cpuinfo: Path) -> None:
    """Raise DelegateError on the ARM cores where LiteRT's WebGPU library ends the process as it is loaded."""
    try:
        check_atomics(machine, cpuinfo)
    except InputError as error:
        raise DelegateError(
            "LiteRT's GPU accelerator ends with an illegal instruction on this processor", received=error.received,
            allowed=error.allowed, next_step="Measure on the CPU: --accelerator cpu",
        ) from error  # fmt: skip


def _gpu_options(options: dict[str, str]) -> object:
    from ai_edge_litert.gpu_options import GpuOptions

    known = [entry.name for entry in dataclasses.fields(GpuOptions)]
    words = {"true": True, "1": True, "false": False, "0": False}
    for key, value in options.items():
        if key not in known or value.lower() not in words:
            raise InputError(
                "The GPU has no such option", received=f"{key}={value}",
                allowed=", ".join(f"{name}=true" for name in known),
            )  # fmt: skip
    return GpuOptions(**{key: words[value.lower()] for key, value in options.items()})


def _tensor(details: dict, info: TensorInfo) -> Tensor:
    scale, zero = (info.scales[0], info.zero_points[0]) if info.scales and info.zero_points else (0.0, 0)
    return Tensor(info.name, tuple(details["shape"]), np.dtype(details["dtype"]).name, float(scale), int(zero))


def _refuse_fallback(text: str, content: TFLiteModel, allowed: bool) -> None:
    """With the GPU alone, an operation that it lacks ends in an error that does not name it; its lines do."""
    if not allowed and _COUNT.search(text):
        taken, left, why = placement(text, content.main.operators, False)
        fallback_allowed(False, taken, left, why)


def _failure(error: Exception, text: str, path: Path) -> DelegateError | ModelRefused:
    if "unresolved custom op" in text.lower():
        line = next(line for line in text.splitlines() if "unresolved custom op" in line.lower())
        return refusal_of(RuntimeError(line.removeprefix("ERROR: ")), path)
    if "No adapters found" in text or "Failed to get or create delegate WebGPU" in text:
        loader = next((line for line in text.splitlines() if "Couldn't load Vulkan" in line), "No adapters found")
        return DelegateError(
            "There is no GPU that LiteRT can use here", received=loader.removeprefix("Warning: "),
            next_step="Install the Vulkan loader (apt install libvulkan1) and the GPU's own driver; "
            "vulkaninfo --summary lists what is found",
        )  # fmt: skip
    if "dynamic-sized tensors" in text:
        return DelegateError(
            "The GPU takes only files in which every size is fixed", received="a file with tensors of open size",
            next_step="Convert the model with a fixed batch of 1, or measure on the CPU",
        )  # fmt: skip
    said = [line for line in text.splitlines() if line.startswith(("ERROR", "E0000"))]
    return DelegateError(
        "The GPU refused the model", received=" ".join([*said[-2:], _flat(error)])[:500],
        next_step="Measure it on the CPU, or convert it again",
    )  # fmt: skip


def _unsupported(text: str) -> list[str]:
    """The lines 'OPERATION: reason' of the last such list."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if _UNSUPPORTED in line]
    if not starts:
        return []
    rest = lines[starts[-1] + 1 :]
    end = next((number for number, line in enumerate(rest) if _COUNT.search(line)), 0)
    return [line.strip() for line in rest[:end] if line.strip()]


def _text(lines: list[bytes]) -> str:
    return b"".join(lines).decode("utf-8", "replace")


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
