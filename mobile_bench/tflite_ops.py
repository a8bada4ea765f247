"""Names in the TFLite schema: operators, tensor types, and the options that operators carry.

Source: tensorflow/compiler/mlir/lite/schema/schema.fbs. Numbers there never change meaning; newer
schemas add to the ends, and what lies behind these ends keeps its number as its name.
"""

from __future__ import annotations

from typing import NamedTuple

_BUILTINS = """
    ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE EMBEDDING_LOOKUP FLOOR
    FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOGISTIC
    LSH_PROJECTION LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX
    SPACE_TO_DEPTH SVDF TANH CONCAT_EMBEDDINGS SKIP_GRAM CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD
    UNIDIRECTIONAL_SEQUENCE_RNN GATHER BATCH_TO_SPACE_ND SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE
    UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE
    BIDIRECTIONAL_SEQUENCE_LSTM CAST PRELU MAXIMUM ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL
    LESS_EQUAL SELECT SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT
    RSQRT SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT
    UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL FLOOR_MOD RANGE RESIZE_NEAREST_NEIGHBOR
    LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL REVERSE_V2 ADD_N GATHER_ND COS WHERE RANK
    ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND HARD_SWISH IF WHILE NON_MAX_SUPPRESSION_V4
    NON_MAX_SUPPRESSION_V5 SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM BATCH_MATMUL
    PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG REAL COMPLEX_ABS
    HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL CONV_3D_TRANSPOSE VAR_HANDLE
    READ_VARIABLE ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE RANDOM_UNIFORM MULTINOMIAL
    GELU DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_SUM ATAN2
    UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT STABLEHLO_LOGISTIC STABLEHLO_ADD STABLEHLO_DIVIDE
    STABLEHLO_MULTIPLY STABLEHLO_MAXIMUM STABLEHLO_RESHAPE STABLEHLO_CLAMP STABLEHLO_CONCATENATE
    STABLEHLO_BROADCAST_IN_DIM STABLEHLO_CONVOLUTION STABLEHLO_SLICE STABLEHLO_CUSTOM_CALL STABLEHLO_REDUCE
    STABLEHLO_ABS STABLEHLO_AND STABLEHLO_COSINE STABLEHLO_EXPONENTIAL STABLEHLO_FLOOR STABLEHLO_LOG
    STABLEHLO_MINIMUM STABLEHLO_NEGATE STABLEHLO_OR STABLEHLO_POWER STABLEHLO_REMAINDER STABLEHLO_RSQRT
    STABLEHLO_SELECT STABLEHLO_SUBTRACT STABLEHLO_TANH STABLEHLO_SCATTER STABLEHLO_COMPARE STABLEHLO_CONVERT
    STABLEHLO_DYNAMIC_SLICE STABLEHLO_DYNAMIC_UPDATE_SLICE STABLEHLO_PAD STABLEHLO_IOTA STABLEHLO_DOT_GENERAL
    STABLEHLO_REDUCE_WINDOW STABLEHLO_SORT STABLEHLO_WHILE STABLEHLO_GATHER STABLEHLO_TRANSPOSE DILATE
    STABLEHLO_RNG_BIT_GENERATOR REDUCE_WINDOW STABLEHLO_COMPOSITE STABLEHLO_SHIFT_LEFT STABLEHLO_CBRT
    STABLEHLO_CASE
"""
_DTYPES = """
    float32 float16 int32 uint8 int64 string bool int16 complex64 int8 float64 complex128 uint64 resource
    variant uint32 uint16 int4 bfloat16 int2 uint4 float8_e4m3fn float8_e5m2
"""
#: The name of builtin operator n is BUILTINS[n].
BUILTINS = tuple(_BUILTINS.split())
#: The name of tensor type n is DTYPES[n]: NumPy's name where NumPy has the type.
DTYPES = tuple(_DTYPES.split())
#: Bits of one element, for the types whose elements all have one size.
BITS = {
    **dict.fromkeys(("int2",), 2),
    **dict.fromkeys(("int4", "uint4"), 4),
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 8),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 16),
    **dict.fromkeys(("int32", "uint32", "float32"), 32),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 64),
    "complex128": 128,
}
#: Kinds of option whose number stands for a name.
ENUMS = {
    "padding": ("SAME", "VALID"),
    "activation": ("NONE", "RELU", "RELU_N1_TO_1", "RELU6", "TANH", "SIGN_BIT"),
    "weights_format": ("DEFAULT", "SHUFFLED4x16INT8"),
    "lstm_kernel": ("FULL", "BASIC"),
    "lsh_projection": ("UNKNOWN", "SPARSE", "DENSE"),
    "combiner": ("SUM", "MEAN", "SQRTN"),
    "mirror_pad": ("REFLECT", "SYMMETRIC"),
    "dtype": DTYPES,
}


