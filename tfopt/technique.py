"""The contract of one step: a dataclass of its own hyper-parameters that changes a model.

A technique does not know the others. It says which properties it adds and which it leaves as they
were; the recipe measures what a model carries after each step and asks the next one to keep it.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mobile_bench.inputs import InputSpec
from mobile_bench.records import StepReport
from tfopt.errors import InputError, RecipeError, unknown_name
from tfopt.training import TrainConfig

if TYPE_CHECKING:
    import keras

    from tfopt.data import ImageData


class Property(enum.Enum):
    """What a model can carry from one step to the next."""

    SPARSE = "sparse"  # zeros in kernels, which must stay zero
    CLUSTERED = "clustered"  # few distinct values per kernel
    LOW_RANK = "low rank"  # kernels split into thinner ones
    NARROW = "narrow"  # fewer channels than the model the study started from
    FAKE_QUANT = "fake quantization"  # trained with simulated int8


@dataclass(frozen=True)
class OptimizedModel:
    """A Keras 3 model on its way through a recipe.

    quantized: a fake-quantized tf_keras model file that quantization-aware training left, from which
    int8 conversion must start; None for every other model.
    """

    model: keras.Model
    spec: InputSpec
    properties: frozenset[Property] = frozenset()
    quantized: Path | None = None


@dataclass(frozen=True)
class Limits:
    """When a step that works in a process of its own (prune, cluster, qat) is ended; None: never.

    minutes: wall clock. memory_gb: resident, in units of 10^9 bytes; Linux only.
    """

    minutes: float | None = None
    memory_gb: float | None = None

    def __post_init__(self):
        for name, value in (("minutes", self.minutes), ("memory_gb", self.memory_gb)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < 1e6):
                raise InputError(
                    f"The limit of a step, {name}, is out of range", received=repr(value), allowed="above 0"
                )

    def for_job(self) -> dict:
        """As mobile_bench.jobs.run_job takes them."""
        return {
            "timeout_s": None if self.minutes is None else 60 * self.minutes,
            "memory_bytes": None if self.memory_gb is None else int(1e9 * self.memory_gb),
        }


@dataclass(frozen=True)
class Context:
    """What a step may use.

    work: a folder of the step's own, for files it leaves. keep: properties it must not break.
    teacher: the model the study started from. progress: (step, steps, facts) -> None.
    """

    data: ImageData
    work: Path
    teacher: keras.Model
    keep: frozenset[Property] = frozenset()
    seed: int = 0
    progress: Callable[[int, int, dict], None] | None = None
    callbacks: Sequence = ()
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True)
class Technique(abc.ABC):
    """Base of all techniques. Subclasses are frozen dataclasses and set the class variables.

    adds: properties of the result. keeps: properties of its input that it preserves. A step that
    neither adds nor keeps a property that the model carries cannot follow in a recipe.
    """

    name: ClassVar[str]
    adds: ClassVar[frozenset[Property]] = frozenset()
    keeps: ClassVar[frozenset[Property]] = frozenset()

    train: TrainConfig = field(default_factory=TrainConfig)

    @abc.abstractmethod
    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        """Change the model. Never modifies `optimized.model` in place; raises a Problem on refusal."""

    def check(self, model: keras.Model, spec: InputSpec) -> None:
        """Raise a Problem where this step cannot work, before any step of its recipe is trained.

        model, spec: what the study starts from; earlier steps may change it, so this sees what does not depend on them.
        """
        if self.train.distill:
            from tfopt.distillation import features, riding

            panel = riding.panel_of(self.train, model, spec, model.name, int(model.output_shape[-1]))
            features.check_teacher(panel[0].model, self.train.distill.pairs)

    def check_layers(self, model: keras.Model, spec: InputSpec) -> None:  # noqa: B027 - most have nothing to check
        """Raise a Problem for settings that do not fit the layers of a model, before any step is trained.

        Called while the steps before have left the layers their names; channels may be fewer by then.
        """

    def check_after(self, carried: frozenset[Property]) -> None:  # noqa: B027 - most have nothing to check
        """Raise a Problem for settings that cannot follow steps that have given the model these properties."""

    @property
    def renames(self) -> bool:
        """Whether the result's layers have other names than those of the model that the step gets."""
        return False

    def files(self) -> tuple[str, ...]:
        """Files whose content shapes the result: teachers, for one. A missing one is refused first of all."""
        distill = self.train.distill
        return tuple(teacher.path for teacher in distill.teachers) if distill else ()

    def settings(self) -> dict:
        """The hyper-parameters as plain values, for the record and the cache key."""
        return dataclasses.asdict(self)


_REGISTRY: dict[str, type[Technique]] = {}


def register(cls: type[Technique]) -> type[Technique]:
    """Class decorator: make a technique known to recipes under its `name`."""
    _REGISTRY[cls.name] = cls
    return cls


def techniques() -> dict[str, type[Technique]]:
    """All techniques by name."""
    import tfopt.techniques  # noqa: F401 - importing it registers them

    return dict(_REGISTRY)


def names_of(setting: str, value: object) -> tuple[str, ...]:
    """Names, patterns or types of layers as a setting takes them: one, or a list. Raises InputError for others."""
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise InputError(f"{setting} is no list of layers", received=repr(value), allowed="names, patterns and types")
    return tuple(value)


def make(name: str, settings: dict) -> Technique:
    """A technique from what a recipe says; raises RecipeError for unknown names and settings."""
    known = techniques()
    if name not in known:
        raise unknown_name("technique", str(name), known, error=RecipeError)
    cls = known[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in settings:
        if key not in fields:
            raise unknown_name(f"setting of {name}", str(key), fields, error=RecipeError)
    values = dict(settings)
    if isinstance(values.get("train"), dict):
        # What the recipe does not say about training is the technique's own default, not everyone's.
        default = cls().train
        given = values["train"]
        base = dataclasses.asdict(default)
        if "steps" in given or "epochs" in given:
            base.update(steps=None, epochs=None)
        values["train"] = TrainConfig.from_dict({**base, **given})
    try:
        return cls(**values)
    except TypeError as error:
        raise RecipeError(f"The settings of {name} are incomplete", received=str(error)) from error
