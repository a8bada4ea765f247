"""Channel pruning: whole channels go, and with them the rows and columns of every kernel that made or read them.

The model that is left is an ordinary dense one, smaller and faster everywhere. Which channels hang together says
tfopt.channels.dependencies, how much they matter tfopt.channels.importance. Taken off in several rounds with training
between them (Molchanov et al. 2017, arXiv:1611.06440), the ratio rises so that each round keeps the same share of what
was there before it.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from mobile_bench.records import Skip, StepReport
from tfopt.channels.limits import DEFAULT_RATIO, IMPORTANCES, SCOPES, check_latency, check_ratio
from tfopt.errors import InputError, ModelRefused, unknown_name
from tfopt.technique import Context, OptimizedModel, Property, Technique, names_of, register
from tfopt.training import TrainConfig

if TYPE_CHECKING:
    import keras
    import numpy as np

    from tfopt.channels.dependencies import Dependencies
    from tfopt.training import TrainReport

#: Far above what float32 rounds and far below what one channel in the wrong place makes.
WRONG_ABOVE = 1e-3
_TAYLOR_IMAGES = 512
_TAYLOR_BATCH = 32


@register
@dataclass(frozen=True, kw_only=True)
class Narrow(Technique):
    """Remove `ratio` of the channels of every layer that can lose some, then fine-tune.

    ratio: of each group of layers whose channels hang together ('uniform'), or of all channels of the model by one
    threshold ('global'). macs: if given, as many channels go as leave that fraction of the MACs, instead of ratio.
    latency, milliseconds: if given, those that matter least for what they cost on `target` go until that fraction of
    the model's measured latency, or so many milliseconds, are left; by the latency `table` at that path, or one that is
    measured first, of files of that `scheme` with so many `threads`.
    importance: taylor (on training images), l1, l2, bn_scale, fpgm, random. layers: other ratios by name or pattern of
    the layer that makes the channels, 0 to leave alone: {stem: 0, 'block3_*': 0.6}; 'uniform' alone. multiple: what
    the number of channels that stay is rounded to. include, exclude: patterns of names or types; only included kernels
    lose channels, excluded ones keep theirs, with all that hang on them. rounds: how often channels are taken off;
    each round gets an equal part of the training.
    """

    name: ClassVar[str] = "channels"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.NARROW})
    keeps: ClassVar[frozenset[Property]] = frozenset({Property.NARROW, Property.LOW_RANK})

    ratio: float | None = None
    importance: str = "taylor"
    scope: str = "uniform"
    macs: float | None = None
    latency: float | None = None
    milliseconds: float | None = None
    table: str = ""
    target: str = ""
    scheme: str = ""
    threads: int = 0
    layers: dict[str, float] = field(default_factory=dict)
    multiple: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rounds: int = 1
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=4, learning_rate=1e-3))

    def __post_init__(self):
        for name in ("include", "exclude"):
            object.__setattr__(self, name, names_of(name, getattr(self, name)))
        for name, known in (("importance", IMPORTANCES), ("scope", SCOPES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        check_latency(self)
        if self.ratio is not None and self.macs is not None:
            raise InputError(
                "How many channels go is said in more than one way", received="ratio and macs", allowed="one of them",
                next_step="Leave the other out",
            )  # fmt: skip
        if self.ratio is None and self.macs is None and not self._timed:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        check_ratio(self.ratio or 0.0, allowed="above 0, below 1")
        if not isinstance(self.layers, dict) or not all(isinstance(key, str) for key in self.layers):
            raise InputError("layers is not a table of ratios", received=repr(self.layers), allowed="{LAYER: RATIO}")
        for layer, ratio in self.layers.items():
            check_ratio(ratio, f"The ratio of {layer}")
        if self.macs is not None and not (_is_number(self.macs) and 0 < self.macs < 1):
            raise InputError("macs is out of range", received=repr(self.macs), allowed="above 0, below 1")
        for name, low, high in (("multiple", 1, 1024), ("rounds", 1, 100)):
            value = getattr(self, name)
            if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
                raise InputError(f"{name} is out of range", received=repr(value), allowed=f"{low} to {high}")
        if self.layers and (self.scope == "global" or self.macs is not None):
            raise InputError(
                "layers gives ratios where the threshold is one for all",
                received=f"layers with {'macs' if self.macs is not None else 'scope global'}",
                allowed="layers with scope uniform and without macs",
            )
        if self.macs is None and not self._timed and self.ratio == 0 and not any(self.layers.values()):
            raise InputError("A ratio of 0 removes no channel", received=self.ratio, allowed="above 0, below 1")

    @property
    def _timed(self) -> bool:
        return self.latency is not None or self.milliseconds is not None

    def files(self) -> tuple[str, ...]:
        return (*super().files(), self.table) if self.table else super().files()

    def check(self, model, spec) -> None:
        super().check(model, spec)
        if self._timed:
            from tfopt.latency.micro import Place

            Place(self.target or "local").found()

    def check_layers(self, model, spec) -> None:
        found = self._analyze(model)
        if not self._timed:  # a table of latencies is for the model as it will be
            _Plan(self, found, spec).check()

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        import keras

        from tfopt import training
        from tfopt.channels import cut
        from tfopt.channels.importance import without_norm
        from tfopt.distillation.riding import riding

        started = time.monotonic()
        model, spec, split = optimized.model, optimized.spec, context.data["train"]
        found = self._analyze(model)
        first = found
        plan = _Plan(self, found, spec, context.progress)
        plan.check()
        facts: list[dict] = []
        reports: list[TrainReport] = []
        rounds = _parts(self.train.steps_for(len(split)), self.rounds)
        total = sum(rounds)
        for number, steps in enumerate(rounds, 1):
            if number > 1:
                found = self._analyze(model)
            removed = plan.choose(found, self._scores(found, optimized, context), number / len(rounds))
            smaller = cut.cut(found, removed)
            exactness = _check(found, removed, smaller)
            training.recalibrate(smaller, split, spec, keras=keras)
            done = sum(rounds[: number - 1])
            with riding(self.train, smaller, context, spec) as ride:
                report = training.fit(
                    smaller, split, context.data["validation"], spec,
                    dataclasses.replace(self.train, epochs=None, steps=steps), keras=keras,
                    seed=context.seed + number - 1, loss_hook=ride.hook, callbacks=context.callbacks,
                    progress=_shifted(context.progress, done, total),
                )  # fmt: skip
            reports.append(report)
            model = smaller
            facts.append({
                "units_removed": len(removed), "parameters": int(smaller.count_params()), "exactness": exactness,
                "accuracy_before": report.accuracy_before, "accuracy_after": report.accuracy_after,
            })  # fmt: skip
        whole = cut.compare(first, model)
        unmoved = [
            Skip(name, "too small to gain", f"all {before} channels stay at this ratio and multiple")
            for name, (before, after) in whole.layers.items() if after == before
        ]  # fmt: skip
        notes = [_moved(whole)]
        if plan.budget:
            latency = plan.budget.facts(self._analyze(model))
            notes.append(_timed_note(latency))
        if self.importance == "bn_scale" and (names := without_norm(first)):
            notes.append(f"No batch norm judges the channels of {', '.join(names)}: there l1 did")
        result = OptimizedModel(model, spec, optimized.properties | self.adds)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=tuple(name for name, (before, after) in whole.layers.items() if after < before),
            skipped=(*whole.skipped, *unmoved),
            parameters_before=whole.parameters_before,
            parameters_after=whole.parameters_after,
            macs_before=whole.macs_before,
            macs_after=whole.macs_after,
            seconds=round(time.monotonic() - started, 3),
            training=ride.report(_joined(reports).to_dict()),
            properties={
                "channels": {name: list(counts) for name, counts in whole.layers.items()},
                "rounds": facts,
                "accuracy_before_training": reports[0].accuracy_before,
                **({"latency": latency} if plan.budget else {}),
            },
            notes=(*notes, *ride.notes(reports[-1].accuracy_after)),
        )

    def cut_once(self, optimized: OptimizedModel, context: Context) -> keras.Model:
        """The smaller model in one round, untrained but for its batch norms' statistics."""
        import keras

        from tfopt import training
        from tfopt.channels import cut

        found = self._analyze(optimized.model)
        plan = _Plan(self, found, optimized.spec)
        plan.check()
        removed = plan.choose(found, self._scores(found, optimized, context), 1.0)
        smaller = cut.cut(found, removed)
        _check(found, removed, smaller)
        training.recalibrate(smaller, context.data["train"], optimized.spec, keras=keras)
        return smaller

    def _analyze(self, model: keras.Model) -> Dependencies:
        from tfopt.channels.dependencies import analyze

        found = analyze(model, include=self.include, exclude=self.exclude)
        if not found.groups:
            reasons = "; ".join(dict.fromkeys(reason.detail for _, reason in found.stays()))
            raise ModelRefused(
                "No layer of the model can lose channels", received=f"{model.name}: {reasons or 'no kernels'}",
                next_step="Exclude fewer layers, or choose another technique",
            )  # fmt: skip
        return found

    def _scores(self, found: Dependencies, optimized: OptimizedModel, context: Context) -> np.ndarray:
        import keras

        from tfopt import objectives
        from tfopt.channels.importance import scores

        batches = loss = None
        if self.importance == "taylor":
            model, spec = found.model, optimized.spec
            loss = objectives.loss(keras, self.train, spec.head, int(model.output_shape[-1]))
            batches = context.data["train"].balanced(_TAYLOR_IMAGES).batches(spec, _TAYLOR_BATCH)
        return scores(found, self.importance, batches=batches, loss=loss, seed=context.seed)


