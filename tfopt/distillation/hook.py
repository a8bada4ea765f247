"""Distillation as a loss hook for tfopt.training.fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from mobile_bench.inputs import InputSpec
from tfopt.distillation import features, teachers

if TYPE_CHECKING:
    from tfopt.distillation.settings import Distillation
    from tfopt.distillation.teachers import Loaded

#: FitNets' regressor learns at this rate, whatever the student does.
_REGRESSOR_RATE = 1e-3


@contextmanager
def distilling(
    student, panel: Sequence[Loaded], settings: Distillation, spec: InputSpec, keras: ModuleType
) -> Iterator[tuple]:
    """(the hook, {student's layer: teacher's layer}) while the block lasts; nothing of it stays in the student.

    Raises what features.pairs raises. The student's features are heard while it is trained; gradients go to the student
    alone, and to the regressors of hints, which have an optimizer of their own.
    """
    import tensorflow as tf

    from tfopt.distillation import losses

    matched = features.pairs(student, panel[0].model, settings.pairs) if settings.on_features else {}
    experts = teachers.Panel(panel, spec, keras, list(dict.fromkeys(matched.values())))
    regressors = _Regressors(student, panel[0].model, matched) if settings.hints else None
    with features.listening(student, list(matched)) as heard:

        def hook(images, labels, outputs, loss):
            total = (1 - settings.alpha) * loss
            if settings.alpha:
                soft = experts.soft(images, settings.temperature)
                logits = losses.logits_of(outputs, spec.head)
                total += settings.alpha * losses.divergence(soft, logits, settings.temperature)
            theirs = experts.features(images)
            last = list(matched)[-1:] if settings.relational else ()
            for mine, name in matched.items():
                target, own = theirs[name], heard[mine]
                if settings.hints:
                    total += settings.hints * losses.hint(target, regressors(mine, own, target))
                if settings.attention and len(target.shape) == 4:
                    total += settings.attention * losses.attention(target, own)
                if mine in last:
                    pooled = [tf.reduce_mean(x, (1, 2)) if len(x.shape) == 4 else x for x in (target, own)]
                    total += settings.relational * losses.relational(*pooled)
            return total

        yield hook, matched


class _Regressors:
    """A 1x1 convolution from each of the student's features to the teacher's channels, trained along by Adam.

    It is no part of the student: its weights are made here, and are gone when the training ends.
    """

    def __init__(self, student, teacher, matched: dict[str, str]):
        import tensorflow as tf

        own, other = features.layers_of(student), features.layers_of(teacher)
        self._weights, self._moments = {}, {}
        random = tf.random.Generator.from_seed(0)
        for mine, theirs in matched.items():
            inputs, outputs = int(own[mine].output.shape[-1]), int(other[theirs].output.shape[-1])
            start = random.normal((inputs, outputs), stddev=inputs**-0.5)
            self._weights[mine] = tf.Variable(start)
            self._moments[mine] = tf.Variable(tf.zeros((2, inputs, outputs)))
        self._step = {mine: tf.Variable(0.0) for mine in matched}

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
