"""Knowledge distillation: a smaller student learns from the model's softened answers.

Hinton et al. 2015 (arXiv:1503.02531): loss = alpha · T² · KL(teacher at T || student at T)
+ (1 - alpha) · the usual loss on the labels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mobile_bench.inputs import InputSpec
from mobile_bench.records import StepReport
from tfopt.errors import InputError, ModelRefused
from tfopt.technique import Context, OptimizedModel, Property, Technique, register
from tfopt.training import TrainConfig


@register
@dataclass(frozen=True, kw_only=True)
class Distill(Technique):
    """Train a narrower network on the teacher's outputs.

    student: 'narrow' takes the teacher's own architecture, or the name of a builder (resnet8,
    mobilenet, …). width: the student's channel multiplier; for 'narrow', relative to the teacher's.
    start: 'teacher' picks evenly spaced channels of the teacher's weights where the student has a
    layer of the same name (weight selection, Xu et al. 2024, arXiv:2311.18823); 'random' does not.
    """

    name: ClassVar[str] = "distill"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.NARROW})

    student: str = "narrow"
    width: float = 0.5
    temperature: float = 4.0
    alpha: float = 0.7
    start: str = "teacher"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=8, learning_rate=3e-3))

    def __post_init__(self):
        if not (isinstance(self.width, (int, float)) and 0 < self.width <= 4):
            raise InputError("width is out of range", received=repr(self.width), allowed="above 0, up to 4")
        if not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
            raise InputError("temperature is out of range", received=repr(self.temperature), allowed="above 0")
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1):
            raise InputError("alpha is out of range", received=repr(self.alpha), allowed="0 to 1")
        if self.start not in ("teacher", "random"):
            raise InputError("start is unknown", received=repr(self.start), allowed="teacher, random")

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        import keras

        from tfopt import training
        from tfopt.graph import count_macs, count_parameters, flat_layers

        started = time.monotonic()
        spec, before = optimized.spec, optimized.model
        keras.utils.set_random_seed(context.seed)
        student = self._student(before, spec)
        inherited = _select_weights(before, student) if self.start == "teacher" else []
        if inherited:
            training.recalibrate(student, context.data["train"], spec, keras=keras)
        report = training.fit(
            student,
            context.data["train"],
            context.data["validation"],
            spec,
            self.train,
            keras=keras,
            seed=context.seed,
            loss_hook=distillation_hook(context.teacher, spec, self.temperature, self.alpha),
            callbacks=context.callbacks,
            progress=context.progress,
        )
        layers = sum(bool(layer.weights) for layer in flat_layers(student))
        notes = (f"{len(inherited)} of {layers} layers start from the teacher",)
        result = OptimizedModel(student, spec, optimized.properties | self.adds)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=tuple(layer.name for layer in flat_layers(student) if layer.weights),
            skipped=(),
            parameters_before=count_parameters(before),
            parameters_after=count_parameters(student),
            macs_before=count_macs(before),
            macs_after=count_macs(student),
            seconds=round(time.monotonic() - started, 3),
            training=report.to_dict(),
            properties={"temperature": self.temperature, "student": student.name},
            notes=notes,
        )

    def _student(self, teacher, spec: InputSpec):
        from tfopt.builders import BUILDERS, build, parse

        name, width = self.student, self.width
        if name == "narrow":
            known = parse(teacher.name)
            if known is None:
                raise ModelRefused(
                    "The model is not of one of our architectures, so there is no narrower version of it",
                    received=teacher.name,
                    allowed=", ".join(BUILDERS),
                    next_step="Name the student in the recipe, such as student: mobilenet",
                )
            name, teacher_width = known
            width *= teacher_width
        classes = int(teacher.output_shape[-1])
        if classes < 2 or spec.head == "sigmoid":
            raise ModelRefused(
                "Distillation needs softmax or logits", received=f"a {spec.head} head with {classes} outputs"
            )
        student = build(name, spec.shape, classes, width)
        if spec.head == "logits":
            student.layers[-1].activation = _linear()
        return student


def distillation_hook(teacher, spec: InputSpec, temperature: float, alpha: float):
    """A loss hook for training.fit; teacher and student take the same images."""
    import tensorflow as tf

    def logits(outputs):
        if spec.head == "logits":
            return outputs
        return tf.math.log(tf.clip_by_value(outputs, 1e-7, 1.0))  # up to a constant, which softmax drops

    def hook(images, labels, outputs, loss):
        soft = tf.nn.softmax(logits(teacher(images, training=False)) / temperature)
        guess = tf.nn.log_softmax(logits(outputs) / temperature)
        divergence = tf.reduce_sum(soft * (tf.math.log(soft + 1e-12) - guess), axis=-1)
        return alpha * temperature**2 * tf.reduce_mean(divergence) + (1 - alpha) * loss

    return hook


def _select_weights(teacher, student) -> list[str]:
    """Evenly spaced slices of the teacher's weights, axis by axis, for layers of the same name.

    The indices depend on the two sizes alone, so layers whose channels are tied pick the same ones.
    """
    from tfopt.graph import flat_layers

    sources = {layer.name: layer.get_weights() for layer in flat_layers(teacher)}
    inherited = []
    for layer in flat_layers(student):
        own, source = layer.get_weights(), sources.get(layer.name, [])
        fits = [w.ndim == s.ndim and all(a <= b for a, b in zip(w.shape, s.shape)) for w, s in zip(own, source)]
        if not own or len(own) != len(source) or not all(fits):
            continue
        layer.set_weights([s[np.ix_(*map(_evenly, s.shape, w.shape))] for w, s in zip(own, source)])
        inherited.append(layer.name)
    return inherited


def _evenly(available: int, wanted: int) -> np.ndarray:
    return np.linspace(0, available - 1, wanted).round().astype(int)


def _linear():
    import keras

    return keras.activations.linear
