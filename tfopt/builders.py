"""ResNets and MobileNets for any image size, width and number of classes.

`build('resnet8', (32, 32, 3), 10)` and its like. Inputs are already scaled: no builder puts a
Rescaling layer inside, because the InputSpec carries the scaling. Every model ends in a softmax.

Images of 32 pixels and below would leave a MobileNet with a single pixel, so its stem keeps the
full resolution there (stride 1); all other strides are the paper's.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable

import keras
from keras import layers

from tfopt.errors import InputError, unknown_name


def resnet(depth: int, shape: tuple[int, int, int], classes: int, width: float = 1.0) -> keras.Model:
    """The CIFAR ResNet of He et al. 2015 (arXiv:1512.03385, section 4.2), depth 6n + 2.

    Three stages of n basic blocks with 16, 32 and 64 channels times `width`; shortcuts that change
    shape are 1x1 convolutions (option B).
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise InputError("A CIFAR ResNet has 6n + 2 layers", received=f"depth {depth}", allowed="8, 14, 20, 32, 44, 56")
    inputs = x = keras.Input(shape, name="image")
    x = _conv(x, _scale(16, width, 4), 3, 1, "stem")
    for stage, base in enumerate((16, 32, 64), 1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            x = _basic_block(x, _scale(base, width, 4), stride, f"stage{stage}_block{block}")
    return _head(inputs, x, classes, f"resnet{depth}{_suffix(width)}")


def _basic_block(x, channels: int, stride: int, name: str):
    y = _conv(x, channels, 3, stride, f"{name}_conv1")
    y = _conv(y, channels, 3, 1, f"{name}_conv2", activation=None)
    if stride > 1 or x.shape[-1] != channels:
        x = _conv(x, channels, 1, stride, f"{name}_shortcut", activation=None)
    return layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, y]))


def mobilenet(shape: tuple[int, int, int], classes: int, width: float = 1.0) -> keras.Model:
    """MobileNet V1 of Howard et al. 2017 (arXiv:1704.04861, table 1) with its width multiplier."""
    inputs = x = keras.Input(shape, name="image")
    x = _conv(x, _scale(32, width), 3, _stem_stride(shape), "stem", activation="relu6")
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for index, (channels, stride) in enumerate(plan, 1):
        x = _depthwise(x, 3, stride, f"block{index}_depthwise", activation="relu6")
        x = _conv(x, _scale(channels, width), 1, 1, f"block{index}_pointwise", activation="relu6")
    return _head(inputs, x, classes, f"mobilenet{_suffix(width)}", dropout=0.1)


def mobilenet_v2(shape: tuple[int, int, int], classes: int, width: float = 1.0) -> keras.Model:
    """MobileNet V2 of Sandler et al. 2018 (arXiv:1801.04381, table 2) with its width multiplier."""
    inputs = x = keras.Input(shape, name="image")
    x = _conv(x, _scale(32, width), 3, _stem_stride(shape), "stem", activation="relu6")
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    index = 0
    for expansion, channels, repeats, first_stride in plan:
        for repeat in range(repeats):
            index += 1
            stride = first_stride if repeat == 0 else 1
            x = _inverted_residual(x, expansion * x.shape[-1], _scale(channels, width), 3, stride, f"block{index}")
    x = _conv(x, _scale(1280, max(1.0, width)), 1, 1, "top", activation="relu6")
    return _head(inputs, x, classes, f"mobilenet_v2{_suffix(width)}", dropout=0.1)


def mobilenet_v3_small(shape: tuple[int, int, int], classes: int, width: float = 1.0) -> keras.Model:
    """MobileNet V3-Small of Howard et al. 2019 (arXiv:1905.02244, table 2) with its width multiplier."""
    inputs = x = keras.Input(shape, name="image")
    x = _conv(x, 16, 3, _stem_stride(shape), "stem", activation="hard_swish")
    plan = [  # kernel, expansion channels, output channels, squeeze-and-excite, activation, stride
        (3, 16, 16, True, "relu", 2),
        (3, 72, 24, False, "relu", 2),
        (3, 88, 24, False, "relu", 1),
        (5, 96, 40, True, "hard_swish", 2),
        (5, 240, 40, True, "hard_swish", 1),
        (5, 240, 40, True, "hard_swish", 1),
        (5, 120, 48, True, "hard_swish", 1),
        (5, 144, 48, True, "hard_swish", 1),
        (5, 288, 96, True, "hard_swish", 2),
        (5, 576, 96, True, "hard_swish", 1),
        (5, 576, 96, True, "hard_swish", 1),
    ]
    for index, (kernel, expanded, channels, squeeze, activation, stride) in enumerate(plan, 1):
        x = _inverted_residual(
            x, _scale(expanded, width), _scale(channels, width), kernel, stride, f"block{index}", activation, squeeze
        )
    x = _conv(x, _scale(576, width), 1, 1, "top", activation="hard_swish")
    x = layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
    x = layers.Conv2D(_scale(1024, max(1.0, width)), 1, name="features")(x)
    x = _activate(x, "hard_swish", "features_act")
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(classes, activation="softmax", name="classes")(x)
    return keras.Model(inputs, x, name=f"mobilenet_v3_small{_suffix(width)}")


