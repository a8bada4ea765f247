from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfopt import builders
from tfopt.errors import InputError, ModelRefused, Problem
from tfopt.technique import Context, OptimizedModel, Property
from tfopt.techniques import distill
from tfopt.techniques.distill import Distill
from tfopt.training import TrainConfig


def test_student_learns_from_the_teacher(digits, spec, trained, tmp_path):
    technique = Distill(width=0.5, train=TrainConfig(steps=120, batch_size=32, learning_rate=5e-3, evaluations=1))
    context = Context(digits, tmp_path, teacher=trained.model)
    result, report = technique.apply(OptimizedModel(trained.model, spec), context)
    assert result.properties == {Property.NARROW}
    assert result.model.count_params() == report.parameters_after < trained.model.count_params() / 2
    assert report.macs_after < report.macs_before / 2
    assert report.training["accuracy_after"] > 0.6
    assert "start from the teacher" in report.notes[0]


def test_loss_is_hintons(spec):
    """Against the formula written out in NumPy, for one batch."""
    generator = np.random.default_rng(0)
    teacher_logits, student_logits = generator.normal(size=(2, 4, 10)).astype(np.float32)
    temperature, alpha, hard = 3.0, 0.6, 1.7

    def softmax(values):
        exponentials = np.exp(values - values.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    soft, guess = softmax(teacher_logits / temperature), softmax(student_logits / temperature)
    divergence = np.mean(np.sum(soft * np.log(soft / guess), -1))
    expected = alpha * temperature**2 * divergence + (1 - alpha) * hard
    hook = distill.distillation_hook(lambda images, training: softmax(teacher_logits), spec, temperature, alpha)
    loss = hook(None, None, tf.constant(softmax(student_logits)), tf.constant(hard))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_a_student_of_full_width_starts_as_its_teacher(digits, spec, trained):
    student = builders.build("resnet8", spec.shape, 10, width=0.5)
    inherited = distill._select_weights(trained.model, student)
    assert len(inherited) == sum(bool(layer.weights) for layer in student.layers)
    image = spec.normalize(digits["test"].pixels(spec, slice(0, 8)))
    np.testing.assert_allclose(student(image), trained.model(image), atol=1e-6)


def test_a_foreign_architecture_needs_a_named_student(digits, spec, tmp_path):
    inputs = keras.Input(spec.shape)
    model = keras.Model(
        inputs, keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(inputs)), name="own"
    )
    context = Context(digits, tmp_path, teacher=model)
    with pytest.raises(ModelRefused, match="Name the student"):
        Distill().apply(OptimizedModel(model, spec), context)
    named = Distill(student="resnet8", width=0.5, train=TrainConfig(steps=2))
    result, _ = named.apply(OptimizedModel(model, spec), context)
    assert result.model.output_shape == (None, 10)
    with pytest.raises(Problem, match="Did you mean resnet8"):
        Distill(student="resnet9").apply(OptimizedModel(model, spec), context)


@pytest.mark.parametrize(
    "values", [{"width": 0}, {"temperature": 0}, {"alpha": 1.5}, {"start": "zero"}, {"width": "half"}]
)
def test_bad_settings(values):
    with pytest.raises(InputError, match="Received"):
        Distill(**values)
