"""One face over the TFLite runtimes: ai_edge_litert (preferred) and tflite_runtime.

`open_model(path)` loads a file and says what it takes and gives; `Model.invoke` runs one batch of
float32 values through it, quantizing and dequantizing as the file demands.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench.errors import InputError, ModelRefused, unknown_name
from mobile_bench.files import check_is_file
from mobile_bench.records import Tensor

#: distribution name -> module that holds its Interpreter, in the order 'auto' tries them.
RUNTIMES = {"ai-edge-litert": "ai_edge_litert.interpreter", "tflite-runtime": "tflite_runtime.interpreter"}
_IDENTIFIER = b"TFL3"


@dataclass(frozen=True)
class Runtime:
    """A runtime that was found: its distribution name, version and Interpreter class."""

    name: str
    version: str
    interpreter: type

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Model:
    """A .tflite that is loaded and ready to run. Not for use by two threads at once.

    inputs, outputs: records.Tensor, with the shapes in force now. runtime: the Runtime in use. delegated_ops,
    fallback_ops: the operations that a delegate took and those left to the CPU, () without one. facts: what a
    record of the device should say of how it runs, {} on the CPU; warnings: what makes its times doubtful; said:
    what the accelerator itself found odd in the file.
    """

    warnings: tuple[str, ...] = ()
    said = ""

    def __init__(self, runtime: Runtime, interpreter, delegated_ops: tuple[str, ...] = (), fallback_ops=()):
        self.runtime = runtime
        self.delegated_ops, self.fallback_ops = delegated_ops, fallback_ops
        self.facts: dict = {}
        self._interpreter = interpreter
        self._input_places = [details["index"] for details in interpreter.get_input_details()]
        self._output_places = [details["index"] for details in interpreter.get_output_details()]
        self.inputs = tuple(_tensor(details) for details in interpreter.get_input_details())
        self.outputs = tuple(_tensor(details) for details in interpreter.get_output_details())

    def invoke(self, *batches: np.ndarray) -> tuple[np.ndarray, ...]:
        """One float32 array per input, such as (1, 224, 224, 3); one float32 array per output.

        Raises ModelRefused when the shapes do not fit or the runtime fails on the way.
        """
        if len(batches) != len(self.inputs):
            raise ModelRefused(
                "The file does not take that many inputs", received=len(batches), allowed=len(self.inputs)
            )
        self.set_inputs(*(quantize(batch, tensor) for batch, tensor in zip(batches, self.inputs)))
        self.run()
        return tuple(dequantize(value, tensor) for value, tensor in zip(self.get_outputs(), self.outputs))

    def set_inputs(self, *values: np.ndarray) -> None:
        """Put values in place as they are: shapes and dtypes must be those of `inputs`."""
        for place, value in zip(self._input_places, values):
            try:
                self._interpreter.set_tensor(place, value)
            except (ValueError, RuntimeError) as error:
                raise refusal_of(error) from error

    def run(self) -> None:
        """Compute the outputs from the inputs in place."""
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise refusal_of(error) from error

    def get_outputs(self) -> list[np.ndarray]:
        """The outputs as the file gives them, as copies."""
        return [self._interpreter.get_tensor(place) for place in self._output_places]

    @property
    def bare_invoke(self):
        """The runtime's own invoke, with nothing around it: what a timer should call."""
        return self._interpreter.invoke


