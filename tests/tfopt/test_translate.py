"""Every layer of Keras and the operations of real models cross to tf_keras, or are refused with the reason."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tfopt.errors import ModelRefused
from tfopt.graph import in_float32
from tfopt.technique import Context, OptimizedModel
from tfopt.techniques.prune import Prune
from tfopt.tfmot import bridge, translate
from tfopt.training import TrainConfig

from .own_layers import Scaled
from .test_bridge import OUTPUTS_AGREE, outputs_of_rebuilt

VECTOR, ROWS, IMAGE, VOLUME = (6,), (8, 6), (8, 8, 6), (4, 6, 6, 3)
#: layer -> (shape of its input, its settings); several inputs of one shape for those that merge.
EXAMPLES = {
    "Conv1D": (ROWS, {"filters": 4, "kernel_size": 3, "activation": "relu"}),
    "Conv2D": (IMAGE, {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same", "activation": "gelu"}),
    "Conv3D": (VOLUME, {"filters": 4, "kernel_size": 2}),
    "Conv1DTranspose": (ROWS, {"filters": 4, "kernel_size": 3, "strides": 2}),
    "Conv2DTranspose": (IMAGE, {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"}),
    "Conv3DTranspose": (VOLUME, {"filters": 2, "kernel_size": 2}),
    "DepthwiseConv1D": (ROWS, {"kernel_size": 3, "depth_multiplier": 2}),
    "DepthwiseConv2D": (IMAGE, {"kernel_size": 3, "padding": "same"}),
    "SeparableConv1D": (ROWS, {"filters": 4, "kernel_size": 3}),
    "Dense": (VECTOR, {"units": 5, "activation": "hard_sigmoid"}),
    "EinsumDense": (ROWS, {"equation": "abc,cd->abd", "output_shape": (None, 5), "bias_axes": "d"}),
    "Embedding": (VECTOR, {"input_dim": 9, "output_dim": 4}),
    "BatchNormalization": (IMAGE, {}),
    "LayerNormalization": (IMAGE, {"epsilon": 1e-5}),
    "GroupNormalization": (IMAGE, {"groups": 3}),
    "UnitNormalization": (VECTOR, {}),
    "ReLU": (IMAGE, {"max_value": 1.0, "negative_slope": 0.1}),
    "ELU": (IMAGE, {"alpha": 0.5}),
    "PReLU": (IMAGE, {"shared_axes": [1, 2]}),
    "Softmax": (VECTOR, {}),
    **{name: (IMAGE, {}) for name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")},
    "Concatenate": (IMAGE, {"axis": 1}),
    "Dot": (VECTOR, {"axes": 1, "normalize": True}),
    "Attention": (ROWS, {"use_scale": True}),
    "AdditiveAttention": (ROWS, {}),
    "MultiHeadAttention": (ROWS, {"num_heads": 2, "key_dim": 3}),
    **{f"{kind}Pooling1D": (ROWS, {"pool_size": 2}) for kind in ("Max", "Average")},
    **{f"{kind}Pooling2D": (IMAGE, {"pool_size": 3, "padding": "same"}) for kind in ("Max", "Average")},
    **{f"{kind}Pooling3D": (VOLUME, {"pool_size": 2}) for kind in ("Max", "Average")},
    **{f"Global{kind}Pooling1D": (ROWS, {"keepdims": True}) for kind in ("Max", "Average")},
    **{f"Global{kind}Pooling2D": (IMAGE, {}) for kind in ("Max", "Average")},
    **{f"Global{kind}Pooling3D": (VOLUME, {}) for kind in ("Max", "Average")},
    "Flatten": (IMAGE, {}),
    "Reshape": (IMAGE, {"target_shape": (16, -1)}),
    "Permute": (IMAGE, {"dims": (3, 1, 2)}),
    "RepeatVector": (VECTOR, {"n": 3}),
    "Masking": (ROWS, {}),
    "ZeroPadding1D": (ROWS, {"padding": (1, 2)}), "ZeroPadding2D": (IMAGE, {"padding": ((1, 0), (2, 1))}),
    "ZeroPadding3D": (VOLUME, {"padding": 1}),
    "Cropping1D": (ROWS, {"cropping": 1}), "Cropping2D": (IMAGE, {"cropping": ((1, 0), (2, 1))}),
    "Cropping3D": (VOLUME, {"cropping": 1}),
    "UpSampling1D": (ROWS, {}), "UpSampling2D": (IMAGE, {"interpolation": "bilinear"}), "UpSampling3D": (VOLUME, {}),
    "CenterCrop": (IMAGE, {"height": 4, "width": 5}),
    "Resizing": (IMAGE, {"height": 5, "width": 11}),
    "Dropout": (IMAGE, {"rate": 0.5}), "SpatialDropout1D": (ROWS, {"rate": 0.5}),
    "SpatialDropout2D": (IMAGE, {"rate": 0.5}), "SpatialDropout3D": (VOLUME, {"rate": 0.5}),
    "SimpleRNN": (ROWS, {"units": 4}), "GRU": (ROWS, {"units": 4, "return_sequences": True}),
    "LSTM": (ROWS, {"units": 4, "go_backwards": True}),
    "ConvLSTM1D": ((3, 8, 2), {"filters": 3, "kernel_size": 3}),
    "ConvLSTM2D": (VOLUME, {"filters": 3, "kernel_size": 3}),
    "ConvLSTM3D": ((2, 4, 4, 4, 2), {"filters": 2, "kernel_size": 2}),
    "Activation": (IMAGE, {"activation": "silu"}),
    "LeakyReLU": (IMAGE, {"negative_slope": 0.2}),
    "Normalization": ((8, 8, 2), {"mean": [0.5, 0.1], "variance": [0.25, 4.0]}),
    "Rescaling": (IMAGE, {"scale": 0.1, "offset": -1.0}),
    "SeparableConv2D": (IMAGE, {"filters": 4, "kernel_size": 3, "activation": "relu"}),
    # Keras's own that tf_keras lacks: they run as they are.
    "RMSNormalization": (VECTOR, {}),
    "AdaptiveAveragePooling2D": (IMAGE, {"output_size": 4}),
}  # fmt: skip
_MERGING = ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Dot")
_OF_THREE = ("Attention", "AdditiveAttention")


def example(name):
    """A model of that one layer; those that merge get two views of the input."""
    shape, settings = EXAMPLES[name]
    layer = getattr(layers, name)(**settings)
    image = keras.Input(shape)
    if name == "Embedding":
        answer = layer(layers.ReLU(max_value=8.0)(image * 9.0))
    elif name in _MERGING:
        answer = layer([image, image * 0.5 + 0.25])
    elif name in _OF_THREE:
        answer = layer([image, image * 0.5, image + 1.0])
    elif name == "MultiHeadAttention":
        answer = layer(image, image * 0.5)
    else:
        answer = layer(image)
    model = keras.Model(image, answer, name=name.lower())
    random = np.random.default_rng(1)
    if name != "Normalization":
        model.set_weights([random.uniform(0.2, 0.8, w.shape) for w in model.get_weights()])
    return model


def test_every_layer_of_keras_crosses_or_is_left_out_for_a_reason():
    absent = {}
    for name in dir(layers):
        cls = getattr(layers, name)
        if not (isinstance(cls, type) and issubclass(cls, layers.Layer)) or cls.__name__.startswith("Random"):
            continue
        kind = cls.__name__  # MaxPool2D is MaxPooling2D
        if kind not in (*EXAMPLES, *translate.TRAINING_ONLY):
            absent[kind] = translate.LEFT_OUT.get(kind, "not in tf_keras: runs as it is")
    assert not set(translate.PLAIN) - set(EXAMPLES), "each has an example"
    foreign = {kind for kind, why in absent.items() if "as it is" in why}
    assert foreign == {
        "AdaptiveAveragePooling1D", "AdaptiveAveragePooling3D", "AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D",
        "AdaptiveMaxPooling3D", "AugMix", "AutoContrast", "ContrastLimitedAdaptiveHistogramEqualization", "CutMix",
        "Equalization", "FlaxLayer", "GroupedQueryAttention", "JaxLayer", "MaxNumBoundingBoxes", "MelSpectrogram",
        "MixUp", "Pipeline", "RandAugment", "ReversibleEmbedding", "STFTSpectrogram", "Solarization", "TFSMLayer",
        "TorchModuleWrapper",
    }  # fmt: skip
    assert all(translate.LEFT_OUT[kind] for kind in set(absent) - foreign)


def test_every_layer_answers_the_same(tmp_path):
    for name, (expected, found) in zip(EXAMPLES, outputs_of_rebuilt(map(example, EXAMPLES), tmp_path)):
        assert name in ("Masking", "UnitNormalization") or np.ptp(expected) > 1e-3, name
        np.testing.assert_allclose(found, expected, atol=OUTPUTS_AGREE, rtol=1e-5, err_msg=name)


OPERATIONS = {
    "mean": lambda x: ops.mean(x, axis=(1, 2), keepdims=True) * x,
    "mean of rows": lambda x: ops.mean(x, axis=-1),
    "max": lambda x: ops.max(x, axis=[1, 2]), "sum": lambda x: ops.sum(x, axis=3, keepdims=True),
    "reshape": lambda x: ops.reshape(x, (-1, 16, 8)), "squeeze": lambda x: ops.squeeze(x[:, :1], axis=1),
    "expand_dims": lambda x: ops.expand_dims(x, 1), "transpose": lambda x: ops.transpose(x, (0, 3, 1, 2)),
    "swapaxes": lambda x: ops.swapaxes(x, 1, 3), "moveaxis": lambda x: ops.moveaxis(x, -1, 1),
    "concatenate": lambda x: ops.concatenate([x, x + 1.0], axis=-1), "stack": lambda x: ops.stack([x, -x], axis=1),
    "pad": lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]]),
    "pad with a value": lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 1], [0, 1]], constant_values=2.0),
    "pad reflected": lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]], mode="reflect"),
    "clip": lambda x: ops.clip(x, -0.5, 0.25), "square": ops.square, "sqrt": lambda x: ops.sqrt(ops.abs(x)),
    "power": lambda x: ops.power(ops.abs(x) + 1.0, 1.5), "leaky_relu": lambda x: ops.leaky_relu(x, 0.3),
    "gelu": lambda x: ops.gelu(x, approximate=False), "softmax": ops.softmax, "log_softmax": ops.log_softmax,
    "negative": lambda x: -x, "slice": lambda x: x[:, 1:-1, ::2, :2],
    "split": lambda x: ops.multiply(*ops.split(x, 2, axis=-1)),
    "split at": lambda x: ops.concatenate(ops.split(x, [1, 3], axis=1)[::-1], axis=1),
    "average_pool": lambda x: ops.average_pool(x, 2, 2), "max_pool": lambda x: ops.max_pool(x, 3, 2, "same"),
    "divide": lambda x: x / (ops.abs(x) + 1.0), "matmul": lambda x: ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))),
    "an array": lambda x: (x * np.arange(4.0, dtype="float32") - np.arange(8, dtype="float32")[:, None]) / 2.0,
    "h-swish by hand": lambda x: x * ops.relu6(x + 3.0) / 6.0, "erf": ops.erf, "exp": ops.exp,
}  # fmt: skip


def test_operations_of_real_models_answer_the_same(tmp_path):
    made = []
    for call in OPERATIONS.values():
        image = keras.Input((4, 8, 4))
        made.append(keras.Model(image, call(layers.ReLU(negative_slope=1.5)(image))))
    for name, (expected, found) in zip(OPERATIONS, outputs_of_rebuilt(made, tmp_path)):
        assert np.ptp(expected) > 1e-3, name
        np.testing.assert_allclose(found, expected, atol=OUTPUTS_AGREE, rtol=1e-5, err_msg=name)


def test_several_inputs_and_outputs(tmp_path):
    photo, depth = keras.Input((8, 8, 3), name="photo"), keras.Input((8, 8, 1), name="depth")
    x = layers.Concatenate()([layers.Conv2D(4, 3)(photo), layers.Conv2D(2, 3)(depth)])
    x = layers.Flatten()(x)
    model = keras.Model([photo, depth], [layers.Dense(3)(x), layers.Dense(2, name="second")(x)])
    graph, _ = bridge.describe(model)
    assert graph.shapes == ((8, 8, 3), (8, 8, 1)) and len(graph.outputs) == 2
    with pytest.raises(ModelRefused, match="not an image classifier"):
        from mobile_bench.inputs import InputSpec
        from tfopt.tfmot import client

        client.crossing(model, InputSpec(8, 8, 3))


def test_a_registered_layer_of_the_users_crosses(tmp_path):
    image = keras.Input((8, 8, 3))
    x = Scaled(0.5, name="own")(layers.Conv2D(4, 3)(image))
    model = keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))
    model.get_layer("own").set_weights([np.float32([1, 2, 3, 4])])
    ((expected, found),) = outputs_of_rebuilt([model], tmp_path)
    np.testing.assert_allclose(found, expected, atol=OUTPUTS_AGREE)


@pytest.mark.slow
def test_a_model_in_mixed_precision_is_pruned_in_float32(digits, spec, tmp_path):
    keras.utils.set_random_seed(0)
    image = keras.Input(spec.shape)
    x = layers.Conv2D(8, 3, dtype="mixed_float16", name="half")(image)
    x = layers.Dense(10, activation="softmax", name="scores")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x)
    brief = TrainConfig(steps=12, batch_size=16, evaluations=1, validation_images=20)
    result, report = Prune(train=brief, frequency=1).apply(
        OptimizedModel(model, spec), Context(digits, tmp_path, model)
    )
    assert result.model.get_layer("half").compute_dtype == "float16"
    assert any("mixed precision answers within" in note for note in report.notes)
    assert np.mean(result.model.get_layer("half").get_weights()[0] == 0) >= 0.49
    images = np.random.default_rng(0).uniform(-1, 1, (4, *spec.shape)).astype(np.float32)
    np.testing.assert_allclose(result.model(images), in_float32(result.model)(images), atol=5e-3)
