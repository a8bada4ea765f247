"""Magnitude pruning: the smallest weights of every kernel become zero, step by step, while training.

Zhu and Gupta 2017 (arXiv:1710.01878), equation 1: the sparsity rises from s_i to s_f along
s_f + (s_i - s_f) · (1 - (t - t_0) / (t_end - t_0))³. TFMOT does it, in a process of its own.

The zeros shrink the compressed file. They make nothing faster unless the runtime has sparse kernels
for the processor.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mobile_bench.records import StepReport
from tfopt.errors import InputError, ModelRefused, TrainingError
from tfopt.technique import Context, OptimizedModel, Property, Technique, register
from tfopt.training import TrainConfig


@register
@dataclass(frozen=True, kw_only=True)
class Prune(Technique):
    """Set `sparsity` of each kernel to zero and keep the rest trained.

    sparsity, initial_sparsity: fractions of zeros at the end and at the start of the ramp. begin, end:
    the ramp's place in the training, as fractions of its steps. frequency: steps between two changes of
    the mask. exclude: layer-name patterns such as 'classes' or 'stage1_*'.
    """

    name: ClassVar[str] = "prune"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.SPARSE})
    keeps: ClassVar[frozenset[Property]] = frozenset({Property.NARROW, Property.LOW_RANK})

    sparsity: float = 0.5
    initial_sparsity: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    frequency: int = 10
    exclude: tuple[str, ...] = ()
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, learning_rate=5e-4, evaluations=2, validation_images=2000)
    )

    def __post_init__(self):
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))
        for name, low, high in (("sparsity", 0, 0.999), ("initial_sparsity", 0, 0.999), ("begin", 0, 1), ("end", 0, 1)):
            value = getattr(self, name)
            if not (_is_number(value) and low <= value <= high):
                raise InputError(f"{name} is out of range", received=repr(value), allowed=f"{low} to {high}")
        if self.sparsity == 0:
            raise InputError("Pruning to a sparsity of 0 does nothing", received=self.sparsity, allowed="above 0")
        if self.initial_sparsity > self.sparsity:
            raise InputError(
                "initial_sparsity is above sparsity",
                received=f"{self.initial_sparsity} and {self.sparsity}",
                allowed="at most sparsity",
            )
        if self.end <= self.begin:
            raise InputError(
                "The ramp ends before it begins",
                received=f"begin {self.begin}, end {self.end}",
                allowed="end above begin",
            )
        if not (isinstance(self.frequency, int) and not isinstance(self.frequency, bool) and self.frequency >= 1):
            raise InputError("frequency is not a number of steps", received=repr(self.frequency), allowed="1 and above")
        if self.train.patience or any("EarlyStopping" in entry for entry in self.train.callbacks):
            raise InputError(
                "Pruning cannot end early: the best weights could be from before the end of the ramp",
                received=f"patience {self.train.patience}, callbacks {list(self.train.callbacks)}",
                allowed="patience 0 and no EarlyStopping",
            )

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        from tfopt.graph import count_macs, count_parameters
        from tfopt.tfmot import client

        started = time.monotonic()
        if Property.FAKE_QUANT in optimized.properties:
            raise ModelRefused("A model trained for int8 cannot be pruned afterwards", next_step="Put prune before qat")
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "train"}
        trained = client.train("prune", optimized, context, self.train, settings=settings)
        pruned = trained.result["pruned"]
        by_layer = {trained.source(name): _sparsity(trained.after[name]) for name in pruned}
        for name in pruned:
            _check(trained.source(name), trained.after[name], self.sparsity)
        zeros = sum(int(np.sum(trained.after[name] == 0)) for name in pruned)
        weights = sum(trained.after[name].size for name in pruned)
        parameters = count_parameters(trained.model)
        result = OptimizedModel(trained.model, optimized.spec, optimized.properties | self.adds)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=client.touched(list(by_layer)),
            skipped=client.skips(trained.result["skipped"]),
            parameters_before=count_parameters(optimized.model),
            parameters_after=parameters,
            macs_before=count_macs(optimized.model),
            macs_after=count_macs(trained.model),
            seconds=round(time.monotonic() - started, 3),
            training=trained.training,
            properties={
                "sparsity": zeros / weights,
                "zeros": zeros,
                "model_sparsity": zeros / parameters,
                "layer_sparsity": {name: round(value, 6) for name, value in by_layer.items()},
            },
            notes=client.notes(trained),
        )


def _sparsity(kernel: np.ndarray) -> float:
    return float(np.mean(kernel == 0))


def _check(layer: str, kernel: np.ndarray, wanted: float) -> None:
    """TFMOT keeps round(size · (1 - s)) weights, at least one, and computes that in float32."""
    fewest = min(kernel.size - 1, kernel.size * wanted - 1 - 1e-6 * kernel.size)
    if np.sum(kernel == 0) < fewest:
        raise TrainingError(
            f"Layer {layer} lost zeros on the way",
            received=f"sparsity {_sparsity(kernel):.4f}",
            allowed=f"{wanted:.4f}",
            next_step="Report this with the recipe and the model's architecture",
        )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
