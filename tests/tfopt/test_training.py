"""fit: schedules, losses, early stopping, callbacks, the loss hook, and what it says when it cannot go on."""

from __future__ import annotations

import dataclasses
import json

import keras
import numpy as np
import pytest
from PIL import Image

from mobile_bench.inputs import InputSpec
from tfopt import data, training
from tfopt.errors import DataError, InputError, Problem, TrainingError
from tfopt.training import TrainConfig

FAST = {"steps": 30, "batch_size": 32, "learning_rate": 5e-3}


def small(shape=(8, 8, 1), outputs=10, activation="softmax", norm=True):
    keras.utils.set_random_seed(0)
    layers = [keras.Input(shape), keras.layers.Conv2D(8, 3, activation="relu")]
    layers += [keras.layers.BatchNormalization()] if norm else []
    return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(outputs, activation=activation)])


def fit(model, digits, spec, config, **options):
    return training.fit(model, digits["train"], digits["validation"], spec, config, keras=keras, **options)


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [*zip(training.OPTIMIZERS, (*training.SCHEDULES, "cosine")), ("sgd", "exponential"), ("adam", "cosine")],
)
def test_every_optimizer_and_schedule_learns(digits, spec, optimizer, schedule):
    rate = {"sgd": 0.05, "rmsprop": 1e-3}.get(optimizer, 5e-3)
    config = TrainConfig(steps=60, batch_size=32, learning_rate=rate, optimizer=optimizer, schedule=schedule,
                         weight_decay=1e-4, clip_norm=1.0, augmentation="crop", warmup=0.2)  # fmt: skip
    report = fit(small(), digits, spec, config)
    assert report.accuracy_before < 0.35 and report.accuracy_after > 0.6
    assert report.steps == 60 and report.images_seen == 1920


@pytest.mark.parametrize(
    ("loss", "activation", "head"),
    [
        ("crossentropy", None, "logits"), ("crossentropy", "sigmoid", "sigmoid"), ("focal", "softmax", "softmax"),
        ("focal", "sigmoid", "sigmoid"), ("mse", "softmax", "softmax"), ("mse", None, "logits"),
    ],
)  # fmt: skip
def test_every_loss_fits_every_head(digits, spec, loss, activation, head):
    config = TrainConfig(**{**FAST, "steps": 80}, loss=loss, label_smoothing=0 if loss == "mse" else 0.05)
    report = fit(small(activation=activation), digits, dataclasses.replace(spec, head=head), config)
    assert report.accuracy_after > 0.6


@pytest.mark.parametrize(("activation", "head"), [("sigmoid", "sigmoid"), (None, "logits")])
def test_two_classes_by_one_output(digits, activation, head):
    """Is it a 0 or a 1? One output, above the middle for the second class."""
    pick = lambda split: (split.images[split.labels < 2], split.labels[split.labels < 2])
    pair = data.from_arrays(pick(digits["train"]), test=pick(digits["test"]), validation=pick(digits["validation"]))
    spec = InputSpec(8, 8, 1, head=head)
    model = small(outputs=1, activation=activation)
    report = fit(model, pair, spec, TrainConfig(**FAST))
    assert report.accuracy_after > 0.95 and report.history[-1]["accuracy"] > 0.8
    outputs = training.predict(model, pair["test"], spec)
    assert outputs.shape == (len(pair["test"]), 1)
    assert set(training.classify(outputs, spec)) == {0, 1}


