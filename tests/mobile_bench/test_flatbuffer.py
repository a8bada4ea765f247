"""The reader of .tflite files: against the official schema code, and against files that lie."""

import os
import random
import re
import struct
import tracemalloc

import flatbuffers
import numpy as np
import pytest

from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.flatbuffer import NUMPY_DTYPES, read_metadata, read_model
from mobile_bench.opcost import cost_of
from mobile_bench.tflite_ops import BUILTINS, DTYPES, ENUMS, OPTIONS

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")

TINY = ("float32", "float16", "int8", "uint8", "int16", "sigmoid", "logits", "open_size", "two_inputs", "two_outputs")
ODD = ("self_calling", "custom_op", "not_a_number")
SHARED = (
    "deeplab_mobilenet_edgetpu_slim_cityscapes_quant",
    "deeplab_mobilenet_edgetpu_slim_cityscapes_quant_edgetpu",
    "invalid_custom_op",
    "mobilenet_v1_0.25_128_quant",
    "mobilenet_v1_0.25_128_quant_edgetpu",
    "mobilenet_v2_1.0_224_quant",
    "split_concat",
    "split_concat_edgetpu",
)


def names_of(enumeration):
    """The schema's names in the order of their numbers."""
    pairs = sorted((v, k) for k, v in vars(enumeration).items() if isinstance(v, int))
    assert [number for number, _ in pairs] == list(range(len(pairs)))
    return [name for _, name in pairs]


def pack(model):
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def unpack(content):
    return schema.ModelT.InitFromPackedBuf(content, 0)


def values(vector):
    return () if vector is None else tuple(np.asarray(vector).tolist())


def text(raw):
    return (raw or b"").decode() if isinstance(raw, bytes) or raw is None else raw


def attribute(option):
    head, *rest = option.split("_")
    return head + "".join(part.capitalize() for part in rest)


def same_options(found, operator, op):
    """Whether decoded options say what the schema's own code reads."""
    if op not in OPTIONS:
        return found == {}
    known = OPTIONS[op]
    table = operator.builtinOptions2 if known.second else operator.builtinOptions
    assert list(found) == [option.name for option in known.fields]
    for option in known.fields if table else ():
        expected = getattr(table, attribute(option.name))
        if option.kind in ("ints", "floats"):
            expected = values(expected)
        elif option.kind == "text":
            expected = text(expected)
        elif option.kind in ENUMS:
            expected = ENUMS[option.kind][expected]
        if found[option.name] != expected or type(found[option.name]) is not type(expected):
            return False
    return True


def compare(path):
    content = path.read_bytes()
    found, expected = read_model(path), unpack(content)
    assert read_model(content) == found == read_model(str(path))
    assert (found.version, found.description) == (expected.version, text(expected.description))
    assert found.size_bytes == len(content) and len(found.subgraphs) == len(expected.subgraphs)
    buffers = expected.buffers or []
    metadata = {text(entry.name): bytes(values(buffers[entry.buffer].data)) for entry in expected.metadata or []}
    assert found.metadata == metadata == read_metadata(content)
    for mine, theirs in zip(found.signatures, expected.signatureDefs or [], strict=True):
        assert (mine.key, mine.subgraph) == (text(theirs.signatureKey), theirs.subgraphIndex)
        assert mine.inputs == {text(item.name): item.tensorIndex for item in theirs.inputs}
        assert mine.outputs == {text(item.name): item.tensorIndex for item in theirs.outputs}
    for graph, theirs in zip(found.subgraphs, expected.subgraphs, strict=True):
        assert (graph.name, graph.inputs, graph.outputs) == (
            text(theirs.name),
            values(theirs.inputs),
            values(theirs.outputs),
        )
        for mine, tensor in zip(graph.tensors, theirs.tensors, strict=True):
            same_tensor(found, mine, tensor, buffers)
        for mine, operator in zip(graph.operators, theirs.operators, strict=True):
            code = expected.operatorCodes[operator.opcodeIndex]
            assert mine.op == BUILTINS[max(code.builtinCode, code.deprecatedBuiltinCode)]
            assert (mine.version, mine.custom_code) == (code.version, text(code.customCode))
            assert (mine.inputs, mine.outputs) == (values(operator.inputs), values(operator.outputs))
            assert same_options(mine.options, operator, mine.op), mine
            cost_of(found, mine, graph)
    return found


