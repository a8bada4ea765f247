"""The planned arena against hand-worked graphs and against where the real interpreter puts its tensors."""

from pathlib import Path

import pytest

from mobile_bench.arena import ALIGNMENT, arena_of
from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.flatbuffer import Operator, Subgraph, TensorInfo, TFLiteModel, read_model

DEMOS = Path(__file__).parents[2] / "saved_models"
THIRD = ("mobilenet_v1_0.25_128_quant", "mobilenet_v2_1.0_224_quant", "split_concat")


def graph(tensors, operators, inputs, outputs):
    """tensors: (bytes[, constant bytes]); operators: (op, inputs, outputs)."""
    made = tuple(
        TensorInfo(n, f"t{n}", (1, size), (1, size), "int8", constant[0] if constant else 0)
        for n, (size, *constant) in enumerate(tensors)
    )
    steps = tuple(Operator(n, op, "", 1, ins, outs, {}) for n, (op, ins, outs) in enumerate(operators))
    main = Subgraph(0, "", made, steps, inputs, outputs)
    return TFLiteModel(3, "", (main,), {}, (), 0, b"", ())


def places(arena):
    return {place.tensor: (place.offset, place.size) for place in arena.places}


def test_tensors_that_are_never_alive_together_share_bytes():
    # 64 in, 640 and 320 in turn, 64 out: the input is kept, the output may lie where tensor 1 was
    chain = [("CONV_2D", (0,), (1,)), ("CONV_2D", (1,), (2,)), ("CONV_2D", (2,), (3,))]
    arena = arena_of(graph([(64,), (640,), (320,), (64,)], chain, (0,), (3,)))
    assert arena.activation_bytes == 64 + 640 + 320 == arena.arena_bytes
    assert places(arena) == {0: (0, 64), 1: (64, 640), 2: (704, 320), 3: (64, 64)}


def test_tensors_lie_on_64_byte_borders_and_the_waste_says_so():
    arena = arena_of(graph([(10,), (70,), (10,)], [("CONV_2D", (0,), (1,)), ("CONV_2D", (1,), (2,))], (0,), (2,)))
    assert places(arena) == {0: (0, 10), 1: (64, 70), 2: (192, 10)}
    assert arena.activation_bytes == 90 and arena.arena_bytes == 202
    assert arena.waste == pytest.approx(1 - 90 / 202)


def test_the_smallest_gap_that_fits_is_taken():
    tensors = [(64,), (640,), (640,), (128,), (64,), (64,)]
    steps = [("SPLIT", (0,), (1, 3)), ("X", (1,), (2,)), ("X", (2, 3), (4,)), ("X", (4,), (5,))]
    arena = arena_of(graph(tensors, steps, (0,), (5,)))
    where = places(arena)
    assert where[4] == (64, 64), "the first gap: what tensor 1 left"
    assert arena.arena_bytes == arena.activation_bytes == 64 + 640 + 640 + 128


@pytest.mark.parametrize(
    "op, readers, shared",
    [("RESHAPE", 1, True), ("RESHAPE", 2, True), ("ADD", 1, True), ("ADD", 2, False), ("MEAN", 1, False)],
)
def test_some_operations_work_in_place(op, readers, shared):
    steps = [("CONV_2D", (0,), (1,)), (op, (1,), (2,)), ("CONV_2D", (2,), (3,))]
    if readers == 2:
        steps[2] = ("CONV_2D", (2, 1), (3,))
    arena = arena_of(graph([(64,), (256,), (256,), (64,)], steps, (0,), (3,)))
    assert (2 not in places(arena)) == shared
    assert arena.arena_bytes == (384 if shared else 576 if readers == 1 else 640)


def test_the_graphs_own_inputs_and_outputs_are_never_worked_on_in_place():
    steps = [("RESHAPE", (0,), (1,)), ("RESHAPE", (1,), (2,))]
    arena = arena_of(graph([(256,), (256,), (256,)], steps, (0,), (2,)))
    assert set(places(arena)) == {0, 1, 2}


def test_constants_take_nothing_and_unpacked_ones_are_counted_apart():
    tensors = [(64,), (100, 50), (100,), (64,)]
    arena = arena_of(graph(tensors, [("DEQUANTIZE", (1,), (2,)), ("CONV_2D", (0, 2), (3,))], (0,), (3,)))
    assert arena.persistent_bytes == 100 and set(places(arena)) == {0, 3}


def test_what_cannot_be_planned_is_refused(tiny):
    with pytest.raises(ModelRefused, match="does not fix"):
        arena_of(read_model(tiny.path("open_size")))
    for batch in (0, 5000, True, 1.5):
        with pytest.raises(InputError, match="batch"):
            arena_of(read_model(tiny.path("int8")), batch)


def real(path, batch, resolver):
    """Tensor -> (address, bytes) in the real interpreter, and the bytes of the kernels' own tensors."""
    interpreter_module = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = interpreter_module.Interpreter(
        model_path=str(path), experimental_op_resolver_type=interpreter_module.OpResolverType[resolver]
    )
    for details in interpreter.get_input_details():
        interpreter.resize_tensor_input(details["index"], [batch, *details["shape"][1:]])
    interpreter.allocate_tensors()
    interpreter.invoke()  # what lies behind a reshape that is computed gets its place only now
    found = {}
    for details in interpreter.get_tensor_details():
        try:
            view = interpreter.tensor(details["index"])()
        except ValueError:  # a tensor without memory, such as a branch that XNNPACK took
            continue
        found[details["index"]] = (view.__array_interface__["data"][0], view.nbytes)
        del view
    count = len(read_model(path).main.tensors)
    scratch = {index: span for index, span in found.items() if index >= count}
    return {index: span for index, span in found.items() if index < count}, scratch


def check_against_the_interpreter(path, batch=1):
    arena = arena_of(read_model(path), batch)
    tensors, scratch = real(path, batch, "BUILTIN_REF")
    mine = places(arena)
    assert mine and {i: size for i, (_, size) in mine.items()} == {i: tensors[i][1] for i in mine}
    start = min(tensors[index][0] for index in mine)
    extent = max(tensors[index][0] + tensors[index][1] for index in mine) - start
    slack = sum(-(-size // ALIGNMENT) * ALIGNMENT for _, size in scratch.values())
    assert arena.activation_bytes <= arena.arena_bytes <= extent + slack and extent <= arena.arena_bytes + slack
    if not scratch:
        assert extent == arena.arena_bytes
    if not scratch and batch == 1:  # resized, a computed reshape makes the runtime plan in two steps
        # Outputs of one operation that are of one size are placed in no particular order.
        theirs = sorted((tensors[i][0] - start, *tensors[i][1:]) for i in mine)
        assert theirs == sorted(mine.values())
    return bool(scratch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["float32", "float16", "int8", "uint8", "two_inputs"])
def test_tiny_files_lie_where_the_interpreter_puts_them(tiny, name, batch):
    assert not check_against_the_interpreter(tiny.path(name), batch), "these need no scratch tensors"


@pytest.mark.parametrize("name", THIRD)
def test_third_party_files_lie_where_the_interpreter_puts_them(shared_model, name):
    assert not check_against_the_interpreter(shared_model(f"{name}.tflite"))


@pytest.mark.parametrize("variant", ["baseline-float32", "baseline-float16", "baseline-int8", "lowrank-float32"])
def test_real_conversions_take_what_the_interpreter_takes(variant):
    found = sorted(DEMOS.glob(f"demo-*/*/{variant}/model.tflite"))
    if not found:
        pytest.skip(f"no demo study with {variant}; make one with tfopt")
    for path in found:
        check_against_the_interpreter(path)
