"""Activations in operations that a delegate takes.

What the converter of TensorFlow 2.21 makes of each, and who takes it:

| Keras                             | TFLite                         | Edge TPU          | GPU |
|-----------------------------------|--------------------------------|-------------------|-----|
| hard_silu, x * hard_sigmoid(x), x * relu6(x + 3) / 6 | HARD_SWISH  | no                | yes |
| hard_sigmoid                      | RELU6, MUL                     | yes, nothing to do | yes |
| silu                              | LOGISTIC, MUL                  | yes, nothing to do | yes |
| leaky_relu                        | LEAKY_RELU                     | no                | yes |
| gelu                              | GELU                           | no                | yes |
| elu, selu, softplus, mish, …      | ELU, or several with EXP       | no                | yes |
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from tfopt.fixes.plan import Fix, Plan
from tfopt.rebuild import KERNELS, View

_OPERATIONS = {
    "HardSilu": "hard_silu", "HardSigmoid": "hard_sigmoid", "LeakyRelu": "leaky_relu", "Relu6": "relu6",
    "Elu": "elu", "Selu": "selu", "Celu": "celu", "Softplus": "softplus", "Softsign": "softsign", "Exp": "exponential",
    "Mish": "mish",
}  # fmt: skip
_NAMES = (
    "hard_silu", "hard_sigmoid", "leaky_relu", "relu6", "gelu", "elu", "selu", "softplus", "softsign", "exponential",
    "mish", "celu",
)  # fmt: skip
_NO_EXPONENTIAL = (
    "it needs an exponential or a division, and Coral's table has neither (a detour through LOGISTIC and RSQRT takes "
    "about ten int8 operations, and is not offered): train with relu6 or hard_silu for an Edge TPU; a GPU takes it"
)


def activation_of(node) -> str:
    """The activation that a call applies last, by its name in keras.activations; '' for none that is known here."""
    operation = node.operation
    kind = type(operation).__name__
    if isinstance(operation, (keras.layers.Activation, *KERNELS)):
        return next((n for n in _NAMES if getattr(keras.activations, n, None) is operation.activation), "")
    if isinstance(operation, keras.layers.ReLU):
        slope, top, threshold = (float(v or 0) for v in _relu(operation))
        return "" if threshold else "leaky_relu" if slope and not top else "relu6" if not slope and top == 6 else ""
    if isinstance(operation, keras.Layer):
        return {"LeakyReLU": "leaky_relu", "ELU": "elu"}.get(kind, "")
    if kind == "Clip" and (_number(operation.x_min), _number(operation.x_max)) == (0.0, 6.0):
        return "relu6"
    if kind == "Gelu":
        return "gelu_tanh" if operation.approximate else "gelu"
    return _OPERATIONS.get(kind, "")


def _relu(layer) -> tuple:
    return layer.negative_slope, layer.max_value, layer.threshold


def _before(make, node):
    """The new tensor that the activation gets: what the kernel layer gives without it, or what the call read."""
    if isinstance(node.operation, KERNELS):
        return make.call(node, activation="linear")
    return make.value(node.input_tensors[0])


def _name(node, suffix: str) -> str:
    return f"{node.operation.name}_{suffix}" if isinstance(node.operation, KERNELS) else node.operation.name


def _hard_swish(view: View, spec) -> Plan:
    plan = Plan()
    for node in view.nodes:
        if activation_of(node) == "hard_silu":
            plan.change(node, _hard_silu)
        elif found := _product(view, node):
            plan.change(node, found)
    return plan


def _hard_silu(make, node):
    """x / 6 first: the converter joins every other order of the factors to HARD_SWISH again."""
    x, name = _before(make, node), _name(node, "hard_swish")
    six = make.op(ops.relu6, make.op(ops.add, x, 3.0, name=f"{name}_add"), name=f"{name}_relu6")
    return make.op(ops.multiply, make.op(ops.multiply, x, 1 / 6, name=f"{name}_sixth"), six, name=name)


def _product(view: View, node):
    """The Change for a product that TFLite would read as hard swish; None for any other call."""
    if _operands(node) is None:
        return None
    tensors, scalar = _factors(view, node)
    if len(tensors) != 2:
        return None
    for x, other in (tensors, tensors[::-1]):
        if any(operand is other for operand in _operands(node)) and not any(v is x for v in _operands(node)):
            continue  # (x / 6) * relu6(x + 3), which the converter leaves as it is
        gate = view.producer(other)
        if gate is None or isinstance(gate.operation, KERNELS):
            continue
        kind = activation_of(gate)
        if kind == "hard_sigmoid" and gate.input_tensors[0] is x and math.isclose(scalar, 1, rel_tol=1e-6):
            return lambda make, old, x=x: _gated(make, old, x, None)
        if kind == "relu6" and _is_plus_three(view, gate, x) and math.isclose(scalar, 1 / 6, rel_tol=1e-6):
            return lambda make, old, x=x, other=other: _gated(make, old, x, other)
    return None


def _gated(make, node, x, six):
    name, x = node.operation.name, make.value(x)
    if six is None:
        six = make.op(ops.relu6, make.op(ops.add, x, 3.0, name=f"{name}_add"), name=f"{name}_relu6")
    else:
        six = make.value(six)
    return make.op(ops.multiply, make.op(ops.multiply, x, 1 / 6, name=f"{name}_sixth"), six, name=name)


def _operands(node) -> tuple | None:
    """(left, right, is it a division) of a product or quotient; None for any other call."""
    kind = type(node.operation).__name__
    if isinstance(node.operation, keras.layers.Multiply):
        tensors = list(node.input_tensors)
        return (*tensors, False) if len(tensors) == 2 else None
    if isinstance(node.operation, keras.layers.Rescaling):
        scale, offset = _number(node.operation.scale), _number(node.operation.offset)
        return (node.input_tensors[0], scale, False) if offset == 0 else None
    if isinstance(node.operation, keras.Layer) or kind not in ("Multiply", "Divide", "TrueDivide"):
        return None
    operands = [*node.arguments.args, *node.arguments.kwargs.values()]
    return (*operands, kind != "Multiply") if len(operands) == 2 else None


def _factors(view: View, node) -> tuple[list, float]:
    """The tensors that a chain of products multiplies, and the product of its numbers."""
    left, right, division = _operands(node)
    tensors, scalar = [], 1.0
    for operand, inverse in ((left, False), (right, division)):
        value = _number(operand)
        if value is not None:
            scalar *= 1 / value if inverse and value else value
        elif inverse:
            return [], 1.0
        elif (inner := view.producer(operand)) is not None and _operands(inner) is not None:
            more, factor = _factors(view, inner)
            # A product that is no chain of numbers and two tensors is a factor itself.
            tensors, scalar = (tensors + more, scalar * factor) if more else ([*tensors, operand], scalar)
        else:
            tensors.append(operand)
    return tensors, scalar


def _number(value) -> float | None:
    if isinstance(value, keras.KerasTensor):
        return None
    array = np.asarray(keras.ops.convert_to_numpy(value))
    return float(array.reshape(())) if array.size == 1 else float("nan")


def _is_plus_three(view: View, gate, x) -> bool:
    node = view.producer(gate.input_tensors[0])
    if node is not None and isinstance(node.operation, keras.layers.Rescaling):
        numbers = _number(node.operation.scale), _number(node.operation.offset)
        return numbers == (1.0, 3.0) and node.input_tensors[0] is x
    if node is None or type(node.operation).__name__ != "Add" or isinstance(node.operation, keras.Layer):
        return False
    operands = [*node.arguments.args, *node.arguments.kwargs.values()]
    numbers = [_number(v) for v in operands if not isinstance(v, keras.KerasTensor)]
    return numbers == [3.0] and any(v is x for v in operands)


def _activations(view: View, spec) -> Plan:
    plan = Plan()
    for node in view.nodes:
        kind = activation_of(node)
        if kind == "leaky_relu":
            plan.change(node, _prelu)
        elif kind == "gelu_tanh":
            plan.change(node, _gelu_tanh)
        elif kind == "gelu":
            plan.refuse(
                node, "the exact GELU needs erf, which TFLite has only inside GELU: train with "
                "keras.ops.gelu(x, approximate=True) for an Edge TPU; the GPU takes it as it is",
            )  # fmt: skip
        elif kind in ("elu", "selu", "celu", "softplus", "softsign", "mish", "exponential"):
            plan.refuse(node, f"{kind}: {_NO_EXPONENTIAL}")
    return plan


def _slope(node) -> float:
    operation = node.operation
    return float(getattr(operation, "negative_slope", 0.2))


def _prelu(make, node):
    """A PReLU with one slope for all channels; max(x, slope * x) would need one scale for both in int8."""
    x = _before(make, node)
    shared = list(range(1, len(x.shape) - 1)) or None
    alpha = np.full((1,) * (len(x.shape) - 2) + (x.shape[-1],), _slope(node), np.float32)
    return make.layer(
        _name(node, "prelu"), lambda name: keras.layers.PReLU(shared_axes=shared, name=name), x, [alpha]
    )  # fmt: skip


def _gelu_tanh(make, node):
    """x sigmoid(2 z) for x (1 + tanh z) / 2, z = sqrt(2 / pi) (x + 0.044715 x^3).

    Hendrycks and Gimpel 2016 (arXiv:1606.08415, section 2); (1 + tanh z) / 2 = sigmoid(2 z) is an identity.
    """
    x, name = _before(make, node), node.operation.name
    factor = 2 * math.sqrt(2 / math.pi)
    square = make.op(ops.multiply, x, x, name=f"{name}_square")
    cubic = make.op(ops.multiply, square, 0.044715 * factor, name=f"{name}_cubic")
    inner = make.op(ops.multiply, x, make.op(ops.add, cubic, factor, name=f"{name}_add"), name=f"{name}_inner")
    return make.op(ops.multiply, x, make.op(ops.sigmoid, inner, name=f"{name}_gate"), name=name)


HARD_SWISH = Fix(
    "hard_swish", "hard swish as (x / 6) * relu6(x + 3), which the converter does not join again",
    ("edgetpu",), ("HARD_SWISH",), ("ADD", "MUL", "RELU6"), _hard_swish,
)  # fmt: skip
ACTIVATIONS = Fix(
    "activations", "leaky ReLU as PReLU, the tanh form of GELU as x * sigmoid(…); others are explained",
    ("edgetpu",), ("LEAKY_RELU", "GELU"), ("PRELU", "ADD", "MUL", "LOGISTIC"), _activations,
)  # fmt: skip
