"""Zeros and clusters that stay what they are while a model learns to live with int8. Runs in the worker only.

TFMOT's Default8BitPrunePreserve- and -ClusterPreserveQuantizeScheme do this for Conv2D and Dense, by a mask over the
zeros and by trained centroids with looked-up weights; this is the same arithmetic with TFMOT's own gradients, around
whatever quantizer the layer has. Three things in TFMOT's classes are why it is not those (TFMOT 0.8.1, collab_opts):
they leave depthwise kernels out (_DISABLE_PRUNE_PRESERVE, _DISABLE_CLUSTER_PRESERVE); one quantizer object serves all
layers and stops preserving zeros for good at the first layer that has none (_build_clusters); and a convolution whose
channels use about equally many centroids gets centroids for each channel, so that 16 values become 16 a channel
(get_centroids).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import GradientAggregation
from tensorflow_model_optimization.python.core.quantization.keras import quantizers

from tfopt.kept import is_clustered
from tfopt.tfmot.clustering import SortedLookup


def preserving(inner, kernel: tf.Variable, *, zeros: bool, clusters: bool):
    """A quantizer that keeps what is asked for of a kernel, None where the kernel has nothing to keep."""
    values = kernel.numpy()
    clustered = clusters and is_clustered(values)
    if not clustered and not (zeros and np.any(values == 0)):
        return None
    return PreservingQuantizer(inner, kernel, clustered)


class PreservingQuantizer(quantizers.Quantizer):
    """The quantizer `inner` of a kernel, behind its zeros and, if `clustered`, its few values.

    The values of a clustered kernel share one range over all channels: then equal weights are equal int8 numbers in
    the whole tensor, not in one channel only. For weights that are few values anyhow, that costs next to nothing.
    """

    def __init__(self, inner, kernel: tf.Variable, clustered: bool):
        self.inner, self._kernel, self.clustered = inner, kernel, clustered
        self._mask = tf.constant((kernel.numpy() != 0).astype(np.float32))
        self.centroids: tf.Variable | None = None
        self._variables: dict = {}

    def build(self, tensor_shape, name, layer):
        self._variables = dict(self.inner.build(tensor_shape, name, layer))
        if self.clustered:
            found = self._kernel.numpy()
            start = np.unique(found[found != 0])
            self.centroids = layer.add_weight(
                f"{name}_centroids", shape=start.shape, trainable=True, initializer=tf.constant_initializer(start)
            )
        return self._variables

    def __call__(self, inputs, training, weights, **kwargs):
        if not self.clustered:
            return self.inner(inputs * self._mask, training, weights, **kwargs)
        found = self.clusters(inputs)
        if training:
            self._set_range(found, weights)
        return self.inner(found, False, weights, **kwargs)

    def clusters(self, kernel):
        """The kernel with every weight at its nearest centroid and its zeros in place."""
        lookup = SortedLookup(self.centroids, GradientAggregation.SUM)
        return lookup.get_clustered_weight(lookup.get_pulling_indices(kernel), tf.identity(kernel)) * self._mask

    def settle(self) -> None:
        """After training: into the kernel itself, with the range that goes with it."""
        if self.clustered:
            self._kernel.assign(self.clusters(self._kernel))
            self._set_range(self._kernel, self._variables)

    def get_config(self):
        return {}

    @staticmethod
    def _set_range(kernel, weights) -> None:
        largest = tf.reduce_max(tf.abs(kernel))
        weights["min_var"].assign(tf.fill(tf.shape(weights["min_var"]), -largest))
        weights["max_var"].assign(tf.fill(tf.shape(weights["max_var"]), largest))


class Holding(tf_keras.callbacks.Callback):
    """For kernels that no wrapper looks after, such as those of layers left out: zeros stay zero while the rest learns,
    and a kernel of few values stays as it is. `held`: the names of those that have something to keep.
    """

    def __init__(self, kernels: Mapping[str, tf.Variable], *, zeros: bool, clusters: bool):
        super().__init__()
        self.held: list[str] = []
        self._fixed: list[tuple[tf.Variable, np.ndarray]] = []
        self._masked: list[tuple[tf.Variable, tf.Tensor]] = []
        for name, variable in kernels.items():
            values = variable.numpy()
            if clusters and is_clustered(values):
                self._fixed.append((variable, values))
            elif zeros and np.any(values == 0):
                self._masked.append((variable, tf.constant((values != 0).astype(values.dtype))))
            else:
                continue
            self.held.append(name)

    def on_train_batch_end(self, batch, logs=None):
        for variable, values in self._fixed:
            variable.assign(values)
        for variable, mask in self._masked:
            variable.assign(variable * mask)