def open_model(
    path: str | Path, threads: int = 1, runtime: str = "auto", *, batch: int = 1,
    size: tuple[int, int] | None = None, resize: bool = False, delegate: object = None,
) -> Model:  # fmt: skip
    """Load a .tflite and allocate its tensors.

    batch: images per inference; the first dimension of every input is resized to it. size: (height,
    width) for a file that leaves them open; with `resize` also where it fixes another one, as far as its operations
    and its answer's form allow that. delegate: what mobile_bench.delegates.load gave; it takes what it
    can before the CPU does, or DelegateError is raised. Raises InputError (no such file, no runtime) or
    ModelRefused (not a .tflite, truncated, an operation the runtime lacks, a shape it cannot take). A
    file that lies about its own structure can crash the process: run strangers' files in a child, as
    mobile_bench.measure and the command line do.
    """
    found = load_runtime(runtime)
    check_is_tflite(path)
    placement, forced = (), False
    # What a delegate says is passed on at once: it may be its last words.
    with _quiet() if delegate is None else nullcontext():
        try:
            interpreter = found.interpreter(model_path=str(path), num_threads=threads)
            before = _answers(interpreter, batch)
            forced = _resize(interpreter, batch, size, resize)
            if delegate is not None:
                from mobile_bench.delegates import apply

                placement = apply(delegate, interpreter)
            interpreter.allocate_tensors()
            if forced:
                interpreter.invoke()  # some operations find only now that sizes do not fit
        except (ValueError, RuntimeError, MemoryError) as error:
            if forced and "unresolved custom op" not in str(error).lower():
                many = f" in a batch of {batch}, which may be what it cannot do" if batch > 1 else ""
                raise ModelRefused(
                    "The file fixes its input size, and cannot be run with another one",
                    received=f"{size[0]}x{size[1]}{many} ({' '.join(str(error).split())[:200]})",
                    next_step="Export it with an open height and width, or once for each size",
                ) from error  # fmt: skip
            raise refusal_of(error, Path(path)) from error
    if forced:
        _check_answers(before, interpreter, size)
    return Model(found, interpreter, *placement)


@functools.cache
def load_runtime(name: str = "auto") -> Runtime:
    """The runtime of that name, or for 'auto' the first that is installed and works."""
    if name != "auto" and name not in RUNTIMES:
        raise unknown_name("runtime", name, ("auto", *RUNTIMES))
    failures = {}
    for candidate in RUNTIMES if name == "auto" else (name,):
        try:
            with _quiet():
                module = importlib.import_module(RUNTIMES[candidate])
            return Runtime(candidate, importlib.metadata.version(candidate), module.Interpreter)
        except ModuleNotFoundError as error:
            failures[candidate] = "not installed" if error.name in _roots(candidate) else str(error)
        except (ImportError, AttributeError, ValueError, OSError) as error:
            # tflite-runtime under numpy 2, or imported after TensorFlow, fails in one of these ways.
            failures[candidate] = " ".join(str(error).split())[:200]
    raise InputError(
        "No TFLite runtime can be loaded" if name == "auto" else f"The runtime {name} cannot be loaded",
        received="; ".join(f"{candidate}: {reason}" for candidate, reason in failures.items()),
        next_step="Install one: pip install ai-edge-litert (or tflite-runtime 'numpy<2' on Python below 3.12)",
    )


def check_is_tflite(path: str | Path) -> None:
    """Raise InputError where there is no file, ModelRefused where its first bytes are not a .tflite's."""
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise InputError("The model file cannot be read", received=f"{path} ({error.strerror})") from error
    if head[4:] != _IDENTIFIER:
        raise ModelRefused(
            "This is not a TensorFlow Lite file",
            received=f"{path}, which {'starts with ' + repr(head) if head else 'is empty'}",
            allowed="a .tflite file",
            next_step="Convert a Keras model with: tfopt convert",
        )


