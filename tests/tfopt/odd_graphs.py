"""Small models with everything in them that channels can go through; for the tests and benchmarks/channels.py."""

from __future__ import annotations

import keras

L, ops = keras.layers, keras.ops


def _block(x, filters: int, kernel: int = 3, **settings):
    x = L.Conv2D(filters, kernel, padding="same", use_bias=False, **settings)(x)
    return L.ReLU()(L.BatchNormalization()(x))


def _head(x, classes: int = 5):
    return L.Dense(classes, activation="softmax", name="head")(L.GlobalAveragePooling2D()(x))


def multi_branch():
    """Inception-like: four branches, two of them deep, concatenated twice."""
    image = keras.Input((16, 16, 3))
    x = _block(image, 16)
    for _ in range(2):
        pooled = L.MaxPooling2D(3, strides=1, padding="same")(x)
        parts = [_block(x, 16, 1), _block(_block(x, 8, 1), 16), _block(_block(x, 8, 1), 24, 5), _block(pooled, 8, 1)]
        x = L.Concatenate()(parts)
    return keras.Model(image, _head(x))


def shared_layers():
    """One convolution and one nested model, each called twice, on different tensors."""
    image = keras.Input((16, 16, 3))
    inner_in = keras.Input((16, 16, 16))
    inner = keras.Model(inner_in, _block(_block(inner_in, 24), 16), name="inner")
    stem, other = L.Conv2D(16, 3, padding="same", name="stem"), L.Conv2D(16, 1, name="other")
    shared, norm = L.Conv2D(16, 3, padding="same", name="shared"), L.BatchNormalization(name="shared_norm")
    one, two = stem(image), other(image)
    one, two = L.ReLU()(norm(shared(one))), L.ReLU()(norm(shared(two)))
    x = L.Concatenate()([inner(one), inner(two)])
    return keras.Model(image, _head(_block(x, 32)))


def concatenate_then_add():
    """16 and 16 channels concatenated and added to 32; then zeros appended behind channels, as in CIFAR's ResNets."""
    image = keras.Input((16, 16, 3))
    joined = L.Concatenate()([_block(image, 16), _block(image, 16, 5)])
    x = L.Add()([joined, _block(image, 32)])
    y = _block(x, 48, strides=2)
    short = ops.pad(L.AveragePooling2D(2)(x), ((0, 0), (0, 0), (0, 0), (4, 12)))
    return keras.Model(image, _head(_block(L.Add()([y, short]), 32)))


def squeeze_and_excite():
    """Gates of (1, 1, C), one by layers and one by keras.ops with its hard sigmoid."""
    image = keras.Input((16, 16, 3))
    x = _block(image, 32)
    gate = L.GlobalAveragePooling2D(keepdims=True)(x)
    gate = L.Conv2D(32, 1, activation="sigmoid")(L.Conv2D(8, 1, activation="relu")(gate))
    x = L.Multiply()([x, gate])
    x = _block(x, 48)
    gate = L.Reshape((1, 1, 48))(ops.mean(x, axis=(1, 2)))
    gate = ops.relu6(L.Conv2D(48, 1)(L.Conv2D(16, 1, activation="silu")(gate)) + 3.0) * (1 / 6)
    return keras.Model(image, _head(x * gate))


def inverted_residual():
    """MobileNetV2's blocks, with a depth multiplier of 2 in one, and a separable convolution."""
    image = keras.Input((16, 16, 3))
    x = L.BatchNormalization()(L.Conv2D(16, 3, padding="same")(image))
    for multiplier in (1, 2):
        y = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(48, 1)(x)))
        y = L.DepthwiseConv2D(3, padding="same", depth_multiplier=multiplier)(y)
        y = L.BatchNormalization()(L.Conv2D(16, 1)(L.ReLU(6.0)(L.BatchNormalization()(y))))
        x = L.Add()([x, y])
    return keras.Model(image, _head(L.SeparableConv2D(32, 3, depth_multiplier=2, activation="relu")(x)))


