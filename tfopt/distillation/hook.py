"""Distillation as a loss hook for tfopt.training.fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mobile_bench.inputs import InputSpec
from tfopt.distillation import features, teachers
from tfopt.errors import InputError

if TYPE_CHECKING:
    from tfopt.distillation.settings import Distillation
    from tfopt.distillation.teachers import Loaded
    from tfopt.training import LossHook

#: FitNets' regressor learns at this rate, whatever the student does.
_REGRESSOR_RATE = 1e-3


@dataclass(frozen=True)
class Lesson:
    """Which features are compared: {student's layer: teacher's layer}, and the channels of both by the former."""

    pairs: dict[str, str] = field(default_factory=dict)
    channels: dict[str, tuple[int, int]] = field(default_factory=dict)


@contextmanager
def distilling(
    student, panel: Sequence[Loaded], settings: Distillation, spec: InputSpec
) -> Iterator[tuple[LossHook, dict[str, str]]]:
    """(the hook, {student's layer: teacher's layer}) while the block lasts; nothing of it stays in the student.

    Raises what `lesson` raises. The first teacher is the one whose features are learned.
    """
    plan = lesson(student, panel[0].model, settings)
    layers = features.chosen(panel[0].model, plan.pairs.values())
    with (
        features.listening(layers) as heard,
        learning(features.chosen(student, plan.pairs), panel, heard, plan, settings, spec) as hook,
    ):
        yield hook, plan.pairs


@contextmanager
def learning(
    layers: Mapping[str, Any], panel: Sequence[Loaded], heard: Mapping[str, Any], plan: Lesson,
    settings: Distillation, spec: InputSpec,
) -> Iterator[LossHook]:  # fmt: skip
    """The hook, for a student whose `layers` are those of the plan, by their names there.

    heard: fills with what the first teacher's layers answer, while it does. Gradients go to the student alone, and to
    the regressors of hints, which have an optimizer of their own.
    """
    regressors = _Regressors(plan.channels) if settings.hints else None
    experts = teachers.Panel(panel, spec, heard)
    with features.listening(layers) as own:

        def hook(images, labels, outputs, loss):
            from tfopt.distillation import losses

            total = (1 - settings.alpha) * loss
            if settings.alpha or plan.pairs:
                soft, targets = experts.answers(images, settings.temperature, bool(settings.alpha))
            if settings.alpha:
                logits = losses.logits_of(outputs, spec.head)
                total += settings.alpha * losses.divergence(soft, logits, settings.temperature)
            for mine, name in plan.pairs.items():
                total += _on_pair(settings, regressors, mine, targets[name], own[mine])
            if settings.relational:
                mine, name = list(plan.pairs.items())[-1]
                total += settings.relational * losses.relational(_pooled(targets[name]), _pooled(own[mine]))
            return total

        yield hook


def lesson(student, teacher, settings: Distillation) -> Lesson:
    """The features that the settings compare, of two Keras models; none for answers alone.

    Raises what features.pairs raises, and InputError where attention is all that looks at layers without images.
    """
    if not settings.on_features:
        return Lesson()
    matched = features.pairs(student, teacher, settings.pairs)
    known = features.layers_of(student)
    flat = [name for name in matched if len(known[name].output.shape) != 4]
    if flat and not settings.hints and not settings.relational:
        raise InputError(
            "Attention is where in an image a layer looks, and a layer has no images", received=", ".join(flat),
            allowed="layers of (height, width, channels)", next_step="Pair other layers, or use hints or relational",
        )  # fmt: skip
    return Lesson(matched, features.channels(student, teacher, matched))


def _on_pair(settings: Distillation, regressors: _Regressors | None, name: str, target, own):
    """The weighted losses on one pair of features."""
    from tfopt.distillation import losses

    total = 0.0
    if settings.hints:
        total += settings.hints * losses.hint(target, regressors(name, own, target))
    if settings.attention and len(target.shape) == 4:
        total += settings.attention * losses.attention(target, own)
    return total


def _pooled(values):
    """The mean over positions where there are any: (batch, channels)."""
    import tensorflow as tf

    return tf.reduce_mean(values, (1, 2)) if len(values.shape) == 4 else values


class _Regressors:
    """A 1x1 convolution from each of the student's features to the teacher's channels, trained along by Adam.

    It is no part of the student: its weights are made here, and are gone when the training ends.
    """

    def __init__(self, channels: Mapping[str, tuple[int, int]]):
        import tensorflow as tf

        self._weights, self._moments = {}, {}
        random = tf.random.Generator.from_seed(0)
        for mine, (inputs, outputs) in channels.items():
            start = random.normal((inputs, outputs), stddev=inputs**-0.5)
            self._weights[mine] = tf.Variable(start)
            self._moments[mine] = tf.Variable(tf.zeros((2, inputs, outputs)))
        self._step = {mine: tf.Variable(0.0) for mine in channels}

    def __call__(self, name: str, own, target):
        """The student's features with the teacher's channels; takes one step towards the target."""
        import tensorflow as tf

        from tfopt.distillation import losses

        weights = self._weights[name]
        fixed = tf.stop_gradient(own)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            error = losses.hint(target, tf.tensordot(fixed, weights, 1))
        slope = tape.gradient(error, weights)
        # Adam (Kingma and Ba 2015), by hand: a Keras optimizer would look for its variables in the student.
        step = self._step[name].assign_add(1.0)
        first = 0.9 * self._moments[name][0] + 0.1 * slope
        second = 0.999 * self._moments[name][1] + 0.001 * tf.square(slope)
        self._moments[name].assign(tf.stack([first, second]))
        first, second = first / (1 - tf.pow(0.9, step)), second / (1 - tf.pow(0.999, step))
        updated = weights.assign_sub(_REGRESSOR_RATE * first / (tf.sqrt(second) + 1e-8))
        return tf.tensordot(own, tf.stop_gradient(updated), 1)
