"""Tiny .tflite files, each of which isolates one operation or one rule of a GPU delegate. No TensorFlow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9}


class Graph:
    """Builds one graph. Tensors are the numbers that input, constant and op return."""

    def __init__(self):
        from ai_edge_litert import schema_py_generated as schema

        self._schema, self._model, self._graph = schema, schema.ModelT(), schema.SubGraphT()
        self._model.version, self._model.operatorCodes, self._model.subgraphs = 3, [], [self._graph]
        self._model.buffers = [schema.BufferT()]
        self._graph.name, self._graph.tensors, self._graph.operators = "main", [], []
        self._graph.inputs = []

    def tensor(self, shape, dtype="float32", scale=None, buffer=0, axis=0) -> int:
        made = self._schema.TensorT()
        made.name = f"t{len(self._graph.tensors)}"
        made.shape, made.type, made.buffer = np.array(shape, np.int32), _TYPES[dtype], buffer
        if scale is not None:
            made.quantization = self._schema.QuantizationParametersT()
            made.quantization.scale = np.atleast_1d(np.array(scale, np.float32))
            made.quantization.zeroPoint = np.zeros(made.quantization.scale.size, np.int64)
            made.quantization.quantizedDimension = axis
        self._graph.tensors.append(made)
        return len(self._graph.tensors) - 1

    def input(self, shape, dtype="float32", scale=None) -> int:
        self._graph.inputs.append(self.tensor(shape, dtype, scale))
        return self._graph.inputs[-1]

    def constant(self, values, dtype="float32", scale=None, axis=0) -> int:
        values = np.array(values, dtype)
        buffer = self._schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        return self.tensor(values.shape, dtype, scale, len(self._model.buffers) - 1, axis)

    def weights(self, *shape, dtype="float32", scale=None, axis=0) -> int:
        """Random constants: in -0.5..0.5, or the same as 8-bit integers."""
        values = np.random.default_rng(len(self._graph.tensors)).uniform(-0.5, 0.5, shape)
        return self.constant(values if "float" in dtype else np.round(values * 100), dtype, scale, axis)

    def op(self, name, inputs, *shapes, options="", dtype="float32", scale=None, version=1, custom="", **fields):
        """Add an operation; gives its output, or the outputs where there are several shapes.

        options: the schema's table, such as 'Conv2DOptions', with its fields in the schema's spelling.
        """
        schema, code, operator = self._schema, self._schema.OperatorCodeT(), self._schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version, code.customCode = min(code.builtinCode, 127), version, custom or None
        operator.opcodeIndex = len(self._model.operatorCodes)
        operator.inputs = np.array(inputs, np.int32)
        types = dtype if isinstance(dtype, tuple) else (dtype,) * len(shapes)
        made = [self.tensor(shape, kind, scale) for shape, kind in zip(shapes, types)]
        operator.outputs = np.array(made, np.int32)
        if options:
            table = getattr(schema, f"{options}T")()
            for field, value in fields.items():
                assert hasattr(table, field), field
                setattr(table, field, value)
            code_number = getattr(schema.BuiltinOptions, options, None)
            if code_number is None:
                operator.builtinOptions2, operator.builtinOptions2Type = table, getattr(schema.BuiltinOptions2, options)
            else:
                operator.builtinOptions, operator.builtinOptionsType = table, code_number
        self._model.operatorCodes.append(code)
        self._graph.operators.append(operator)
        return made[0] if len(made) == 1 else made

    def write(self, path: Path, *outputs: int) -> Path:
        import flatbuffers

        self._graph.outputs = np.array(outputs, np.int32)
        self._graph.inputs = np.array(self._graph.inputs, np.int32)
        builder = flatbuffers.Builder(1024)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path


def conv(g, shape=(1, 8, 8, 4), kernel=(4, 3, 3, 4), stride=1, version=1, kind="float32", given=None, **fields):
    """CONV_2D of a new input, or of `given`. kind: float32, float16 (weights), dynamic, int8, computed (weights)."""
    scale = 0.02 if kind == "int8" else None
    dtype = "int8" if kind == "int8" else "float32"
    value = g.input(shape, dtype, scale) if given is None else given
    if kind == "float32":
        weights, bias = g.weights(*kernel), g.weights(kernel[0])
    elif kind == "float16":
        weights, bias = (g.op("DEQUANTIZE", [g.weights(*s, dtype="float16")], s, options="DequantizeOptions")
                         for s in (kernel, kernel[:1]))  # fmt: skip
    elif kind == "computed":
        weights, bias = g.input(kernel), g.weights(kernel[0])
    else:
        weights = g.weights(*kernel, dtype="int8", scale=[0.01] * kernel[0])
        bias = g.weights(kernel[0])
        if kind == "int8":
            bias = g.constant([10] * kernel[0], "int32", [0.0002] * kernel[0])
    out = (shape[0], shape[1] // stride, shape[2] // stride, kernel[0])
    return g.op("CONV_2D", [value, weights, bias], out, options="Conv2DOptions", strideH=stride, strideW=stride,
                version=3 if kind == "int8" else version, dtype=dtype, scale=scale, **fields)  # fmt: skip


def depthwise(g, kind="float32", multiplier=1, claimed=None, shape=(1, 8, 8, 4)):
    made = shape[3] * multiplier
    value = g.input(shape)
    narrow = {} if kind == "float32" else {"dtype": "int8", "scale": [0.01] * made, "axis": 3}
    weights = g.weights(1, 3, 3, made, **narrow)
    return g.op("DEPTHWISE_CONV_2D", [value, weights, g.weights(made)], (*shape[:3], made),
                options="DepthwiseConv2DOptions", strideH=1, strideW=1,
                depthMultiplier=claimed or multiplier)  # fmt: skip


def dense(g, kind="float32", shape=(1, 8), bias=True, given=None, out=None, **fields):
    scales = {"dynamic": [0.01], "channels": [0.01] * 4}.get(kind)
    weights = g.weights(4, 8, **({"dtype": "int8", "scale": scales} if scales else {}))
    if kind == "computed":
        weights = g.input((4, 8))
    value = g.input(shape) if given is None else given
    return g.op("FULLY_CONNECTED", [value, weights, g.weights(4) if bias else -1], out or (shape[0], 4),
                options="FullyConnectedOptions", **fields)  # fmt: skip


def unary(g, name, shape=(1, 4, 4, 4), out=None, options="", dtype="float32", given=None, **fields):
    value = g.input(shape, dtype, fields.get("scale")) if given is None else given
    return g.op(name, [value], out or shape, options=options, dtype=fields.pop("made", dtype), **fields)


def binary(g, name, one=(1, 4, 4, 4), other=(1, 4, 4, 4), fixed=False, same=False, options="", dtype="float32",
           made="", **fields):  # fmt: skip
    """fixed: the second is a constant; same: both are the first."""
    first = g.input(one, dtype)
    second = first if same else g.weights(*other, dtype=dtype) if fixed else g.input(other, dtype)
    return g.op(name, [first, second], np.broadcast_shapes(one, other), options=options, dtype=made or dtype, **fields)


def reduce(g, name, shape=(1, 4, 4, 4), axes=(1, 2), keep=False, kind="int32", **fields):
    left = {axis % len(shape) for axis in axes}
    out = [1 if n in left else size for n, size in enumerate(shape) if keep or n not in left]
    return g.op(name, [g.input(shape), g.constant(axes, kind)], out, options="ReducerOptions", keepDims=keep, **fields)


def strided(g, shape, begin, end, strides, out, dtype="float32", **masks):
    given = [g.input(shape, dtype), *(g.constant(values, "int32") for values in (begin, end, strides))]
    return g.op("STRIDED_SLICE", given, out, options="StridedSliceOptions", dtype=dtype, **masks)


def pool(g, name="MAX_POOL_2D", shape=(1, 8, 8, 4), **fields):
    return g.op(name, [g.input(shape)], (shape[0], 4, 4, shape[3]), options="Pool2DOptions", strideH=2, strideW=2,
                filterHeight=2, filterWidth=2, **fields)  # fmt: skip


def concat(g, shapes, axis, fixed=False, **fields):
    given = [g.input(shape) for shape in shapes[:-1]]
    given.append(g.weights(*shapes[-1]) if fixed else g.input(shapes[-1]))
    out = list(shapes[0])
    out[axis] = sum(shape[axis] for shape in shapes)
    return g.op("CONCATENATION", given, out, options="ConcatenationOptions", axis=axis, **fields)


def pad(g, paddings, shape=(1, 4, 4, 4), name="PAD", value=None, kind="int32", **fields):
    options = {"PAD": "PadOptions", "PADV2": "PadV2Options", "MIRROR_PAD": "MirrorPadOptions"}[name]
    out = [before + size + after for size, (before, after) in zip(shape, paddings)]
    given = [g.input(shape), g.constant(paddings, kind), *([] if value is None else [g.constant(value)])]
    return g.op(name, given, out, options=options, **fields)


def softmax(g, beta=1.0, shape=(1, 8), given=None, **fields):
    value = g.input(shape) if given is None else given
    return g.op("SOFTMAX", [value], shape, options="SoftmaxOptions", beta=beta, **fields)


def squeeze(g, given, shape):
    return g.op("SQUEEZE", [given], shape, options="SqueezeOptions")


def reshape_to(g, value, shape):
    """A reshape of (1, 4) to itself, by a shape that is computed."""
    return g.op("RESHAPE", [value, shape], (1, 4), options="ReshapeOptions")


def reshape(g, shape, out, given=None, computed=False, dtype="float32"):
    value = g.input(shape, dtype) if given is None else given
    wanted = g.input((len(out),), "int32") if computed else g.constant(out, "int32")
    return g.op("RESHAPE", [value, wanted], out, options="ReshapeOptions", newShape=list(out), dtype=dtype)


def resize(g, name="RESIZE_BILINEAR", **fields):
    options = "ResizeBilinearOptions" if name == "RESIZE_BILINEAR" else "ResizeNearestNeighborOptions"
    return g.op(name, [g.input((1, 4, 4, 4)), g.constant([8, 8], "int32")], (1, 8, 8, 4), options=options, **fields)


def prelu(g, alpha, shape=(1, 4, 4, 4)):
    return g.op("PRELU", [g.input(shape), g.weights(*alpha)], shape)


def gather(g, axis=1, indices=(2, 0), kind="int32"):
    shape = (1, 4, 4, 4)
    out = shape[:axis] + np.shape(indices) + shape[axis + 1 :]
    return g.op("GATHER", [g.input(shape), g.constant(indices, kind)], out, options="GatherOptions", axis=axis)


def argmax(g, kind="int32", name="ARG_MAX", shape=(1, 8)):
    options = "ArgMaxOptions" if name == "ARG_MAX" else "ArgMinOptions"
    return g.op(name, [g.input(shape), g.constant([1], "int32")], (shape[0],), dtype=kind, options=options,
                outputType=_TYPES[kind])  # fmt: skip


def cumsum(g, **fields):
    return g.op("CUMSUM", [g.input((1, 8)), g.constant(1, "int32")], (1, 8), options="CumsumOptions", **fields)


def slice_(g, begin, size, shape=(1, 8, 8, 4), out=None, kind="int32"):
    given = [g.input(shape), g.constant(begin, kind), g.constant(size, kind)]
    return g.op("SLICE", given, out or size, options="SliceOptions")


def transpose(g, perm, shape=(1, 4, 5, 6)):
    return g.op("TRANSPOSE", [g.input(shape), g.constant(perm, "int32")], [shape[p] for p in perm],
                options="TransposeOptions")  # fmt: skip


def matmul(g, one=(1, 4, 8), other=(1, 8, 4), fixed=False, first=False):
    given = [g.weights(*one) if first else g.input(one), g.weights(*other) if fixed else g.input(other)]
    return g.op("BATCH_MATMUL", given, (*one[:-1], other[-1]), options="BatchMatMulOptions")


def split(g, count=2, axis=3, shape=(1, 4, 4, 4)):
    out = tuple(size // count if n == axis else size for n, size in enumerate(shape))
    return g.op("SPLIT", [g.constant(axis, "int32"), g.input(shape)], *[out] * count, options="SplitOptions",
                numSplits=count)  # fmt: skip


def unpack(g, shape=(1, 2, 4), axis=1):
    out = shape[:axis] + shape[axis + 1 :]
    return g.op("UNPACK", [g.input(shape)], *[out] * shape[axis], options="UnpackOptions", axis=axis, num=shape[axis])


def pack(g, shape=(1, 4, 4), axis=1, count=2, dtype="float32"):
    out = (*shape[:axis], count, *shape[axis:])
    return g.op("PACK", [g.input(shape, dtype) for _ in range(count)], out, options="PackOptions", axis=axis,
                valuesCount=count, dtype=dtype)  # fmt: skip


def select(g, condition=(1, 4, 4, 4), other=(1, 4, 4, 4), dtype="bool"):
    given = [g.input(condition, dtype), g.input((1, 4, 4, 4)), g.input(other)]
    return g.op("SELECT_V2", given, (1, 4, 4, 4), options="SelectV2Options")


def transpose_conv(g, shape=(1, 4, 4, 4)):
    given = [g.constant([1, 8, 8, 2], "int32"), g.weights(2, 3, 3, 4), g.input(shape)]
    return g.op("TRANSPOSE_CONV", given, (1, 8, 8, 2), options="TransposeConvOptions", strideH=2, strideW=2)


def cast_of(g, made, given=None):
    return unary(g, "CAST", given=given, made=made, options="CastOptions")


def swish(g, given, shape, count):
    for _ in range(count):
        given = g.op("LOGISTIC", [given], shape)
    return given
