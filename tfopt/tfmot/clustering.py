"""TFMOT's weight clustering around the kernels of a rebuilt model. Runs in the worker only.

Every kernel gets its own few values; weights move between them, and the values are trained (Han et al. 2016,
arXiv:1510.00149, section 3). TFMOT's registry leaves depthwise kernels out ('big unrecoverable accuracy loss'), its
wrapper takes them like any layer that names its weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import CentroidInitialization
from tensorflow_model_optimization.python.core.clustering.keras.cluster_wrapper import ClusterWeights
from tensorflow_model_optimization.python.core.clustering.keras.clusterable_layer import ClusterableLayer
from tensorflow_model_optimization.python.core.clustering.keras.clustering_algorithm import ClusteringAlgorithm

from tfopt.tfmot.neutral import Graph, Node, Weights
from tfopt.tfmot.rebuild import build, values

INITIALIZATIONS = {
    "linear": CentroidInitialization.LINEAR,
    "kmeans++": CentroidInitialization.KMEANS_PLUS_PLUS,
    "density": CentroidInitialization.DENSITY_BASED,
}
_ATTRIBUTES = ("kernel", "depthwise_kernel", "embeddings")


class SortedLookup(ClusteringAlgorithm):
    """The nearest centroid by bisection: TFMOT's own compares each weight with all, in as many times the memory."""

    def get_pulling_indices(self, weight, centroids=None):
        """weight: (height, width, in, out) or any other shape; gives int64 of the same."""
        centroids = self.cluster_centroids if centroids is None else centroids
        order = tf.argsort(centroids)
        ordered = tf.gather(centroids, order)
        place = tf.searchsorted((ordered[1:] + ordered[:-1]) / 2, tf.reshape(weight, [-1]))
        return tf.cast(tf.reshape(tf.gather(order, place), tf.shape(weight)), tf.int64)


class Clusterer:
    """A model ready for clustering: `model`, and after training `weights()` with few distinct values in them.

    kernels: weight -> (number of clusters, whether its zeros must stay: TFMOT's sparsity-preserving clustering).
    """

    def __init__(self, graph: Graph, weights: Weights, kernels: dict[str, list], initialization: str):
        self._kernels, self._initialization = kernels, INITIALIZATIONS[initialization]
        self._wrappers: list[tuple[str, ClusterWeights]] = []
        self.model, self._variables = build(graph, weights, wrap=self._wrap)

    def others(self, kernels: Iterable[str]) -> dict[str, tf.Variable]:
        """Of these weights, those that are not clustered here."""
        return {name: self._variables[name] for name in kernels if name not in self._kernels}

    def weights(self) -> Weights:
        found = values(self._variables)
        for key, wrapper in self._wrappers:
            wrapper.update_clustered_weights_associations()  # by the last step's weights and centroids
            ((name, _),) = wrapper.original_clusterable_weights.items()
            found[key] = getattr(wrapper.layer, name).numpy()
        return found

    def _wrap(self, node: Node, layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        key = next((key for key in node.weights if key in self._kernels), None)
        if key is None:
            return layer
        kernel = layer.weights[node.weights.index(key)]
        name = next(name for name in _ATTRIBUTES if getattr(layer, name, None) is kernel)
        clusters, keep_zeros = self._kernels[key]
        layer.__class__ = _clusterable(type(layer), name)
        wrapper = ClusterWeights(
            layer, clusters, cluster_centroids_init=self._initialization, preserve_sparsity=keep_zeros
        )
        self._wrappers.append((key, wrapper))
        return wrapper


def _clusterable(kind: type, name: str) -> type:
    """The layer's class, saying which weight to cluster and how to look it up."""
    return type(
        kind.__name__,
        (kind, ClusterableLayer),
        {
            "get_clusterable_weights": lambda self: [(name, getattr(self, name))],
            "get_clusterable_algorithm": lambda self, weight_name: SortedLookup,
        },
    )
