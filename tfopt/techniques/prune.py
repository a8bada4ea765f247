"""Magnitude pruning: the smallest weights of every kernel become zero, step by step, while training.

Zhu and Gupta 2017 (arXiv:1710.01878), equation 1: the sparsity rises from s_i to s_f along
s_f + (s_i - s_f) · (1 - (t - t_0) / (t_end - t_0))³. TFMOT does it, in a process of its own.

The zeros shrink the compressed file. They make nothing faster unless the runtime has sparse kernels
for the processor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mobile_bench.records import Skip, StepReport
from tfopt.errors import InputError, ModelRefused, TrainingError, unknown_name
from tfopt.technique import Context, OptimizedModel, Property, Technique, names_of, register
from tfopt.training import TrainConfig

if TYPE_CHECKING:
    from tfopt.tfmot.kernels import Kernel

SENSITIVITY = "sensitivity"
SCHEDULES = ("polynomial", "constant")
SCOPES = ("layer", "global")
POOLS = ("average", "max")
POLICIES = ("xnnpack",)
#: With one threshold for all, no layer loses more than this; a kernel without weights would cut the network in two.
MOST_OF_A_LAYER = 0.98

_SPARSITIES = "above 0, below 1, or sensitivity"


@register
@dataclass(frozen=True, kw_only=True)
class Prune(Technique):
    """Set `sparsity` of each kernel to zero and keep the rest trained.

    sparsity, initial_sparsity: fractions of zeros at the end and at the start of the ramp. sparsity 'sensitivity':
    each layer gets the most that costs at most `max_drop` of validation accuracy when it alone is pruned, untrained.
    scope: 'layer' prunes each kernel to `sparsity`; 'global' computes one threshold over the magnitudes of all
    kernels and prunes each to the share of its weights below it. layers: other sparsities by layer name, pattern or
    type, 0 to leave alone: {stem: 0.3, 'stage3_*': 0.8, DepthwiseConv2D: 0}; what they cover stands outside the
    global threshold. exclude: the same keys, layers to leave alone; depthwise kernels are few weights and feel it most.
    m_by_n: [2, 4] sets the 2 smallest of every 4 weights along the input axis to zero, from the first step on.
    block: [4, 1] zeros blocks of 4 inputs by 1 output as one, by the `pool` of their magnitudes. policy: 'xnnpack'
    prunes 1x1 convolutions only and says whether XNNPACK's sparse kernels will take the exported file.
    schedule: 'polynomial' rises with `power`, 'constant' is all there from `begin`. begin, end: the ramp's place in
    the training, as fractions of its steps. frequency: steps between two changes of the mask. train.patience counts
    from the end of the ramp, so that what training stops at has all its zeros.
    """

    name: ClassVar[str] = "prune"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.SPARSE})
    keeps: ClassVar[frozenset[Property]] = frozenset({Property.NARROW, Property.LOW_RANK})

    sparsity: float | str = 0.5
    max_drop: float = 0.01
    initial_sparsity: float = 0.0
    scope: str = "layer"
    layers: dict[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    m_by_n: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    pool: str = "average"
    policy: str = ""
    schedule: str = "polynomial"
    power: float = 3.0
    begin: float = 0.0
    end: float = 0.75
    frequency: int = 10
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=200, learning_rate=5e-4, evaluations=2, validation_images=2000)
    )

    def __post_init__(self):
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        choices = {"schedule": SCHEDULES, "scope": SCOPES, "pool": POOLS, "policy": ("", *POLICIES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), filter(None, known))
        if isinstance(self.sparsity, str) and self.sparsity != SENSITIVITY:
            raise InputError("sparsity is out of range", received=repr(self.sparsity), allowed=_SPARSITIES)
        self._check_pattern()
        if not isinstance(self.layers, dict) or not all(isinstance(key, str) for key in self.layers):
            raise InputError(
                "layers is not a table of sparsities", received=repr(self.layers), allowed="{LAYER: SPARSITY}"
            )
        shares = [(name, getattr(self, name)) for name in ("sparsity", "initial_sparsity", "max_drop")]
        for name, value in [*shares, *((f"The sparsity of {key}", share) for key, share in self.layers.items())]:
            if value != SENSITIVITY and not (_is_number(value) and 0 <= value < 1):
                allowed = _SPARSITIES if name == "sparsity" else "0 to below 1"
                raise InputError(f"{name} is out of range", received=repr(value), allowed=allowed)
        for name in ("begin", "end"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                allowed = "0 to 1, a share of the training's steps"
                raise InputError(f"{name} is out of range", received=repr(value), allowed=allowed)
        if not (_is_number(self.power) and 0 < self.power <= 10):
            raise InputError("power is out of range", received=repr(self.power), allowed="above 0 to 10")
        if self.sparsity == 0 and not any(self.layers.values()):
            raise InputError("Pruning to a sparsity of 0 does nothing", received=self.sparsity, allowed="above 0")
        if not isinstance(self.sparsity, str) and self.initial_sparsity > max([self.sparsity, *self.layers.values()]):
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
        if any("EarlyStopping" in entry for entry in self.train.callbacks):
            raise InputError(
                "Keras's EarlyStopping could end pruning, or go back, to before the end of the ramp",
                received=f"callbacks {list(self.train.callbacks)}",
                allowed="patience, which counts from the end of the ramp",
            )

    def _check_pattern(self) -> None:
        for name in ("m_by_n", "block"):
            value = getattr(self, name)
            if value is None:
                continue
            pair = tuple(value) if isinstance(value, (list, tuple)) else ()
            whole = len(pair) == 2 and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in pair)
            if not whole or (name == "m_by_n" and pair[0] >= pair[1]) or (name == "block" and pair == (1, 1)):
                allowed = (
                    "[m, n], m zeros in every n, m below n" if name == "m_by_n" else "[inputs, outputs], not [1, 1]"
                )
                colon = isinstance(value, int) and value >= 60  # YAML takes 2:4 for minutes and seconds
                raise InputError(
                    f"{name} is no such pair of whole numbers", received=repr(value), allowed=allowed,
                    next_step=f"YAML reads {value // 60}:{value % 60} as {value}: write [{value // 60}, {value % 60}]"
                    if colon else None,
                )  # fmt: skip
            object.__setattr__(self, name, pair)
        if self.m_by_n is None:
            return
        share = self.m_by_n[0] / self.m_by_n[1]
        default = type(self).__dataclass_fields__["sparsity"].default
        given = [] if self.sparsity in (default, share) else [f"sparsity {self.sparsity}"]
        given += ["block"] if self.block else []
        given += ["scope global"] if self.scope == "global" else []
        given += ["layers"] if isinstance(self.layers, dict) and any(self.layers.values()) else []
        if given:
            raise InputError(
                f"m_by_n says by itself how many weights become zero: {share:.4g} of each kernel",
                received=f"m_by_n {list(self.m_by_n)} and {', '.join(given)}",
                allowed="m_by_n with exclude, or with layers that are 0",
            )
        object.__setattr__(self, "sparsity", share)

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        from tfopt.graph import count_macs, count_parameters
        from tfopt.tfmot import client

        started = time.monotonic()
        if Property.FAKE_QUANT in optimized.properties:
            raise ModelRefused("A model trained for int8 cannot be pruned afterwards", next_step="Put prune before qat")
        kernels, skipped = self._choose(optimized.model)
        wanted, facts = self._allot(kernels, optimized, context)
        names = ("initial_sparsity", "m_by_n", "block", "policy", "schedule", "power", "begin", "end", "frequency")
        settings = {name: getattr(self, name) for name in names} | {"sparsity": max(wanted.values())}
        settings |= {"kernels": wanted, "pool": "MAX" if self.pool == "max" else "AVG"}
        trained = client.train("prune", optimized, context, self.train, settings=settings)
        for kernel in kernels:
            _check(kernel, trained.after[kernel.key], wanted[kernel.key], self.m_by_n, self.block)
        zeros = sum(int(np.sum(trained.after[kernel.key] == 0)) for kernel in kernels)
        weights = sum(kernel.values.size for kernel in kernels)
        parameters = count_parameters(trained.model)
        result = OptimizedModel(trained.model, optimized.spec, optimized.properties | self.adds)
        notes = [*client.notes(trained), *self._notes(kernels)]
        if self.policy:
            facts["xnnpack"], told = _xnnpack(trained, optimized.spec, context)
            notes += told
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=client.touched([kernel.layer for kernel in kernels]),
            skipped=tuple(skipped),
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
                "layer_sparsity": _by_layer(kernels, trained.after),
                **facts,
            },
            notes=tuple(notes),
        )

    def check_layers(self, model, spec) -> None:
        self._choose(model)

    def _choose(self, model) -> tuple[list[Kernel], list[Skip]]:
        """The kernels to prune and the layers left alone; refuses names that fit nothing, and an empty choice."""
        from tfopt.tfmot import kernels as choice

        found, skipped = choice.choose(model, self.exclude, self.layers)
        kept, why = [], {}
        for kernel in found:
            reason = self._why_not(kernel)
            if reason:
                why.setdefault(kernel.layer, Skip(kernel.layer, *reason))
            else:
                kept.append(kernel)
        chosen = {kernel.layer for kernel in kept}
        skipped += [skip for layer, skip in why.items() if layer not in chosen]
        choice.check_any(kept, model, self.exclude, "pruned")
        return kept, skipped

    def _why_not(self, kernel: Kernel) -> tuple[str, str] | None:
        if self.policy and not (kernel.kind == "Conv2D" and kernel.values.shape[:2] == (1, 1)):
            return "excluded by the recipe", "policy xnnpack: 1x1 convolutions only"
        if kernel.setting(self.layers, None) == 0:
            return "excluded by the recipe", "sparsity 0"
        if self.m_by_n:
            zeros, group = self.m_by_n
            if not kernel.groups_fit():
                return "shape does not allow it", f"no axis of inputs: {kernel.kind} {kernel.values.shape}"
            if kernel.input_axis <= group - zeros:
                return "shape does not allow it", f"input axis of {kernel.input_axis}, groups of {group}"
        if self.block and (kernel.values.ndim < 2 or kernel.kind.startswith("Depthwise")):
            return "shape does not allow it", "a depthwise filter has one input: no block of inputs by outputs"
        return None

    def _allot(self, kernels: Sequence[Kernel], optimized: OptimizedModel, context: Context) -> tuple[dict, dict]:
        """The sparsity of each kernel, by its key, and what the report shall say of how it came to be."""
        given = {kernel.key: kernel.setting(self.layers, None) for kernel in kernels}
        open_to = [kernel for kernel in kernels if given[kernel.key] is None]
        facts = {}
        if self.sparsity == SENSITIVITY and open_to:
            from tfopt import sensitivity

            found = sensitivity.analyze(
                optimized.model, context.data["validation"], optimized.spec, exclude=self.exclude,
                only=[kernel.key for kernel in open_to], progress=context.progress,
            )  # fmt: skip
            shares = found.sparsities(self.max_drop)
            facts["sensitivity"] = {row.layer: dict(row.drops(found.accuracy)) for row in found.layers}
            if not any(shares.values()) and not any(given.values()):
                raise ModelRefused(
                    "No layer can lose any of the tried shares of its weights for that little accuracy",
                    received=f"max_drop {self.max_drop}",
                    next_step="Raise max_drop, or set sparsity: what is lost alone comes back with training",
                )
        elif self.scope == "global":
            shares = global_shares({kernel.key: kernel.values for kernel in open_to}, self.sparsity)
        else:
            shares = dict.fromkeys((kernel.key for kernel in open_to), self.sparsity)
        return {key: float(shares[key] if share is None else share) for key, share in given.items()}, facts

    def _notes(self, kernels: Sequence[Kernel]) -> list[str]:
        if not self.m_by_n:
            return []
        zeros, group = self.m_by_n
        odd = [f"{kernel.layer} ({kernel.input_axis})" for kernel in kernels if kernel.input_axis % group]
        text = (
            f"Groups of {group} do not divide the input axis of {', '.join(odd)}: the rest of it keeps {group - zeros}"
        )
        return [text] if odd else []


def global_shares(kernels: dict[str, np.ndarray], sparsity: float) -> dict[str, float]:
    """The share of each kernel below one threshold of magnitude that makes `sparsity` of all of them zero.

    Layers that would lose nearly all keep what MOST_OF_A_LAYER leaves, and the threshold rises to make up for it.
    """
    sizes = {key: array.size for key, array in kernels.items()}
    ordered = {key: np.sort(np.abs(array), axis=None) for key, array in kernels.items()}
    wanted = min(sparsity, MOST_OF_A_LAYER) * sum(sizes.values())
    low, high = 0.0, max((float(array[-1]) for array in ordered.values()), default=0.0)
    shares = lambda threshold: {
        key: min(MOST_OF_A_LAYER, np.searchsorted(array, threshold, side="right") / sizes[key])
        for key, array in ordered.items()
    }
    for _ in range(60):  # halves the interval to less than a float32 can tell apart
        middle = (low + high) / 2
        enough = sum(share * sizes[key] for key, share in shares(middle).items()) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return {key: float(share) for key, share in shares(high).items()}


def _xnnpack(trained, spec, context: Context) -> tuple[dict, list[str]]:
    """What TFMOT's policy and the exported file say of XNNPACK's sparse kernels."""
    from mobile_bench.flatbuffer import read_model
    from mobile_bench.xray.cpu_sparse import UNMEASURED, missing
    from mobile_bench.xray.rules import nodes
    from tfopt import convert, models

    policy = trained.result["policy"]
    models.save(trained.model, context.work / "pruned.keras", spec)
    (converted,) = convert.convert(
        context.work / "pruned.keras", spec, ["float32_sparse"], context.work, work=context.work, trust=True
    )
    lacking = [converted.reason] if converted.path is None else missing(nodes(read_model(converted.path)))
    facts = {"eligible": not lacking, "missing": lacking, "policy": policy or "the whole model is supported"}
    notes = [
        f"XNNPACK's sparse kernels would run this model as float32_sparse ({UNMEASURED})" if not lacking else
        f"XNNPACK's sparse kernels would not run this model ({UNMEASURED}). Missing: {'; '.join(lacking)}"
    ]  # fmt: skip
    if policy:
        notes.append(f"TFMOT's PruneForLatencyOnXNNPack would refuse the model: {policy}")
    return facts, notes


def _by_layer(kernels: Sequence[Kernel], weights: dict) -> dict[str, float]:
    """The share of zeros of each layer's kernels."""
    arrays: dict[str, list[np.ndarray]] = {}
    for kernel in kernels:
        arrays.setdefault(kernel.layer, []).append(weights[kernel.key].ravel())
    return {layer: round(float(np.mean(np.concatenate(found) == 0)), 6) for layer, found in arrays.items()}


