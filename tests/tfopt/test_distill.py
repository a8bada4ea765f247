from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest

from mobile_bench.inputs import InputSpec
from tfopt import builders, models, training
from tfopt.distillation import students
from tfopt.errors import InputError, ModelRefused, Problem, RecipeError
from tfopt.recipe import Recipe
from tfopt.technique import Context, OptimizedModel, Property, make
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


def test_a_student_of_full_width_starts_as_its_teacher(digits, spec, trained):
    student = builders.build("resnet8", spec.shape, 10, width=0.5)
    inherited = students.select_weights(trained.model, student)
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


def trained_for(digits, spec, tmp_path, model, **settings):
    technique = Distill(train=TrainConfig(steps=2, batch_size=16, validation_images=20), **settings)
    context = Context(digits.limited(100, 20), tmp_path, teacher=model)
    return technique.apply(OptimizedModel(model, spec), context)


def test_a_student_with_channels_removed_and_one_that_is_the_model_itself(digits, spec, trained, tmp_path):
    settings = {"ratio": 0.5, "importance": "l1"}
    result, report = trained_for(
        digits, spec, tmp_path, trained.model, student="channels", channels=settings, attention=1000.0, hints=0.5
    )
    assert report.macs_after < 0.5 * report.macs_before and result.properties == {Property.NARROW}
    assert report.properties["pairs"] and set(report.properties["pairs"]) == set(report.properties["pairs"].values())
    before = [weights.copy() for weights in trained.model.get_weights()]
    result, report = trained_for(digits, spec, tmp_path, trained.model, student="self", relational=1.0)
    assert result.model is not trained.model and report.macs_after == report.macs_before
    assert result.properties == frozenset()
    for old, new in zip(before, trained.model.get_weights()):
        np.testing.assert_array_equal(old, new)
    names = [weight.path for weight in result.model.weights]
    assert len(names) == len(before)  # no regressor is left in the student


def test_a_student_and_two_teachers_from_files(digits, spec, trained, tmp_path):
    student = builders.build("resnet8", spec.shape, 10, width=0.5)
    models.save(student, tmp_path / "student.keras", spec)
    other = spec.with_scaling("unit" if spec.scaling != "unit" else "signed")
    models.save(trained.model, tmp_path / "a.keras", spec)
    models.save(builders.build("resnet8", spec.shape, 10), tmp_path / "b.keras", other)
    teachers = [str(tmp_path / "a.keras"), {"path": str(tmp_path / "b.keras"), "weight": 0.5}]
    technique = Distill(student=str(tmp_path / "student.keras"), teachers=teachers)
    assert set(technique.files()) == {str(tmp_path / name) for name in ("student.keras", "a.keras", "b.keras")}
    _, report = trained_for(
        digits, spec, tmp_path, trained.model, student=str(tmp_path / "student.keras"), teachers=teachers
    )
    assert set(report.properties["teachers"]) == {"a", "b"} and report.properties["student"] == student.name


