"""Models to learn from: their softened answers, and the features of their layers, on a student's images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobile_bench.inputs import InputSpec
from tfopt.errors import ModelRefused, Problem

if TYPE_CHECKING:
    from tfopt.distillation.settings import Distillation


@dataclass(frozen=True, eq=False)
class Loaded:
    """A teacher with its own idea of pixels."""

    name: str
    model: Any
    spec: InputSpec
    weight: float = 1.0
    note: str = ""


def load(settings: Distillation, own, spec: InputSpec) -> list[Loaded]:
    """The teachers that the settings name, or the study's own model; ModelRefused where one does not fit.

    own: the study's model, which takes images as `spec` says.
    """
    from tfopt import models
    from tfopt.convert import check_weights

    if not settings.teachers:
        return [Loaded(own.name, own, spec)]
    found = []
    for teacher in settings.teachers:
        try:
            loaded = models.load(teacher.path, input_spec=teacher.input_spec)
            check_weights(loaded.model)
        except Problem as problem:
            raise ModelRefused(f"Teacher {teacher.path} cannot be used: {problem}") from problem
        note = models.assumption(loaded).removeprefix("warning: ")
        found.append(Loaded(loaded.name, loaded.model, loaded.spec, teacher.weight, note))
    names = [teacher.name for teacher in found]
    if len(set(names)) < len(names):
        found = [dataclasses.replace(one, name=teacher.path) for one, teacher in zip(found, settings.teachers)]
    return found


def notes(teachers: Sequence[Loaded]) -> list[str]:
    """What a reader of the report must know of them."""
    return [f"Teacher {teacher.note}" for teacher in teachers if teacher.note]


def check(teachers: Sequence[Loaded], student_name: str, classes: int, spec: InputSpec) -> None:
    """Raise ModelRefused where a teacher's classes, labels or images are not the student's, before any training."""
    for teacher in teachers:
        theirs = int(teacher.model.output_shape[-1])
        if theirs != classes:
            raise ModelRefused(
                f"Teacher {teacher.name} and student {student_name} have different classes",
                received=f"{theirs} and {classes}", allowed="the same number, in the same order",
            )  # fmt: skip
        if teacher.spec.shape != spec.shape:
            raise ModelRefused(
                f"Teacher {teacher.name} and student {student_name} take different images",
                received=f"{teacher.spec.shape} and {spec.shape}", allowed="the same height, width and channels",
                next_step="Train the student at the teacher's size, or choose another teacher",
            )  # fmt: skip
        labels = teacher.spec.labels, spec.labels
        if all(labels) and labels[0] != labels[1]:
            raise ModelRefused(
                f"Teacher {teacher.name} names its classes otherwise than student {student_name}",
                received=f"{', '.join(labels[0][:4])} … and {', '.join(labels[1][:4])} …",
                allowed="the same names in the same order",
            )  # fmt: skip
        if classes < 2 or teacher.spec.head == "sigmoid":
            raise ModelRefused(
                "Distillation needs softmax or logits", received=f"a {teacher.spec.head} head with {classes} outputs"
            )


class Panel:
    """All teachers at work inside a training step."""

    def __init__(self, teachers: Sequence[Loaded], spec: InputSpec, heard: Mapping[str, Any] | None = None):
        """heard: what features.listening gives for the first teacher; it fills while that answers."""
        self._teachers, self._spec, self._heard = list(teachers), spec, heard
        self._total = sum(teacher.weight for teacher in teachers)

    def answers(self, images, temperature: float, all_of_them: bool = True) -> tuple[Any, dict]:
        """(the mean of the teachers' probabilities at a temperature, by their weights: (batch, classes), the features).

        images: as the student takes them. all_of_them: False asks the first teacher alone, for its features.
        """
        import tensorflow as tf

        from tfopt.distillation import losses

        parts = []
        for teacher in self._teachers if all_of_them else self._teachers[:1]:
            outputs = teacher.model(rescaled(images, self._spec, teacher.spec), training=False)
            soft = losses.softened(losses.logits_of(outputs, teacher.spec.head), temperature)
            parts.append(soft * (teacher.weight / self._total))
        features = {name: tf.stop_gradient(value) for name, value in (self._heard or {}).items()}
        return tf.stop_gradient(tf.add_n(parts)), features


def rescaled(images, given: InputSpec, wanted: InputSpec):
    """Images that are scaled for one model, as another wants them: the same pixels."""
    import tensorflow as tf

    if given == wanted or (given.mean, given.std, given.order) == (wanted.mean, wanted.std, wanted.order):
        return images
    pixels = images * tf.constant(given.std, tf.float32) + tf.constant(given.mean, tf.float32)
    if given.order != wanted.order:
        pixels = tf.reverse(pixels, [-1])
    return (pixels - tf.constant(wanted.mean, tf.float32)) / tf.constant(wanted.std, tf.float32)
