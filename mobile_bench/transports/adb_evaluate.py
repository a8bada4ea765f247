"""What a file answers on a device by adb: benchmark_model reads each image from a file and writes its output.

The images are prepared, and the answers read, by mobile_bench.evaluate itself, here; only the inference is there.
So the same outputs give the same predictions. One invocation an image makes it slow: take a small sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mobile_bench.errors import JobFailed, ModelRefused
from mobile_bench.evaluate import _Evaluator, read_sample
from mobile_bench.flatbuffer import TensorInfo, read_model
from mobile_bench.inputs import InputSpec
from mobile_bench.records import Tensor

#: invoke(raw input tensor, name -> shape) gives the raw output tensor.
Invoke = Callable[[bytes, dict], bytes]


def evaluate_there(invoke: Invoke, job: dict, files: Mapping, outputs: Mapping, tell: Callable, runtime: str) -> dict:
    """The result of mobile_bench.evaluate's child, with its predictions at outputs['out']."""
    images, labels = read_sample(files["sample"])
    spec = InputSpec.from_dict(job["spec"])
    model = _RemoteModel(Path(files["tflite"]), spec, invoke, runtime)
    relay = lambda done, total: tell({"kind": "progress", "done": done, "total": total})
    result = _There(Path(files["tflite"]), images, labels, spec, 1, "auto", relay, model).run()
    np.save(outputs["out"], result.predictions)
    facts = {name: getattr(result, name) for name in ("correct", "images", "runtime", "workers", "seconds")}
    return {**facts, "inputs": [asdict(t) for t in result.inputs], "outputs": [asdict(t) for t in result.outputs]}


class _There(_Evaluator):
    """An evaluation whose interpreter is on a device."""

    def __init__(self, *args):
        *rest, self._model = args
        super().__init__(*rest)

    def _open(self) -> _RemoteModel:
        return self._model


class _RemoteModel:
    """As much of interpreter.Model as an evaluation takes."""

    def __init__(self, tflite: Path, spec: InputSpec, invoke: Invoke, runtime: str):
        graph = read_model(tflite).subgraphs[0]
        self.inputs = tuple(_tensor(graph.tensors[index], spec.shape) for index in graph.inputs)
        self.outputs = tuple(_tensor(graph.tensors[index]) for index in graph.outputs)
        self.runtime, self._invoke = runtime, invoke

    def set_inputs(self, value: np.ndarray) -> None:
        self._raw = np.ascontiguousarray(value).tobytes()

    def run(self) -> None:
        self._answer = self._invoke(self._raw, {self.inputs[0].name: self.inputs[0].shape})

    def get_outputs(self) -> list[np.ndarray]:
        output = self.outputs[0]
        dtype = np.dtype(output.dtype)
        expected = math.prod(output.shape) * dtype.itemsize
        if len(self._answer) != expected:
            raise JobFailed(
                "The device's answer was cut short", received=f"{len(self._answer)} bytes", allowed=f"{expected} bytes"
            )
        return [np.frombuffer(self._answer, dtype).reshape(output.shape)]


def _tensor(info: TensorInfo, open_shape: tuple[int, ...] = ()) -> Tensor:
    shape = tuple(max(1, n) for n in info.shape)
    if open_shape and len(shape) == 4 and any(n < 0 for n in info.shape_signature[1:]):
        shape = (1, *open_shape)
    try:
        np.dtype(info.dtype)
    except TypeError as error:
        raise ModelRefused("A tensor's type cannot be sent to a device", received=info.dtype) from error
    scale, zero = (info.scales[0], info.zero_points[0]) if info.scales and info.zero_points else (0.0, 0)
    return Tensor(info.name, shape, info.dtype, float(scale), int(zero))
