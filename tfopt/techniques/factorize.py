"""Low-rank factorization: one kernel becomes a chain of thinner ones, then the network is fine-tuned.

What a kernel can become says tfopt.lowrank.kernels, how ranks are found tfopt.lowrank.rank and .search. A chain is kept
where it is cheaper by count or, if asked, where it is measured faster or smaller on the target.
"""

from __future__ import annotations

import fnmatch
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mobile_bench.records import Skip, StepReport
from tfopt.errors import InputError, ModelRefused, unknown_name
from tfopt.technique import Context, OptimizedModel, Property, Technique, names_of, register
from tfopt.training import TrainConfig

if TYPE_CHECKING:
    from tfopt.latency.micro import Place
    from tfopt.lowrank.layers import Candidate, Factorable
    from tfopt.lowrank.search import Choice

METHODS = ("auto", "channel", "spatial", "tucker", "cp")
KEEP = ("cheaper", "faster", "smaller", "all")
_DEFAULT_ENERGY = 0.9


@register
@dataclass(frozen=True, kw_only=True)
class Factorize(Technique):
    """Factorize every kernel that gains by it, then fine-tune.

    method: 'channel' (a kernel as one matrix: dense layers, 1x1 and k x k convolutions), 'spatial' (k x 1, 1 x k),
    'tucker' (1x1, k x k, 1x1), 'cp' (1x1, depthwise, 1x1); 'auto' takes for each layer the cheapest of the first three.
    Dense and 1x1 layers are matrices whatever it says; depthwise ones are left alone but by 'spatial'.

    How the rank is found, one of: energy, the share of a kernel's squared singular values to keep (0.9 where nothing is
    said); rank_ratio, the rank as a share of the full one; vbmf, by variational Bayes; macs, a share of the model's
    multiplications that is left, shared out where least is lost; latency, the same for measured time. ranks sets those
    of some layers by name or pattern: {'block3_*': 16}, two numbers for Tucker.

    data: factors that lose least of the layers' answers on `images` training images instead of least of the kernels;
    by 'channel' alone. keep: 'cheaper' wants min_gain fewer weights and multiplications; 'faster' wants the chain
    measured faster than the layer on `target` (`scheme`, `threads`); 'smaller' wants fewer weights and not measured
    slower; 'all' wants nothing. exclude: names, patterns or types of layers.
    """

    name: ClassVar[str] = "factorize"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.LOW_RANK})
    keeps: ClassVar[frozenset[Property]] = frozenset({Property.NARROW, Property.LOW_RANK})

    method: str = "auto"
    energy: float | None = None
    rank_ratio: float | None = None
    vbmf: bool = False
    macs: float | None = None
    latency: float | None = None
    ranks: dict = field(default_factory=dict)
    data: bool = False
    images: int = 512
    keep: str = "cheaper"
    min_gain: float = 0.05
    target: str = "local"
    scheme: str = "float32"
    threads: int = 1
    exclude: tuple[str, ...] = ()
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, learning_rate=1e-3))

    def __post_init__(self):
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        for name, known in (("method", METHODS), ("keep", KEEP), ("scheme", ("float32", "int8"))):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        for name in ("vbmf", "data"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is neither true nor false", received=repr(getattr(self, name)))
        ways = [name for name in ("energy", "rank_ratio", "macs", "latency") if getattr(self, name) is not None]
        for name in ways:
            value = getattr(self, name)
            below_one = name in ("macs", "latency")
            if not (_is_number(value) and 0 < value <= 1) or (below_one and value == 1):
                allowed = "above 0, below 1" if below_one else "above 0, up to 1"
                raise InputError(f"{name} is out of range", received=repr(value), allowed=allowed)
        ways += ["vbmf"] if self.vbmf else []
        if len(ways) > 1:
            raise InputError("The rank is set in more than one way", received=" and ".join(ways), allowed="one of them")
        if not (_is_number(self.min_gain) and 0 <= self.min_gain < 1):
            raise InputError("min_gain is out of range", received=repr(self.min_gain), allowed="0 to below 1")
        for name, most in (("images", 100_000), ("threads", 256)):
            value = getattr(self, name)
            if not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most):
                raise InputError(f"{name} is out of range", received=repr(value), allowed=f"1 to {most}")
        if not isinstance(self.target, str) or not self.target:
            raise InputError("The target is no text", received=repr(self.target), allowed="local, ssh://…, adb:SERIAL")
        if self.data and self.method not in ("auto", "channel"):
            raise InputError(
                "Only the method channel fits its factors to data", received=f"data with method {self.method}",
                allowed="method auto or channel",
            )  # fmt: skip
        if self.vbmf and self.method == "cp":
            raise InputError("CP has no matrix whose rank variational Bayes could find", received="vbmf with method cp")
        self._check_ranks()

    def _check_ranks(self) -> None:
        if not isinstance(self.ranks, dict):
            raise InputError("ranks is not a table", received=repr(self.ranks), allowed="{LAYER: RANK}")
        for layer, value in self.ranks.items():
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if not (isinstance(one, int) and not isinstance(one, bool) and one >= 1):
                    raise InputError(
                        f"The rank of {layer} is no whole number above 0", received=repr(value), allowed="1 and above"
                    )

    @property
    def renames(self) -> bool:
        return True

    def check(self, model, spec) -> None:
        super().check(model, spec)
        if self.keep in ("faster", "smaller") or self.latency is not None:
            self._place().found()

    def check_layers(self, model, spec) -> None:
        from tfopt.lowrank import layers as kinds

        for layer in (kinds.Factorable(*layer) for layer in self._chosen(model)[0]):
            if self._own_rank(layer) is not None:
                self._at_own_rank(layer)

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        import keras

        from tfopt import training
        from tfopt.distillation.riding import riding
        from tfopt.graph import count_macs, count_parameters, flat_layers, rewrite

        started = time.monotonic()
        model, spec = optimized.model, optimized.spec
        choice, skipped = self.plan(optimized, context)
        chains = {name: candidate.parts for name, candidate in choice.candidates.items()}
        thinner = rewrite(model, {name: [part.make(keras) for part in parts] for name, parts in chains.items()})
        made = {layer.name: layer for layer in flat_layers(thinner)}
        for part in itertools.chain.from_iterable(chains.values()):
            made[part.name].set_weights(part.weights)
        training.recalibrate(thinner, context.data["train"], spec, keras=keras)
        with riding(self.train, thinner, context, spec) as ride:
            report = training.fit(
                thinner, context.data["train"], context.data["validation"], spec, self.train, keras=keras,
                seed=context.seed, loss_hook=ride.hook, callbacks=context.callbacks, progress=context.progress,
            )  # fmt: skip
        result = OptimizedModel(thinner, spec, optimized.properties | self.adds)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=tuple(chains),
            skipped=tuple(skipped),
            parameters_before=count_parameters(model),
            parameters_after=count_parameters(thinner),
            macs_before=count_macs(model),
            macs_after=count_macs(thinner),
            seconds=round(time.monotonic() - started, 3),
            training=ride.report(report.to_dict()),
            properties={
                "ranks": {name: _rank(candidate) for name, candidate in choice.candidates.items()},
                "methods": {name: candidate.method for name, candidate in choice.candidates.items()},
                "errors": {name: round(candidate.error, 6) for name, candidate in choice.candidates.items()},
                "times": {name: vars(timed) for name, timed in choice.times.items()},
                "accuracy_before_training": report.accuracy_before,
            },
            notes=(*self._notes(choice), *ride.notes(report.accuracy_after)),
        )

    def plan(self, optimized: OptimizedModel, context: Context) -> tuple[Choice, list[Skip]]:
        """What replaces which layers, and why the others stay; nothing is trained."""
        factorable, skipped = self._layers(optimized, context)
        choice, dropped = self._choose(optimized.model, factorable, Path(context.work) / "low_rank", context)
        if not choice.candidates:
            why = "; ".join(f"{skip.layer} {skip.reason} {skip.detail}".strip() for skip in dropped[:3])
            raise ModelRefused(
                "No kernel of the model gains by factorization",
                received=f"{optimized.model.name}: {why or 'no kernels'}",
                next_step="Keep less energy, or set rank_ratio",
            )
        return choice, [*skipped, *dropped]

    def _layers(self, optimized: OptimizedModel, context: Context) -> tuple[list[Factorable], list[Skip]]:
        """What can be decomposed, and why the others cannot."""
        from tfopt.lowrank import layers as kinds
        from tfopt.lowrank import moments

        chosen, skipped = self._chosen(optimized.model)
        answers = {}
        if self.data:
            known = [layer for layer, _ in chosen if not kinds.is_depthwise(layer)]
            images = context.data["train"].balanced(self.images)
            answers = moments.answers(optimized.model, known, images, optimized.spec)
        return [kinds.Factorable(layer, seen, answers.get(layer.name)) for layer, seen in chosen], skipped

    def _chosen(self, model) -> tuple[list[tuple], list[Skip]]:
        """(layer, its shapes) of what can be decomposed, and why the others cannot; refuses names that fit nothing."""
        from tfopt.graph import calls
        from tfopt.lowrank import layers as kinds

        shapes: dict[int, list] = {}
        found = {}
        for operation, before, after in calls(model):
            if operation.weights if hasattr(operation, "weights") else False:
                shapes.setdefault(id(operation), []).append((before, after))
                found[id(operation)] = operation
        with_kernel = {key: layer for key, layer in found.items() if kinds.has_kernel(layer)}
        self._check_names([layer for layer in with_kernel.values()])
        chosen, skipped = [], []
        for key, layer in found.items():
            skip = kinds.refused(layer, shapes[key])
            if key in with_kernel and self._excluded(layer):
                skipped.append(Skip(layer.name, "excluded by the recipe"))
            elif skip:
                skipped.append(skip)
            elif key in with_kernel:
                chosen.append((layer, shapes[key]))
        self._check_ranked([layer for layer, _ in chosen], skipped)
        return chosen, skipped

    def _check_names(self, layers: list) -> None:
        names = [layer.name for layer in layers]
        for pattern in self.ranks:
            if not fnmatch.filter(names, str(pattern)):
                raise unknown_name("layer with a kernel", str(pattern), names)
        types = {type(layer).__name__ for layer in layers}
        for pattern in self.exclude:
            if pattern not in types and not fnmatch.filter(names, pattern):
                raise unknown_name("layer with a kernel", pattern, [*names, *types])

    def _check_ranked(self, chosen: list, skipped: list[Skip]) -> None:
        """Raise InputError where a rank is asked for and no layer can have it."""
        names = [layer.name for layer in chosen]
        for pattern, value in self.ranks.items():
            if fnmatch.filter(names, str(pattern)):
                continue
            why = next(skip for skip in skipped if fnmatch.fnmatch(skip.layer, str(pattern)))
            raise InputError(
                f"Layer {why.layer} has no rank to set: {why.detail or why.reason}", received=f"{pattern}: {value}",
                next_step="Take it out of ranks",
            )  # fmt: skip

    def _excluded(self, layer) -> bool:
        return any(pattern == type(layer).__name__ or fnmatch.fnmatch(layer.name, pattern) for pattern in self.exclude)

    def _methods(self, layer: Factorable) -> tuple[str, ...]:
        """The methods to try on a layer; the settings' own where it has it, else what it is."""
        if layer.depthwise:
            return layer.methods if self.method == "spatial" else ()
        if self.data:
            return ("channel",)
        if self.method == "auto":
            return tuple(method for method in layer.methods if method != "cp")
        return (self.method,) if self.method in layer.methods else layer.methods[:1]

    def _choose(self, model, layers: list[Factorable], folder: Path, context: Context) -> tuple[Choice, list[Skip]]:
        """The candidates that stay, and the layers for which there is none, with the reason."""
        from tfopt.graph import count_macs
        from tfopt.lowrank import search

        place = self._place()
        if self.keep in ("faster", "smaller") or self.latency is not None:
            place.found()  # a target that is none is refused before anything is computed
        tell = lambda done, total, what: (
            context.progress and context.progress(done, total, {"what": "timing layers", "layer": what})
        )
        fixed = [layer for layer in layers if self._own_rank(layer) is not None]
        free = [layer for layer in layers if self._own_rank(layer) is None and self._methods(layer)]
        dropped = [
            Skip(layer.name, "not supported by the technique", "depthwise: nothing between channels to factorize")
            for layer in layers if layer not in fixed and layer not in free
        ]  # fmt: skip
        # A rank above the maximum is refused here, by the layer's name.
        choice = search.Choice({layer.name: self._at_own_rank(layer) for layer in fixed})
        if self.macs is not None:
            whole = count_macs(model)
            others = whole - sum(layer.macs for layer in layers)
            others += sum(candidate.macs for candidate in choice.candidates.values())
            others += sum(layer.macs for layer in layers if layer not in fixed and layer not in free)
            found = search.under_macs(free, self._methods, self.macs, others, whole)
        elif self.latency is not None:
            found = search.under_latency(free, self._methods, self.latency, place, folder, tell)
        else:
            found = search.Choice({layer.name: search.cheapest(self._candidates(layer)) for layer in free})
        choice.candidates.update(found.candidates)
        choice.times.update(found.times)
        dropped += [
            Skip(layer.name, "kept whole within the budget") for layer in free if layer.name not in found.candidates
        ]
        counted = self._drop(layers, choice, [layer.name for layer in fixed], dropped)
        if counted and self.keep in ("faster", "smaller"):
            pairs = {layer.name: (layer, [choice.candidates[layer.name]]) for layer in counted}
            for name, (timed,) in search.race(pairs, place, folder, tell).items():
                choice.times[name] = timed
                wanted = ("faster",) if self.keep == "faster" else ("faster", "cannot tell")
                if timed.verdict not in wanted:
                    dropped.append(Skip(name, "not faster on the target", timed.text()))
                    del choice.candidates[name]
        return choice, dropped

    def _place(self) -> Place:
        from tfopt.latency.micro import Place

        return Place(self.target, self.scheme, self.threads)

    def _drop(
        self, layers: list[Factorable], choice: Choice, fixed: list[str], dropped: list[Skip]
    ) -> list[Factorable]:
        """Take out what is not cheaper by count; the layers whose candidates are left to be timed."""
        left = []
        for layer in layers:
            candidate = choice.candidates.get(layer.name)
            if candidate is None:
                continue
            share = candidate.macs / max(layer.macs, 1)
            weights = candidate.parameters / layer.parameters
            gain = 1 - max(share, weights) if self.keep == "cheaper" else 1 - weights
            least = self.min_gain if self.keep == "cheaper" else 0.0
            if self.keep in ("cheaper", "smaller") and layer.name not in fixed and gain < max(least, 1e-9):
                text = f"rank {_rank(candidate)} costs {max(share, weights):.0%} of the one kernel"
                dropped.append(Skip(layer.name, "no gain at this rank" if gain <= 0 else "too small to gain", text))
                del choice.candidates[layer.name]
            elif layer.name not in choice.times:
                left.append(layer)
        return left

    def _candidates(self, layer: Factorable) -> list[Candidate]:
        if self.vbmf:
            usable = [method for method in self._methods(layer) if method not in ("cp", "depthwise")]
            return [layer.by_variational_bayes(method) for method in usable] or [layer.at("depthwise", (1,))]
        if self.rank_ratio is not None:
            return [layer.by_ratio(method, self.rank_ratio) for method in self._methods(layer)]
        return [layer.by_energy(method, self.energy or _DEFAULT_ENERGY) for method in self._methods(layer)]

    def _own_rank(self, layer: Factorable):
        exact = self.ranks.get(layer.name)
        fitting = [value for pattern, value in self.ranks.items() if fnmatch.fnmatch(layer.name, str(pattern))]
        return exact if exact is not None else fitting[0] if fitting else None

    def _at_own_rank(self, layer: Factorable) -> Candidate:
        ranks = self._own_rank(layer)
        methods = self._methods(layer)
        ranks = tuple(ranks) if isinstance(ranks, (list, tuple)) else (ranks,)
        if not methods:
            raise InputError(
                f"Layer {layer.name} has no rank to set: it is a depthwise convolution", received=ranks[0],
                next_step="Take it out of ranks",
            )  # fmt: skip
        fitting = [method for method in methods if len(layer.full_rank(method)) == len(ranks)]
        return layer.at((fitting or methods)[0], ranks)

    def _notes(self, choice: Choice) -> tuple[str, ...]:
        notes = []
        plain = sorted(name for name, candidate in choice.candidates.items() if self.data and not candidate.by_data)
        if plain:
            notes.append(f"Without data, since no answers stand for them: {', '.join(plain)}")
        return tuple(notes)


def _rank(candidate: Candidate) -> int | list[int]:
    return candidate.ranks[0] if len(candidate.ranks) == 1 else list(candidate.ranks)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