def test_what_does_not_fit_is_refused_before_training(digits, spec, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "fit", None)
    models.save(builders.build("resnet8", spec.shape, 7), tmp_path / "seven.keras", replace(spec, labels=()))
    small = InputSpec(16, 16, spec.channels)
    models.save(builders.build("resnet8", small.shape, 10), tmp_path / "small.keras", small)
    for teacher, words in (("seven", "different classes"), ("small", "different images")):
        with pytest.raises(ModelRefused, match=words):
            trained_for(digits, spec, tmp_path, trained.model, teachers=str(tmp_path / f"{teacher}.keras"))
    with pytest.raises(ModelRefused, match="does not take this study's images"):
        trained_for(digits, spec, tmp_path, trained.model, student=str(tmp_path / "small.keras"))
    with pytest.raises(Problem, match="nowhere"):
        trained_for(digits, spec, tmp_path, trained.model, teachers="nowhere.keras")
    with pytest.raises(InputError, match="Did you mean stage3_block1"):
        trained_for(digits, spec, tmp_path, trained.model, hints=1.0, pairs={"stage3_block1_con2": "stem"})
    with pytest.raises(InputError, match="different sizes"):
        trained_for(digits, spec, tmp_path, trained.model, hints=1.0, pairs={"stage3_block1_conv2": "stem"})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hints": -1}, "hints"), ({"attention": "much"}, "attention"), ({"pairs": {"a": "b"}}, "no loss looks at"),
        ({"pairs": [1], "hints": 1.0}, "table"), ({"teachers": 3}, "list of files"), ({"teachers": [""]}, "no file"),
        ({"teachers": {"path": "a", "weight": 0}}, "weight"), ({"teachers": {"pth": "a"}}, "Did you mean path"),
        ({"channels": {"ratio": 0.5}}, "no student uses"), ({"student": "channels", "channels": {"ratio": 2}}, "range"),
        ({"student": "channels", "channels": {"rounds": 2}}, "one round"), ({"student": 3}, "text"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(values, words):
    with pytest.raises(Problem, match=words):
        Distill(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"alpha": 2}, "alpha"), ("yes", "neither true"), ({"temprature": 3}, "Did you mean temperature")],
)
def test_what_rides_along_is_checked(values, words):
    with pytest.raises(InputError, match=words):
        TrainConfig.from_dict({"steps": 1, "distill": values})
    assert TrainConfig(distill=False).distill is None and TrainConfig(distill=True).distill.alpha == 0.7
    with pytest.raises(Problem, match="says it twice"):
        Distill(train=TrainConfig(distill=True))


def test_a_student_made_of_the_model_keeps_what_it_has():
    step = {"student": "self"}
    Recipe("a", (make("channels", {}), make("distill", step), make("qat", {})), ("int8",))
    with pytest.raises(RecipeError, match="would lose what channels gained"):
        Recipe("a", (make("channels", {}), make("distill", {})))
    with pytest.raises(RecipeError, match="would lose what prune gained"):
        Recipe("a", (make("prune", {}), make("distill", step)))


@pytest.mark.parametrize("name", ["channels", pytest.param("factorize", marks=pytest.mark.slow)])
def test_any_step_can_learn_from_the_original(name, digits, spec, trained, tmp_path):
    """With alpha 1 the labels do not count, and the loss is another."""
    settings = {"channels": {"ratio": 0.3, "importance": "l1"}, "factorize": {"energy": 0.999999, "keep": "all"}}[name]
    config = {"steps": 1, "batch_size": 16, "learning_rate": 1e-9, "validation_images": 20}
    losses = {}
    for alpha in (0.0, 1.0):
        technique = make(name, {**settings, "train": {**config, "distill": {"alpha": alpha}}})
        context = Context(digits.limited(100, 20), tmp_path, teacher=trained.model)
        _, report = technique.apply(OptimizedModel(trained.model, spec), context)
        losses[alpha] = report.training["loss"]
    assert losses[0.0] != losses[1.0]


@pytest.mark.slow
def test_training_for_int8_learns_from_the_original_too(digits, spec, trained, tmp_path):
    """The worker's tf_keras has the teacher itself, so that both see the same augmented images."""
    config = {"steps": 2, "batch_size": 16, "learning_rate": 1e-6, "validation_images": 20, "augmentation": "crop_flip"}
    context = Context(digits.limited(100, 20), tmp_path, teacher=trained.model)
    losses = {}
    for alpha in (0.0, 1.0):
        technique = make("qat", {"train": {**config, "distill": {"alpha": alpha, "temperature": 1.0}}})
        result, report = technique.apply(OptimizedModel(trained.model, spec), context)
        losses[alpha] = report.training["loss"]
    assert result.quantized and Property.FAKE_QUANT in result.properties
    assert 0 < losses[1.0] < losses[0.0]  # rounding is nearer to the original than the labels are
