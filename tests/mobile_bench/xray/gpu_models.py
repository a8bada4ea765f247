"""Tiny models for the GPU, by what LiteRT's WebGPU accelerator does with them; see gpu_graphs.py."""

from .gpu_graphs import (
    argmax,
    binary,
    concat,
    conv,
    cumsum,
    dense,
    depthwise,
    gather,
    matmul,
    pack,
    pad,
    pool,
    prelu,
    reduce,
    reshape,
    reshape_to,
    resize,
    select,
    slice_,
    softmax,
    split,
    squeeze,
    strided,
    swish,
    transpose,
    transpose_conv,
    unary,
    unpack,
)

#: The accelerator takes all of it.
TAKEN = {
    "conv": conv,
    "conv_batch": lambda g: conv(g, (2, 8, 8, 4)),
    "conv_float16": lambda g: conv(g, kind="float16"),
    "conv_dynamic": lambda g: conv(g, kind="dynamic"),
    "conv_int8": lambda g: conv(g, kind="int8"),
    "conv_1x1_dynamic": lambda g: conv(g, kernel=(4, 1, 1, 4), kind="dynamic"),
    "conv_relu6": lambda g: conv(g, fusedActivationFunction=3),
    "depthwise": depthwise,
    "depthwise_dynamic": lambda g: depthwise(g, "dynamic"),
    "depthwise_multiplier": lambda g: depthwise(g, multiplier=2),
    "dense": dense,
    "dense_channels": lambda g: dense(g, "channels"),
    "dense_nobias": lambda g: dense(g, bias=False),
    "dense_keep": lambda g: dense(g, shape=(1, 2, 8), out=(1, 2, 4), keepNumDims=True),
    "add_int32": lambda g: binary(g, "ADD", dtype="int32", options="AddOptions"),
    "mul_scalar": lambda g: binary(g, "MUL", other=(), fixed=True, options="MulOptions"),
    "add_2d": lambda g: binary(g, "ADD", other=(4, 4), options="AddOptions"),
    "add_channel": lambda g: binary(g, "ADD", other=(4,), fixed=True, options="AddOptions"),
    "mul_se": lambda g: binary(g, "MUL", other=(1, 1, 1, 4), options="MulOptions"),
    "sub": lambda g: binary(g, "SUB", options="SubOptions"),
    "add_same": lambda g: binary(g, "ADD", same=True, options="AddOptions"),
    "greater": lambda g: binary(g, "GREATER", made="bool", options="GreaterOptions"),
    "logical_not": lambda g: unary(g, "LOGICAL_NOT", dtype="bool", options="LogicalNotOptions"),
    "mean": lambda g: reduce(g, "MEAN"),
    "mean_batch": lambda g: reduce(g, "MEAN", shape=(2, 4, 4, 4)),
    "mean_ch": lambda g: reduce(g, "MEAN", axes=(3,)),
    "sum": lambda g: reduce(g, "SUM"),
    "max": lambda g: reduce(g, "REDUCE_MAX"),
    "strided_masks": lambda g: strided(
        g, (1, 8, 8, 4), [0, 1, 1, 0], [0, 0, 0, 0], [1] * 4, (1, 7, 7, 4), beginMask=9, endMask=15
    ),
    "strided_steps": lambda g: strided(g, (1, 8, 8, 4), [0] * 4, [1, 8, 8, 4], [1, 2, 2, 1], (1, 4, 4, 4)),
    "strided_2d": lambda g: strided(g, (1, 8), [0, 1], [1, 5], [1, 1], (1, 4)),
    "strided_first_of_batch": lambda g: strided(g, (2, 8), [0, 0], [1, 8], [1, 1], (1, 8)),
    "avgpool": lambda g: pool(g, "AVERAGE_POOL_2D"),
    "maxpool": pool,
    "concat": lambda g: concat(g, [(1, 4, 4, 4), (1, 4, 4, 8)], 3),
    "concat_const": lambda g: concat(g, [(1, 4, 4, 4), (1, 4, 4, 8)], 3, True),
    "pad": lambda g: pad(g, [[0, 0], [1, 1], [1, 1], [0, 0]]),
    "padv2": lambda g: pad(g, [[0, 0], [1, 1], [1, 1], [0, 0]], name="PADV2", value=-1.0),
    "mirror": lambda g: pad(g, [[0, 0], [1, 1], [1, 1], [0, 0]], name="MIRROR_PAD"),
    "softmax": softmax,
    "reshape": lambda g: reshape(g, (1, 2, 2, 4), (1, 16)),
    "resize": resize,
    "resize_nearest": lambda g: resize(g, "RESIZE_NEAREST_NEIGHBOR"),
    "prelu": lambda g: prelu(g, (1, 1, 4)),
    "prelu_full": lambda g: prelu(g, (4, 4, 4)),
    "gather": gather,
    "argmax": argmax,
    "cumsum": cumsum,
    "slice": lambda g: slice_(g, [0, 1, 1, 0], [1, 4, 4, 4]),
    "slice_2d": lambda g: slice_(g, [0, 1], [1, 4], (1, 8)),
    "transpose": lambda g: transpose(g, [0, 3, 1, 2]),
    "transpose2": lambda g: transpose(g, [1, 0], (3, 4)),
    "matmul": matmul,
    "matmul_const": lambda g: matmul(g, fixed=True),
    "split": split,
    "unpack": unpack,
    "pack": pack,
    "select": select,
    "select_2d": lambda g: g.op(
        "SELECT_V2", [g.input((3, 4), "bool"), g.input((3, 4)), g.input((3, 4))], (3, 4), options="SelectV2Options"
    ),
    "transpose_conv": transpose_conv,
    "depth_to_space": lambda g: unary(
        g, "DEPTH_TO_SPACE", (1, 4, 4, 8), (1, 8, 8, 2), "DepthToSpaceOptions", blockSize=2
    ),
    "space_to_depth": lambda g: unary(
        g, "SPACE_TO_DEPTH", (1, 4, 4, 2), (1, 2, 2, 8), "SpaceToDepthOptions", blockSize=2
    ),
    "reverse": lambda g: g.op(
        "REVERSE_V2", [g.input((1, 4, 4, 4)), g.constant([1], "int32")], (1, 4, 4, 4), options="ReverseV2Options"
    ),
    "tile": lambda g: g.op(
        "TILE", [g.input((1, 4, 4, 4)), g.constant([1, 2, 1, 1], "int32")], (1, 8, 4, 4), options="TileOptions"
    ),
    "topk": lambda g: g.op(
        "TOPK_V2",
        [g.input((1, 8)), g.constant(3, "int32")],
        (1, 3),
        (1, 3),
        dtype=("float32", "int32"),
        options="TopKV2Options",
    ),
    "one_hot": lambda g: g.op(
        "ONE_HOT",
        [g.input((1,), "int32"), g.constant(4, "int32"), g.constant(1.0), g.constant(0.0)],
        (1, 4),
        options="OneHotOptions",
        axis=-1,
    ),
    "cast": lambda g: unary(g, "CAST", made="int32", options="CastOptions"),
    "quantize": lambda g: g.op("QUANTIZE", [g.input((1, 4, 4, 4))], (1, 4, 4, 4), dtype="int8", scale=0.02),
    "dequantize": lambda g: g.op("DEQUANTIZE", [g.input((1, 4, 4, 4), "int8", 0.02)], (1, 4, 4, 4)),
    "hswish": lambda g: unary(g, "HARD_SWISH"),
    "gelu": lambda g: unary(g, "GELU", options="GeluOptions", approximate=True),
    "leaky": lambda g: unary(g, "LEAKY_RELU", options="LeakyReluOptions", alpha=0.2),
    "logistic_int8": lambda g: unary(g, "LOGISTIC", dtype="int8", scale=1 / 256),
    "reduce_any": lambda g: g.op(
        "REDUCE_ANY",
        [g.input((1, 4, 4, 4), "bool"), g.constant([1, 2], "int32")],
        (1, 4),
        options="ReducerOptions",
        dtype="bool",
    ),
    "sum_int32": lambda g: g.op(
        "SUM",
        [g.input((1, 4, 4, 4), "int32"), g.constant([1, 2], "int32")],
        (1, 4),
        options="ReducerOptions",
        dtype="int32",
    ),
    "greater_and_select": lambda g: (
        lambda x: g.op(
            "SELECT_V2",
            [
                g.op("GREATER", [x, g.constant(0.0)], (1, 4, 4, 4), dtype="bool", options="GreaterOptions"),
                x,
                g.constant(0.0),
            ],
            (1, 4, 4, 4),
            options="SelectV2Options",
        )
    )(g.input((1, 4, 4, 4))),
}
#: It takes nothing; the reason that our rules give for the first operation.
REFUSED = {
    "conv_sign_bit": (lambda g: conv(g, fusedActivationFunction=5), "it fuses the activation SIGN_BIT"),
    "conv_version_8": (lambda g: conv(g, version=8), "it is of version 8, and the delegate takes versions up to 6"),
    "depthwise_wrong_multiplier": (
        lambda g: depthwise(g, claimed=2),
        "its depth_multiplier 2 does not lead to its output's channels",
    ),
    "dense_uint8": (
        lambda g: g.op(
            "FULLY_CONNECTED",
            [
                g.input((1, 8), "uint8", 0.02),
                g.weights(4, 8, dtype="uint8", scale=[0.01]),
                g.constant([1] * 4, "int32", [0.0002]),
            ],
            (1, 4),
            options="FullyConnectedOptions",
            dtype="uint8",
            scale=0.02,
        ),
        "its weights are uint8, and int8, int4 or int2 are taken",
    ),
    "dense_constant_input": (
        lambda g: g.op(
            "FULLY_CONNECTED", [g.weights(1, 8), g.input((4, 8)), -1], (1, 4), options="FullyConnectedOptions"
        ),
        "its input is a constant",
    ),
    "add_int64": (
        lambda g: binary(g, "ADD", dtype="int64", options="AddOptions"),
        "its input is int64, and ADD takes bfloat16, bool, float16, float32, int16, int2, int32, int4, int8, uint8",
    ),
    "mul_computed_scalar": (
        lambda g: binary(g, "MUL", other=(), options="MulOptions"),
        "it broadcasts (1, 4, 4, 4) and (), and a scalar must be a constant",
    ),
    "sub_same": (lambda g: binary(g, "SUB", same=True, options="SubOptions"), "both its inputs are the same tensor"),
    "bitwise_xor": (lambda g: binary(g, "BITWISE_XOR", dtype="int32"), "the WebGPU accelerator has no BITWISE_XOR"),
    "strided_shrink": (
        lambda g: strided(g, (1, 4, 4, 4), [0, 1, 0, 0], [1, 2, 4, 4], [1] * 4, (1, 4, 4), shrinkAxisMask=2),
        "it has a shrink_axis_mask of 2",
    ),
    "strided_beyond": (
        lambda g: strided(g, (1, 8, 8, 4), [0] * 4, [1, 100, 8, 4], [1] * 4, (1, 8, 8, 4)),
        "its end lies outside of (1, 8, 8, 4): (1, 100, 8, 4) is no (1, 8, 8, 4)",
    ),
    "strided_reverse": (
        lambda g: strided(g, (1, 8, 8, 4), [0, -1, 0, 0], [1, -9, 8, 4], [1, -1, 1, 1], (1, 8, 8, 4)),
        "its stride is -1, and more than 0 is needed",
    ),
    "strided_1d": (
        lambda g: strided(g, (8,), [1], [5], [1], (4,)),
        "it cuts the first axis of (8,), the batch, by numbers",
    ),
    "strided_batch": (
        lambda g: strided(g, (2, 8), [0, 1], [2, 5], [1, 1], (2, 4)),
        "it cuts the first axis of (2, 8), the batch, by numbers",
    ),
    "strided_new_axis": (
        lambda g: strided(g, (1, 8), [0, 0, 0], [1, 0, 8], [1, 1, 1], (1, 1, 8), newAxisMask=2),
        "it has a new_axis_mask of 2",
    ),
    "l2pool": (lambda g: pool(g, "L2_POOL_2D"), "the WebGPU accelerator has no L2_POOL_2D"),
    "pad_2d": (lambda g: pad(g, [[0, 0], [1, 1]], (1, 4)), "it pads a tensor of 2 dimensions, and 3 or 4 are needed"),
    "pad_int64": (
        lambda g: pad(g, [[0, 0], [1, 1], [1, 1], [0, 0]], kind="int64"),
        "its paddings are no constants of int32",
    ),
    "mirror_sym": (
        lambda g: pad(g, [[0, 0], [1, 1], [1, 1], [0, 0]], name="MIRROR_PAD", mode=1),
        "its mode is SYMMETRIC, and only REFLECT is taken",
    ),
    "softmax_beta": (lambda g: softmax(g, 2.0), "its beta is 2, and 1 is needed"),
    "squeeze": (lambda g: squeeze(g, g.input((1, 1, 1, 8)), (1, 8)), "the WebGPU accelerator has no SQUEEZE"),
    "expand_dims": (
        lambda g: g.op(
            "EXPAND_DIMS", [g.input((1, 8)), g.constant(1, "int32")], (1, 1, 8), options="ExpandDimsOptions"
        ),
        "the WebGPU accelerator has no EXPAND_DIMS",
    ),
    "reshape_5d": (
        lambda g: reshape(g, (1, 2, 2, 4), (1, 2, 2, 2, 2)),
        "a tensor has 5 dimensions, and at most 4 are taken",
    ),
    "shape": (
        lambda g: g.op("SHAPE", [g.input((1, 4))], (2,), dtype="int32", options="ShapeOptions", outType=2),
        "the WebGPU accelerator has no SHAPE",
    ),
    "prelu_bad": (lambda g: prelu(g, (4, 1, 4)), "its alpha of (4, 1, 4) fits no channel of (1, 4, 4, 4)"),
    "gather_2d": (lambda g: gather(g, indices=((0, 1), (1, 0))), "its indices have 2 dimensions, and 1 is needed"),
    "gather_int64": (lambda g: gather(g, kind="int64"), "its indices are int64, and int32 is needed"),
    "argmax_int64": (lambda g: argmax(g, "int64"), "its output is int64, and ARG_MAX takes int32"),
    "argmin": (lambda g: argmax(g, name="ARG_MIN"), "the WebGPU accelerator has no ARG_MIN"),
    "cumsum_computed_axis": (
        lambda g: g.op("CUMSUM", [g.input((1, 8)), g.input((), "int32")], (1, 8), options="CumsumOptions"),
        "it sums float32 along an axis that is int32, and float values and a constant int32 are needed",
    ),
    "slice_int64": (
        lambda g: slice_(g, [0, 1, 1, 0], [1, 4, 4, 4], kind="int64"),
        "its begin and size are no constants of int32",
    ),
    "transpose_5d": (
        lambda g: transpose(g, [0, 1, 2, 4, 3], (1, 2, 2, 2, 3)),
        "it permutes 5 dimensions, and 2 to 4 are taken",
    ),
    "transpose_1d": (lambda g: transpose(g, [0], (3,)), "it permutes 1 dimensions, and 2 to 4 are taken"),
    "matmul_first": (lambda g: matmul(g, first=True), "its first matrix is the constant one"),
    "pack5": (lambda g: pack(g, (1, 2, 3, 4)), "a tensor has 5 dimensions, and at most 4 are taken"),
    "select_scalar": (
        lambda g: select(g, other=(1, 1, 1, 4)),
        "it chooses from a tensor of (1, 1, 1, 4) for an output of (1, 4, 4, 4)",
    ),
    "select_constant": (
        lambda g: g.op(
            "SELECT_V2",
            [g.input((3, 4, 2), "bool"), g.input((3, 4, 2)), g.weights(3, 4, 2)],
            (3, 4, 2),
            options="SelectV2Options",
        ),
        "it chooses from a constant of (3, 4, 2), and a scalar is needed",
    ),
    "depth_to_space_1": (
        lambda g: unary(g, "DEPTH_TO_SPACE", (1, 4, 4, 8), (1, 4, 4, 8), "DepthToSpaceOptions", blockSize=1),
        "its block_size is 1, and more than 1 is needed",
    ),
    "one_hot_first_axis": (
        lambda g: g.op(
            "ONE_HOT",
            [g.input((3,), "int32"), g.constant(4, "int32"), g.constant(1.0), g.constant(0.0)],
            (4, 3),
            options="OneHotOptions",
            axis=0,
        ),
        "its axis is 0, and -1 is needed",
    ),
    "cast_int64": (
        lambda g: unary(g, "CAST", made="int64", options="CastOptions"),
        "its output is int64, and CAST takes bfloat16, bool, float16",
    ),
    "quantize_int16": (
        lambda g: g.op("QUANTIZE", [g.input((1, 4, 4, 4))], (1, 4, 4, 4), dtype="int16", scale=0.02),
        "its output is int16, and QUANTIZE takes float16, float32, int8, uint8",
    ),
    "relu_5d": (lambda g: unary(g, "RELU", (1, 2, 2, 2, 2)), "a tensor has 5 dimensions, and at most 4 are taken"),
    "l2_normalization": (
        lambda g: unary(g, "L2_NORMALIZATION", options="L2NormOptions"),
        "the WebGPU accelerator has no L2_NORMALIZATION",
    ),
    "log_softmax": (lambda g: unary(g, "LOG_SOFTMAX"), "the WebGPU accelerator has no LOG_SOFTMAX"),
    "relu_0_to_1": (lambda g: unary(g, "RELU_0_TO_1"), "the WebGPU accelerator has no RELU_0_TO_1"),
    "tanh_int16": (
        lambda g: unary(g, "TANH", dtype="int16", scale=1 / 32768),
        "its input is int16, and TANH takes bfloat16, bool, float16, float32, int2, int4, int8, uint8",
    ),
    "equal_int64": (
        lambda g: binary(g, "EQUAL", dtype="int64", made="bool", options="EqualOptions"),
        "its input is int64, and EQUAL takes bool",
    ),
}
#: It takes these operations.
PARTLY = {
    "float16_and_squeeze": (lambda g: squeeze(g, conv(g, kind="float16"), (8, 8, 4)), (2,)),
    "conv_squeeze_three": (lambda g: (lambda c: swish(g, squeeze(g, c, (8, 8, 4)), (8, 8, 4), 3))(conv(g)), (2, 3, 4)),
    "equal_halves": (
        lambda g: swish(g, squeeze(g, swish(g, g.input((1, 4, 4)), (1, 4, 4), 2), (4, 4)), (4, 4), 2),
        (0, 1),
    ),
    "groups_of_1_3_3": (
        lambda g: swish(
            g,
            squeeze(g, swish(g, squeeze(g, swish(g, g.input((1, 1, 4)), (1, 1, 4), 1), (1, 4)), (1, 4), 3), (4,)),
            (4,),
            3,
        ),
        (2, 3, 4),
    ),
    "branch": (
        lambda g: (
            lambda x: g.op(
                "ADD",
                [
                    swish(g, x, (1, 4), 2),
                    reshape(g, (1, 1, 4), (1, 4), given=squeeze(g, reshape(g, (1, 4), (1, 1, 4), given=x), (1, 1, 4))),
                ],
                (1, 4),
                options="AddOptions",
            )
        )(g.input((1, 4))),
        (0, 1, 2),
    ),
    "shape_chain": (
        lambda g: (
            lambda x: (
                lambda sh: reshape_to(
                    g,
                    unary(g, "EXP", given=x, shape=(1, 4)),
                    g.op(
                        "CONCATENATION",
                        [
                            g.op(
                                "STRIDED_SLICE",
                                [sh, g.constant([0], "int32"), g.constant([1], "int32"), g.constant([1], "int32")],
                                (1,),
                                options="StridedSliceOptions",
                                dtype="int32",
                            ),
                            g.constant([4], "int32"),
                        ],
                        (2,),
                        dtype="int32",
                        options="ConcatenationOptions",
                    ),
                )
            )(g.op("SHAPE", [x], (2,), dtype="int32", options="ShapeOptions", outType=2))
        )(g.input((1, 4))),
        (1, 2, 3),
    ),
    "shape_alone": (
        lambda g: (
            lambda x: reshape_to(
                g,
                unary(g, "EXP", given=x, shape=(1, 4)),
                g.op("SHAPE", [x], (2,), dtype="int32", options="ShapeOptions", outType=2),
            )
        )(g.input((1, 4))),
        (0,),
    ),
}
