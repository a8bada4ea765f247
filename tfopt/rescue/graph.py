"""A .tflite that can be changed: constants, scales and operators, and the layers among them.

The object API of the schema (ai_edge_litert.schema_py_generated) holds the whole file; nothing here needs
TensorFlow. Files come from our own converter, checked by mobile_bench.flatbuffer before they get here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mobile_bench.flatbuffer import read_model
from mobile_bench.profile import layers_of

_BUILTIN = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
DTYPES = {
    schema.TensorType.FLOAT32: np.float32, schema.TensorType.FLOAT16: np.float16, schema.TensorType.INT8: np.int8,
    schema.TensorType.UINT8: np.uint8, schema.TensorType.INT16: np.int16, schema.TensorType.INT32: np.int32,
    schema.TensorType.INT64: np.int64, schema.TensorType.BOOL: np.bool_,
}  # fmt: skip
_TYPES = {np.dtype(dtype): number for number, dtype in DTYPES.items()}
KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


@dataclass(frozen=True)
class Layer:
    """An operator with weights. operator, input, weights, bias and output are numbers in the file; bias is -1
    where there is none. window: rows and columns of the kernel; (1, 1) for dense layers."""

    name: str
    op: str
    operator: int
    input: int
    weights: int
    bias: int
    output: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    same_padding: bool = False
    activation: str = "NONE"
    multiplier: int = 1

    @property
    def depthwise(self) -> bool:
        return self.op == "DEPTHWISE_CONV_2D"


class Graph:
    """The main graph of a .tflite, to be changed in place and packed again."""

    def __init__(self, content: bytes):
        self.model = schema.ModelT.InitFromPackedBuf(bytearray(content), 0)
        self.main = self.model.subgraphs[0]
        self._names = layers_of(read_model(content))

    def pack(self) -> bytes:
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def cut(self, operators: int, tensors: list[int]) -> bytes:
        """A file of the first `operators` operators that answers with `tensors`."""
        main, model = self.main, self.model
        kept = main.operators, main.outputs, model.signatureDefs
        main.operators, main.outputs = main.operators[:operators], np.array(tensors, np.int32)
        model.signatureDefs = None
        try:
            return self.pack()
        finally:
            main.operators, main.outputs, model.signatureDefs = kept

    def op(self, number: int) -> str:
        code = self.model.operatorCodes[self.main.operators[number].opcodeIndex]
        return _BUILTIN.get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")

    def name(self, tensor: int) -> str:
        name = self.main.tensors[tensor].name
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def find(self, name: str) -> int:
        """The number of the tensor with this name, -1 for none."""
        return next((n for n in range(len(self.main.tensors)) if self.name(n) == name), -1)

    def dtype(self, tensor: int) -> np.dtype | None:
        """None where NumPy has no such type."""
        found = DTYPES.get(self.main.tensors[tensor].type)
        return None if found is None else np.dtype(found)

    def is_constant(self, tensor: int) -> bool:
        data = self.model.buffers[self.main.tensors[tensor].buffer].data
        return data is not None and len(data) > 0

    def array(self, tensor: int) -> np.ndarray:
        """A constant, in the tensor's shape."""
        info = self.main.tensors[tensor]
        data = np.ascontiguousarray(np.asarray(self.model.buffers[info.buffer].data, np.uint8))
        return data.view(DTYPES[info.type]).reshape(tuple(info.shape))

    def set_array(self, tensor: int, values: np.ndarray) -> None:
        """Give a constant new values of its own shape and type; other tensors with the same buffer keep theirs."""
        info = self.main.tensors[tensor]
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values.astype(DTYPES[info.type])).tobytes(), np.uint8)
        if sum(other.buffer == info.buffer for other in self.main.tensors) > 1:
            info.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        else:
            self.model.buffers[info.buffer] = buffer

    def scale(self, tensor: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points as float64 and int64; empty where the tensor is not quantized."""
        quantization = self.main.tensors[tensor].quantization
        if quantization is None or quantization.scale is None:
            return np.zeros(0), np.zeros(0, np.int64)
        return np.asarray(quantization.scale, np.float64), np.asarray(quantization.zeroPoint, np.int64)

    def set_scale(self, tensor: int, scales: np.ndarray, zero_points: np.ndarray | None = None) -> None:
        quantization = self.main.tensors[tensor].quantization
        quantization.scale = np.asarray(scales, np.float32).reshape(-1)
        quantization.zeroPoint = np.zeros(quantization.scale.size, np.int64) if zero_points is None else zero_points
        quantization.min = quantization.max = None

    def values(self, raw: np.ndarray, tensor: int) -> np.ndarray:
        """What raw contents of a tensor mean: float32 (per-tensor scales)."""
        scales, zeros = self.scale(tensor)
        if raw.dtype.kind == "f" or not scales.size:
            return raw.astype(np.float32)
        return (raw.astype(np.float32) - np.float32(zeros[0])) * np.float32(scales[0])

    def add_tensor(self, name: str, shape, dtype, values: np.ndarray | None = None, quantization=None) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name, np.asarray(shape, np.int32), _TYPES[np.dtype(dtype)]
        tensor.quantization, tensor.buffer, tensor.hasRank = quantization, 0, True
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values.astype(dtype)).tobytes(), np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.main.tensors.append(tensor)
        return len(self.main.tensors) - 1

    def operator(self, op: str, inputs: list[int], outputs: list[int], version: int = 1) -> schema.OperatorT:
        """A new operator without options, not yet in the graph."""
        made = schema.OperatorT()
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        self.retype(made, op, version)
        return made

    def retype(self, operator: schema.OperatorT, op: str, version: int) -> None:
        """Make an operator one of another kind or version; its options stay."""
        number = getattr(schema.BuiltinOperator, op)
        codes = self.model.operatorCodes
        place = next((n for n, c in enumerate(codes) if c.builtinCode == number and c.version == version), None)
        if place is None:
            code = schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
            codes.append(code)
            place = len(codes) - 1
        operator.opcodeIndex = place

    def replace_outputs(self, tensors: Mapping[int, int]) -> None:
        """Answer with other tensors: old number -> new number, in the graph and in its signatures."""
        self.main.outputs = np.array([tensors.get(int(t), int(t)) for t in self.main.outputs], np.int32)
        for signature in self.model.signatureDefs or []:
            for output in signature.outputs:
                output.tensorIndex = tensors.get(output.tensorIndex, output.tensorIndex)

    def layers(self) -> list[Layer]:
        """The operators with constant weights, in the order in which they run. Weights behind a DEQUANTIZE of a
        constant are that constant."""
        stored = {
            int(operator.outputs[0]): int(operator.inputs[0])
            for number, operator in enumerate(self.main.operators)
            if self.op(number) == "DEQUANTIZE" and self.is_constant(int(operator.inputs[0]))
        }
        found = []
        for number, operator in enumerate(self.main.operators):
            op, inputs = self.op(number), [int(i) for i in operator.inputs]
            if op not in KERNELS or len(inputs) < 2:
                continue
            weights = stored.get(inputs[1], inputs[1])
            if not self.is_constant(weights) or self.dtype(weights) is None:
                continue
            options, shape = operator.builtinOptions, tuple(int(n) for n in self.main.tensors[weights].shape)
            dense = op == "FULLY_CONNECTED"
            name = self._names[number] if number < len(self._names) else ""
            found.append(
                Layer(
                    name or self.name(int(operator.outputs[0])).split(";")[0],
                    op,
                    number,
                    inputs[0],
                    weights,
                    inputs[2] if len(inputs) > 2 else -1,
                    int(operator.outputs[0]),
                    (1, 1) if dense else shape[1:3],
                    (1, 1) if dense else (options.strideH, options.strideW),
                    (1, 1) if dense else (options.dilationHFactor, options.dilationWFactor),
                    not dense and options.padding == schema.Padding.SAME,
                    _ACTIVATIONS.get(options.fusedActivationFunction, "?"),
                    getattr(options, "depthMultiplier", None) or 1,
                )
            )
        return found


_ACTIVATIONS = {number: name for name, number in vars(schema.ActivationFunctionType).items() if isinstance(number, int)}
