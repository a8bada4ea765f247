"""Sparse storage of a pruned model's weights: by the converter, and taken back where LiteRT could not open the file.

A sparse weight is unpacked by a DENSIFY in front of its operation. LiteRT's XNNPACK, in use unless one says otherwise,
unpacks int8 weights for int8 convolutions only: with those of a FULLY_CONNECTED, or of an operation of dynamic range,
it refuses the whole file ("failed to delegate", LiteRT 2.3, xnnpack_delegate.cc: there it reads the packed tensor).
"""

from __future__ import annotations


def sparsified(content: bytes) -> tuple[bytes, int]:
    """A .tflite with sparse weights where the converter finds enough zeros, and how many had to stay dense."""
    from tensorflow.lite.python.convert import mlir_sparsify

    return _dense_again(mlir_sparsify(content), content)


def _dense_again(sparse: bytes, dense: bytes) -> tuple[bytes, int]:
    """`sparse` with the weights of `dense` for each operation that XNNPACK would refuse, and their number."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, whole = (schema.ModelT.InitFromPackedBuf(part, 0) for part in (sparse, dense))
    (graph, *_), (whole_graph, *_) = model.subgraphs, whole.subgraphs
    kinds = schema.BuiltinOperator
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    code_of = lambda operator: codes[operator.opcodeIndex]
    unpacking = {op.outputs[0]: op for op in graph.operators if code_of(op) == kinds.DENSIFY}
    removed = set()
    # But for the DENSIFYs, the operations are those of the dense file, in its order.
    working = (op for op in graph.operators if code_of(op) != kinds.DENSIFY)
    for operator, original in zip(working, whole_graph.operators, strict=True):
        if len(operator.inputs) < 2 or operator.inputs[1] not in unpacking:
            continue
        weight = graph.tensors[operator.inputs[1]]
        dynamic = graph.tensors[operator.inputs[0]].type == schema.TensorType.FLOAT32
        if weight.type != schema.TensorType.INT8 or not (dynamic or code_of(operator) == kinds.FULLY_CONNECTED):
            continue
        packed = graph.tensors[unpacking[operator.inputs[1]].inputs[0]]
        model.buffers[packed.buffer].data = whole.buffers[whole_graph.tensors[original.inputs[1]].buffer].data
        weight.buffer, packed.buffer = packed.buffer, 0
        removed.add(int(operator.inputs[1]))
    if not removed:
        return sparse, 0
    graph.operators = [op for op in graph.operators if not (code_of(op) == kinds.DENSIFY and op.outputs[0] in removed)]
    for index in (unpacking[place].inputs[0] for place in removed):
        graph.tensors[index].sparsity = None  # nobody reads it any more
    builder = flatbuffers.Builder(len(dense) + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output()), len(removed)