def same_tensor(model, mine, tensor, buffers):
    assert (mine.name, mine.shape) == (text(tensor.name), values(tensor.shape))
    assert mine.shape_signature == (values(tensor.shapeSignature) or values(tensor.shape))
    assert (mine.dtype, mine.is_variable) == (DTYPES[tensor.type], tensor.isVariable)
    assert mine.sparse == (tensor.sparsity is not None)
    quantization = tensor.quantization or schema.QuantizationParametersT()
    assert mine.scales == values(quantization.scale) and mine.zero_points == values(quantization.zeroPoint)
    assert mine.quantized_dimension == quantization.quantizedDimension
    data = bytes(values(buffers[tensor.buffer].data)) if buffers else b""
    assert (bytes(model.buffer(mine)), mine.constant_bytes) == (data, len(data))
    array = model.constant(mine)
    assert (array is None) == (not data or mine.sparse or mine.dtype not in NUMPY_DTYPES)
    if array is not None:
        assert (array.shape, array.dtype.name, array.tobytes()) == (mine.shape, mine.dtype, data)
        assert not array.flags.writeable and not array.flags.owndata, "a constant is a view of the file"


@pytest.mark.parametrize("name", TINY + ODD)
def test_tiny_models_read_as_the_official_code_reads_them(tiny, name):
    compare(tiny.path(name))


@pytest.mark.parametrize("name", SHARED)
def test_third_party_models_read_as_the_official_code_reads_them(shared_model, name):
    compare(shared_model(f"{name}.tflite"))


def test_a_model_by_its_facts(tiny):
    model = read_model(tiny.path("int8"))
    image, answer = (model.main.tensors[i[0]] for i in (model.main.inputs, model.main.outputs))
    assert (image.shape, image.shape_signature, image.dtype) == ((1, 12, 12, 3), (-1, 12, 12, 3), "int8")
    assert len(image.scales) == len(image.zero_points) == 1 and image.constant_bytes == 0
    assert answer.shape == (1, 4) and model.signatures[0].inputs == {"image": image.index}
    conv = model.main.operators[0]
    assert conv.op == "CONV_2D" and conv.options["padding"] == "SAME" and conv.options["stride_w"] == 2
    weights = model.main.tensors[conv.inputs[1]]
    assert len(weights.scales) == weights.shape[0] and weights.quantized_dimension == 0
    assert model.constant(weights).dtype == np.int8 and model.constant(image) is None
    assert len(model.buffer(image)) == 0


def test_the_tables_are_those_of_the_schema():
    assert list(BUILTINS) == names_of(schema.BuiltinOperator)
    assert list(DTYPES) == [name.lower() for name in names_of(schema.TensorType)]
    assert list(ENUMS["padding"]) == names_of(schema.Padding)
    assert list(ENUMS["activation"]) == names_of(schema.ActivationFunctionType)
    assert list(ENUMS["weights_format"]) == names_of(schema.FullyConnectedOptionsWeightsFormat)
    assert list(ENUMS["lstm_kernel"]) == names_of(schema.LSTMKernelType)
    assert list(ENUMS["lsh_projection"]) == names_of(schema.LSHProjectionType)
    assert list(ENUMS["combiner"]) == names_of(schema.CombinerType)
    assert list(ENUMS["mirror_pad"]) == names_of(schema.MirrorPadMode)


def one_operator(op, options=None, union=0, *, second=False):
    """A model of one operator on two tensors, with two subgraphs so that options may name either."""
    model, code, node = schema.ModelT(), schema.OperatorCodeT(), schema.OperatorT()
    model.version, model.buffers = 3, [schema.BufferT()]
    code.builtinCode = BUILTINS.index(op)
    code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 2
    node.inputs, node.outputs = np.array([0, -1], np.int32), np.array([1], np.int32)
    if second:
        node.builtinOptions2, node.builtinOptions2Type = options, union
    else:
        node.builtinOptions, node.builtinOptionsType = options, union
    model.operatorCodes, model.subgraphs = [code], []
    for operators in ([node], []):
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = [schema.TensorT(), schema.TensorT()], operators
        graph.inputs, graph.outputs = np.array([0], np.int32), np.array([1], np.int32)
        model.subgraphs.append(graph)
    return pack(model)