def test_the_same_seed_gives_the_same_weights(digits, spec):
    def weights(seed):
        model = small()
        fit(model, digits, spec, TrainConfig(**FAST, augmentation="crop_flip"), seed=seed)
        return np.concatenate([weight.ravel() for weight in model.get_weights()])

    first, again, other = weights(0), weights(0), weights(1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_epochs_and_steps():
    config = TrainConfig(epochs=2.5, batch_size=64)
    assert config.steps_for(640) == 25
    assert TrainConfig(steps=7).steps_for(640) == 7
    assert TrainConfig().steps_for(640) == 10
    assert TrainConfig(epochs=1, batch_size=64).steps_for(10) == 1


def test_progress_says_what_and_how_far(digits, spec):
    seen = []
    config = TrainConfig(**FAST, evaluations=2, validation_images=50)
    report = fit(small(), digits, spec, config, progress=lambda *args: seen.append(args))
    assert [done for done, *_ in seen] == [10, 15, 15, 20, 30, 30]
    assert all(total == 30 and facts["what"] == "training" and facts["loss"] > 0 for _, total, facts in seen)
    assert [round(facts["validation"], 6) for *_, facts in seen if "validation" in facts] == [
        round(entry["val_accuracy"], 6) for entry in report.history
    ]


def test_validation_can_be_limited_to_as_many_of_each_class(digits, spec):
    model = small()
    report = fit(model, digits, spec, TrainConfig(**FAST, validation_images=40))
    assert report.validation_images == 40
    sample = digits["validation"].balanced(40)
    assert set(np.bincount(sample.labels)) == {4}
    assert report.accuracy_after == training.accuracy(model, sample, spec)
    assert fit(model, digits, spec, TrainConfig(**FAST)).validation_images == len(digits["validation"])


class Spoiler(keras.callbacks.Callback):
    """From its third evaluation on, the model knows nothing; so the best weights are among the first two."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def on_train_batch_end(self, batch, logs=None):
        if len(self.kept) >= 2:
            head = self.model.layers[-1]
            head.set_weights([0 * weight for weight in head.get_weights()])

    def on_epoch_end(self, epoch, logs=None):
        self.kept.append(self.model.get_weights())


def test_early_stopping_returns_to_the_best_weights(digits, spec):
    model, spoiler = small(), Spoiler()
    config = TrainConfig(steps=100, batch_size=32, learning_rate=5e-3, evaluations=10, patience=2, schedule="constant")
    report = fit(model, digits, spec, config, callbacks=[spoiler])
    accuracies = [entry["val_accuracy"] for entry in report.history]
    best = int(np.argmax(accuracies))
    assert best < 2 and accuracies[-1] < 0.2 < accuracies[best]
    assert report.stopped_early and report.steps == 10 * (best + 1 + 2)
    assert report.accuracy_after == accuracies[best] == training.accuracy(model, digits["validation"], spec)
    for mine, kept in zip(model.get_weights(), spoiler.kept[best]):
        np.testing.assert_array_equal(mine, kept)


def test_keras_callbacks_work(digits, spec, tmp_path):
    class StopAt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 6

    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.weights.h5", monitor="val_accuracy", save_best_only=True, save_weights_only=True
    )
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    model = small()
    report = fit(model, digits, spec, TrainConfig(**FAST, evaluations=3), callbacks=[checkpoint, logger])
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 3
    model.load_weights(tmp_path / "best.weights.h5")
    best = max(entry["val_accuracy"] for entry in report.history)
    assert training.accuracy(model, digits["validation"], spec) == best
    stopped = fit(model, digits, spec, TrainConfig(**FAST), callbacks=[StopAt()])
    assert stopped.steps == 7 and stopped.stopped_early
    assert fit(model, digits, spec, TrainConfig(**FAST)).steps == 30  # a stop is not remembered


def test_the_loss_hook_joins_the_training_and_leaves_no_trace(digits, spec):
    model, seen = small(), []

    def no_answer(images, labels, outputs, loss):
        """Pull every output to 1/10: a model so taught never becomes sure."""
        seen.append((tuple(images.shape), tuple(labels.shape), tuple(outputs.shape)))
        return 0.0 * loss + keras.ops.mean((outputs - 0.1) ** 2)

    report = fit(model, digits, spec, TrainConfig(**{**FAST, "steps": 60}), loss_hook=no_answer)
    assert seen and set(seen) == {((32, 8, 8, 1), (32,), (32, 10))}
    assert report.accuracy_after < 0.5
    assert training.predict(model, digits["test"], spec).max() < 0.6
    assert "compute_loss" not in vars(model)
    assert fit(model, digits, spec, TrainConfig(**{**FAST, "steps": 80})).accuracy_after > 0.6
    assert training.predict(model, digits["test"], spec).max() > 0.9


def test_divergence_is_an_error_with_the_step(digits, spec):
    model = small(activation=None, norm=False)
    config = TrainConfig(steps=200, learning_rate=100, optimizer="sgd", schedule="constant", loss="mse")
    with pytest.raises(TrainingError, match=r"diverged.*step \d+ of 200, learning rate 100.*clip_norm"):
        fit(model, digits, dataclasses.replace(spec, head="logits"), config)


def test_an_image_that_breaks_during_training_is_named(tmp_path):
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(60):
            pixels = random.integers(0, 256, (8, 8, 1), np.uint8)[..., 0]
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
    loaded = data.load(tmp_path)
    victim = loaded["train"].paths[10]
    with open(victim, "wb") as file:
        file.write(b"no longer an image")
    with pytest.raises(DataError, match="not an image") as raised:
        training.fit(small(outputs=2), loaded["train"], loaded["validation"], InputSpec(8, 8, 1), TrainConfig(steps=40),
                     keras=keras)  # fmt: skip
    assert victim in str(raised.value)


def test_what_does_not_fit_is_said_before_training(digits, spec):
    with pytest.raises(TrainingError, match=r"do not fit the model.*\(8, 8, 1\).*\(9, 9, 1\)"):
        fit(small((9, 9, 1)), digits, spec, TrainConfig(**FAST))
    with pytest.raises(TrainingError, match=r"A label has no output.*label 9.*0 to 4"):
        fit(small(outputs=5), digits, spec, TrainConfig(**FAST))


@pytest.mark.parametrize("size", [1, 7, 64, 360, 1000])
def test_predictions_do_not_depend_on_the_batch(digits, spec, size):
    model, test = small(), digits["test"]
    outputs = training.predict(model, test, spec, size)
    assert outputs.shape == (360, 10) and outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, model.predict(spec.normalize(test.images), verbose=0), atol=1e-6)


def test_a_traced_model_sees_new_weights_and_is_traced_once(digits, spec):
    model = small()
    graph = training.traced(model, spec)
    before = training.predict(model, digits["test"], spec, 256, graph=graph)
    assert graph.experimental_get_tracing_count() == 1  # though the last batch is smaller
    model.layers[-1].kernel.assign(model.layers[-1].kernel * 2)
    assert not np.array_equal(before, training.predict(model, digits["test"], spec, graph=graph))


def test_recalibration_finds_the_statistics_of_the_training_images(digits, spec):
    model = small()
    norm = next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    momentum = norm.momentum
    train = digits["train"]
    by_class = train.subset(np.argsort(train.labels, kind="stable"))  # as class folders lie
    training.recalibrate(model, by_class, spec, keras=keras, batches=100, batch_size=64)
    features = keras.ops.convert_to_numpy(model.layers[0](spec.normalize(train.images)))
    np.testing.assert_allclose(norm.moving_mean, features.mean((0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(norm.moving_variance, features.var((0, 1, 2)), rtol=0.05, atol=1e-4)
    assert norm.momentum == momentum


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1, "steps": 1}, "both epochs and steps"),
        ({"epochs": 0}, "epochs is out of range.*above 0"),
        ({"epochs": float("inf")}, "epochs is out of range"),
        ({"steps": -3}, "steps is out of range"),
        ({"steps": 1.5}, "steps is not a whole number"),
        ({"steps": True}, "steps is out of range"),
        ({"batch_size": 0}, "batch_size is out of range"),
        ({"batch_size": None}, "batch_size is out of range"),
        ({"learning_rate": 0}, "learning_rate is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate is out of range"),
        ({"learning_rate": "fast"}, "learning_rate is not a number"),
        ({"warmup": 1}, "warmup is out of range.*0 to below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is out of range"),
        ({"patience": -1}, "patience is out of range"),
        ({"patience": None}, "patience is out of range"),
        ({"evaluations": 0}, "evaluations is out of range"),
        ({"evaluations": 5000}, "evaluations is out of range.*at most 1000"),
        ({"validation_images": 0}, "validation_images is out of range"),
        ({"clip_norm": 0}, "clip_norm is out of range"),
        ({"optimizer": "adamm"}, "no optimizer.*Did you mean.*adam"),
        ({"schedule": None}, "no schedule"),
        ({"loss": "hinge"}, "no loss.*crossentropy"),
        ({"augmentation": "mixup"}, "no augmentation.*crop_flip"),
        ({"lr": 0.1}, "no training setting.*learning_rate"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message) as raised:
        TrainConfig.from_dict(settings)
    assert isinstance(raised.value, Problem) and raised.value.exit_code == 2


def test_settings_as_yaml_gives_them():
    config = TrainConfig.from_dict({"learning_rate": "1e-3", "steps": 10.0, "evaluations": 2.0, "patience": 1.0})
    assert config == TrainConfig(learning_rate=0.001, steps=10, evaluations=2, patience=1)
    assert isinstance(config.steps, int) and isinstance(config.evaluations, int)


WORKER = """
import json
import numpy as np, tf_keras
from mobile_bench.inputs import InputSpec
from tfopt import data, training
from tfopt.training import TrainConfig
digits, spec = data.load("digits"), InputSpec(8, 8, 1)
def small():
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    return tf_keras.Sequential([layers.Input((8, 8, 1)), layers.Conv2D(8, 3, activation="relu"),
        layers.BatchNormalization(), layers.Flatten(), layers.Dense(10, activation="softmax")])
def fit(config, **options):
    model = small()
    report = training.fit(model, digits["train"], digits["validation"], spec, config, keras=tf_keras, **options)
    return model, report
found = {}
for optimizer in training.OPTIMIZERS:
    rate = {"sgd": 0.05, "rmsprop": 1e-3}.get(optimizer, 5e-3)
    model, report = fit(TrainConfig(steps=60, batch_size=32, learning_rate=rate, optimizer=optimizer, weight_decay=1e-4,
        clip_norm=1.0, augmentation="crop", evaluations=4, patience=3, validation_images=100))
    found[optimizer] = report.accuracy_after
    assert report.accuracy_after == training.accuracy(model, digits["validation"].balanced(100), spec)
class Stop(tf_keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == 6
found["stopped at"] = fit(TrainConfig(steps=30), callbacks=[Stop()])[1].steps
shapes = []
def hook(images, labels, outputs, loss):
    import tensorflow as tf
    shapes.append((images.shape.as_list(), labels.shape.as_list(), outputs.shape.as_list()))
    return 0.0 * loss + tf.reduce_mean((outputs - 0.1) ** 2)
model, report = fit(TrainConfig(steps=60, batch_size=32, learning_rate=5e-3), loss_hook=hook)
found["hooked"], found["shapes"] = float(training.predict(model, digits["test"], spec).max()), shapes[0]
training.recalibrate(model, digits["train"], spec, keras=tf_keras)
try:
    fit(TrainConfig(steps=200, learning_rate=100, optimizer="sgd", schedule="constant", loss="mse"),
        loss_hook=lambda x, y, out, loss: loss / 0.0 * 0.0)
except Exception as error:
    found["diverged"] = type(error).__name__ + ": " + str(error)
print(json.dumps(found))
"""


def test_training_imports_no_keras_of_its_own(run_python):
    code = "import sys, tfopt.training; print([n for n in ('keras', 'tf_keras', 'tensorflow') if n in sys.modules])"
    assert run_python("-c", code).stdout == "[]\n"


def test_the_same_room_trains_tf_keras(run_python):
    """As the TFMOT worker uses it: tf_keras in a process of its own."""
    done = run_python("-c", WORKER, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found[name] > 0.6 for name in training.OPTIMIZERS)
    assert found["stopped at"] == 7
    assert found["hooked"] < 0.6 and found["shapes"] == [[32, 8, 8, 1], [32], [32, 10]]
    assert found["diverged"].startswith("TrainingError: Training diverged")
