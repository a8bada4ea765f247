"""Write .tflite files operation by operation, without TensorFlow: int8 tensors with a scale unless told otherwise.

graph = Graph()
image = graph.input((1, 8, 8, 4))
graph.op("CONV_2D", [image, graph.weights((4, 1, 1, 4)), graph.constant([0] * 4, "int32")], (1, 8, 8, 4))
model = graph.content()
"""

import numpy as np

TYPES = {"float32": 0, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9}
#: The options table of an operation, where it is not the operation's own name in capitals.
OPTIONS = {
    "AVERAGE_POOL_2D": "Pool2DOptions", "CONV_2D": "Conv2DOptions", "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "MAX_POOL_2D": "Pool2DOptions", "MEAN": "ReducerOptions", "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions", "SUM": "ReducerOptions",
}  # fmt: skip


class Graph:
    """A graph of one subgraph; its methods return numbers of tensors."""

    def __init__(self):
        from ai_edge_litert import schema_py_generated as schema

        self.schema, self.model, self.main = schema, schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.buffers, self.model.operatorCodes = 3, [schema.BufferT()], []
        self.model.subgraphs = [self.main]
        self.main.name, self.main.tensors, self.main.operators = "main", [], []
        self.inputs, self.outputs = [], []

    def tensor(self, shape, dtype="int8", *, name=None, values=None, signature=None, scale=0.5, variable=False):
        made = self.schema.TensorT()
        made.name = name or f"t{len(self.main.tensors)}"
        made.shape, made.type, made.isVariable = np.array(shape, np.int32), TYPES[dtype], variable
        if signature is not None:
            made.shapeSignature = np.array(signature, np.int32)
        if dtype in ("int8", "uint8", "int16") and scale:
            made.quantization = self.schema.QuantizationParametersT()
            made.quantization.scale = np.array([scale], np.float32)
            made.quantization.zeroPoint = np.array([0], np.int64)
        if values is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.ascontiguousarray(np.array(values, dtype)).reshape(-1).view(np.uint8)
            made.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.main.tensors.append(made)
        return len(self.main.tensors) - 1

    def input(self, shape, dtype="int8", **facts):
        self.inputs.append(self.tensor(shape, dtype, **facts))
        return self.inputs[-1]

    def constant(self, values, dtype="int32", **facts):
        return self.tensor(np.shape(values), dtype, values=values, **facts)

    def weights(self, shape, dtype="int8"):
        return self.constant(np.ones(shape), dtype)

    def op(self, kind, inputs, *shapes, dtype="int8", version=1, name=None, **options):
        """Add an operation; the number of its first output. options: the schema's fields, as its Python names them."""
        made, code = self.schema.OperatorT(), self.schema.OperatorCodeT()
        custom = not hasattr(self.schema.BuiltinOperator, kind)
        code.builtinCode = self.schema.BuiltinOperator.CUSTOM if custom else getattr(self.schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        code.customCode = kind if custom else None
        made.opcodeIndex, made.inputs = len(self.model.operatorCodes), np.array(inputs, np.int32)
        outputs = [self.tensor(shape, dtype, name=name if not n else None) for n, shape in enumerate(shapes)]
        made.outputs = np.array(outputs, np.int32)
        if options:
            table = OPTIONS.get(kind) or "".join(word.capitalize() for word in kind.split("_")) + "Options"
            made.builtinOptions = getattr(self.schema, f"{table}T")()
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            for field, value in options.items():
                assert hasattr(made.builtinOptions, field), field
                setattr(made.builtinOptions, field, value)
        self.model.operatorCodes.append(code)
        self.main.operators.append(made)
        self.outputs = outputs
        return outputs[0] if outputs else -1

    def content(self, outputs=None):
        """The file; its outputs are those of the last operation unless told otherwise."""
        import flatbuffers

        self.main.inputs = np.array(self.inputs, np.int32)
        self.main.outputs = np.array(self.outputs if outputs is None else outputs, np.int32)
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())