@pytest.mark.parametrize("op", sorted(OPTIONS))
def test_options_of_every_operator(op):
    known = OPTIONS[op]
    union = names_of(schema.BuiltinOptions2 if known.second else schema.BuiltinOptions)[known.union]
    table = getattr(schema, f"{union}T")()
    absent = read_model(one_operator(op)).main.operators[0].options
    for option in known.fields:
        default = getattr(table, attribute(option.name))
        assert option.kind in ("ints", "floats", "text") or int(default) == default == option.default
        full = {"ints": [3, -4], "floats": [0.5, 2.0], "text": "word", "bool": not default, "float": 0.25}
        value = full.get(option.kind, 1)
        if option.kind in ("ints", "floats"):
            value = np.array(value, np.int32 if option.kind == "ints" else np.float32)
        setattr(table, attribute(option.name), value)
    content = one_operator(op, table, known.union, second=known.second)
    operator = read_model(content).main.operators[0]
    assert (operator.op, operator.version, operator.inputs) == (op, 2, (0, -1))
    assert same_options(operator.options, unpack(content).subgraphs[0].operators[0], op)
    assert list(absent) == list(operator.options), "options are there whether the file says them or not"
    wrong = read_model(one_operator(op, schema.AbsOptionsT(), schema.BuiltinOptions.AbsOptions))
    assert wrong.main.operators[0].options == absent


def test_numbers_that_are_newer_than_the_tables(tiny):
    model = unpack(tiny.path("float32").read_bytes())
    model.operatorCodes[0].builtinCode, model.subgraphs[0].tensors[0].type = 5000, 99
    found = read_model(pack(model)).main
    assert found.operators[0].op == "5000" and found.operators[0].options == {} and found.tensors[0].dtype == "99"


def test_old_files_have_the_short_operator_code(tiny):
    model = unpack(tiny.path("float32").read_bytes())
    for code in model.operatorCodes:
        code.builtinCode = 0
    assert [o.op for o in read_model(pack(model)).main.operators] == [
        o.op for o in read_model(tiny.path("float32")).main.operators
    ]


def with_data_outside(content, shift=0):
    """The same model with its constants behind the flatbuffer, as files above 2 GB have them."""
    model = unpack(content)
    data = [bytes(values(buffer.data)) for buffer in model.buffers]
    start = 1
    for _ in range(2):  # the first time only to learn the length
        place = start + shift
        for buffer, part in zip(model.buffers, data):
            if part:
                buffer.data, buffer.offset, buffer.size = None, place, len(part)
                place += len(part)
        start = len(pack(model))
    return pack(model) + b"".join(data)


def test_constants_behind_the_flatbuffer(tiny):
    content = tiny.path("float32").read_bytes()
    near, far = read_model(content), read_model(with_data_outside(content))
    assert far.metadata == near.metadata
    for mine, theirs in zip(far.main.tensors, near.main.tensors, strict=True):
        assert bytes(far.buffer(mine)) == bytes(near.buffer(theirs))
    with pytest.raises(ModelRefused, match=r"Buffer\.offset leads to \d+ bytes that lie outside"):
        read_model(with_data_outside(content, shift=100))


def test_constants_that_are_no_array(tiny):
    model = unpack(tiny.path("float32").read_bytes())
    place = next(i for i, t in enumerate(model.subgraphs[0].tensors) if model.buffers[t.buffer].data is not None)
    tensor = model.subgraphs[0].tensors[place]
    shape = tensor.shape
    for change in ([7, 7], [-1, 3], [0], [2**31 - 1] * 9, np.append(shape, -1)):
        tensor.shape = np.array(change, np.int32)
        found = read_model(pack(model))
        assert found.constant(found.main.tensors[place]) is None, change
    tensor.shape = shape
    for dtype in ("STRING", "INT4", "BFLOAT16", "RESOURCE", "COMPLEX128"):
        tensor.type = getattr(schema.TensorType, dtype)
        found = read_model(pack(model))
        assert found.constant(found.main.tensors[place]) is None, dtype
        assert found.main.tensors[place].dtype == dtype.lower() and len(found.buffer(found.main.tensors[place]))


def test_names_that_are_not_utf8(tiny):
    content = bytearray(tiny.path("float32").read_bytes())
    name = read_model(bytes(content)).main.tensors[0].name.encode()
    place = content.index(struct.pack("<I", len(name)) + name) + 4
    content[place] = 0xFF
    assert read_model(bytes(content)).main.tensors[0].name.startswith("\ufffd")