def _check(kernel: Kernel, values: np.ndarray, wanted: float, m_by_n=None, block=None) -> None:
    """Raise TrainingError unless the kernel has its zeros, in their pattern.

    TFMOT keeps round(size · (1 - s)) weights, at least one, and computes that in float32.
    """
    zero = values == 0
    if m_by_n:
        rows = np.moveaxis(zero, -1 if kernel.kind == "Conv2DTranspose" else -2, -1)
        have = [rows[..., i : i + m_by_n[1]] for i in range(0, rows.shape[-1], m_by_n[1])]
        fine = all(np.all(part.sum(-1) >= m_by_n[0] - m_by_n[1] + part.shape[-1]) for part in have)
    else:
        units = zero
        if block:
            flat = zero.reshape(-1, *zero.shape[-2:])
            for axis, size in zip((1, 2), block):
                flat = np.logical_and.reduceat(flat, np.arange(0, flat.shape[axis], size), axis)
            units = flat
        fine = np.sum(units) >= min(units.size - 1, units.size * wanted - 1 - 1e-6 * units.size)
    if not fine:
        raise TrainingError(
            f"Layer {kernel.layer} lost zeros on the way",
            received=f"sparsity {zero.mean():.4f}",
            allowed=f"{wanted:.4f}",
            next_step="Report this with the recipe and the model's architecture",
        )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