def quantize(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Real values to what `tensor` holds: q = round(value / scale) + zero_point, clipped to its dtype.

    Jacob et al. 2018 (arXiv:1712.05877), equation 1. Float tensors are only cast.
    """
    dtype = np.dtype(tensor.dtype)
    if not np.issubdtype(dtype, np.integer):
        return np.ascontiguousarray(values, dtype)
    scaled = values / np.float32(tensor.scale or 1.0)
    np.rint(scaled, out=scaled)
    scaled += np.float32(tensor.zero_point)
    limits = np.iinfo(dtype)
    np.clip(scaled, limits.min, limits.max, out=scaled)
    return scaled.astype(dtype)


def dequantize(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    """What `tensor` holds as float32: value = scale (q - zero_point), the same paper's equation 1."""
    if tensor.scale:
        return (values.astype(np.float32) - np.float32(tensor.zero_point)) * np.float32(tensor.scale)
    return np.asarray(values, np.float32)


def _tensor(details: dict) -> Tensor:
    scales = details.get("quantization_parameters", {}).get("scales", ())
    zeros = details.get("quantization_parameters", {}).get("zero_points", ())
    scale, zero = (float(scales[0]), int(zeros[0])) if len(scales) and len(zeros) else (0.0, 0)
    shape = tuple(int(n) for n in details["shape"])
    return Tensor(str(details["name"]), shape, np.dtype(details["dtype"]).name, scale, zero)


def _answers(interpreter, batch: int) -> list[tuple[int, ...]]:
    """The shapes that the outputs should have for `batch` images, from what the file says of itself."""
    images = max(1, int((*interpreter.get_input_details()[0]["shape"], 1)[0]))
    shapes = [[int(n) for n in details["shape"]] for details in interpreter.get_output_details()]
    return [(batch * shape[0] // images, *shape[1:]) if shape else () for shape in shapes]


def _check_answers(before: list[tuple[int, ...]], interpreter, size: tuple[int, int]) -> None:
    """ModelRefused where another input size made another answer: more rows, say, by a reshape to (-1, classes).

    Rows of scores, also as a picture of one pixel, have nothing to do with the size; maps grow with it, but not to
    nothing.
    """
    for expected, details in zip(before, interpreter.get_output_details()):
        shape = tuple(int(n) for n in details["shape"])
        if not expected:  # the file does not say
            continue
        scores = len(expected) < 3 or set(expected[1:-1]) == {1}
        if (scores and shape != expected) or len(shape) != len(expected) or shape[:1] != expected[:1] or 0 in shape:
            raise ModelRefused(
                "The file's answer has another form with another input size",
                received=f"{shape} at {size[0]}x{size[1]}", allowed=expected,
                next_step="Export it once for each size",
            )  # fmt: skip


def _resize(interpreter, batch: int, size: tuple[int, int] | None, resize: bool) -> bool:
    """Give the inputs the shapes that they are to have; whether a size that the file fixes was changed."""
    forced = False
    for details in interpreter.get_input_details():
        now = [int(n) for n in details["shape"]]
        wanted = wanted_shape(details["name"], now, [int(n) for n in details["shape_signature"]], batch, size)
        if resize and size and len(now) == 4 and tuple(wanted[1:3]) != tuple(size):
            wanted[1:3], forced = size, True
        if wanted != now:
            interpreter.resize_tensor_input(details["index"], wanted)
    return forced


def wanted_shape(
    name: str, now: list[int], signature: list[int], batch: int, size: tuple[int, int] | None
) -> list[int]:
    """The shape that an input is to have: `batch` first, and `size` where its signature leaves the size open."""
    wanted = [batch, *now[1:]] if now else now
    if any(n < 0 for n in signature[1:]):
        if size is None or len(now) != 4:
            raise ModelRefused(
                "The file leaves its input's size open",
                received=f"input {name!r} of shape {tuple(signature)}",
                next_step="Say it with --input-spec size=224 (or whatever it was trained on)",
            )
        wanted[1:3] = size
    return wanted


def refusal_of(error: Exception, path: Path | None = None) -> ModelRefused:
    """A runtime's message as one clear sentence. Its wording differs between versions, so fall back to it."""
    text = " ".join(str(error).split())
    if "unresolved custom op" in text.lower():
        operation = text.split(":", 1)[1].split()[0].rstrip(".") if ":" in text else text
        edge_tpu = operation == "edgetpu-custom-op"
        return ModelRefused(
            "The file holds an operation that this runtime does not have",
            received=operation,
            next_step="It was compiled for the Edge TPU: use the file that it was compiled from"
            if edge_tpu
            else "Convert the model with built-in operations only",
        )
    if "flatbuffer" in text.lower() or "allocation is null" in text.lower():
        size = f" ({path.stat().st_size} bytes)" if path else ""
        return ModelRefused(
            "The file is truncated or damaged", received=f"{path}{size}", next_step="Copy it or convert it again"
        )
    return ModelRefused("The runtime refused the model", received=text[:400] or type(error).__name__)


def _roots(candidate: str) -> tuple[str, ...]:
    module = RUNTIMES[candidate]
    return module, module.split(".")[0]


_STDERR = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the runtime's INFO lines, which native code writes, from the user's terminal; pass on the rest."""
    lines: list[bytes] = []
    try:
        with listening(lines):
            yield
    finally:
        kept = [line for line in lines if not line.startswith((b"INFO:", b"VERBOSE:"))]
        if kept:
            os.write(2, b"".join(kept))


@contextmanager
def listening(lines: list[bytes]) -> Iterator[None]:
    """Put what is written to standard error meanwhile, by native code too, into `lines` when the block ends."""
    with _STDERR, tempfile.TemporaryFile() as caught:
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            saved = os.dup(2)
        except OSError:
            yield
            return
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            lines += caught
