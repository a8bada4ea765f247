"""The losses of distillation against NumPy, and the hook that carries them into a training step."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_bench.inputs import InputSpec
from tfopt.distillation import features, frozen, hook, losses, teachers
from tfopt.distillation.settings import Distillation
from tfopt.errors import InputError, ModelRefused

kinds = keras.layers
RANDOM = np.random.default_rng(0)
SPEC = InputSpec(8, 8, 3)


def softmax(values):
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def network(width: int, name: str, seed: int = 0, head: str = "softmax"):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8, 8, 3))
    x = kinds.Conv2D(width, 3, padding="same", activation="relu", name="first")(inputs)
    x = kinds.Conv2D(2 * width, 3, strides=2, padding="same", activation="relu", name="second")(x)
    x = kinds.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, kinds.Dense(4, activation=None if head == "logits" else "softmax")(x), name=name)


def loaded(model, spec=SPEC, weight=1.0):
    return teachers.Loaded(model.name, model, spec, weight)


def test_the_softened_loss_is_hintons():
    """Against the formula written out in NumPy, for one batch; probabilities and logits alike."""
    theirs, own = RANDOM.normal(size=(2, 4, 10)).astype(np.float32)
    soft, guess = softmax(theirs / 3), softmax(own / 3)
    expected = 9 * np.mean(np.sum(soft * np.log(soft / guess), -1))
    for head, answer in (("logits", own), ("softmax", softmax(own))):
        logits = losses.logits_of(tf.constant(answer), head)
        assert float(losses.divergence(tf.constant(soft), logits, 3.0)) == pytest.approx(float(expected), rel=1e-4)


def test_attention_is_compared_as_unit_vectors():
    a, b = (RANDOM.normal(size=(2, 3, 3, c)).astype(np.float32) for c in (5, 7))

    def unit(values):
        flat = (values**2).sum(-1).reshape(2, -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    expected = np.mean((unit(a) - unit(b)) ** 2)
    assert float(losses.attention(tf.constant(a), tf.constant(b))) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.attention(tf.constant(a), tf.constant(3 * a))) == pytest.approx(0, abs=1e-12)


def test_relations_are_distances_and_angles():
    a, b = RANDOM.normal(size=(2, 4, 6)).astype(np.float32)

    def huber(x, y):
        error = np.abs(x - y)
        return np.mean(np.where(error <= 1, 0.5 * error**2, error - 0.5))

    def distances(x):
        found = np.linalg.norm(x[:, None] - x[None], axis=-1)
        return found / found[~np.eye(4, dtype=bool)].mean()

    def angles(x):
        towards = x[None] - x[:, None]
        lengths = np.linalg.norm(towards, axis=-1, keepdims=True)
        towards = np.divide(towards, lengths, out=np.zeros_like(towards), where=lengths > 0)
        return np.einsum("ijd,ikd->ijk", towards, towards)

    expected = huber(distances(a), distances(b)) + 2 * huber(angles(a), angles(b))
    assert float(losses.relational(tf.constant(a), tf.constant(b))) == pytest.approx(float(expected), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.floats(0.1, 10), st.integers(0, 99))
def test_relations_do_not_change_when_all_are_moved_turned_and_scaled(batch, size, scale, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=(batch, size))
    turn, _ = np.linalg.qr(random.normal(size=(size, size)))
    moved = (scale * values @ turn + random.normal(size=size)).astype(np.float32)
    values = values.astype(np.float32)
    assert float(losses.relational(tf.constant(values), tf.constant(moved))) == pytest.approx(0, abs=1e-4)


def test_gradients_of_relations_are_numbers_even_for_equal_examples():
    values = tf.constant(np.ones((3, 4), np.float32))
    with tf.GradientTape() as tape:
        tape.watch(values)
        loss = losses.relational(tf.constant(RANDOM.normal(size=(3, 4)).astype(np.float32)), values)
    assert np.isfinite(tape.gradient(loss, values).numpy()).all()


def test_several_teachers_are_averaged_by_weight():
    a, b = network(4, "a", 1), network(4, "b", 2, head="logits")
    images = RANDOM.normal(size=(3, 8, 8, 3)).astype(np.float32)
    logits = InputSpec(8, 8, 3, head="logits")
    panel = teachers.Panel([loaded(a), loaded(b, logits, 3.0)], SPEC)
    expected = 0.25 * softmax(np.log(np.asarray(a(images))) / 2) + 0.75 * softmax(np.asarray(b(images)) / 2)
    np.testing.assert_allclose(panel.answers(images, 2.0)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("scaling", ["raw", "unit", "torch", "caffe"])
def test_a_teacher_sees_the_same_pixels_as_its_own_scaling_wants(scaling):
    pixels = RANDOM.integers(0, 256, (2, 8, 8, 3), np.uint8)
    wanted = SPEC.with_scaling(scaling)
    np.testing.assert_allclose(
        teachers.rescaled(SPEC.normalize(pixels), SPEC, wanted), wanted.normalize(pixels), rtol=1e-4, atol=1e-4
    )


def test_layers_are_matched_by_the_size_of_their_images():
    assert features.pairs(network(2, "s"), network(4, "t")) == {"first": "first", "second": "second"}
    flat = keras.Sequential([keras.Input((5,)), kinds.Dense(4)])
    with pytest.raises(ModelRefused, match="Name the layers"):
        features.pairs(flat, network(4, "t"))
    with pytest.raises(InputError, match="Did you mean second"):
        features.pairs(network(2, "s"), network(4, "t"), {"secnd": "second"})
    with pytest.raises(InputError, match="different sizes"):
        features.pairs(network(2, "s"), network(4, "t"), {"second": "first"})


def train(student, teacher, settings, steps=30):
    images = RANDOM.normal(size=(16, 8, 8, 3)).astype(np.float32)
    labels = RANDOM.integers(0, 4, 16)
    with hook.distilling(student, [loaded(teacher)], settings, SPEC) as (call, pairs):

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                outputs = student(images, training=True)
                plain = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, outputs))
                loss = call(images, labels, outputs, plain)
            slopes = tape.gradient(loss, student.trainable_variables)
            for slope, weights in zip(slopes, student.trainable_variables):
                if slope is not None:
                    weights.assign_sub(0.05 * slope)
            return loss

        found = [float(step()) for _ in range(steps)]
    return found, pairs


@pytest.mark.parametrize(
    "values", [{"alpha": 1.0}, {"alpha": 0.0, "hints": 10.0}, {"alpha": 0.0, "attention": 1000.0}, {"relational": 5.0}]
)
def test_each_loss_falls_and_changes_the_student_alone(values):
    student, teacher = network(2, "s", 3), network(6, "t", 4)
    before = [weights.numpy() for weights in teacher.weights]
    count = len(student.weights)
    found, pairs = train(student, teacher, Distillation(**values))
    assert found[-1] < found[0]
    assert (pairs == {}) == (not Distillation(**values).on_features)
    for old, new in zip(before, teacher.weights):
        np.testing.assert_array_equal(old, new.numpy())
    assert len(student.weights) == count
    assert not any("call" in vars(layer) for layer in student.layers)


def test_a_copy_has_nothing_to_learn():
    teacher = network(4, "t", 5)
    student = keras.models.clone_model(teacher)
    student.set_weights(teacher.get_weights())
    found, _ = train(student, teacher, Distillation(alpha=1.0, attention=1000.0, relational=1.0), steps=1)
    assert found[0] == pytest.approx(0, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 99))
def test_attention_does_not_change_with_the_scale_or_order_of_channels(batch, size, channels, scale, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=(batch, size, size, channels)).astype(np.float32)
    other = (scale * values[..., random.permutation(channels)]).astype(np.float32)
    assert float(losses.attention(tf.constant(values), tf.constant(other))) == pytest.approx(0, abs=1e-6)


def test_a_hint_is_half_the_mean_squared_difference():
    a, b = RANDOM.normal(size=(2, 2, 3, 3, 5)).astype(np.float32)
    expected = 0.5 * np.mean((a - b) ** 2)
    assert float(losses.hint(tf.constant(a), tf.constant(b))) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.hint(tf.constant(a), tf.constant(a))) == 0


def test_a_teacher_asked_for_its_features_answers_once():
    """Its layers are heard in the same pass that gives its softened answers."""
    teacher, calls = network(4, "t", 1), []
    with features.listening(features.chosen(teacher, ["first", "second"])) as heard:
        own = teacher.get_layer("first").call
        teacher.get_layer("first").__dict__["call"] = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
        images = RANDOM.normal(size=(2, 8, 8, 3)).astype(np.float32)
        _, found = teachers.Panel([loaded(teacher)], SPEC, heard).answers(images, 1.0)
    assert len(calls) == 1 and {name: value.shape for name, value in found.items()} == {
        "first": (2, 8, 8, 4), "second": (2, 4, 4, 8),
    }  # fmt: skip


def nested(name: str, seed: int = 0):
    """A backbone inside a model, as transfer learning makes it, behind its own scaling and padding."""
    keras.utils.set_random_seed(seed)
    inside = keras.Input((10, 10, 3))
    x = kinds.Conv2D(6, 3, padding="same", activation="relu", name="inner_conv")(inside)
    backbone = keras.Model(inside, kinds.MaxPooling2D(2, name="inner_pool")(x), name="backbone")
    inputs = keras.Input((8, 8, 3))
    x = kinds.ZeroPadding2D(1, name="padding")(kinds.Rescaling(0.5, name="scaling")(inputs))
    x = kinds.GlobalAveragePooling2D()(kinds.Conv2D(5, 3, padding="same", name="top")(backbone(x)))
    return keras.Model(inputs, kinds.Dense(4, activation="softmax")(x), name=name)


def test_layers_inside_nested_models_are_matched_and_heard():
    """Sizes that only scaling and padding make are no stages."""
    student, teacher = nested("s", 1), nested("t", 2)
    assert features.pairs(student, teacher) == {"inner_conv": "inner_conv", "top": "top"}
    found, _ = train(student, teacher, Distillation(alpha=0.5, attention=10.0, hints=1.0), steps=20)
    assert found[-1] < found[0]


def test_layers_of_the_same_name_are_matched_before_the_end_of_a_stage():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = kinds.Conv2D(3, 3, padding="same", name="first")(inputs)
    x = kinds.Conv2D(3, 3, padding="same", name="later")(x)
    teacher = keras.Model(inputs, kinds.Dense(4)(kinds.GlobalAveragePooling2D()(x)), name="t")
    assert features.pairs(network(2, "s"), teacher) == {"first": "first"}


def test_attention_needs_images():
    student, teacher = network(2, "s"), network(4, "t")
    with pytest.raises(InputError, match="no images"):
        hook.lesson(student, teacher, Distillation(attention=1.0, pairs={"pool": "pool"}))
    assert hook.lesson(student, teacher, Distillation(relational=1.0, pairs={"pool": "pool"})).pairs == {"pool": "pool"}


@keras.saving.register_keras_serializable("tests")
class Halved(keras.layers.Layer):
    """A layer that no other process knows."""

    def call(self, x):
        return keras.ops.where(x > 0, x / 2, keras.ops.sin(x))


def test_a_frozen_teacher_answers_as_it_did(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = kinds.BatchNormalization()(Halved()(kinds.Conv2D(4, 3)(inputs)))
    model = keras.Model(inputs, kinds.Dense(4, activation="softmax")(kinds.Flatten()(x)), name="own")
    model.layers[1].name = "first"
    frozen.freeze(model, SPEC, tmp_path / "teacher.npz", ["first"])
    answer = frozen.Thawed(tmp_path / "teacher.npz", "own")
    for count in (1, 5):
        images = RANDOM.normal(size=(count, 8, 8, 3)).astype(np.float32)
        np.testing.assert_allclose(tf.nn.softmax(answer(tf.constant(images), training=False)), model(images), atol=1e-6)
        np.testing.assert_allclose(answer.heard["first"], model.layers[1](images), atol=1e-6)
    with np.load(tmp_path / "teacher.npz") as arrays:
        changed = {**arrays, "outputs": arrays["outputs"] + 1}
    np.savez(tmp_path / "teacher.npz", **changed)
    with pytest.raises(ModelRefused, match="Teacher own does not answer the same"):
        frozen.Thawed(tmp_path / "teacher.npz", "own")


def test_words_that_are_numbers_are_numbers():
    """YAML reads 1e3 as a word."""
    assert Distillation(attention="1e3", temperature="2").numbers()["attention"] == 1000
    with pytest.raises(InputError, match="much"):
        Distillation(attention="much")


def test_the_logits_of_a_sure_model_are_its_own():
    """Not the logarithm of probabilities, which are all below what counts as one."""
    sure, plain = network(4, "s", 1), network(4, "s", 1, head="logits")
    sure.layers[-1].set_weights([1000 * weights for weights in sure.layers[-1].get_weights()])
    plain.set_weights(sure.get_weights())
    images = tf.constant(RANDOM.normal(size=(3, 8, 8, 3)).astype(np.float32))
    found = tf.function(lambda x: losses.logits_of(sure(x, training=False), "softmax"))(images)
    assert np.ptp(found) > 50
    np.testing.assert_allclose(found, plain(images), rtol=1e-4)
