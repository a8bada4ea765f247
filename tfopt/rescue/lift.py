"""Let some operators of a full-int8 file compute in float again.

A lifted operator gets its activations through DEQUANTIZE and gives its answers through QUANTIZE; where two lifted
ones meet, the float tensor goes straight from one to the other. Its weights stay int8 ('weight8': as large as
before, expanded when the file is loaded) or become float16 ('float16': twice as large).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tfopt.errors import unknown_name
from tfopt.rescue.graph import Graph, Layer
from tfopt.rescue.refit import twins

KINDS = ("weight8", "float16")
#: The versions of DEQUANTIZE that first took these, from tflite/tools/versioning/op_version.cc.
_FROM_TENSOR_SCALE, _FROM_FLOAT16, _FROM_CHANNEL_SCALES = 2, 3, 5


def units(quantized: Graph) -> dict[int, tuple[int, ...]]:
    """What is lifted together: a layer's operator -> it and the operators without weights behind it.

    MEAN or SOFTMAX after a convolution go with that convolution; an ADD goes with the later of its inputs.
    """
    owner: dict[int, int] = {}
    found: dict[int, list[int]] = {layer.operator: [] for layer in quantized.layers()}
    for number, operator in enumerate(quantized.main.operators):
        homes = [owner[int(i)] for i in operator.inputs if int(i) in owner]
        home = number if number in found else max(homes, default=None)
        if home is not None:
            found[home].append(number)
            owner.update({int(tensor): home for tensor in operator.outputs})
    return {layer: tuple(members) for layer, members in found.items()}


def lift(floats: Graph, quantized: Graph, chosen: Mapping[int, str]) -> Graph:
    """A new graph in which the units of `chosen` (a layer's operator in `quantized` -> one of KINDS) compute in float.

    The file's inputs stay as they are; an output of a lifted operator becomes float32.
    """
    for kind in chosen.values():
        if kind not in KINDS:
            raise unknown_name("precision of a layer", str(kind), KINDS)
    made = Graph(quantized.pack())
    belongs = units(made)
    return _Lifting(floats, made, {member: kind for layer, kind in chosen.items() for member in belongs[layer]}).run()


class _Lifting:
    """One walk along the operators of `made`. lifted: operator -> kind."""

    def __init__(self, floats: Graph, made: Graph, lifted: dict[int, str]):
        self.floats, self.made, self.lifted = floats, made, lifted
        self.layers = {twin.operator: (layer, twin) for layer, twin in twins(floats, made)}
        self.versions = _versions(floats)
        self.operators: list = []
        #: Quantized tensor -> the float tensor with its values.
        self.floating: dict[int, int] = {}
        #: Quantized tensors that no operator makes any more.
        self.missing: set[int] = set()
        #: Tensors that are another one by now.
        self.renamed: dict[int, int] = {}

    def run(self) -> Graph:
        for number, operator in enumerate(self.made.main.operators):
            operator.inputs = np.array([self.renamed.get(int(i), int(i)) for i in operator.inputs], np.int32)
            if number not in self.lifted:
                self._keep(operator)
            elif self.made.op(number) in ("QUANTIZE", "DEQUANTIZE"):
                self._drop(operator)
            else:
                self._lift(number, operator)
        self.made.main.operators = self.operators
        outputs = {t: self.floating[t] for t in self.missing} | self.renamed
        self.made.replace_outputs(outputs)
        return Graph(self.made.pack())

    def _keep(self, operator) -> None:
        for tensor in map(int, operator.inputs):
            if tensor in self.missing:
                self.operators.append(self.made.operator("QUANTIZE", [self.floating[tensor]], [tensor]))
                self.missing.discard(tensor)
        self.operators.append(operator)

    def _drop(self, operator) -> None:
        """Between lifted operators a change of scale means nothing, and the way back to float is there already."""
        source, target = self._as_float(int(operator.inputs[0])), int(operator.outputs[0])
        if self._is_quantized(target):
            self.floating[target] = source
            self.missing.add(target)
        else:
            self.renamed[target] = source

    def _lift(self, number: int, operator) -> None:
        made, inputs = self.made, [int(i) for i in operator.inputs]
        if number in self.layers:
            layer, twin = self.layers[number]
            first = self._as_float(inputs[0])
            new = [first, self._weights(layer, twin, self.lifted[number])]
            if len(inputs) > 2:
                new.append(self._bias(layer, twin, self.lifted[number]))
        else:
            new = [i if i < 0 else self._as_float(i) for i in inputs]
        made.retype(operator, made.op(number), self.versions.get(made.name(int(operator.outputs[0])), 1))
        operator.inputs, outputs = np.array(new, np.int32), []
        for tensor in map(int, operator.outputs):
            if self._is_quantized(tensor):
                self.floating[tensor] = made.add_tensor(
                    f"{made.name(tensor)}_float", made.main.tensors[tensor].shape, np.float32
                )
                self.missing.add(tensor)
                tensor = self.floating[tensor]
            outputs.append(tensor)
        operator.outputs = np.array(outputs, np.int32)
        self.operators.append(operator)

    def _is_quantized(self, tensor: int) -> bool:
        return self.made.dtype(tensor) in (np.int8, np.uint8, np.int16) and bool(self.made.scale(tensor)[0].size)

    def _as_float(self, tensor: int) -> int:
        made = self.made
        if not self._is_quantized(tensor):
            return tensor
        if tensor not in self.floating:
            if made.is_constant(tensor):
                values = made.values(made.array(tensor), tensor)
                self.floating[tensor] = made.add_tensor(f"{made.name(tensor)}_float", values.shape, np.float32, values)
            else:
                shape = made.main.tensors[tensor].shape
                self.floating[tensor] = made.add_tensor(f"{made.name(tensor)}_dequantized", shape, np.float32)
                self._expand(tensor, self.floating[tensor], _FROM_TENSOR_SCALE)
        return self.floating[tensor]

    def _weights(self, layer: Layer, twin: Layer, kind: str) -> int:
        made, name, shape = self.made, self.made.name(twin.weights), self.made.main.tensors[twin.weights].shape
        expanded = made.add_tensor(f"{name}_expanded", shape, np.float32)
        if kind == "float16":
            stored = made.add_tensor(f"{name}_float16", shape, np.float16, self.floats.array(layer.weights))
            self._expand(stored, expanded, _FROM_FLOAT16)
        else:
            several = made.scale(twin.weights)[0].size > 1
            self._expand(twin.weights, expanded, _FROM_CHANNEL_SCALES if several else _FROM_TENSOR_SCALE)
        return expanded

    def _bias(self, layer: Layer, twin: Layer, kind: str) -> int:
        """As it was refitted, where the weights are those it was refitted with."""
        made = self.made
        if twin.bias < 0 or layer.bias < 0:
            return -1
        values = self.floats.array(layer.bias)
        if kind == "weight8" and made.dtype(twin.bias) != np.float32:
            values = made.array(twin.bias) * made.scale(twin.bias)[0]
        return made.add_tensor(f"{made.name(twin.bias)}_float", values.shape, np.float32, values)

    def _expand(self, stored: int, expanded: int, version: int) -> None:
        self.operators.append(self.made.operator("DEQUANTIZE", [stored], [expanded], version))


def _versions(floats: Graph) -> dict[str, int]:
    """Name of a tensor -> the version of the float operator that makes it: the same one is needed again."""
    codes = floats.model.operatorCodes
    return {
        floats.name(int(tensor)): codes[operator.opcodeIndex].version
        for operator in floats.main.operators
        for tensor in operator.outputs
    }
