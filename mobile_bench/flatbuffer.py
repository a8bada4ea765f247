"""What a .tflite holds, read without a runtime: tensors, operators, constants, metadata, signatures.

Every offset, length and index is checked before it is followed, so that a damaged or hostile file costs an
error and no more: see mobile_bench.flattables.

    model = read_model("model.tflite")
    for operator in model.main.operators:
        print(operator.op, [model.main.tensors[i].shape for i in operator.inputs if i >= 0])
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_bench.errors import InputError
from mobile_bench.flattables import Reader, Table
from mobile_bench.tflite_ops import BUILTINS, DTYPES, ENUMS, OPTIONS, named

if TYPE_CHECKING:
    import numpy as np

_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMPY_DTYPES = frozenset(("bool", "float16", "float32", "float64", "complex64", "complex128", *_INTEGERS))
# NumPy has no more, and the product of a million dimensions would take hours.
_MOST_DIMENSIONS = 64
_FORMS = {"int": "i", "int64": "q", "bool": "?", "float": "f", "subgraph": "i"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a subgraph.

    shape: (1, 224, 224, 3); an open dimension is 1 here and -1 in shape_signature. dtype: NumPy's name, or
    int4, uint4, int2, bfloat16, float8_..., string, resource, variant, or the schema's number where it is newer
    than this reader. constant_bytes: 0 where it is not a constant. scales and zero_points: one each, or one
    per slice along quantized_dimension; empty where the tensor is not quantized. buffer: its number in the file.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    shape_signature: tuple[int, ...]
    dtype: str
    constant_bytes: int = 0
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    quantized_dimension: int = 0
    is_variable: bool = False
    sparse: bool = False
    buffer: int = 0


@dataclass(frozen=True, slots=True)
class Operator:
    """One step of a subgraph. inputs and outputs: indices of its tensors, an input of -1 is left out.

    op: a name such as 'CONV_2D', 'CUSTOM' (its name is then custom_code), or the schema's number where it is
    newer than this reader. options: the schema's names, {'padding': 'SAME', 'stride_w': 2}, with the schema's
    defaults for all that the file does not say; {} for operators without options.
    """

    index: int
    op: str
    custom_code: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Subgraph:
    """One graph of a model, its operators in the order in which they run."""

    index: int
    name: str
    tensors: tuple[TensorInfo, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """A named way to call a subgraph: {'image': 0} gives the tensor of each argument by its name."""

    key: str
    subgraph: int
    inputs: dict[str, int]
    outputs: dict[str, int]


@dataclass(frozen=True, slots=True)
class TFLiteModel:
    """A whole file. At least one subgraph; metadata: name -> content; size_bytes: of the file."""

    version: int
    description: str
    subgraphs: tuple[Subgraph, ...]
    metadata: dict[str, bytes]
    signatures: tuple[Signature, ...]
    size_bytes: int
    _content: bytes = field(repr=False, compare=False)
    _spans: tuple[tuple[int, int], ...] = field(repr=False, compare=False)

    @property
    def main(self) -> Subgraph:
        return self.subgraphs[0]

    def buffer(self, tensor: TensorInfo) -> memoryview:
        """The bytes of a constant as they lie in the file, without a copy; empty for other tensors."""
        start, length = self._spans[tensor.buffer] if tensor.constant_bytes else (0, 0)
        return memoryview(self._content)[start : start + length]

    def constant(self, tensor: TensorInfo) -> np.ndarray | None:
        """A constant as a read-only array of the tensor's shape, without a copy.

        None where the tensor is no constant, is sparse, has a type that NumPy has not (int4, string), or where
        its bytes do not make its shape.
        """
        if not tensor.constant_bytes or tensor.sparse or tensor.dtype not in NUMPY_DTYPES:
            return None
        import numpy as np

        try:
            values = np.frombuffer(self.buffer(tensor), np.dtype(tensor.dtype).newbyteorder("<"))
            return values.reshape(tensor.shape) if min(tensor.shape, default=0) >= 0 else None
        except ValueError:
            return None


def read_model(source: str | Path | bytes) -> TFLiteModel:
    """Everything that a .tflite says about itself; `source` is a path or the file's content.

    Raises InputError where the file cannot be read and ModelRefused where it is no .tflite, is cut short or
    is damaged; the message says which field and where.
    """
    reader = Reader(*_load(source))
    model = reader.root()
    spans = _buffers(model)
    codes = [_operator_code(code) for code in model.tables("operator_codes", "OperatorCode")]
    graphs = model.tables("subgraphs", "SubGraph")
    if not graphs:
        raise reader.refusal("Model.subgraphs is empty", model.place)
    subgraphs = tuple(_subgraph(n, graph, codes, spans, len(graphs)) for n, graph in enumerate(graphs))
    return TFLiteModel(
        version=model.number("version", "I"),
        description=model.text("description"),
        subgraphs=subgraphs,
        metadata=_metadata(model, spans),
        signatures=tuple(_signature(entry, subgraphs) for entry in model.tables("signature_defs", "SignatureDef")),
        size_bytes=len(reader.content),
        _content=reader.content,
        _spans=spans,
    )


def read_metadata(source: str | Path | bytes) -> dict[str, bytes]:
    """Only the metadata of a .tflite, whatever else in it is damaged; raises as read_model does."""
    model = Reader(*_load(source)).root()
    return _metadata(model, _buffers(model))


def _load(source: str | Path | bytes) -> tuple[bytes, str]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), f"{len(source)} bytes"
    try:
        path = Path(source)
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may never end
            raise InputError("The model is not a file", received=path, next_step="Give the path of a .tflite")
        return path.read_bytes(), str(path)
    except (OSError, ValueError, TypeError, MemoryError) as error:
        raise InputError("The model cannot be read", received=f"{source} ({error})") from error


def _buffers(model: Table) -> tuple[tuple[int, int], ...]:
    """(start, length) of every buffer. Large models keep theirs behind the flatbuffer, at `offset`."""
    reader, spans = model.reader, []
    for buffer in model.tables("buffers", "Buffer"):
        start, length = buffer.vector("data", 1)
        offset, size = buffer.number("offset", "Q"), buffer.number("size", "Q")
        if not length and offset > 1 and size:  # 1 is the converter's mark for "not known yet"
            if offset + size > len(reader.content):
                raise reader.refusal(f"Buffer.offset leads to {size} bytes that lie outside the file", offset)
            start, length = offset, size
        spans.append((start, length))
    return tuple(spans)


def _operator_code(code: Table) -> tuple[str, str, int]:
    # Files from before 127 operators existed have only the first of the two.
    number = max(code.number("deprecated_builtin_code", "b"), code.number("builtin_code", "i"))
    if number < 0:
        raise code.reader.refusal(f"OperatorCode.builtin_code is {number}", code.place)
    return named(BUILTINS, number), code.text("custom_code"), code.number("version", "i", 1)


def _subgraph(index: int, graph: Table, codes: list, spans: tuple, graphs: int) -> Subgraph:
    tensors = tuple(_tensor(n, tensor, spans) for n, tensor in enumerate(graph.tables("tensors", "Tensor")))
    operators = []
    for number, operator in enumerate(graph.tables("operators", "Operator")):
        code = operator.index("opcode_index", len(codes))
        operators.append(
            Operator(
                number,
                *codes[code],
                inputs=operator.indices("inputs", len(tensors), optional=True),
                outputs=operator.indices("outputs", len(tensors)),
                options=_options(operator, codes[code][0], graphs),
            )
        )
    inputs, outputs = (graph.indices(name, len(tensors)) for name in ("inputs", "outputs"))
    return Subgraph(index, graph.text("name"), tensors, tuple(operators), inputs, outputs)


def _tensor(index: int, tensor: Table, spans: tuple) -> TensorInfo:
    # Buffer 0 means "none", and files without constants may have no buffers at all.
    buffer = tensor.index("buffer", max(len(spans), 1), "I")
    shape, signature = tensor.numbers("shape", "i"), tensor.numbers("shape_signature", "i")
    if max(len(shape), len(signature)) > _MOST_DIMENSIONS:
        raise tensor.reader.refusal(f"Tensor.shape has {max(len(shape), len(signature))} dimensions", tensor.place)
    quantization = tensor.table("quantization", "QuantizationParameters")
    return TensorInfo(
        index=index,
        name=tensor.text("name"),
        shape=shape,
        shape_signature=signature or shape,
        dtype=named(DTYPES, tensor.number("type", "b")),
        constant_bytes=spans[buffer][1] if buffer else 0,
        scales=quantization.numbers("scale", "f") if quantization else (),
        zero_points=quantization.numbers("zero_point", "q") if quantization else (),
        quantized_dimension=quantization.number("quantized_dimension", "i") if quantization else 0,
        is_variable=tensor.number("is_variable", "?"),
        sparse=tensor.table("sparsity", "SparsityParameters") is not None,
        buffer=buffer,
    )


def _options(operator: Table, op: str, graphs: int) -> dict[str, Any]:
    known = OPTIONS.get(op)
    if known is None:
        return {}
    union = "builtin_options_2" if known.second else "builtin_options"
    # The runtimes, too, take options of another operator's type for none.
    matches = operator.number(f"{union}_type", "B") == known.union
    table = operator.table(union, f"{op} options") if matches else None
    return {option.name: _option(table, option, graphs) for option in known.fields}


def _option(table: Table | None, option: Any, graphs: int) -> Any:
    number, name, kind, default = option
    if kind in ("ints", "floats"):
        return table.numbers(name, kind[0], number) if table else ()
    if kind == "text":
        return table.text(name, number) if table else ""
    if kind == "subgraph":
        return table.index(name, graphs, "i", number) if table else default
    value = table.number(name, _FORMS.get(kind, "b"), default, number) if table else default
    if kind in ENUMS:
        return named(ENUMS[kind], value)
    return {"bool": bool, "float": float}.get(kind, int)(value)


def _metadata(model: Table, spans: tuple) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in model.tables("metadata", "Metadata"):
        name, buffer = entry.text("name"), entry.index("buffer", max(len(spans), 1), "I")
        if name not in found:
            start, length = spans[buffer] if buffer < len(spans) else (0, 0)
            model.reader.spend(length, "Metadata.buffer", entry.place)
            found[name] = model.reader.content[start : start + length]
    return found


def _signature(entry: Table, subgraphs: tuple[Subgraph, ...]) -> Signature:
    number = entry.index("subgraph_index", len(subgraphs), "I")
    count = len(subgraphs[number].tensors)
    inputs, outputs = (
        {item.text("name"): item.index("tensor_index", count, "I") for item in entry.tables(name, "TensorMap")}
        for name in ("inputs", "outputs")
    )
    return Signature(entry.text("signature_key"), number, inputs, outputs)
