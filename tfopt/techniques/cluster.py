"""Weight clustering: every kernel keeps a few values, which its weights share, while training.

Han et al. 2016 (arXiv:1510.00149), section 3. TFMOT does it, in a process of its own. The file shrinks once it is
compressed (gzip, or an app store's package); no runtime is any faster for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mobile_bench.records import Skip, StepReport
from tfopt.errors import InputError, ModelRefused, TrainingError, unknown_name
from tfopt.kept import MOST_CLUSTERS, distinct
from tfopt.technique import Context, OptimizedModel, Property, Technique, names_of, register
from tfopt.training import TrainConfig

if TYPE_CHECKING:
    from tfopt.tfmot.kernels import Kernel

INITIALIZATIONS = ("kmeans++", "linear", "density")
_RECURRENT = ("LSTM", "GRU", "SimpleRNN", "SeparableConv1D", "SeparableConv2D")


@register
@dataclass(frozen=True, kw_only=True)
class Cluster(Technique):
    """Give each kernel at most `clusters` different values and train them.

    initialization of the values: 'kmeans++', 'linear' (evenly from the smallest weight to the largest) or 'density'
    (evenly over the weights' distribution). layers: other numbers by layer name, pattern or type, 0 to leave alone:
    {stem: 32, DepthwiseConv2D: 0}. exclude: the same keys, layers to leave alone. The zeros of a sparse model stay
    zero, and zero is then one of the values.
    """

    name: ClassVar[str] = "cluster"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.CLUSTERED})
    keeps: ClassVar[frozenset[Property]] = frozenset({Property.SPARSE, Property.NARROW, Property.LOW_RANK})

    clusters: int = 16
    initialization: str = "kmeans++"
    layers: dict[str, int] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, learning_rate=2e-4, evaluations=2, validation_images=2000)
    )

    def __post_init__(self):
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        if self.initialization not in INITIALIZATIONS:
            raise unknown_name("initialization", str(self.initialization), INITIALIZATIONS)
        if not isinstance(self.layers, dict) or not all(isinstance(key, str) for key in self.layers):
            raise InputError(
                "layers is not a table of numbers of clusters", received=repr(self.layers), allowed="{LAYER: CLUSTERS}"
            )
        given = [("clusters", self.clusters), *((f"The clusters of {key}", n) for key, n in self.layers.items() if n)]
        for name, number in given:
            whole = isinstance(number, int) and not isinstance(number, bool)
            if not (whole and 2 <= number <= MOST_CLUSTERS):
                raise InputError(
                    f"{name} is out of range",
                    received=repr(number),
                    allowed=f"2 to {MOST_CLUSTERS}, a whole number: int8 has no more values",
                )

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        from tfopt.graph import count_macs, count_parameters
        from tfopt.tfmot import client
        from tfopt.tfmot import kernels as choice

        started = time.monotonic()
        if Property.FAKE_QUANT in optimized.properties:
            raise ModelRefused(
                "A model trained for int8 cannot be clustered afterwards", next_step="Put cluster before qat"
            )
        sparse = Property.SPARSE in optimized.properties | context.keep
        kernels, skipped = self._choose(optimized.model)
        wanted = {kernel.key: self._number(kernel, sparse) for kernel in kernels}
        # A kernel of no more weights than clusters has no more values either, whatever it learns.
        job = {key: list(number) for key, number in wanted.items() if number[0] > 1}
        every = choice.choose(optimized.model)[0] if sparse else []
        trained = client.train(
            "cluster", optimized, context, self.train, kernels=job, keep=[kernel.key for kernel in every],
            initialization=self.initialization,
        )  # fmt: skip
        held = [kernel for kernel in every if kernel.key in trained.result["held"]]
        for kernel in kernels:
            _check(kernel, trained.after[kernel.key], wanted[kernel.key])
        for kernel in held:  # of layers left out
            _check(kernel, trained.after[kernel.key], (1, True))
        counts: dict[str, int] = {}
        for kernel in kernels:
            counts[kernel.layer] = max(distinct(trained.after[kernel.key]), counts.get(kernel.layer, 0))
        properties: dict = {"clusters": max(counts.values()), "layer_clusters": counts}
        if sparse:
            arrays = [trained.after[key] for key in dict.fromkeys(kernel.key for kernel in (*kernels, *held))]
            zeros = sum(int(np.sum(array == 0)) for array in arrays)
            properties |= {"sparsity": zeros / sum(array.size for array in arrays), "zeros": zeros}
        result = OptimizedModel(trained.model, optimized.spec, optimized.properties | self.adds)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=client.touched([kernel.layer for kernel in kernels]),
            skipped=tuple(skipped),
            parameters_before=count_parameters(optimized.model),
            parameters_after=count_parameters(trained.model),
            macs_before=count_macs(optimized.model),
            macs_after=count_macs(trained.model),
            seconds=round(time.monotonic() - started, 3),
            training=trained.training,
            properties=properties,
            notes=client.notes(trained),
        )

    def check_after(self, carried: frozenset[Property]) -> None:
        if Property.SPARSE in carried and self.clusters < 3:
            raise InputError(
                "Two clusters of a pruned kernel are its zeros and one value for all other weights",
                received=f"clusters {self.clusters}", allowed="3 and above after pruning",
            )  # fmt: skip

    def check_layers(self, model, spec) -> None:
        self._choose(model)

    def _choose(self, model) -> tuple[list[Kernel], list[Skip]]:
        from tfopt.tfmot import kernels as choice

        found, skipped = choice.choose(model, self.exclude, self.layers)
        kept: list[Kernel] = []
        why: dict[str, Skip] = {}
        for kernel in found:
            if kernel.setting(self.layers, None) == 0:
                why.setdefault(kernel.layer, Skip(kernel.layer, "excluded by the recipe", "clusters 0"))
            elif kernel.kind in _RECURRENT:
                why.setdefault(kernel.layer, Skip(kernel.layer, "not supported by the technique", kernel.kind))
            else:
                kept.append(kernel)
        chosen = {kernel.layer for kernel in kept}
        skipped += [skip for layer, skip in why.items() if layer not in chosen]
        choice.check_any(kept, model, self.exclude, "clustered")
        return kept, skipped

    def _number(self, kernel: Kernel, sparse: bool) -> tuple[int, bool]:
        """How many values a kernel gets, 1 where it needs no clustering, and whether its zeros must stay."""
        clusters = int(kernel.setting(self.layers, self.clusters))
        keep_zeros = sparse and bool(np.any(kernel.values == 0))
        if keep_zeros and clusters < 3:
            raise InputError(
                f"Layer {kernel.layer} is sparse: two clusters are its zeros and one value for all other weights",
                received=f"clusters {clusters}",
                allowed="3 and above after pruning",
            )
        values = distinct(kernel.values)
        if kernel.values.size <= clusters or values < 2 + keep_zeros:
            return 1, keep_zeros
        return min(clusters, values), keep_zeros


def _check(kernel: Kernel, values: np.ndarray, wanted: tuple[int, bool]) -> None:
    number, keep_zeros = wanted
    found = distinct(values)
    if number > 1 and found > number:
        raise TrainingError(
            f"Layer {kernel.layer} has more values than clusters",
            received=f"{found} different weights",
            allowed=f"{number}",
            next_step="Report this with the recipe and the model's architecture",
        )
    if keep_zeros and np.any((kernel.values == 0) & (values != 0)):
        raise TrainingError(
            f"Layer {kernel.layer} lost zeros in clustering",
            received=f"sparsity {np.mean(values == 0):.4f}",
            allowed=f"{np.mean(kernel.values == 0):.4f}",
            next_step="Report this with the recipe and the model's architecture",
        )
