"""The table of rules: how channels go through each kind of operation.

A rule gets the Walk and one call (Keras's node), and returns the Label of each output, or one Label where there is one
output. It says which weights lie along which channels (Walk.use), which settings follow their number (Walk.settings)
and what of a call itself has to change (Walk.edit). `rule` makes one known, for a user's own layers too:

    @rule(MyScale)
    def _(walk, node):
        label = walk.label(node.input_tensors[0])
        walk.use(node.operation, node.operation.gamma, 0, walk.ids(node, axis=-1), "along")
        return label
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tfopt.channels.ids import Label

if TYPE_CHECKING:
    from tfopt.channels.dependencies import Walk

Rule = Callable[["Walk", object], "Label | list | None"]

_LAYERS: dict[type, Rule] = {}
_OPERATIONS: dict[str, Rule] = {}


def rule(*kinds: type | str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for these layer classes, and for functions of keras.ops by the name of their class."""

    def remember(function: Rule) -> Rule:
        for kind in kinds:
            (_OPERATIONS if isinstance(kind, str) else _LAYERS)[kind] = function
        return function

    return remember


def find(operation) -> Rule | None:
    """The rule for an operation; None for a layer that nobody described.

    A class derived from a known one has its rule as long as it computes the same way. A function of keras.ops that
    has no rule keeps its inputs as they are: what it computes is known, its channels are left alone.
    """
    import keras

    if not isinstance(operation, keras.Layer):
        own = type(operation).__module__.startswith("keras.src.ops.")
        return _OPERATIONS.get(type(operation).__name__, opaque) if own else None
    for kind in type(operation).__mro__:
        if kind in _LAYERS:
            return _LAYERS[kind] if inspect.getattr_static(type(operation), "call") is _call(kind) else None
    return None


def _call(kind: type):
    return inspect.getattr_static(kind, "call", None)


def opaque(walk: Walk, node) -> list[Label | None]:
    """Everything that goes in and comes out stays."""
    name, kind = node.operation.name, type(node.operation).__name__
    walk.keep_inputs(node, f"{name} ({kind}) reads them as a whole")
    return [walk.fixed(tensor, f"{name} ({kind}) makes them as a whole") for tensor in node.outputs]


def channel_axis(operation, rank: int) -> int:
    """Where a layer of images has its channels, the batch being axis 0."""
    return 1 if getattr(operation, "data_format", None) == "channels_first" else rank - 1


def by_channel(function: Callable) -> bool:
    """Whether an activation treats each value by itself, found by trying: softmax and glu do not.

    A function that cannot be tried does not.
    """
    import keras

    values = np.linspace(-4, 4, 24, dtype=np.float32)[np.random.default_rng(0).permutation(24)].reshape(4, 6)
    try:
        whole = keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(values)))
        part = keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(values[:, 1:4])))
    except Exception:  # noqa: BLE001 - a user's function may raise anything
        return False
    return whole.shape == values.shape and np.allclose(whole[:, 1:4], part, atol=1e-6, equal_nan=True)