def test_what_is_not_a_tflite_is_said_so(tiny, tmp_path):
    for name in ("text", "empty"):
        with pytest.raises(ModelRefused, match=r"not a \.tflite.*TFL3"):
            read_model(tiny.path(name))
    with pytest.raises(ModelRefused, match=r"Model\.buffers\[\d+\] leads outside the file \(byte \d+ of \d+\)"):
        read_model(tiny.path("truncated"))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent.tflite", tmp_path, "a\0b", "/dev/zero", tmp_path / "pipe", None, 7):
        with pytest.raises(InputError, match=r"The model (cannot be read|is not a file)"):
            read_model(path)


def reads_or_refuses(content):
    """The model, or None where it is refused; whatever was read can be asked for all it has."""
    try:
        model = read_model(content)
    except ModelRefused as refused:
        assert re.search(r"\(byte \d+ of \d+\)|TFL3", str(refused))
        return None
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            model.constant(tensor)
        for operator in graph.operators:
            cost_of(model, operator, graph)
    return model


@pytest.mark.parametrize("name", ["int8", "open_size", "self_calling"])
def test_every_truncation_is_refused_or_read(tiny, name):
    content = tiny.path(name).read_bytes()
    read = sum(reads_or_refuses(content[:length]) is not None for length in range(0, len(content), 3))
    assert read <= 4, "only the last bytes of a file may be padding"


@pytest.mark.parametrize("name", ["float32", "int8", "two_inputs", "self_calling", "custom_op"])
def test_damaged_bytes_cause_no_other_error(tiny, name):
    content, chance = tiny.path(name).read_bytes(), random.Random(name)
    words = (0, 1, 4, 2**31 - 1, 2**31, 2**32 - 1, len(content), len(content) - 4, 2**32 - len(content))
    refused = 0
    for _ in range(2000):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            place = chance.randrange(len(damaged) - 4)
            if chance.random() < 0.5:
                damaged[place] = chance.randrange(256)
            else:
                place -= place % 4
                damaged[place : place + 4] = struct.pack("<I", chance.choice(words))
        refused += reads_or_refuses(bytes(damaged)) is None
    assert refused > 200


def test_every_word_of_a_file_may_lie(tiny):
    content = tiny.path("self_calling").read_bytes()
    refused = 0
    for place in range(0, len(content), 2):
        for form, word in (("<I", 0), ("<I", 2**31 - 1), ("<I", 2**32 - 1), ("<H", 0xFFFF), ("<H", 4), ("<i", -place)):
            damaged = bytearray(content + b"\0\0\0\0")
            struct.pack_into(form, damaged, place, word)
            refused += reads_or_refuses(bytes(damaged)) is None
    assert refused > len(content) / 2


def field(content, table, number):
    vtable = table - struct.unpack_from("<i", content, table)[0]
    return table + struct.unpack_from("<H", content, vtable + 4 + 2 * number)[0]


def target(content, place):
    return place + struct.unpack_from("<I", content, place)[0]


def places(content):
    """Where some words of a file lie, found by hand: name -> byte."""
    model = target(content, 0)
    graphs = target(content, field(content, model, 2))
    graph = target(content, graphs + 4)
    tensors = target(content, field(content, graph, 0))
    tensor = target(content, tensors + 4)
    operators = target(content, field(content, graph, 3))
    operator = target(content, operators + 4)
    return {
        "root": 0,
        "vtable": model,
        "graphs": field(content, model, 2),
        "graph count": graphs,
        "tensor": tensors + 4,
        "tensor count": tensors,
        "shape": field(content, tensor, 0),
        "shape count": target(content, field(content, tensor, 0)),
        "name count": target(content, field(content, tensor, 3)),
        "buffer": field(content, tensor, 2),
        "operator input": target(content, field(content, operator, 1)) + 4,
        "operator output": target(content, field(content, operator, 2)) + 4,
        "graph input": target(content, field(content, graph, 1)) + 4,
    }


