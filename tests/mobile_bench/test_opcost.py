"""What operators cost, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest

from mobile_bench.flatbuffer import Operator, TensorInfo, read_model
from mobile_bench.opcost import OpCost, cost_of, macs_of


def cost(op, inputs, outputs, options=None):
    """The cost of an operator whose tensors are (shape, dtype[, constant bytes[, signature]]) or None."""
    tensors, places = [], []
    for given in (*inputs, *outputs):
        places.append(-1 if given is None else len(tensors))
        if given is not None:
            shape, dtype, constant, signature = (*given, 0, given[0])[:4] if len(given) != 3 else (*given, given[0])
            tensors.append(TensorInfo(len(tensors), "", shape, signature, dtype, constant))
    cut = len(inputs)
    operator = Operator(0, op, "", 1, tuple(places[:cut]), tuple(places[cut:]), options or {})
    return cost_of(SimpleNamespace(main=SimpleNamespace(tensors=tensors)), operator)


@pytest.mark.parametrize(
    "op, inputs, outputs, options, expected",
    [
        # 5 x 5 positions, 8 filters of 3 x 3 x 3; 10*10*3 + 8*27 + 8*4 bytes in, 5*5*8 out
        (
            "CONV_2D",
            [((1, 10, 10, 3), "int8"), ((8, 3, 3, 3), "int8", 216), ((8,), "int32", 32)],
            [((1, 5, 5, 8), "int8")],
            {},
            OpCost(5 * 5 * 8 * 27, 300 + 216 + 32, 200),
        ),
        # two groups: each filter sees 2 of the 4 channels
        (
            "CONV_2D",
            [((1, 4, 4, 4), "float32"), ((6, 1, 1, 2), "float32", 48), None],
            [((1, 4, 4, 6), "float32")],
            {},
            OpCost(16 * 6 * 2, 256 + 48, 384),
        ),
        (
            "DEPTHWISE_CONV_2D",
            [((1, 8, 8, 4), "float32"), ((1, 3, 3, 8), "float32", 288)],
            [((1, 4, 4, 8), "float32")],
            {"depth_multiplier": 2},
            OpCost(4 * 4 * 8 * 9, 1024 + 288, 512),
        ),
        # int4 weights take half a byte each
        (
            "FULLY_CONNECTED",
            [((2, 10), "int8"), ((5, 10), "int4", 25), None],
            [((2, 5), "int8")],
            {},
            OpCost(100, 20 + 25, 10),
        ),
        (
            "FULLY_CONNECTED",
            [((2, 3, 10), "float32"), ((5, 10), "float32", 200)],
            [((2, 3, 5), "float32")],
            {"keep_num_dims": True},
            OpCost(300, 240 + 200, 120),
        ),
        (
            "TRANSPOSE_CONV",
            [((4,), "int32", 16), ((2, 3, 3, 5), "float32", 360), ((1, 4, 4, 5), "float32")],
            [((1, 8, 8, 2), "float32")],
            {},
            OpCost(4 * 4 * 5 * 2 * 9, 16 + 360 + 320, 512),
        ),
        (
            "BATCH_MATMUL",
            [((3, 4, 6), "float32"), ((3, 6, 5), "float32")],
            [((3, 4, 5), "float32")],
            {"adj_x": False, "adj_y": False},
            OpCost(3 * 4 * 5 * 6, 288 + 360, 240),
        ),
        (
            "BATCH_MATMUL",
            [((3, 6, 4), "float32"), ((3, 5, 6), "float32")],
            [((3, 4, 5), "float32")],
            {"adj_x": True, "adj_y": True},
            OpCost(3 * 4 * 5 * 6, 288 + 360, 240),
        ),
        ("ADD", [((2, 3), "int16"), ((), "int16")], [((2, 3), "int16")], {}, OpCost(0, 14, 12)),
        ("CAST", [((3,), "int4")], [((3,), "int8")], {}, OpCost(0, 2, 3)),
        ("READ_VARIABLE", [((), "resource")], [((3,), "int8")], {}, OpCost(0, None, 3)),
    ],
)
def test_costs_by_hand(op, inputs, outputs, options, expected):
    assert cost(op, inputs, outputs, options) == expected


def test_an_open_size_has_no_cost_but_an_open_batch_is_one_image():
    def conv(signature):
        image = ((1, 8, 8, 4), "float32", 0, signature)
        return cost("CONV_2D", [image, ((6, 1, 1, 4), "float32", 96)], [image])

    assert conv((-1, 8, 8, 4)).macs == 8 * 8 * 24
    assert conv((-1, -1, -1, 4)) == OpCost(None, None, None)


def test_operators_with_too_few_tensors_or_dimensions_have_no_macs():
    for op in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"):
        assert cost(op, [], []).macs is None
        assert cost(op, [((3,), "int8")] * 3, [((), "int8")]).macs is None
        assert cost(op, [None, None, None], [((1, 2, 2, 1), "int8")]).macs is None


def test_a_tensor_that_is_used_twice_is_read_once(tiny):
    model = read_model(tiny.path("self_calling"))
    assert cost_of(model, model.main.operators[0]) == OpCost(0, 1, 1)


@pytest.mark.parametrize("name", ["float32", "int8", "uint8", "int16", "float16"])
def test_one_network_has_the_same_macs_in_every_scheme(tiny, name):
    model = read_model(tiny.path(name))
    # 6x6 positions x 8 filters of 27, then what depthwise, pointwise and dense layers add to it
    assert sum(macs_of(model, operator) for operator in model.main.operators) == 11_520


@pytest.mark.parametrize(
    "name, macs", [("mobilenet_v2_1.0_224_quant", 300_775_552), ("mobilenet_v1_0.25_128_quant", 13_570_304)]
)
def test_known_networks_have_their_published_macs(shared_model, name, macs):
    """The papers and the model zoo give 300 million and 14 million."""
    model = read_model(shared_model(f"{name}.tflite"))
    assert sum(macs_of(model, operator) for operator in model.main.operators) == macs
