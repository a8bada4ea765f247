"""What a Keras layer can become: chains of layers with the same answers, up to what the rank cuts off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.records import Skip
from tfopt.errors import InputError
from tfopt.lowrank import kernels, rank

if TYPE_CHECKING:
    import keras

    from tfopt.lowrank.moments import Answers

#: 'matrix' is called 'channel' in recipes: for convolutions that is its name in the literature.
METHODS = ("channel", "spatial", "tucker", "cp")


@dataclass(frozen=True, eq=False)
class Part:
    """One layer of a chain: its class, its config and its weights."""

    kind: str
    config: dict
    weights: list[np.ndarray]

    @property
    def name(self) -> str:
        return self.config["name"]

    def make(self, keras) -> keras.Layer:
        """The layer without its weights, which it has once it is built."""
        return getattr(keras.layers, self.kind).from_config(self.config)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A chain in place of a layer.

    ranks: one number, for Tucker two (inputs, outputs). error: the share of the kernel's energy that is lost, or of
    the answers' variance where `by_data`. share: of the layer's weights, and so of its multiplications where all
    parts run at the output's resolution; `macs` is exact, per image.
    """

    layer: str
    method: str
    ranks: tuple[int, ...]
    error: float
    parameters: int
    macs: int
    parts: list[Part]
    by_data: bool = False


