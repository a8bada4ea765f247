"""LiteRT's C library, the one in the ai-edge-litert wheel, by ctypes: just what a profile of each operation needs.

The wheel's Python gives no profiler. The declarations follow litert/c/*.h of LiteRT 2.3; a library that lacks
one of them, or of another age, is refused before anything is called. What goes wrong inside it can end the
process: use it in a child only, as mobile_bench.profile does.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path

import numpy as np

from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.records import Tensor

#: CreateModelFromFile took no environment before this version, and nothing in the library tells which it takes.
FIRST_VERSION, LAST_MAJOR = (2, 3), 2
NEEDS = "ai-edge-litert 2.3 or a later 2.x (pip install 'ai-edge-litert>=2.3,<3')"
_LIBRARIES = {"linux": "libLiteRt.so", "darwin": "libLiteRt.dylib", "win32": "libLiteRt.dll"}
_CPU, _WRITE = 1, 1
_MAX_RANK = 8
#: LiteRtElementType -> numpy's name.
_DTYPES = {
    1: "float32", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8", 10: "float16",
    11: "float64", 13: "uint64", 16: "uint32", 17: "uint16",
}  # fmt: skip


class _Layout(ctypes.Structure):
    # C packs `rank` (7 bits) and `has_strides` (1 bit) into the first byte.
    _fields_ = [
        ("bits", c_uint8),
        ("padding", c_uint8 * 3),
        ("dimensions", c_int32 * _MAX_RANK),
        ("strides", c_uint32 * _MAX_RANK),
    ]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dimensions[: min(self.bits & 0x7F, _MAX_RANK)])


class _TensorType(ctypes.Structure):
    _fields_ = [("element_type", c_int), ("layout", _Layout)]


_OUT, _HANDLE = POINTER(c_void_p), c_void_p
#: name -> arguments. Each gives a LiteRtStatus, 0 for success.
_FUNCTIONS = {
    "LiteRtCreateEnvironment": (c_int, c_void_p, _OUT),
    "LiteRtCreateModelFromFile": (_HANDLE, c_char_p, _OUT),
    "LiteRtGetNumModelSignatures": (_HANDLE, POINTER(c_size_t)),
    "LiteRtGetModelSignature": (_HANDLE, c_size_t, _OUT),
    "LiteRtGetNumSignatureInputs": (_HANDLE, POINTER(c_size_t)),
    "LiteRtGetNumSignatureOutputs": (_HANDLE, POINTER(c_size_t)),
    "LiteRtGetSignatureInputTensorByIndex": (_HANDLE, c_size_t, _OUT),
    "LiteRtGetSignatureOutputTensorByIndex": (_HANDLE, c_size_t, _OUT),
    "LiteRtGetTensorName": (_HANDLE, POINTER(c_char_p)),
    "LiteRtGetRankedTensorType": (_HANDLE, POINTER(_TensorType)),
    "LiteRtCreateOptions": (_OUT,),
    "LiteRtSetOptionsHardwareAccelerators": (_HANDLE, c_int),
    "LiteRtCreateOpaqueOptions": (c_char_p, c_void_p, c_void_p, _OUT),
    "LiteRtAddOpaqueOptions": (_HANDLE, _HANDLE),
    "LiteRtCreateCompiledModel": (_HANDLE, _HANDLE, _HANDLE, _OUT),
    "LiteRtCompiledModelResizeInputTensor": (_HANDLE, c_size_t, c_size_t, POINTER(c_int), c_size_t),
    "LiteRtGetCompiledModelOutputTensorLayouts": (_HANDLE, c_size_t, c_size_t, POINTER(_Layout), ctypes.c_bool),
    "LiteRtGetCompiledModelInputBufferRequirements": (_HANDLE, c_size_t, c_size_t, _OUT),
    "LiteRtGetCompiledModelOutputBufferRequirements": (_HANDLE, c_size_t, c_size_t, _OUT),
    "LiteRtCreateManagedTensorBufferFromRequirements": (_HANDLE, POINTER(_TensorType), _HANDLE, _OUT),
    "LiteRtLockTensorBuffer": (_HANDLE, _OUT, c_int),
    "LiteRtUnlockTensorBuffer": (_HANDLE,),
    "LiteRtGetTensorBufferPackedSize": (_HANDLE, POINTER(c_size_t)),
    "LiteRtRunCompiledModel": (_HANDLE, c_size_t, c_size_t, _OUT, c_size_t, _OUT),
    "LiteRtCompiledModelGetProfiler": (_HANDLE, _OUT),
    "LiteRtStartProfiler": (_HANDLE,),
    "LiteRtStopProfiler": (_HANDLE,),
    "LiteRtGetProfileSummary": (_HANDLE, _HANDLE, POINTER(c_void_p)),
}
# The library frees the text of its options through this; the text lives as long as this module's list.
_KEEP = ctypes.CFUNCTYPE(None, c_void_p)(lambda _: None)
_TEXTS: list[ctypes.Array] = []


def load() -> tuple[ctypes.CDLL, str]:
    """The library and its version. InputError where there is none, or none that can profile here."""
    check_atomics(platform.machine(), Path("/proc/cpuinfo"))
    path, version = _find()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _lacking(f"{path.name} of ai-edge-litert {version} cannot be loaded: {error}") from error
    for name, arguments in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise _lacking(f"ai-edge-litert {version} without the function {name}") from None
        function.argtypes, function.restype = arguments, c_int
    return library, version


def _find() -> tuple[Path, str]:
    spec = importlib.util.find_spec("ai_edge_litert")
    try:
        version = importlib.metadata.version("ai-edge-litert")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if spec is None or not version or not spec.submodule_search_locations:
        other = importlib.util.find_spec("tflite_runtime") is not None
        raise _lacking("no ai-edge-litert here, only tflite-runtime" if other else "no ai-edge-litert here")
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if numbers < FIRST_VERSION or numbers[0] > LAST_MAJOR:
        raise _lacking(f"ai-edge-litert {version}")
    path = Path(next(iter(spec.submodule_search_locations))) / _LIBRARIES.get(sys.platform, "libLiteRt.so")
    if not path.is_file():
        raise _lacking(f"ai-edge-litert {version} without {path.name}")
    return path, version


def _lacking(received: str) -> InputError:
    return InputError(
        "No runtime here can time single operations", received=received, allowed=NEEDS,
        next_step="mobile-bench run times whole inferences on any runtime",
    )  # fmt: skip


def check_atomics(machine: str, cpuinfo: Path) -> None:
    """Refuse the ARM cores on which the library aborts: those without atomics (ARMv8.0)."""
    if machine not in ("aarch64", "arm64") or not cpuinfo.is_file():
        return
    features = [line.split(":", 1)[1].split() for line in cpuinfo.read_text().splitlines() if "Features" in line]
    if features and not all("atomics" in names for names in features):
        raise InputError(
            "LiteRT's profiler ends with an illegal instruction on this processor",
            received="an ARM core without the atomics of ARMv8.1, such as Cortex-A53 or A72 (Raspberry Pi 3 and 4)",
            allowed="Cortex-A55, A76 (Raspberry Pi 5) or later, or x86",
            next_step="mobile-bench run works here",
        )


class CompiledModel:
    """A .tflite that LiteRT has made ready for the CPU, its inputs in place.

    inputs: what the legacy Interpreter says of them, in the shapes wanted; values: one array for each.
    """

    def __init__(
        self, library: ctypes.CDLL, path: str, inputs: tuple[Tensor, ...], values: list[np.ndarray], *, threads: int,
        profiling: bool,
    ):  # fmt: skip
        self._library = library
        self._environment = self._make("LiteRtCreateEnvironment", 0, None)
        model = self._make("LiteRtCreateModelFromFile", self._environment, str(path).encode())
        if not self._count("LiteRtGetNumModelSignatures", model):
            raise ModelRefused("LiteRT finds nothing to run in the file", received=path)
        signature = self._make("LiteRtGetModelSignature", model, 0)
        # 'xnnpack' is what the library calls the options of its CPU accelerator.
        options = {"xnnpack": f"num_threads = {threads}\n"}
        if profiling:
            options["runtime_options_string"] = "enable_profiling = true\n"
        self._model = self._make("LiteRtCreateCompiledModel", self._environment, model, self._options(options))
        self._inputs = self._input_buffers(signature, inputs, values)
        self._outputs = self._output_buffers(signature)
        self._arguments = (self._model, 0, len(self._inputs), self._inputs, len(self._outputs), self._outputs)

    def run(self) -> None:
        self._call("LiteRtRunCompiledModel", *self._arguments)

    @property
    def bare_invoke(self):
        """The library's own run, with nothing around it: what a timer should call."""
        function, arguments = self._library.LiteRtRunCompiledModel, self._arguments
        return lambda: function(*arguments)

    def profile(self, run) -> str:
        """Profile what `run()` does; the library's own report, in text."""
        profiler = self._make("LiteRtCompiledModelGetProfiler", self._model)
        self._call("LiteRtStartProfiler", profiler)
        run()
        self._call("LiteRtStopProfiler", profiler)
        text = self._make("LiteRtGetProfileSummary", profiler, self._model)
        return ctypes.string_at(text).decode("utf-8", "replace") if text else ""

    def _options(self, texts: dict[str, str]) -> c_void_p:
        options = self._make("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
        for name, text in texts.items():
            _TEXTS.append(ctypes.create_string_buffer(text.encode()))
            place, free = ctypes.cast(_TEXTS[-1], c_void_p), ctypes.cast(_KEEP, c_void_p)
            self._call(
                "LiteRtAddOpaqueOptions", options, self._make("LiteRtCreateOpaqueOptions", name.encode(), place, free)
            )
        return options

    def _input_buffers(self, signature: c_void_p, inputs: tuple[Tensor, ...], values: list[np.ndarray]):
        count = self._count("LiteRtGetNumSignatureInputs", signature)
        if count != len(inputs):
            raise ModelRefused(
                "The file's signature leaves out some of its inputs", received=count, allowed=len(inputs)
            )
        tensors = [self._make("LiteRtGetSignatureInputTensorByIndex", signature, i) for i in range(count)]
        names = [self._name(tensor) for tensor in tensors]
        known = {tensor.name: value for tensor, value in zip(inputs, values)}
        if set(known) == set(names) and len(known) == count:
            # The signature may list them in another order than the graph.
            values = [known[name] for name in names]
        buffers = (c_void_p * count)()
        for index, (tensor, value) in enumerate(zip(tensors, values)):
            kind = self._type(tensor)
            if _DTYPES.get(kind.element_type) != value.dtype.name:
                raise ModelRefused("LiteRT's profiler does not take such an input", received=value.dtype.name)
            if kind.layout.shape != value.shape:
                shape = (c_int * value.ndim)(*value.shape)
                self._call("LiteRtCompiledModelResizeInputTensor", self._model, 0, index, shape, value.ndim)
                kind.layout.bits = value.ndim
                kind.layout.dimensions[: value.ndim] = list(value.shape)
            buffers[index] = self._buffer("Input", index, kind)
            self._fill(buffers[index], value)
        return buffers

    def _output_buffers(self, signature: c_void_p):
        count = self._count("LiteRtGetNumSignatureOutputs", signature)
        layouts, buffers = (_Layout * count)(), (c_void_p * count)()
        self._call("LiteRtGetCompiledModelOutputTensorLayouts", self._model, 0, count, layouts, True)
        for index in range(count):
            kind = self._type(self._make("LiteRtGetSignatureOutputTensorByIndex", signature, index))
            kind.layout = layouts[index]
            buffers[index] = self._buffer("Output", index, kind)
        return buffers

    def _buffer(self, side: str, index: int, kind: _TensorType) -> c_void_p:
        needs = self._make(f"LiteRtGetCompiledModel{side}BufferRequirements", self._model, 0, index)
        return self._make("LiteRtCreateManagedTensorBufferFromRequirements", self._environment, byref(kind), needs)

    def _fill(self, buffer: int, value: np.ndarray) -> None:
        value, size, place = np.ascontiguousarray(value), c_size_t(), c_void_p()
        self._call("LiteRtGetTensorBufferPackedSize", buffer, byref(size))
        if size.value != value.nbytes:
            raise ModelRefused("LiteRT wants an input of another size", received=value.nbytes, allowed=size.value)
        self._call("LiteRtLockTensorBuffer", buffer, byref(place), _WRITE)
        ctypes.memmove(place, value.ctypes.data, value.nbytes)
        self._call("LiteRtUnlockTensorBuffer", buffer)

    def _type(self, tensor: c_void_p) -> _TensorType:
        kind = _TensorType()
        self._call("LiteRtGetRankedTensorType", tensor, byref(kind))
        return kind

    def _name(self, tensor: c_void_p) -> str:
        name = c_char_p()
        self._call("LiteRtGetTensorName", tensor, byref(name))
        return (name.value or b"").decode("utf-8", "replace")

    def _count(self, function: str, handle: c_void_p) -> int:
        count = c_size_t()
        self._call(function, handle, byref(count))
        return count.value

    def _make(self, function: str, *arguments) -> c_void_p:
        handle = c_void_p()
        self._call(function, *arguments, byref(handle))
        return handle

    def _call(self, function: str, *arguments) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise ModelRefused(
                "LiteRT's C library refused the model", received=f"{function} gave status {status}",
                next_step="mobile-bench run uses another of its interpreters, which may take it",
            )  # fmt: skip
