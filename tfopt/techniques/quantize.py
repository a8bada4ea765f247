"""Quantization-aware training: the model learns to live with int8 before it is converted.

Jacob et al. 2018 (arXiv:1712.05877), section 3. TFMOT's fake quantization, in a process of its own;
ranges are calibrated on training images before the first step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from mobile_bench.records import Skip, StepReport
from tfopt.errors import InputError, ModelRefused, TrainingError
from tfopt.kept import distinct, is_clustered
from tfopt.technique import Context, OptimizedModel, Property, Technique, names_of, register
from tfopt.training import TrainConfig

QUANTIZED_FILE = "quantized.npz"


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeAware(Technique):
    """Fine-tune with simulated int8 weights and activations.

    The zeros of a sparse model stay zero and the kernels of a clustered one keep no more values than they have (PQAT,
    CQAT and, with both, PCQAT): which of them it is, the model says by what it carries. The result carries the
    fake-quantized model as a file, from which int8 conversion starts, and its float weights in a Keras 3 model.
    exclude: layers with a kernel that stay in float, by name, pattern or type; the file holds their weights in float16.
    strict: look first, by converting the untrained model, and refuse one that would not end in whole numbers.
    """

    name: ClassVar[str] = "qat"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.FAKE_QUANT})
    keeps: ClassVar[frozenset[Property]] = frozenset(
        {Property.SPARSE, Property.CLUSTERED, Property.NARROW, Property.LOW_RANK}
    )

    exclude: tuple[str, ...] = ()
    strict: bool = False
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, learning_rate=2e-4, evaluations=2, validation_images=2000)
    )

    def __post_init__(self):
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        if not isinstance(self.strict, bool):
            raise InputError("strict is neither true nor false", received=repr(self.strict))

    def check_layers(self, model, spec) -> None:
        from tfopt.tfmot import foresight, kernels

        if self.exclude:
            kernels.left_out(model, self.exclude)
        if self.strict:
            foresight.check(foresight.foresee(model, spec, self.exclude), self.exclude)

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        from tfopt.graph import count_macs, count_parameters
        from tfopt.tfmot import client, foresight, kernels

        started = time.monotonic()
        if Property.FAKE_QUANT in optimized.properties:
            raise ModelRefused("The model has been trained for int8 already", next_step="Leave out one qat")
        carried = optimized.properties | context.keep
        sparse, clustered = Property.SPARSE in carried, Property.CLUSTERED in carried
        quantized = Path(context.work) / QUANTIZED_FILE
        left_out = kernels.left_out(optimized.model, self.exclude) if self.exclude else ()
        if self.strict:
            foresight.check(foresight.foresee(optimized.model, optimized.spec, self.exclude), self.exclude)
        trained = client.train(
            "quantize", optimized, context, self.train, keep_zeros=sparse, keep_clusters=clustered,
            keep=[kernel.key for kernel in kernels.choose(optimized.model)[0]] if sparse or clustered else [],
            quantized=str(quantized.resolve()), exclude=list(left_out),
        )  # fmt: skip
        properties = _zeros_kept(trained) if sparse else {}
        properties |= _clusters_kept(trained) if clustered else {}
        notes = client.notes(trained)
        if trained.result["norms"]:
            names = ", ".join(trained.result["norms"])
            notes += (f"Batch norms that follow no convolution were trained as 1x1 depthwise convolutions: {names}",)
        if trained.result["float"]:
            names = ", ".join(trained.result["float"])
            notes += (f"Batch norms that follow no convolution keep part of their arithmetic in float: {names}",)
        result = OptimizedModel(trained.model, optimized.spec, optimized.properties | self.adds, quantized)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=client.touched(trained.result["quantized"]),
            skipped=tuple(Skip(layer, "excluded by the recipe") for layer in _sources(trained, left_out)),
            parameters_before=count_parameters(optimized.model),
            parameters_after=count_parameters(trained.model),
            macs_before=count_macs(optimized.model),
            macs_after=count_macs(trained.model),
            seconds=round(time.monotonic() - started, 3),
            training=trained.training,
            properties=properties,
            notes=notes,
        )


def _sources(trained, nodes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node.source for node in trained.graph.nodes if node.name in nodes))


def _zeros_kept(trained) -> dict:
    """Measure the zeros before and after; raises TrainingError for the first layer that lost one."""
    zeros = total = 0
    layers: dict[str, list] = {}
    for name in trained.result["kept"]:
        before, after = trained.before[name] == 0, trained.after[name] == 0
        layers.setdefault(trained.source(name), []).append(after.ravel())
        if np.any(before & ~after):
            raise TrainingError(
                f"Layer {trained.source(name)} lost zeros in quantization-aware training",
                received=f"sparsity {after.mean():.4f}",
                allowed=f"{before.mean():.4f}",
                next_step="Report this with the recipe and the model's architecture",
            )
        zeros += int(after.sum())
        total += after.size
    shares = {layer: round(float(np.concatenate(found).mean()), 6) for layer, found in layers.items()}
    return {"sparsity": zeros / max(1, total), "zeros": zeros, "layer_sparsity": shares}


def _clusters_kept(trained) -> dict:
    """Count the values before and after; raises TrainingError for the first clustered kernel that has more."""
    counts = {}
    for name in trained.result["kept"]:
        if not is_clustered(trained.before[name]):
            continue
        before, after = distinct(trained.before[name]), distinct(trained.after[name])
        if after > before:
            raise TrainingError(
                f"Layer {trained.source(name)} lost its clusters in quantization-aware training",
                received=f"{after} different weights",
                allowed=f"{before}",
                next_step="Report this with the recipe and the model's architecture",
            )
        counts[trained.source(name)] = max(after, counts.get(trained.source(name), 0))
    return {"clusters": max(counts.values(), default=0), "layer_clusters": counts}
