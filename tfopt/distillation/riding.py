"""Distillation that rides along with the fine-tuning of any step, by the `distill` of its training settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mobile_bench.inputs import InputSpec

if TYPE_CHECKING:
    from tfopt.data.splits import Split
    from tfopt.distillation.teachers import Loaded
    from tfopt.technique import Context
    from tfopt.training import LossHook, TrainConfig

#: A teacher counts as worse where it is so by more than this, a fraction of the validation images.
_CLEARLY = 0.01


@dataclass(frozen=True)
class Ride:
    """A fine-tuning's loss hook, where it is here and not in the worker, and what the report says of its teachers.

    All is empty where nobody teaches. accuracies: name -> fraction of the validation images. known: what is to be said
    of them in any case.
    """

    hook: LossHook | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    known: tuple[str, ...] = ()

    def report(self, training: dict) -> dict:
        """The training's report, with who taught."""
        if not self.accuracies:
            return training
        return {**training, "distillation": facts(self.accuracies, self.pairs)}

    def notes(self, accuracy: float) -> tuple[str, ...]:
        """What the report says of the teachers of a student with that accuracy."""
        return (*self.known, *worse(self.accuracies, accuracy))


@contextmanager
def riding(config: TrainConfig, model, context: Context, spec: InputSpec) -> Iterator[Ride]:
    """What the settings want for a fine-tuning of the Keras 3 `model`."""
    if config.distill is None:
        yield Ride()
        return
    from tfopt.distillation import teachers
    from tfopt.distillation.hook import distilling

    panel = panel_of(config, context.teacher, spec, model.name, int(model.output_shape[-1]))
    with distilling(model, panel, config.distill, spec) as (hook, pairs):
        yield Ride(hook, judged(panel, judges(config, context)), pairs, tuple(teachers.notes(panel)))


def panel_of(config: TrainConfig, own, spec: InputSpec, student: str, classes: int) -> list[Loaded]:
    """The teachers of a training, checked against the student's classes and images; own: the study's model."""
    from tfopt.distillation import teachers

    panel = teachers.load(config.distill, own, spec)
    teachers.check(panel, student, classes, spec)
    return panel


def judges(config: TrainConfig, context: Context) -> Split:
    """The validation images by which the training itself is judged."""
    validation = context.data["validation"]
    return validation.balanced(config.validation_images) if config.validation_images else validation


def judged(panel: Sequence[Loaded], validation: Split) -> dict[str, float]:
    """name -> accuracy of each teacher, as a fraction."""
    from tfopt import training

    return {teacher.name: round(training.accuracy(teacher.model, validation, teacher.spec), 4) for teacher in panel}


def facts(accuracies: dict[str, float], pairs: dict[str, str]) -> dict:
    return {"teachers": accuracies, **({"pairs": pairs} if pairs else {})}


def worse(accuracies: dict[str, float], accuracy: float) -> tuple[str, ...]:
    """A note for each teacher that is clearly worse than its student on the same validation images."""
    return tuple(
        f"Teacher {name} is worse than its student: {theirs:.1%} and {accuracy:.1%} of the validation images"
        for name, theirs in accuracies.items() if theirs < accuracy - _CLEARLY
    )  # fmt: skip
