"""Write .tflite files of a few operations in a row, without TensorFlow."""

from pathlib import Path

import numpy as np

FLOAT, INTEGER, INTEGER_64 = 0, 2, 4


def write_chain(path: Path, *operations: str, shape=(1, 8)) -> Path:
    """A file that feeds one float32 input of `shape` through `operations`.

    ADD adds a value to itself; CUMSUM and REVERSED sum along the last axis, from the left and from the right;
    CUT takes the second slice of the second axis and drops that axis; EDGETPU is what the Edge TPU's compiler makes
    of operations; ROWS makes rows of whatever comes, each as long as one image of `shape`; INT64, the last, casts to
    int64; all others take one input.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [schema.BufferT()], [], [graph]
    graph.name, graph.tensors, graph.operators = "main", [], []

    def tensor(name, shape, constant=None):
        made = schema.TensorT()
        made.name, made.shape, made.type = name, np.array(shape, np.int32), FLOAT
        if constant is not None:
            buffer = schema.BufferT()
            buffer.data = np.array(constant, np.int32).reshape(-1).view(np.uint8)
            made.type, made.buffer = INTEGER, len(model.buffers)
            model.buffers.append(buffer)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def constant(name, values):
        return tensor(name, np.shape(values), values)

    value = tensor("given", shape)
    graph.inputs = np.array([value], np.int32)
    for number, name in enumerate(operations):
        kind, options, inputs = name, None, [value]
        if name == "ADD":
            options, inputs = schema.AddOptionsT(), [value, value]
        elif name == "EDGETPU":
            kind = "CUSTOM"
        elif name in ("CUMSUM", "REVERSED"):
            kind, options = "CUMSUM", schema.CumsumOptionsT()
            options.reverse = name == "REVERSED"
            inputs.append(constant("axis", len(shape) - 1))
        elif name == "CUT":
            kind, options = "STRIDED_SLICE", schema.StridedSliceOptionsT()
            options.shrinkAxisMask = 2
            begin, end = [0, 1, *(0 for _ in shape[2:])], [shape[0], 2, *shape[2:]]
            inputs += [constant("begin", begin), constant("end", end), constant("strides", [1 for _ in shape])]
            shape = (shape[0], *shape[2:])
        elif name == "ROWS":
            kind = "RESHAPE"
            inputs.append(constant("rows", [-1, int(np.prod(shape[1:]))]))
            shape = (shape[0], int(np.prod(shape[1:])))
        elif name == "INT64":
            kind = "CAST"
        value = tensor(f"{name.lower()}_{number}", shape)
        if name == "INT64":
            graph.tensors[value].type = INTEGER_64
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
        code.customCode = "edgetpu-custom-op" if kind == "CUSTOM" else None
        operator.opcodeIndex, operator.inputs = number, np.array(inputs, np.int32)
        operator.outputs = np.array([value], np.int32)
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__[:-1])
        model.operatorCodes.append(code)
        graph.operators.append(operator)
    graph.outputs = np.array([value], np.int32)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path