class _Plan:
    """How much goes in each round, measured by the model that the step began with."""

    def __init__(self, settings: Narrow, first: Dependencies, spec=None, progress=None):
        from tfopt.channels import choose
        from tfopt.graph import count_macs

        self._settings, self._first, self._choose = settings, first, choose
        self._sizes = dict(zip(_keys(first), map(len, first.groups)))
        self._ratios = dict(zip(_keys(first), choose.ratios_of(first, settings.layers, settings.ratio or 0.0)))
        self._macs = count_macs(first.model)
        self.budget = None
        if settings._timed:
            from tfopt.latency.channels import Budget, Wanted, table_for

            names = ("latency", "milliseconds", "table", "target", "scheme", "threads")
            wanted = Wanted(**{name: getattr(settings, name) for name in names})
            self.budget = Budget(wanted, first, *table_for(wanted, first, spec, progress))

    def check(self) -> None:
        """Refuse before any training what cannot be done, or would do nothing."""
        import numpy as np

        found, settings = self._first, self._settings
        none = np.zeros(int(found.units.max()) + 1)
        if self.budget or settings.macs is not None or settings.scope == "global":
            removed = self.choose(found, none + np.random.default_rng(0).random(len(none)), 1.0)
        else:
            removed = self._choose.by_group(found, none, list(self._ratios.values()), settings.multiple)
        if not removed:
            raise ModelRefused(
                "No layer of the model loses a channel", received=f"ratio {settings.ratio or 0:g} in multiples of "
                f"{settings.multiple}", next_step="Raise ratio, or lower multiple",
            )  # fmt: skip

    def choose(self, found: Dependencies, scores: np.ndarray, share: float) -> list[int]:
        """The units that go in a round after which that share of the way is gone."""
        from tfopt.graph import count_macs

        settings, choose = self._settings, self._choose
        if self.budget:
            kind, multiple = settings.importance, settings.multiple
            return self.budget.choose(found, scores, share, kind=kind, multiple=multiple)
        if settings.macs is not None:
            fraction = settings.macs**share * self._macs / count_macs(found.model)
            if fraction >= 1:
                return []
            kind = settings.importance
            return choose.to_macs(found, scores, fraction, settings.multiple, scope=settings.scope, kind=kind)
        if settings.scope == "global":
            before, now = sum(self._sizes.values()), sum(map(len, found.groups))
            ratio = max(0.0, 1 - (1 - settings.ratio) ** share * before / now)
            return choose.overall(found, scores, ratio, settings.multiple, kind=settings.importance)
        ratios = []
        for key, group in zip(_keys(found), found.groups):
            wanted = (1 - self._ratios.get(key, 0.0)) ** share * self._sizes.get(key, len(group))
            ratios.append(max(0.0, 1 - wanted / len(group)))
        return choose.by_group(found, scores, ratios, settings.multiple, strict=False)


