"""Batch norms that no kernel absorbs, as the convolutions that int8 has, and back.

A batch norm behind a convolution is folded into it. Anywhere else (before the convolution, as in ResNet V2 and
DenseNet) TFLite has no integer form of it: the converter leaves a multiplication and an addition in float. With its
moving statistics it is y = k x + b for each channel, a 1x1 depthwise convolution, and that is what is trained for int8.
The trained k and b then go back into gamma and beta; the moving statistics stay as they were.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tfopt.tfmot.neutral import Graph, Node, Weights
from tfopt.tfmot.rounding import unfolded

_KERNEL, _BIAS = "norm_kernel", "norm_bias"


def as_convolutions(graph: Graph, weights: Weights) -> tuple[Graph, Weights, list[Node]]:
    """The graph with such batch norms replaced, its weights, and the batch norms that were.

    Left as they are: norms of rows instead of images, of another axis than the channels, and those without gamma or
    beta that would have to take up what the training changes.
    """
    replaced = [node for node in unfolded(graph) if node.rank == 4 and _by_channel(node)]
    if not replaced:
        return graph, weights, []
    names, weights = {node.name for node in replaced}, dict(weights)
    nodes = []
    for node in graph.nodes:
        if node.name not in names:
            nodes.append(node)
            continue
        factor, offset = _affine(node, weights)
        keys = (f"{node.name}:{_KERNEL}", f"{node.name}:{_BIAS}")
        weights |= {keys[0]: factor.astype(np.float32).reshape(1, 1, -1, 1), keys[1]: offset.astype(np.float32)}
        config = {"kernel_size": (1, 1), "strides": (1, 1), "padding": "valid", "use_bias": True}
        nodes.append(Node(node.name, "DepthwiseConv2D", config, keys, node.source, node.trainable))
    gone = {key for node in replaced for key in node.weights}
    weights = {key: value for key, value in weights.items() if key not in gone}
    return dataclasses.replace(graph, nodes=tuple(nodes)), weights, replaced


def back(replaced: list[Node], before: Weights, after: Weights) -> Weights:
    """`after`, the trained weights of the replaced graph, under the names of the graph as it was."""
    found = dict(after)
    for node in replaced:
        factor = found.pop(f"{node.name}:{_KERNEL}").reshape(-1).astype(np.float64)
        offset = found.pop(f"{node.name}:{_BIAS}").astype(np.float64)
        gamma, beta, mean, variance = node.weights
        spread = np.sqrt(before[variance].astype(np.float64) + node.config["epsilon"])
        found |= {
            gamma: (factor * spread).astype(np.float32), beta: (offset + before[mean] * factor).astype(np.float32),
            mean: before[mean], variance: before[variance],
        }  # fmt: skip
    return found


def _affine(node: Node, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    gamma, beta, mean, variance = (weights[key].astype(np.float64) for key in node.weights)
    factor = gamma / np.sqrt(variance + node.config["epsilon"])
    return factor, beta - mean * factor


def _by_channel(node: Node) -> bool:
    axis = node.config.get("axis", -1)
    axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
    return axis in (-1, 3) and len(node.weights) == 4
