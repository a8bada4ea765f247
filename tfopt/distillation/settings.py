"""What a recipe says of distillation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from tfopt.errors import InputError, unknown_name


@dataclass(frozen=True)
class Teacher:
    """A model file, how it wants its pixels where the file does not say, and its weight among several."""

    path: str
    input_spec: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise InputError("A teacher is no file", received=repr(self.path), allowed="a .keras file")
        if self.input_spec is not None and not isinstance(self.input_spec, str):
            raise InputError(
                f"The input_spec of teacher {self.path} is no text", received=repr(self.input_spec),
                allowed="such as scaling=unit",
            )  # fmt: skip
        object.__setattr__(self, "weight", as_number(self.weight))
        if not (is_number(self.weight) and self.weight > 0):
            raise InputError("A teacher's weight is out of range", received=repr(self.weight), allowed="above 0")

    @classmethod
    def parse(cls, entry) -> Teacher:
        if isinstance(entry, Teacher):
            return entry
        if isinstance(entry, str):
            return cls(entry)
        if isinstance(entry, dict):
            for key in entry:
                if key not in ("path", "input_spec", "weight"):
                    raise unknown_name("setting of a teacher", str(key), ("path", "input_spec", "weight"))
            if "path" in entry:
                return cls(**entry)
        raise InputError("A teacher is no file", received=repr(entry), allowed="FILE, or {path: FILE, weight: 1}")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """alpha · T² · KL of the softened answers + (1 - alpha) · the usual loss + the weighted losses on features.

    temperature, alpha: of Hinton et al. 2015. hints: weight of FitNets' regression on features. attention: weight of
    attention transfer (1000 is the order of its authors'). relational: weight of relational distillation, distances
    plus twice the angles, between the last pair of layers. pairs: {student's layer: teacher's layer} for these three;
    where it is empty, the ends of stages are matched, by name or else by size (features.pairs). teachers: files; none
    is the study's own model. The first one's features count, and the mean of all answers.
    """

    temperature: float = 4.0
    alpha: float = 0.7
    hints: float = 0.0
    attention: float = 0.0
    relational: float = 0.0
    pairs: dict = field(default_factory=dict)
    teachers: tuple[Teacher, ...] = ()

    def __post_init__(self):
        for name in _NUMBERS:
            object.__setattr__(self, name, as_number(getattr(self, name)))
        if not (is_number(self.temperature) and self.temperature > 0):
            raise InputError("temperature is out of range", received=repr(self.temperature), allowed="above 0")
        if not (is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise InputError("alpha is out of range", received=repr(self.alpha), allowed="0 to 1")
        for name in ("hints", "attention", "relational"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise InputError(f"The weight of {name} is out of range", received=repr(value), allowed="0 and above")
        words = lambda entry: isinstance(entry, str) and entry
        if not isinstance(self.pairs, dict) or not all(words(a) and words(b) for a, b in self.pairs.items()):
            raise InputError("pairs is no table of layers", received=repr(self.pairs), allowed="{STUDENT: TEACHER}")
        if self.pairs and not self.on_features:
            raise InputError(
                "pairs names layers that no loss looks at", received=repr(self.pairs),
                next_step="Give hints, attention or relational a weight",
            )  # fmt: skip
        teachers = self.teachers
        teachers = (teachers,) if isinstance(teachers, (str, dict, Teacher)) else teachers
        if not isinstance(teachers, (list, tuple)):
            raise InputError("teachers is no list of files", received=repr(teachers), allowed="FILE or [FILE, FILE]")
        object.__setattr__(self, "teachers", tuple(Teacher.parse(entry) for entry in teachers))

    @property
    def on_features(self) -> bool:
        """Whether the features of layers are looked at, and not the answers alone."""
        return bool(self.feature_losses)

    @property
    def feature_losses(self) -> tuple[str, ...]:
        """The names of the losses on features that have a weight."""
        return tuple(name for name in ("hints", "attention", "relational") if getattr(self, name))

    def numbers(self) -> dict[str, float]:
        """temperature, alpha and the weights, by name."""
        return {name: getattr(self, name) for name in _NUMBERS}

    @classmethod
    def parse(cls, values) -> Distillation:
        """From a recipe's `distill:` inside a step's training: true, or a table of the settings."""
        if isinstance(values, Distillation):
            return values
        if values is True:
            return cls()
        if not isinstance(values, dict):
            raise InputError("distill is neither true nor a table", received=repr(values), allowed=", ".join(NAMES))
        for name in values:
            if name not in NAMES:
                raise unknown_name("setting of distill", str(name), NAMES)
        return cls(**values)

    def plain(self) -> dict:
        """As plain values, for a record or a file."""
        return dataclasses.asdict(self)


_NUMBERS = ("temperature", "alpha", "hints", "attention", "relational")
NAMES = tuple(f.name for f in dataclasses.fields(Distillation))


def as_number(value):
    """What YAML reads as a word, such as 1e3, as the number it is; everything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