def _keys(found: Dependencies) -> list[tuple]:
    """A name for each group that it has in every round: its layers, and which of several with the same it is."""
    seen: dict[tuple, int] = {}
    keys = []
    for group in found.groups:
        seen[group.layers] = seen.get(group.layers, 0) + 1
        keys.append((group.layers, seen[group.layers]))
    return keys


def _parts(steps: int, rounds: int) -> list[int]:
    """The steps of each round, at least one, as equal as they can be."""
    steps = max(steps, rounds)
    return [steps * (i + 1) // rounds - steps * i // rounds for i in range(rounds)]


def _check(found: Dependencies, removed: list[int], smaller: keras.Model) -> float:
    from tfopt.channels.check import exactness

    difference = exactness(found, removed, smaller)
    if not difference <= WRONG_ABOVE:
        raise ModelRefused(
            "The smaller model does not compute what the model without these channels does",
            received=f"{found.model.name}: answers differ by {difference:.2g} of their size",
            next_step="Report this with the model's architecture",
        )
    return float(difference)


def _shifted(progress, done: int, total: int):
    return progress and (lambda step, steps, facts: progress(done + step, total, facts))


def _joined(reports: list[TrainReport]) -> TrainReport:
    """The rounds as one training."""
    history, steps = [], 0
    for report in reports:
        history += [{**row, "step": row["step"] + steps} for row in report.history]
        steps += report.steps
    return dataclasses.replace(
        reports[-1],
        steps=steps,
        images_seen=sum(report.images_seen for report in reports),
        seconds=round(sum(report.seconds for report in reports), 3),
        accuracy_before=reports[0].accuracy_before,
        history=tuple(history),
        stopped_early=any(report.stopped_early for report in reports),
    )


def _moved(whole) -> str:
    narrower = sum(after < before for before, after in whole.layers.values())
    return (
        f"{narrower} of {len(whole.layers)} kernels that can lose channels did: parameters to "
        f"{whole.parameters_after / whole.parameters_before:.0%}, MACs to "
        f"{whole.macs_after / max(whole.macs_before, 1):.0%}"
    )


def _timed_note(latency: dict) -> str:
    return (
        f"Latency on {latency['target']} ({latency['scheme']}, {latency['threads']} thread(s)): measured "
        f"{latency['measured_ms']:.4g} ms before, {latency['predicted_ms']:.4g} ms predicted after, the budget being "
        f"{latency['budget_ms']:.4g} ms"
    )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