@pytest.mark.parametrize(
    "place, word, message",
    [
        ("root", 0, "Model leads outside"),
        ("root", 2**32 - 1, "Model leads outside"),
        ("vtable", 2**31 - 1, "Model's list of fields lies outside"),
        ("vtable", 2**31, "Model's list of fields lies outside"),
        ("graphs", 0, r"Model\.subgraphs leads outside"),
        ("graph count", 0, r"Model\.subgraphs is empty"),
        ("graph count", 2**32 - 1, r"Model\.subgraphs has 4294967295 elements"),
        ("tensor", 2**31, r"SubGraph\.tensors\[0\] leads outside"),
        ("tensor", 2**32 - 64, r"SubGraph\.tensors\[0\] leads outside"),  # backwards, for arithmetic that wraps
        ("tensor count", 2**28, r"SubGraph\.tensors has 268435456 elements"),
        ("tensor count", 0, "but there are 0"),
        ("shape", 2**31 - 1, r"Tensor\.shape leads outside"),
        ("shape count", 2**30, r"Tensor\.shape has 1073741824 elements"),
        ("name count", 2**32 - 1, r"Tensor\.name has 4294967295 elements"),
        ("buffer", 10_000, r"Tensor\.buffer is 10000, but there are \d+"),
        ("operator input", 2**32 - 2, r"Operator\.inputs has -2, but there are \d+ tensors"),
        ("operator input", 999, r"Operator\.inputs has 999"),
        ("operator output", 2**32 - 1, r"Operator\.outputs has -1"),
        ("graph input", 999, r"SubGraph\.inputs has 999"),
    ],
)
def test_a_word_that_lies_is_named(tiny, place, word, message):
    content = bytearray(tiny.path("two_inputs").read_bytes())
    struct.pack_into("<I", content, places(bytes(content))[place], word)
    with pytest.raises(ModelRefused, match=message) as refused:
        read_model(bytes(content))
    assert re.search(r"\(byte \d+ of \d+\)", str(refused.value)) and "again" in str(refused.value)


def test_a_branch_that_is_not_there():
    options = schema.WhileOptionsT()
    options.condSubgraphIndex, options.bodySubgraphIndex = 1, 2
    content = one_operator("WHILE", options, schema.BuiltinOptions.WhileOptions)
    with pytest.raises(ModelRefused, match=r"WHILE options\.body_subgraph_index is 2, but there are 2"):
        read_model(content)


def shared_tables(count, tail):
    """`count` subgraphs that are one table, whose `count` tensors are one table with a name of `tail` bytes."""
    content = bytearray(struct.pack("<I4s", 0, b"TFL3"))

    def table(*fields):  # fields hold places to fill in later
        content.extend(struct.pack(f"<HH{len(fields)}H", 4 + 2 * len(fields), 4 + 4 * len(fields),
                                   *(4 + 4 * n if kept else 0 for n, kept in enumerate(fields))))  # fmt: skip
        content.extend(b"\0" * (-len(content) % 4))
        vtable = len(content) - (-(-(4 + 2 * len(fields)) // 4) * 4)
        start = len(content)
        content.extend(struct.pack("<i", start - vtable) + b"\0" * 4 * len(fields))
        return start

    def point(place, to):
        struct.pack_into("<I", content, place, to - place)

    def vector():
        start = len(content)
        content.extend(struct.pack("<I", count) + b"\0" * 4 * count)
        return start

    model = table(False, False, True)
    point(0, model)
    graphs = vector()
    point(model + 4 + 8, graphs)
    graph = table(True)
    tensors = vector()
    point(graph + 4, tensors)
    tensor = table(False, False, False, True)
    for n in range(count):
        point(graphs + 4 + 4 * n, graph)
        point(tensors + 4 + 4 * n, tensor)
    end = len(content)
    point(tensor + 4 + 12, end)
    content.extend(struct.pack("<I", tail) + b"n" * tail)
    return bytes(content)


def test_few_tables_that_pose_as_many_are_sound():
    model = read_model(shared_tables(2, 8))
    assert [[tensor.name for tensor in graph.tensors] for graph in model.subgraphs] == [["n" * 8] * 2] * 2


def test_a_shape_of_too_many_dimensions(tiny):
    model = unpack(tiny.path("float32").read_bytes())
    for name in ("shape", "shapeSignature"):
        tensor = model.subgraphs[0].tensors[0]
        before = getattr(tensor, name)
        setattr(tensor, name, np.full(65, 2**31 - 1, np.int32))
        with pytest.raises(ModelRefused, match=r"Tensor\.shape has 65 dimensions"):
            read_model(pack(model))
        setattr(tensor, name, before)


@pytest.mark.parametrize("count, tail", [(50_000, 8), (2_000, 400_000), (3, 4_000_000), (300, 0)])
def test_tables_that_are_named_many_times_do_not_fill_the_memory(count, tail):
    content = shared_tables(count, tail)
    tracemalloc.start()
    try:
        with pytest.raises(ModelRefused, match=r"one table more than|name more bytes than the file has"):
            read_model(content)
        assert tracemalloc.get_traced_memory()[1] < 64 * len(content) + 1_000_000
    finally:
        tracemalloc.stop()
