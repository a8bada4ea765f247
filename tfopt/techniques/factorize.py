"""Low-rank factorization: one kernel becomes two thinner ones, by singular value decomposition.

A dense kernel W of (inputs, outputs) becomes U of (inputs, rank) and V of (rank, outputs) (Denton et
al. 2014, arXiv:1404.0736). A convolution of (k, k, inputs, outputs) is reshaped to (k·k·inputs,
outputs) and becomes a k x k convolution to `rank` channels followed by a 1 x 1 one (channel
decomposition, Zhang et al. 2015, arXiv:1505.06798, without the data term).
"""

from __future__ import annotations

import fnmatch
import math
import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mobile_bench.records import Skip, StepReport
from tfopt.errors import InputError, ModelRefused
from tfopt.technique import Context, OptimizedModel, Property, Technique, register
from tfopt.training import TrainConfig


@register
@dataclass(frozen=True, kw_only=True)
class Factorize(Technique):
    """Factorize every kernel that gets cheaper, then fine-tune.

    energy: the fraction of a kernel's squared singular values to keep; it sets each layer's rank.
    rank_ratio: if given, the rank as a fraction of the full one instead. min_gain: leave a layer alone
    unless the two kernels need that fraction less than the one; only_if_cheaper=False factorizes it all
    the same. exclude: layer-name patterns.
    """

    name: ClassVar[str] = "factorize"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.LOW_RANK})
    keeps: ClassVar[frozenset[Property]] = frozenset({Property.NARROW, Property.LOW_RANK})

    energy: float = 0.9
    rank_ratio: float | None = None
    min_gain: float = 0.05
    only_if_cheaper: bool = True
    exclude: tuple[str, ...] = ()
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, learning_rate=1e-3))

    def __post_init__(self):
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for name in ("energy", "rank_ratio"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value <= 1):
                raise InputError(f"{name} is out of range", received=repr(value), allowed="above 0, up to 1")
        if not (isinstance(self.min_gain, (int, float)) and 0 <= self.min_gain < 1):
            raise InputError("min_gain is out of range", received=repr(self.min_gain), allowed="0 to below 1")

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        import keras

        from tfopt import training
        from tfopt.graph import count_macs, count_parameters, flat_layers, rewrite

        started = time.monotonic()
        model, spec = optimized.model, optimized.spec
        replacements, skipped, ranks = {}, [], {}
        for layer in flat_layers(model):
            outcome = self._plan(layer)
            if isinstance(outcome, Skip):
                skipped.append(outcome)
            elif outcome:
                replacements[layer.name], ranks[layer.name] = outcome, outcome[0].units_or_filters
        if not replacements:
            raise ModelRefused(
                "No kernel of the model gets cheaper by factorization",
                received=f"{model.name} with energy {self.energy:g}",
                next_step="Lower energy, or set rank_ratio",
            )
        thinner = rewrite(model, {name: [part.make(keras) for part in parts] for name, parts in replacements.items()})
        for parts in replacements.values():
            for part in parts:
                thinner.get_layer(part.name).set_weights(part.weights)
        training.recalibrate(thinner, context.data["train"], spec, keras=keras)
        before_training = training.accuracy(thinner, context.data["validation"].balanced(1000), spec)
        report = training.fit(
            thinner, context.data["train"], context.data["validation"], spec, self.train,
            keras=keras, seed=context.seed, callbacks=context.callbacks, progress=context.progress,
        )  # fmt: skip
        result = OptimizedModel(thinner, spec, optimized.properties | self.adds)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=tuple(replacements),
            skipped=tuple(skipped),
            parameters_before=count_parameters(model),
            parameters_after=count_parameters(thinner),
            macs_before=count_macs(model),
            macs_after=count_macs(thinner),
            seconds=round(time.monotonic() - started, 3),
            training=report.to_dict(),
            properties={"ranks": ranks, "accuracy_before_training": before_training},
        )

    def _plan(self, layer) -> list[_Part] | Skip | None:
        """The two parts that replace a layer, why it is left alone, or None where it has no kernel."""
        import keras

        kinds = keras.layers
        if isinstance(layer, (kinds.DepthwiseConv2D, kinds.SeparableConv2D, kinds.Conv2DTranspose)):
            return Skip(layer.name, "not supported by the technique", type(layer).__name__)
        if not isinstance(layer, (kinds.Dense, kinds.Conv2D)):
            return None
        if any(fnmatch.fnmatch(layer.name, pattern) for pattern in self.exclude):
            return Skip(layer.name, "excluded by the recipe")
        convolution = isinstance(layer, kinds.Conv2D)
        if convolution and layer.groups > 1:
            return Skip(layer.name, "not supported by the technique", "grouped convolution")
        kernel = layer.get_weights()[0]
        rows, columns = math.prod(kernel.shape[:-1]), kernel.shape[-1]
        left, values, right = np.linalg.svd(kernel.reshape(rows, columns).astype(np.float64), full_matrices=False)
        rank = self._rank(values)
        # The first part runs at the output's resolution, so weights and multiplications shrink alike.
        gain = 1 - rank * (rows + columns) / (rows * columns)
        if self.only_if_cheaper and gain < max(self.min_gain, 1e-9):
            reason = "no gain at this rank" if gain <= 0 else "too small to gain"
            return Skip(layer.name, reason, f"rank {rank} of {len(values)} costs {1 - gain:.0%} of the one kernel")
        root = np.sqrt(values[:rank])
        first = (left[:, :rank] * root).reshape(*kernel.shape[:-1], rank).astype(np.float32)
        second = (root[:, None] * right[:rank]).astype(np.float32)
        if convolution:
            second = second.reshape(1, 1, rank, columns)
        return _Part.pair(layer, first, second)

    def _rank(self, values: np.ndarray) -> int:
        if self.rank_ratio is not None:
            return max(1, round(self.rank_ratio * len(values)))
        kept = np.cumsum(values**2) / max(float(np.sum(values**2)), 1e-30)
        # Rounding may leave the full sum a hair below 1; then all values are needed.
        return min(len(values), int(np.searchsorted(kept, self.energy * (1 - 1e-12))) + 1)


@dataclass(frozen=True, eq=False)
class _Part:
    """One of the two layers: a config for the same layer class, and its weights."""

    kind: str
    config: dict
    weights: list[np.ndarray]

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def units_or_filters(self) -> int:
        return int(self.config.get("filters", self.config.get("units")))

    def make(self, keras):
        return getattr(keras.layers, self.kind).from_config(self.config)

    @classmethod
    def pair(cls, layer, first: np.ndarray, second: np.ndarray) -> list[_Part]:
        convolution = first.ndim == 4
        kind, size = ("Conv2D", "filters") if convolution else ("Dense", "units")
        config = layer.get_config()
        rank = first.shape[-1]
        before = {**config, "name": f"{layer.name}_u", size: rank, "use_bias": False, "activation": "linear"}
        after = {**config, "name": f"{layer.name}_v"}
        if convolution:
            after.update(kernel_size=(1, 1), strides=(1, 1), dilation_rate=(1, 1), padding="valid")
        bias = [layer.get_weights()[1]] if layer.use_bias else []
        return [cls(kind, before, [first]), cls(kind, after, [second, *bias])]
