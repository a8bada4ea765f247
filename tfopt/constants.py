"""A function as a graph of constants: another process runs it without the code that made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def frozen(function) -> dict[str, np.ndarray]:
    """A concrete function of one tensor as arrays for an .npz: 'graph', a GraphDef's bytes, and 'ends', its tensors.

    Raises ValueError, NotImplementedError or an OpError of TensorFlow where its state cannot become constants.
    """
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    constant = convert_variables_to_constants_v2(function, lower_control_flow=False)
    return {
        "graph": np.frombuffer(constant.graph.as_graph_def().SerializeToString(), np.uint8),
        "ends": np.array([tensor.name for tensor in (constant.inputs[0], *constant.outputs)]),
    }


def thawed(graph: np.ndarray, ends: Sequence[str]) -> Callable:
    """tensor -> list of tensors, of what `frozen` gave."""
    import tensorflow as tf

    source, *results = map(str, ends)
    definition = tf.compat.v1.GraphDef.FromString(np.asarray(graph).tobytes())
    wrapped = tf.compat.v1.wrap_function(lambda: tf.compat.v1.import_graph_def(definition, name=""), [])
    return wrapped.prune(source, results)