class Option(NamedTuple):
    """One field of an options table. kind: int, int64, bool, float, ints, floats, text, subgraph or a key of ENUMS."""

    number: int
    name: str
    kind: str
    default: int


class Options(NamedTuple):
    """The options table of some operators: its number in the union, and its fields."""

    union: int
    second: bool
    fields: tuple[Option, ...]


# Number in the union BuiltinOptions, operators, fields in order as name:kind=default; '-' is a field out of use.
_FIRST = (
    (
        1,
        "CONV_2D",
        "padding:padding stride_w:int stride_h:int fused_activation_function:activation "
        "dilation_w_factor:int=1 dilation_h_factor:int=1 quantized_bias_type:dtype",
    ),
    (
        2,
        "DEPTHWISE_CONV_2D",
        "padding:padding stride_w:int stride_h:int depth_multiplier:int fused_activation_function:activation "
        "dilation_w_factor:int=1 dilation_h_factor:int=1",
    ),
    (3, "CONCAT_EMBEDDINGS", "num_channels:int num_columns_per_channel:ints embedding_dim_per_channel:ints"),
    (4, "LSH_PROJECTION", "type:lsh_projection"),
    (
        5,
        "AVERAGE_POOL_2D MAX_POOL_2D L2_POOL_2D",
        "padding:padding stride_w:int stride_h:int filter_width:int filter_height:int "
        "fused_activation_function:activation",
    ),
    (6, "SVDF", "rank:int fused_activation_function:activation asymmetric_quantize_inputs:bool"),
    (7, "RNN", "fused_activation_function:activation asymmetric_quantize_inputs:bool"),
    (
        8,
        "FULLY_CONNECTED",
        "fused_activation_function:activation weights_format:weights_format keep_num_dims:bool "
        "asymmetric_quantize_inputs:bool quantized_bias_type:dtype",
    ),
    (9, "SOFTMAX", "beta:float"),
    (10, "CONCATENATION", "axis:int fused_activation_function:activation"),
    (11, "ADD", "fused_activation_function:activation pot_scale_int16:bool=1"),
    (12, "L2_NORMALIZATION", "fused_activation_function:activation"),
    (13, "LOCAL_RESPONSE_NORMALIZATION", "radius:int bias:float alpha:float beta:float"),
    (
        14,
        "LSTM",
        "fused_activation_function:activation cell_clip:float proj_clip:float kernel_type:lstm_kernel "
        "asymmetric_quantize_inputs:bool",
    ),
    (15, "RESIZE_BILINEAR", "- - align_corners:bool half_pixel_centers:bool"),
    (16, "CALL", "subgraph:subgraph"),
    (17, "RESHAPE", "new_shape:ints"),
    (18, "SKIP_GRAM", "ngram_size:int max_skip_size:int include_all_ngrams:bool"),
    (19, "SPACE_TO_DEPTH", "block_size:int"),
    (20, "EMBEDDING_LOOKUP_SPARSE", "combiner:combiner"),
    (21, "MUL", "fused_activation_function:activation"),
    (23, "GATHER", "axis:int batch_dims:int"),
    (27, "MEAN SUM REDUCE_PROD REDUCE_MAX REDUCE_MIN REDUCE_ANY REDUCE_ALL", "keep_dims:bool"),
    (28, "SUB", "fused_activation_function:activation pot_scale_int16:bool=1"),
    (29, "DIV", "fused_activation_function:activation"),
    (30, "SQUEEZE", "squeeze_dims:ints"),
    (
        31,
        "UNIDIRECTIONAL_SEQUENCE_RNN",
        "time_major:bool fused_activation_function:activation asymmetric_quantize_inputs:bool",
    ),
    (
        32,
        "STRIDED_SLICE",
        "begin_mask:int end_mask:int ellipsis_mask:int new_axis_mask:int shrink_axis_mask:int offset:bool",
    ),
    (35, "SPLIT", "num_splits:int"),
    (37, "CAST", "in_data_type:dtype out_data_type:dtype"),
    (40, "ARG_MAX", "output_type:dtype"),
    (
        49,
        "TRANSPOSE_CONV",
        "padding:padding stride_w:int stride_h:int fused_activation_function:activation quantized_bias_type:dtype",
    ),
    (50, "SPARSE_TO_DENSE", "validate_indices:bool"),
    (55, "SHAPE", "out_type:dtype"),
    (57, "ARG_MIN", "output_type:dtype"),
    (58, "FAKE_QUANT", "min:float max:float num_bits:int narrow_range:bool"),
    (59, "PACK", "values_count:int axis:int"),
    (61, "ONE_HOT", "axis:int"),
    (64, "UNPACK", "num:int axis:int"),
    (
        69,
        "BIDIRECTIONAL_SEQUENCE_LSTM",
        "fused_activation_function:activation cell_clip:float proj_clip:float merge_outputs:bool "
        "time_major:bool=1 asymmetric_quantize_inputs:bool",
    ),
    (
        70,
        "BIDIRECTIONAL_SEQUENCE_RNN",
        "time_major:bool fused_activation_function:activation merge_outputs:bool asymmetric_quantize_inputs:bool",
    ),
    (
        71,
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        "fused_activation_function:activation cell_clip:float proj_clip:float time_major:bool "
        "asymmetric_quantize_inputs:bool diagonal_recurrent_tensors:bool",
    ),
    (74, "RESIZE_NEAREST_NEIGHBOR", "align_corners:bool half_pixel_centers:bool"),
    (75, "LEAKY_RELU", "alpha:float"),
    (77, "MIRROR_PAD", "mode:mirror_pad"),
    (79, "SPLIT_V", "num_splits:int"),
    (80, "UNIQUE", "idx_out_type:dtype=2"),
    (87, "REVERSE_SEQUENCE", "seq_dim:int batch_dim:int"),
    (92, "IF", "then_subgraph_index:subgraph else_subgraph_index:subgraph"),
    (93, "WHILE", "cond_subgraph_index:subgraph body_subgraph_index:subgraph"),
    (94, "DEPTH_TO_SPACE", "block_size:int"),
    (101, "BATCH_MATMUL", "adj_x:bool adj_y:bool asymmetric_quantize_inputs:bool"),
    (102, "CUMSUM", "exclusive:bool reverse:bool"),
    (103, "CALL_ONCE", "init_subgraph_index:subgraph"),
    (
        106,
        "CONV_3D CONV_3D_TRANSPOSE",
        "padding:padding stride_d:int stride_w:int stride_h:int fused_activation_function:activation "
        "dilation_d_factor:int=1 dilation_w_factor:int=1 dilation_h_factor:int=1",
    ),
    (107, "HASHTABLE", "table_id:int key_dtype:dtype value_dtype:dtype"),
    (111, "VAR_HANDLE", "container:text shared_name:text"),
    (114, "RANDOM_UNIFORM RANDOM_STANDARD_NORMAL MULTINOMIAL", "seed:int64 seed2:int64"),
    (115, "BUCKETIZE", "boundaries:floats"),
    (116, "GELU", "approximate:bool"),
)
# The same for the union BuiltinOptions2.
_SECOND = (
    (15, "STABLEHLO_WHILE", "cond_subgraph_index:subgraph body_subgraph_index:subgraph"),
    (21, "STABLEHLO_COMPOSITE", "name:text decomposition_subgraph_index:subgraph - - version:int"),
)


def _parse(union: int, operators: str, fields: str, *, second: bool) -> dict[str, Options]:
    found = []
    for number, field in enumerate(fields.split()):
        if field != "-":
            name, _, rest = field.partition(":")
            kind, _, default = rest.partition("=")
            found.append(Option(number, name, kind, int(default or 0)))
    return dict.fromkeys(operators.split(), Options(union, second, tuple(found)))


#: The options of an operator by its name.
OPTIONS: dict[str, Options] = {}
for _row in _FIRST:
    OPTIONS.update(_parse(*_row, second=False))
for _row in _SECOND:
    OPTIONS.update(_parse(*_row, second=True))


def named(names: tuple[str, ...], number: int) -> str:
    """The name behind a number of the schema, or the number itself where this table ends before it."""
    return names[number] if 0 <= number < len(names) else str(number)