def _inverted_residual(x, expanded, channels, kernel, stride, name, activation="relu6", squeeze=False):
    y = x if expanded == x.shape[-1] else _conv(x, expanded, 1, 1, f"{name}_expand", activation=activation)
    y = _depthwise(y, kernel, stride, f"{name}_depthwise", activation=activation)
    if squeeze:
        y = _squeeze_excite(y, f"{name}_se")
    y = _conv(y, channels, 1, 1, f"{name}_project", activation=None)
    if stride == 1 and x.shape[-1] == channels:
        y = layers.Add(name=f"{name}_add")([x, y])
    return y


def _squeeze_excite(x, name):
    y = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(x)
    y = layers.Conv2D(_scale(x.shape[-1], 0.25), 1, activation="relu", name=f"{name}_reduce")(y)
    y = layers.Conv2D(x.shape[-1], 1, activation="hard_sigmoid", name=f"{name}_expand")(y)
    return layers.Multiply(name=f"{name}_scale")([x, y])


def _conv(x, channels, kernel, stride, name, activation: str | None = "relu"):
    x = layers.Conv2D(channels, kernel, stride, "same", use_bias=False, name=name)(x)
    return _activate(layers.BatchNormalization(name=f"{name}_bn")(x), activation, f"{name}_act")


def _depthwise(x, kernel, stride, name, activation):
    x = layers.DepthwiseConv2D(kernel, stride, "same", use_bias=False, name=name)(x)
    return _activate(layers.BatchNormalization(name=f"{name}_bn")(x), activation, f"{name}_act")


def _activate(x, activation, name):
    if activation is None:
        return x
    if activation == "hard_swish":
        return layers.Activation("hard_silu", name=name)(x)
    return layers.ReLU(6.0 if activation == "relu6" else None, name=name)(x)


def _head(inputs, x, classes, name, dropout: float = 0.0):
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(inputs, layers.Dense(classes, activation="softmax", name="classes")(x), name=name)


def _stem_stride(shape) -> int:
    return 1 if min(shape[:2]) <= 32 else 2


def _scale(channels: int, width: float, divisor: int = 8) -> int:
    """Channels times width, rounded to what kernels like, never more than 10% below."""
    wanted = channels * width
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


def _suffix(width: float) -> str:
    return "" if width == 1.0 else f"_{width:g}".replace(".", "p")


BUILDERS: dict[str, Callable[..., keras.Model]] = {
    **{f"resnet{depth}": (lambda *args, _depth=depth, **kw: resnet(_depth, *args, **kw)) for depth in (8, 20, 32, 56)},
    "mobilenet": mobilenet,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_small": mobilenet_v3_small,
}


def parse(name: str) -> tuple[str, float] | None:
    """The (architecture, width) of a name that `build` gives, such as 'mobilenet_0p25'; None for others."""
    for architecture in sorted(BUILDERS, key=len, reverse=True):
        found = re.fullmatch(re.escape(architecture) + r"(?:_(\d+(?:p\d+)?))?", name)
        if found:
            return architecture, float((found[1] or "1").replace("p", "."))
    return None


def build(name: str, shape: tuple[int, int, int], classes: int, width: float = 1.0) -> keras.Model:
    """A fresh model by name: resnet8, resnet20, resnet32, resnet56, mobilenet, mobilenet_v2, mobilenet_v3_small.

    shape: (height, width, channels) of one image, 1 or 3 channels. classes: at least 2. width: the
    channel multiplier, 0.05 to 4. Raises InputError for anything else.
    """
    if name not in BUILDERS:
        raise unknown_name("architecture", str(name), BUILDERS)
    if not _is_whole(classes) or classes < 2:
        raise InputError("A classifier needs at least two classes", received=repr(classes), allowed="2 and above")
    if not isinstance(width, (int, float)) or isinstance(width, bool) or not 0.05 <= width <= 4:
        raise InputError("The width multiplier is out of range", received=repr(width), allowed="0.05 to 4")
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if len(shape) != 3 or not all(map(_is_whole, shape)) or shape[2] not in (1, 3):
        raise InputError("This is no image's shape", received=shape, allowed="(height, width, 1 or 3)")
    if min(shape[:2]) < 8:
        raise InputError("The image is too small for this architecture", received=shape, allowed="8 x 8 and above")
    return BUILDERS[name](tuple(map(int, shape)), int(classes), width=width)


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