class Factorable:
    """A layer with a kernel, and the candidates for it.

    shapes: (input, output) without the batch of every call. answers: of the layer on images, for factors that fit
    them. Raises nothing: `refused` says why a layer is left alone.
    """

    def __init__(self, layer, shapes: list[tuple[tuple, tuple]], answers: Answers | None = None):
        import keras

        self.layer, self.shapes, self.answers = layer, shapes, answers
        self._kinds = keras.layers
        self.kernel = layer.get_weights()[0]
        self.dense = isinstance(layer, keras.layers.Dense)
        self.depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)

    @property
    def name(self) -> str:
        return self.layer.name

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """What this layer can be decomposed by."""
        if self.depthwise:
            return ("depthwise",)
        if self.dense or isinstance(self.layer, self._kinds.Conv1D) or max(self.layer.kernel_size) == 1:
            return ("channel",)
        equal = len(set(self.layer.strides)) == 1
        height, width = self.layer.kernel_size
        return ("channel", *(["spatial"] if min(height, width) > 1 else []), "tucker", *(["cp"] if equal else []))

    def full_rank(self, method: str) -> tuple[int, ...]:
        """The ranks from which on nothing is lost; for CP, the most that can pay."""
        *taps, inputs, outputs = self.kernel.shape if not self.dense else (1, *self.kernel.shape)
        if method == "spatial":
            return (min(taps[0] * inputs, taps[1] * outputs),)
        if method == "tucker":
            return (min(inputs, math.prod(taps) * outputs), min(outputs, math.prod(taps) * inputs))
        if method == "cp":
            return (min(math.prod(taps) * inputs, math.prod(taps) * outputs, inputs * outputs),)
        return (1,) if method == "depthwise" else (min(math.prod(taps) * inputs, outputs),)

    @cached_property
    def parameters(self) -> int:
        return sum(array.size for array in self.layer.get_weights())

    @cached_property
    def macs(self) -> int:
        if self.dense:
            return sum(math.prod(after[:-1]) for _, after in self.shapes) * self.kernel.size
        return sum(math.prod(after[:-1]) for _, after in self.shapes) * math.prod(self.kernel.shape)

    def by_energy(self, method: str, energy: float) -> Candidate:
        """The least ranks that keep that share of the kernel's energy, or of the answers' variance."""
        if method == "channel":
            values = self.answers.values if self.answers else self._values(method)
            return self.at(method, (rank.by_energy(values, energy),))
        if method == "spatial":
            return self.at(method, (rank.by_energy(self._values(method), energy),))
        if method == "tucker":
            # What the two modes lose adds up to no more than what both may lose together.
            half = 1 - (1 - energy) / 2
            return self.at(method, tuple(rank.by_energy(values, half) for values in self._values(method)))
        return self._least(method, energy)

    def by_ratio(self, method: str, ratio: float) -> Candidate:
        """That share of the full ranks."""
        return self.at(method, tuple(max(1, round(ratio * full)) for full in self.full_rank(method)))

    def by_variational_bayes(self, method: str) -> Candidate:
        """The ranks that EVBMF finds in the unfolded kernel; CP has no such unfolding."""
        *taps, inputs, outputs = self.kernel.shape if not self.dense else (1, *self.kernel.shape)
        space = math.prod(taps)
        shapes = {
            "channel": [(space * inputs, outputs)], "spatial": [(taps[0] * inputs, taps[-1] * outputs)],
            "tucker": [(inputs, space * outputs), (outputs, space * inputs)],
        }[method]  # fmt: skip
        values = self._values(method)
        values = values if method == "tucker" else (values,)
        return self.at(method, tuple(rank.by_variational_bayes(v, shape) for v, shape in zip(values, shapes)))

    def at(self, method: str, ranks: tuple[int, ...]) -> Candidate:
        """The candidate of these ranks; InputError where they are above the maximum."""
        full = self.full_rank(method)
        if any(not 1 <= one <= most for one, most in zip(ranks, full)) or len(ranks) != len(full):
            raise InputError(
                f"The rank of layer {self.name} is out of range", received=", ".join(map(str, ranks)),
                allowed=("one number, " if len(full) == 1 else "two numbers, ")
                + " and ".join(f"1 to {most}" for most in full) + f", for {method}",
            )  # fmt: skip
        by_data = method == "channel" and self.answers is not None
        bias = self._bias()
        if method == "depthwise":
            chain = kernels.depthwise(self.kernel)
        elif by_data:
            chain = kernels.projected(self.kernel, self.answers.directions[:, : ranks[0]])
            mean = self.answers.mean
            bias = (0 if bias is None else bias) + mean - chain[1].T @ (chain[1] @ mean)
        elif method == "channel":
            chain = kernels.matrix(self.kernel, ranks[0])
        elif method == "tucker":
            chain = kernels.tucker(self.kernel, ranks)
        else:
            chain = {"spatial": kernels.spatial, "cp": kernels.cp}[method](self.kernel, ranks[0])
        if by_data:
            values = self.answers.values**2
            error = float(1 - values[: ranks[0]].sum() / max(values.sum(), 1e-30))
        else:
            error = kernels.error("matrix" if method == "channel" else method, self.kernel, chain)
        parts = self._parts(method, chain, bias)
        parameters = sum(array.size for part in parts for array in part.weights)
        macs = sum(self._chain_macs(parts, shapes) for shapes in self.shapes)
        return Candidate(self.name, method, ranks, max(0.0, error), parameters, macs, parts, by_data)

    def ladder(self, method: str, steps: int = 16) -> Iterator[Candidate]:
        """Candidates from few ranks to nearly all, for a choice under a budget."""
        full = self.full_rank(method)
        if method == "depthwise":
            yield self.at(method, (1,))
            return
        seen = set()
        for share in np.geomspace(1 / 16, 1, steps):
            ranks = tuple(max(1, round(share * most)) for most in full)
            if ranks not in seen:
                seen.add(ranks)
                yield self.at(method, ranks)

    def _values(self, method: str):
        if method not in self._cached:
            made: Callable = {
                "channel": kernels.matrix_values, "spatial": kernels.spatial_values, "tucker": kernels.tucker_values,
            }[method]  # fmt: skip
            self._cached[method] = made(self.kernel)
        return self._cached[method]

    @cached_property
    def _cached(self) -> dict:
        return {}

    def _least(self, method: str, energy: float) -> Candidate:
        """The smallest CP rank that keeps the energy, by bisection; a depthwise kernel has one rank."""
        if method == "depthwise":
            return self.at(method, (1,))
        low, high = 1, self.full_rank(method)[0]
        # Above this rank the chain has as many weights as the kernel: nothing to find there.
        *taps, inputs, outputs = self.kernel.shape
        high = min(high, max(1, self.kernel.size // (math.prod(taps) + inputs + outputs)))
        best = self.at(method, (high,))
        while low < high and best.error <= 1 - energy:
            middle = (low + high) // 2
            found = self.at(method, (middle,))
            if found.error <= 1 - energy:
                best, high = found, middle
            else:
                low = middle + 1
        return best

    def _bias(self) -> np.ndarray | None:
        return self.layer.get_weights()[1] if self.layer.use_bias else None

    def _parts(self, method: str, chain: tuple[np.ndarray, ...], bias) -> list[Part]:
        config, name = self.layer.get_config(), self.name
        kernels32 = [np.asarray(kernel, np.float32) for kernel in chain]
        inner = {**config, "use_bias": False, "activation": "linear"}
        inner |= {key: None for key in config if key.endswith(("_regularizer", "_constraint"))}
        ends = ("u", "v") if len(chain) == 2 else ("u", "core", "v")
        last = {**config, "name": f"{name}_v", "use_bias": bias is not None}
        parts = []
        for index, kernel in enumerate(kernels32):
            outermost = index == len(chain) - 1
            own = dict(last) if outermost else {**inner, "name": f"{name}_{ends[index]}"}
            kind = self._shape_part(own, method, index, kernel)
            weights = [self._as_weights(kind, kernel)]
            parts.append(
                Part(kind, own, weights + ([np.asarray(bias, np.float32)] if outermost and bias is not None else []))
            )
        return parts

    def _as_weights(self, kind: str, kernel: np.ndarray) -> np.ndarray:
        dimensions = {"Dense": 2, "Conv1D": 3}.get(kind, 4)
        return kernel.reshape((1,) * (dimensions - kernel.ndim) + kernel.shape)

    def _shape_part(self, config: dict, method: str, index: int, kernel: np.ndarray) -> str:
        """Set what a part's config must say of its place in the chain; the class it is of."""
        if self.dense:
            config["units"] = kernel.shape[-1]
            return "Dense"
        one = isinstance(self.layer, self._kinds.Conv1D)
        dimensions = 1 if one else 2
        pointwise = {"kernel_size": (1,) * dimensions, "strides": (1,) * dimensions,
                     "dilation_rate": (1,) * dimensions, "padding": "valid"}  # fmt: skip
        config["filters"] = kernel.shape[-1]
        if method == "channel":
            config.update(pointwise if index == 1 else {})
            return "Conv1D" if one else "Conv2D"
        if method in ("spatial", "depthwise"):
            along = 0 if index == 0 else 1
            for key in ("kernel_size", "strides", "dilation_rate"):
                config[key] = tuple(value if axis == along else 1 for axis, value in enumerate(config[key]))
            if method == "depthwise":
                config.pop("filters")
                return "DepthwiseConv2D"
            return "Conv2D"
        if index != 1:
            config.update(pointwise)
            return "Conv2D"
        if method == "tucker":
            return "Conv2D"
        for key in ("filters", "kernel_initializer", "kernel_regularizer", "kernel_constraint", "groups"):
            config.pop(key, None)
        return "DepthwiseConv2D"

    def _chain_macs(self, parts: list[Part], shapes: tuple[tuple, tuple]) -> int:
        before, after = shapes
        if self.dense:
            return math.prod(after[:-1]) * sum(part.weights[0].size for part in parts)
        total, size = 0, before[:-1]
        for part in parts:
            strides = part.config["strides"]
            # A part that takes steps of 1 and is padded keeps its size; the whole chain ends at the layer's own.
            size = _output_size(size, part.config, strides)
            total += math.prod(size) * part.weights[0].size
        return total


def _output_size(size: tuple, config: dict, strides) -> tuple:
    found = []
    for length, kernel, stride, dilation in zip(size, config["kernel_size"], strides, config["dilation_rate"]):
        spread = (kernel - 1) * dilation
        found.append(-(-(length - (0 if config["padding"] in ("same", "causal") else spread)) // stride))
    return tuple(found)


def refused(layer, shapes: list[tuple[tuple, tuple]]) -> Skip | None:
    """Why a layer with a kernel is left alone; None where it can be decomposed, or has no kernel at all."""
    import keras

    kinds = keras.layers
    reason = "not supported by the technique"
    if isinstance(layer, kinds.DepthwiseConv2D):
        if layer.strides != (1, 1):
            return Skip(
                layer.name, reason, "a depthwise convolution with strides, which a chain needs unequal in its two parts"
            )
        if min(layer.kernel_size) < 2 or layer.depth_multiplier != 1:
            return Skip(layer.name, reason, "a depthwise convolution of one row or with a multiplier")
        return None
    if isinstance(layer, (kinds.SeparableConv1D, kinds.SeparableConv2D)):
        return Skip(layer.name, reason, "a separable convolution is a chain of two already")
    if isinstance(layer, (kinds.Conv1DTranspose, kinds.Conv2DTranspose, kinds.Conv3D, kinds.DepthwiseConv1D)):
        return Skip(layer.name, reason, type(layer).__name__)
    if not isinstance(layer, (kinds.Dense, kinds.Conv1D, kinds.Conv2D)):
        return None
    if getattr(layer, "groups", 1) > 1:
        return Skip(layer.name, reason, "grouped convolution")
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return Skip(layer.name, reason, "channels first")
    if not isinstance(layer, kinds.Dense) and any(None in before for before, _ in shapes):
        return Skip(layer.name, reason, "images of open size")
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return Skip(layer.name, reason, "its kernel is stored another way (LoRA, or quantized by Keras)")
    return None


def has_kernel(layer) -> bool:
    """Whether the layer is of a kind that the technique decomposes."""
    import keras

    kinds = keras.layers
    return isinstance(layer, (kinds.Dense, kinds.Conv1D, kinds.Conv2D, kinds.DepthwiseConv2D)) and not isinstance(
        layer, (kinds.SeparableConv2D, kinds.SeparableConv1D)
    )


def is_depthwise(layer) -> bool:
    import keras

    return isinstance(layer, keras.layers.DepthwiseConv2D)
