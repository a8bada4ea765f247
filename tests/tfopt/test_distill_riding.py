"""Teachers beside the fine-tuning of any step, and what is refused before the first step of a recipe is trained."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import tfopt
from tfopt import builders, graph, models, steps
from tfopt.distillation import students, teachers
from tfopt.distillation.settings import Distillation, Teacher
from tfopt.errors import InputError, ModelRefused, RecipeError
from tfopt.recipe import Recipe
from tfopt.technique import Context, OptimizedModel, Property, make

QUICK = {"steps": 12, "batch_size": 16, "learning_rate": 1e-4, "validation_images": 40}


@keras.saving.register_keras_serializable("tests")
class Gate(keras.layers.Layer):
    """A layer of the user's own, which TFMOT's process cannot rebuild."""

    def call(self, x):
        return keras.ops.where(x > 0, x, 0.1 * keras.ops.tanh(x))


@pytest.fixture
def otherwise_scaled(trained, spec, tmp_path):
    """The path of the same classifier for pixels of 0..255, and its input spec."""
    raw = spec.with_scaling("raw")
    path = tmp_path / "raw.keras"
    models.save(students._rescaling(trained.model, raw, spec), path, raw)
    return path, raw


def test_a_teacher_of_another_scaling_answers_for_the_same_picture(digits, spec, trained, otherwise_scaled):
    path, raw = otherwise_scaled
    (panel,) = teachers.load(Distillation(teachers=str(path)), trained.model, spec)
    assert panel.spec == raw
    images = spec.normalize(digits["test"].pixels(spec, slice(0, 8)))
    soft, _ = teachers.Panel([panel], spec).answers(images, 1.0)
    np.testing.assert_allclose(soft, trained.model(images), atol=1e-4)


def test_a_student_of_another_scaling_answers_for_the_same_picture(digits, spec, trained, otherwise_scaled):
    path, _ = otherwise_scaled
    student, notes = students.from_file(str(path), 10, spec)
    images = spec.normalize(digits["test"].pixels(spec, slice(0, 8)))
    np.testing.assert_allclose(student(images), trained.model(images), atol=1e-4)
    assert any("Rescaling layer" in note for note in notes)


def test_two_teachers_of_one_name_are_told_apart(spec, trained, tmp_path):
    paths = [tmp_path / folder / "best.keras" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        models.save(trained.model, path, spec)
    panel = teachers.load(Distillation(teachers=[Teacher(str(path)) for path in paths]), trained.model, spec)
    assert [teacher.name for teacher in panel] == list(map(str, paths))


def test_a_teacher_whose_weights_are_no_numbers_is_refused(spec, trained, tmp_path):
    teacher = graph.rewrite(trained.model)
    teacher.get_layer("stem").kernel.assign(np.full(teacher.get_layer("stem").kernel.shape, np.nan, np.float32))
    models.save(teacher, tmp_path / "broken.keras", spec)
    with pytest.raises(ModelRefused, match=r"broken.keras cannot be used.*Layer stem .* not finite"):
        teachers.load(Distillation(teachers=[Teacher(str(tmp_path / "broken.keras"))]), trained.model, spec)


def test_zeros_stay_and_any_teacher_answers_where_tfmot_trains(digits, spec, trained, tmp_path):
    """Pruned, then trained for int8, both from a teacher with a layer that the bridge does not know."""
    inputs = keras.Input(spec.shape)
    x = keras.layers.Flatten()(Gate(name="gate")(keras.layers.Conv2D(4, 3, padding="same")(inputs)))
    own = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x), name="own")
    models.save(own, tmp_path / "own.keras", spec)
    distill = {"teachers": str(tmp_path / "own.keras"), "temperature": 2, "attention": 1}
    context = Context(digits.limited(160, 40), tmp_path / "prune", teacher=trained.model)
    pruned, report = make("prune", {"sparsity": 0.5, "train": {**QUICK, "distill": distill}}).apply(
        OptimizedModel(trained.model, spec), context
    )
    assert set(report.training["distillation"]["teachers"]) == {"own"}
    assert report.training["distillation"]["pairs"] == {"stage1_block1_out": "gate"}
    assert any("Teacher own is worse than its student" in note for note in report.notes)
    assert report.properties["sparsity"] >= 0.49
    context = dataclasses.replace(context, work=tmp_path / "qat", keep=frozenset({Property.SPARSE}))
    quantized, after = make("qat", {"train": {**QUICK, "distill": True}}).apply(pruned, context)
    assert after.properties["zeros"] >= report.properties["zeros"]
    assert quantized.properties == {Property.SPARSE, Property.FAKE_QUANT}
    assert set(after.training["distillation"]["teachers"]) == {trained.model.name}


def test_the_report_names_teachers_and_pairs(digits, spec, trained, tmp_path):
    """Of the steps that train here, features included."""
    technique = make("channels", {
        "ratio": 0.3, "importance": "l1", "train": {**QUICK, "steps": 1, "distill": {"alpha": 0, "attention": "1e2"}},
    })  # fmt: skip
    context = Context(digits.limited(100, 20), tmp_path, teacher=trained.model)
    _, report = technique.apply(OptimizedModel(trained.model, spec), context)
    told = report.training["distillation"]
    assert told["teachers"] == {trained.model.name: pytest.approx(1, abs=0.3)}
    ends = [f"stage{stage}_block1_out" for stage in (1, 2, 3)]
    assert set(told["pairs"].items()) <= set(zip(ends, ends)) and told["pairs"]


def test_features_are_learned_inside_simulated_int8(digits, spec, trained, tmp_path):
    """All three losses are part of what is minimised and reported; an untrained regressor costs most."""
    pairs = {"stage2_block1_out": "stage2_block1_out"}
    distill = {"alpha": 1, "attention": 1000, "relational": 1, "hints": 1e6, "pairs": pairs}
    config = {**QUICK, "steps": 2, "learning_rate": 1e-6, "augmentation": "crop_flip", "distill": distill}
    context = Context(digits.limited(100, 20), tmp_path, teacher=trained.model)
    _, report = make("qat", {"train": config}).apply(OptimizedModel(trained.model, spec), context)
    assert report.training["distillation"]["pairs"] == pairs
    assert 1e3 < report.training["loss"] < 1e9


BROKEN = {
    "other classes": ("qat: {train: {distill: {teachers: SEVEN}}}", "Teacher seven and student .* different classes"),
    "a student of other classes": ("distill: {student: SEVEN}", "seven.keras does not take this study's images"),
    "a layer of the teacher": ("distill: {hints: 1, pairs: {stem: stm}}", "Did you mean stem"),
    "a layer of the student": ("distill: {hints: 1, pairs: {stm: stem}}", "Did you mean stem"),
    "a riding layer of nobody": ("qat: {train: {distill: {hints: 1, pairs: {stem: stm}}}}", "Did you mean stem"),
    "layers to prune": ("prune: {layers: {stm: 0.5}}", "Did you mean stem"),
    "layers to cluster": ("cluster: {exclude: stm}", "Did you mean stem"),
    "layers that stay float": ("qat: {exclude: [stm]}", "Did you mean stem"),
    "layers to narrow": ("channels: {exclude: [stm]}", "Did you mean stem"),
    "layers to factorize": ("factorize: {ranks: {stm: 4}}", "Did you mean stem"),
    "a rank above the maximum": ("factorize: {ranks: {stem: 99}}", "rank of layer stem is out of range"),
    "a target that is none": ("channels: {latency: 0.5, target: 'ssh:/pi'}", "ssh:/pi"),
    "a target of factors": ("factorize: {keep: faster, target: nowhere}", "nowhere"),
    "a ratio that leaves nothing": ("channels: {ratio: 0.999}", "left without a channel"),
    "a student of nobody": ("distill: {student: resnet9}", "Did you mean resnet8"),
}


@pytest.mark.parametrize(("step", "words"), BROKEN.values(), ids=list(BROKEN))
def test_what_cannot_work_is_refused_before_the_first_step_is_trained(
    step, words, digits, spec, trained_file, tmp_path, monkeypatch
):
    models.save(
        builders.build("resnet8", spec.shape, 7), tmp_path / "seven.keras", dataclasses.replace(spec, labels=())
    )
    text = step.replace("SEVEN", str(tmp_path / "seven.keras"))
    (tmp_path / "r.yaml").write_text(f"name: r\nsteps:\n  - distill: {{student: self}}\n  - {text}\nschemes: [int8]\n")
    monkeypatch.setattr(steps, "run", None)
    made = tfopt.run_study([trained_file], digits.limited(40, 20), [tmp_path / "r.yaml"], out=tmp_path / "out")
    (entry,) = made.entries
    assert entry.variant.status == "failed"
    assert re.search(words, entry.variant.reason), entry.variant.reason


@pytest.mark.parametrize(
    "step", ["distill: {teachers: nowhere.keras}", "distill: {student: nowhere.keras}",
             "qat: {train: {distill: {teachers: nowhere.keras}}}", "channels: {latency: 0.5, table: nowhere.keras}"],
)  # fmt: skip
def test_a_file_that_is_not_there_is_refused_before_the_model_is_opened(step, digits, trained_file, tmp_path):
    (tmp_path / "r.yaml").write_text(f"name: r\nsteps:\n  - {step}\nschemes: [int8]\n")
    name = step.split(":")[0]
    with pytest.raises(InputError, match=rf"Recipe r, step 1 \({name}\) names a file that is not there.*nowhere"):
        tfopt.run_study([trained_file], digits.limited(40, 20), [tmp_path / "r.yaml"], out=tmp_path / "out")
    assert not (tmp_path / "out" / "study.json").exists()


def test_a_chain_that_would_lose_zeros_is_refused_by_name():
    zeros = make("prune", {})
    with pytest.raises(RecipeError, match=r"would lose what prune .* ride along: prune: \{train: \{distill"):
        Recipe("r", (zeros, make("distill", {"student": "self"})))
    Recipe("r", (make("distill", {"student": "self"}), make("prune", {"train": {"steps": 1, "distill": True}})))


def test_a_recipe_is_read_without_tensorflow(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "name: r\nsteps:\n  - distill: {student: channels, attention: 1e3, teachers: [a.keras]}\n"
        "  - qat: {train: {distill: {temperature: 2}}}\nschemes: [int8]\n"
    )
    code = f"import sys; from tfopt import recipe; recipe.load({str(tmp_path / 'r.yaml')!r}); print([m for m in "
    code += "('keras', 'tensorflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("value", [{"path": "a.keras", "input_spec": 3}, {"path": "a.keras", "weight": -1}, {}])
def test_a_teacher_that_is_none(value):
    with pytest.raises(InputError, match="Received"):
        Distillation(teachers=[value])


def test_a_student_whose_channels_are_in_another_order(spec, tmp_path):
    colours = dataclasses.replace(spec, channels=3)
    model = builders.build("resnet8", colours.shape, 10, width=0.25)
    models.save(model, tmp_path / "bgr.keras", colours.with_scaling("caffe"))
    with pytest.raises(ModelRefused, match="another order"):
        students.from_file(str(tmp_path / "bgr.keras"), 10, colours)
