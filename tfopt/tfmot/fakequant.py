"""Simulated int8 around a rebuilt model, with TFMOT's wrappers and quantizers. Runs in the worker only.

Jacob et al. 2018 (arXiv:1712.05877), section 3: weights and activations are rounded in the forward
pass as the int8 kernels will round them. Where a rounding belongs is decided by rounding.py on the
neutral graph, not by TFMOT's pattern matcher, which refuses whatever it has no pattern for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras import quantize_layer, quantizers
from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import (
    default_8bit_quantize_configs as configs,
)
from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import (
    default_8bit_quantize_registry as registry,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantize_aware_activation import NoOpActivation
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import QuantizeWrapperV2

from mobile_bench.inputs import InputSpec
from tfopt.tfmot import neutral
from tfopt.tfmot.neutral import Graph, Node, Weights
from tfopt.tfmot.preserving import PreservingQuantizer, preserving
from tfopt.tfmot.rebuild import build, values
from tfopt.tfmot.rounding import plan

#: how much of a range stays at each training step; TFMOT's 0.999 cannot follow a short fine-tuning
_RANGE_DECAY = 0.99


class FakeQuantized:
    """A model with simulated int8: `model`, and `weights()`, the float weights below the roundings.

    keep_zeros: weights that are zero stay zero. keep_clusters: kernels of few values keep no more than these. kept:
    the names of the kernels that have something to keep; see preserving.py.
    """

    def __init__(self, graph: Graph, weights: Weights, *, keep_zeros: bool = False, keep_clusters: bool = False):
        self.graph = graph
        self._rounding = plan(graph)
        for name in graph.floats:  # its weights stay as they are; its answer is rounded for those that read it
            self._rounding[name] = "none" if self._rounding[name] == "fused kernel" else "output"
        self._registry = registry.Default8BitQuantizeRegistry()
        self._keep = {"zeros": keep_zeros, "clusters": keep_clusters}
        self._preserving: list[PreservingQuantizer] = []
        self.wrappers: list[QuantizeWrapperV2] = []
        self.kept: list[str] = []
        self._image = quantize_layer.QuantizeLayer(
            quantizers.AllValuesQuantizer(num_bits=8, per_axis=False, symmetric=False, narrow_range=False),
            name="quantize_layer",
        )
        self.model, self._variables = build(graph, weights, wrap=self._wrap, entry=self._image)
        frozen = {node.name for node in graph.nodes if not node.trainable}
        for wrapper in self.wrappers:
            if wrapper.layer.name in frozen:
                wrapper._trainable_weights.clear()  # where the wrapper puts the kernel even of a frozen layer

    def others(self, kernels: Iterable[str]) -> dict[str, tf.Variable]:
        """Of these weights, those that nothing here keeps zeros or clusters of."""
        return {name: self._variables[name] for name in kernels if name not in self.kept}

    def weights(self) -> Weights:
        for quantizer in self._preserving:
            quantizer.settle()
        return values(self._variables)

    def calibrate(self, batches, spec: InputSpec) -> None:
        """Set every range from some batches of training images before training starts.

        TFMOT starts each range at -6…6 and lets it drift by a thousandth a step, which a fine-tuning
        of a few hundred steps never recovers from. batches: float32 (batch, height, width, channels).
        """
        low, high = _image_range(spec)
        self._image.quantizer_vars["min_var"].assign(low)
        self._image.quantizer_vars["max_var"].assign(high)
        # The range is known, and a quantizer that widened it to the last pixel would undo what _image_range does.
        self._image.quantizer = _TrackingQuantizer(tf.constant(1.0))
        decay = tf.Variable(0.0, trainable=False)
        for wrapper in self.wrappers:
            for activation in wrapper._quantize_activations:
                activation.quantizer = _TrackingQuantizer(decay)
            if wrapper._output_quantizers:
                wrapper._output_quantizers = [_TrackingQuantizer(decay)]
        layers = self.model._flatten_layers()
        norms = [layer for layer in layers if isinstance(layer, tf_keras.layers.BatchNormalization)]
        trainable = [norm.trainable for norm in norms]
        for norm in norms:
            norm.trainable = False  # its statistics are not what is being measured
        forward = tf.function(lambda images: self.model(images, training=True), autograph=False, reduce_retracing=True)
        for number, images in enumerate(batches):
            decay.assign(number / (number + 1))  # a plain average over the batches
            forward(tf.constant(images))
        decay.assign(_RANGE_DECAY)
        for norm, was in zip(norms, trainable):
            norm.trainable = was

    def save(self, path: Path) -> None:
        """The graph, the float weights and, as 'range:N', what the wrappers added, in the model's order."""
        ranges = {f"range:{i}": variable.numpy() for i, variable in enumerate(self._ranges())}
        neutral.save(path, self.graph, {**self.weights(), **ranges})

    @classmethod
    def load(cls, path: Path) -> FakeQuantized:
        """What `save` wrote. Raises InputError for anything else."""
        graph, arrays = neutral.load(path)
        loaded = cls(graph, arrays)
        for number, variable in enumerate(loaded._ranges()):
            variable.assign(arrays[f"range:{number}"])
        return loaded

    def _ranges(self) -> list[tf.Variable]:
        own = {id(variable) for variable in self._variables.values()}
        own |= {id(quantizer.centroids) for quantizer in self._preserving}
        return [variable for variable in self.model.weights if id(variable) not in own]

    def _wrap(self, node: Node, layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        rounding = self._rounding[node.name]
        if rounding == "none":
            return layer
        if rounding == "output":
            config = configs.Default8BitOutputQuantizeConfig()
        else:
            config = self._kernel_config(node, layer)
            if rounding == "fused kernel":
                layer.activation = NoOpActivation()
        wrapper = QuantizeWrapperV2(layer, config)
        self.wrappers.append(wrapper)
        return wrapper

    def _kernel_config(self, node: Node, layer: tf_keras.layers.Layer):
        config = self._registry.get_quantize_config(layer)
        # A kernel that a batch norm became, or that scales pixels, is no kernel of the user's to keep anything of.
        if any(self._keep.values()) and node.trainable and node.weights[0].rpartition(":")[2].isdigit():
            quantizer = preserving(config.weight_quantizer, layer.weights[0], **self._keep)
            if quantizer:
                config = copy.copy(config)  # the registry gives one and the same to all layers of a type
                config.weight_quantizer = quantizer
                self._preserving.append(quantizer)
                self.kept.append(node.weights[0])
        return config


class _TrackingQuantizer(quantizers.MovingAverageQuantizer):
    """TFMOT's moving average with a decay that can be changed; used in training only, never stored."""

    def __init__(self, decay: tf.Variable):
        super().__init__(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
        self._decay = decay

    def __call__(self, inputs, training, weights, **kwargs):
        if training:
            # int8 needs 0 inside the range.
            low = tf.minimum(tf.reduce_min(inputs), 0.0)
            high = tf.maximum(tf.reduce_max(inputs), 0.0)
            weights["min_var"].assign(self._decay * weights["min_var"] + (1 - self._decay) * low)
            weights["max_var"].assign(self._decay * weights["max_var"] + (1 - self._decay) * high)
        return tf.quantization.fake_quant_with_min_max_vars(inputs, weights["min_var"], weights["max_var"], num_bits=8)


def _image_range(spec: InputSpec) -> tuple[float, float]:
    """The range that all pixels of 0..255 fill, with 0 in it, as int8 needs.

    Where pixels would fall half-way between two int8 values (127.5 ± 127.5 does it to all of them), every
    runtime would round them its own way; then the range is narrowed by a five-hundredth of itself.
    """
    grey = np.arange(256, dtype=np.uint8)[:, None, None, None]
    levels = spec.normalize(np.broadcast_to(grey, (256, 1, 1, spec.channels))).astype(np.float64)
    low, high = min(0.0, float(levels.min())), max(0.0, float(levels.max()))
    steps = np.abs(levels) / ((high - low) / 255)
    tie = np.any(np.abs(steps - np.floor(steps) - 0.5) < 1e-3)
    return (low / 1.002, high / 1.002) if tie else (low, high)