def u_net():
    """Encoder and decoder with transposed convolutions, skips and cropping; its output is an image."""
    image = keras.Input((20, 20, 3))
    one = _block(image, 16)
    two = _block(L.MaxPooling2D()(one), 32)
    x = _block(L.MaxPooling2D()(two), 48)
    x = L.Conv2DTranspose(32, 2, strides=2, activation="relu")(x)
    x = _block(L.Concatenate()([x, two]), 32)
    x = L.Conv2DTranspose(16, 3, strides=2, padding="same", use_bias=False)(x)
    x = L.Concatenate()([L.Cropping2D(2)(L.ZeroPadding2D(2)(x)), one, L.UpSampling2D()(two)])
    return keras.Model(image, L.Conv2D(1, 1, activation="sigmoid", name="mask")(_block(x, 16)))


def two_inputs():
    """An image and a row of numbers, and two outputs."""
    image, numbers = keras.Input((16, 16, 3), name="image"), keras.Input((7,), name="numbers")
    x = L.GlobalAveragePooling2D()(_block(_block(image, 16), 32))
    y = L.Dense(32, activation="relu")(L.Dense(24, activation="tanh")(numbers))
    both = L.Concatenate()([L.Maximum()([x, y]), L.Dense(16)(numbers), numbers])
    outputs = {
        "kind": L.Dense(4, activation="softmax", name="kind")(both),
        "size": L.Dense(1, name="size")(L.Dense(16)(x)),
    }
    return keras.Model({"image": image, "numbers": numbers}, outputs)


def grouped():
    """Grouped convolutions, shuffled channels, a group for each channel, and group normalization."""
    image = keras.Input((16, 16, 3))
    x = _block(image, 32)
    x = _block(x, 48, groups=4)
    x = L.Reshape((16, 16, 4, 12))(x)
    x = L.Reshape((16, 16, 48))(L.Permute((1, 2, 4, 3))(x))
    x = _block(x, 32, groups=2)
    x = L.Conv2D(64, 3, groups=32, padding="same", activation="relu")(x)
    x = L.GroupNormalization(16)(x)
    return keras.Model(image, _head(L.ReLU()(L.Conv2D(32, 1)(x))))


def prelu_and_padding():
    """PReLU with and without shared axes, LeakyReLU, valid padding; in one dimension and three behind it."""
    image = keras.Input((14, 14, 3))
    x = L.PReLU(shared_axes=[1, 2])(L.Conv2D(24, 3)(L.ZeroPadding2D(((1, 0), (0, 2)))(image)))
    x = L.PReLU()(L.BatchNormalization()(L.Conv2D(32, 3, strides=2)(L.ZeroPadding2D(1)(x))))
    row = L.Reshape((49, 32))(x) if x.shape[1] == 7 else L.Reshape((x.shape[1] * x.shape[2], 32))(x)
    row = L.Conv1D(24, 3, activation="relu")(L.ZeroPadding1D(1)(row))
    row = L.SeparableConv1D(16, 3)(L.LeakyReLU()(row))
    cube = L.Conv3D(16, 2, activation="relu")(L.Reshape((*x.shape[1:3], 32, 1))(x))
    both = L.Concatenate()([L.GlobalMaxPooling1D()(row), L.GlobalAveragePooling3D()(cube)])
    return keras.Model(image, L.Dense(5, name="head")(both))


def flatten_and_reshape():
    """Flattened into dense layers, reshaped back into an image, parts taken out and put together."""
    image = keras.Input((8, 8, 3))
    x = L.MaxPooling2D()(_block(image, 24))
    x = L.Dense(64, activation="relu")(L.Flatten()(x))
    x = L.EinsumDense("ab,bc->ac", output_shape=4 * 4 * 16, bias_axes="c", activation="relu")(x)
    x = ops.transpose(ops.reshape(x, (-1, 4, 4, 16)), (0, 2, 1, 3))
    x = L.Conv2D(32, 3, padding="same")(x)
    one, two = ops.split(x, 2, axis=-1)
    three = ops.concatenate([one, x[:, :, :, 8:24], ops.maximum(two, 0.0)], axis=-1)
    x = ops.squeeze(ops.expand_dims(three, 1), 1)
    return keras.Model(image, L.Dense(5, activation="softmax", name="head")(L.Flatten()(L.Conv2D(16, 3)(x))))


GRAPHS = {
    function.__name__: function
    for function in (
        multi_branch, shared_layers, concatenate_then_add, squeeze_and_excite, inverted_residual, u_net, two_inputs,
        grouped, prelu_and_padding, flatten_and_reshape,
    )
}  # fmt: skip
