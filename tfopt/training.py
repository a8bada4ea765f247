"""The one place where a model is fitted, by Keras 3 here and by tf_keras in the TFMOT worker.

`fit` takes the Keras module it shall work with, so that fine-tuning, distillation, pruning and
quantization-aware training share schedule, augmentation, early stopping and progress. A technique
that wants another loss passes a loss hook instead of writing a loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt import objectives
from tfopt.data.augment import AUGMENTATIONS
from tfopt.data.splits import Split
from tfopt.distillation.settings import Distillation
from tfopt.errors import InputError, Problem, TrainingError, unknown_name

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("cosine", "constant", "exponential")
LOSSES = ("crossentropy", "focal", "mse")
#: Keras's callbacks that a recipe may name; the others need code, or send data away.
CALLBACKS = ("CSVLogger", "EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau", "TensorBoard", "TerminateOnNaN")

#: (images, labels, outputs, loss so far) -> loss; called inside the graph, once per batch.
LossHook = Callable[[Any, Any, Any, Any], Any]
#: (step, steps, what is known so far) -> None
Progress = Callable[[int, int, dict], None]


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train; every field can stand in a recipe.

    Either `epochs` or `steps` (of `batch_size` images). `learning_rate` is the peak; 'cosine' rises
    to it over `warmup` (a fraction of all steps) and falls to 0, 'exponential' falls to a hundredth.
    `weight_decay` is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101). `patience` ends the
    training after that many evaluations on validation without progress and returns to the best
    weights; 0 trains to the end. Validation runs once an epoch, or `evaluations` times in all, on
    `validation_images` of the split, as many of each class as there are (None: on all of them).
    `loss` 'crossentropy' follows the head: categorical for softmax and logits, binary for sigmoid; from
    Python also a function of (labels as class indices, outputs), except where TFMOT trains.
    `distill` lets the step learn from the study's own model or from named ones besides the labels: true, or settings
    of tfopt.distillation.
    `callbacks` names some of Keras's own with their settings: [{CSVLogger: {filename: log.csv}}]; an
    epoch to them is what lies between two evaluations, and 'val_accuracy' is there to monitor.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    loss: str | Callable = "crossentropy"
    label_smoothing: float = 0.0
    augmentation: str = "none"
    patience: int = 0
    evaluations: int | None = None
    validation_images: int | None = None
    clip_norm: float | None = None
    distill: Distillation | dict | bool | None = None
    callbacks: tuple[dict, ...] = ()

    def __post_init__(self):
        for name, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("loss", self.loss, LOSSES),
            ("augmentation", self.augmentation, AUGMENTATIONS),
        ):
            if value not in allowed and not (name == "loss" and callable(value)):
                raise unknown_name(name, str(value), allowed)
        wanted = None if self.distill in (None, False) else Distillation.parse(self.distill)
        object.__setattr__(self, "distill", wanted)
        object.__setattr__(self, "callbacks", tuple(_callback_entry(entry) for entry in self.callbacks))
        if self.epochs is not None and self.steps is not None:
            raise InputError("Training has both epochs and steps", received=self, allowed="one of them")
        limits = [
            ("epochs", self.epochs, 0, math.inf), ("steps", self.steps, 0, math.inf),
            ("batch_size", self.batch_size, 0, 65536),
            ("learning_rate", self.learning_rate, 0, 100), ("clip_norm", self.clip_norm, 0, math.inf),
            ("evaluations", self.evaluations, 0, 1000), ("validation_images", self.validation_images, 0, math.inf),
        ]  # fmt: skip
        for name, value, low, high in limits:
            required = name in ("batch_size", "learning_rate")
            if (required or value is not None) and not (_is_number(value) and low < value <= high):
                upper = "" if high == math.inf else f" and at most {high}"
                raise InputError(
                    f"{name} is out of range", received=repr(value), allowed=f"a number above {low}{upper}"
                )
        for name in ("warmup", "label_smoothing", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise InputError(f"{name} is out of range", received=repr(value), allowed="0 to below 1")
        if not (_is_number(self.patience) and self.patience >= 0):
            raise InputError("patience is out of range", received=repr(self.patience), allowed="0 and above")
        for name in ("steps", "batch_size", "patience", "evaluations", "validation_images"):
            value = getattr(self, name)
            if value is not None and value != int(value):
                raise InputError(f"{name} is not a whole number", received=repr(value))
            object.__setattr__(self, name, None if value is None else int(value))
        # Keras takes no whole number for a learning rate, and YAML writes 1.0 as 1.
        object.__setattr__(self, "learning_rate", float(self.learning_rate))

    def steps_for(self, images: int) -> int:
        """How many batches this training takes on a split of that many images."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 1) * max(1, images // min(self.batch_size, images))))

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """From a recipe's text. YAML reads 1e-3 as a word, so words that are numbers count as numbers."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = dict(values)
        for name, value in values.items():
            if name not in fields:
                raise unknown_name("training setting", str(name), fields)
            if isinstance(value, str) and "str" not in fields[name].type and name not in ("callbacks", "distill"):
                try:
                    values[name] = float(value)
                except ValueError:
                    raise InputError(f"{name} is not a number", received=repr(value)) from None
        return cls(**values)


@dataclass(frozen=True)
class TrainReport:
    """What a training did. Accuracies are fractions of `validation_images` images of validation."""

    steps: int
    images_seen: int
    seconds: float
    loss: float
    accuracy_before: float | None
    accuracy_after: float
    history: tuple[dict, ...]
    stopped_early: bool
    validation_images: int

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def fit(
    model,
    train: Split,
    validation: Split,
    spec: InputSpec,
    config: TrainConfig,
    *,
    keras: ModuleType,
    seed: int = 0,
    loss_hook: LossHook | None = None,
    callbacks: Sequence = (),
    progress: Progress | None = None,
    settled: int = 0,
) -> TrainReport:
    """Train `model` in place.

    keras: the module the model belongs to (keras, or tf_keras inside the worker). callbacks: that
    module's own; an epoch to them is what lies between two evaluations. progress: called every ten
    steps with {'what', 'loss', 'evaluation'}, after an evaluation with 'validation' as well. settled: the step before
    which `patience` neither counts an evaluation nor keeps its weights: the model is not yet what it shall be.
    Raises TrainingError when the loss stops being a number, with the step, and DataError with the
    file's name when an image cannot be read.
    """
    keras.utils.set_random_seed(seed)
    _check_fit(model, train, spec)
    if config.validation_images:
        validation = validation.balanced(config.validation_images)
    steps = config.steps_for(len(train))
    images_per_epoch = max(1, len(train) // min(config.batch_size, len(train)))
    evaluations = min(steps, config.evaluations or max(1, round(steps / images_per_epoch)))
    edges = np.linspace(0, steps, evaluations + 1).round().astype(int)
    outputs = int(model.output_shape[-1])
    model.compile(
        optimizer=objectives.optimizer(keras, config, steps),
        loss=objectives.loss(keras, config, spec.head, outputs),
        metrics=[objectives.metric(keras, spec.head, outputs)],
        jit_compile=False,
    )
    model.stop_training = False
    graph = traced(model, spec)
    failures: list[Problem] = []
    batches = iter(
        train.stream(spec, config.batch_size, augmentation=config.augmentation, seed=seed, failures=failures)
    )
    before = accuracy(model, validation, spec, graph=graph)
    best, best_weights, misses, history = -1.0, None, 0, []
    started = time.monotonic()
    with _hooked(model, loss_hook), _reading(failures), _brisk_norms(model, steps, keras):
        own = [*objectives.callbacks(keras, config), *callbacks]
        runner = keras.callbacks.CallbackList(own, model=model, epochs=evaluations, steps=steps)
        model.make_train_function()
        train_step = model.train_function
        runner.on_train_begin()
        done = 0
        for evaluation, (start, stop) in enumerate(itertools.pairwise(edges)):
            runner.on_epoch_begin(evaluation)
            model.reset_metrics()
            for step in range(start, stop):
                runner.on_train_batch_begin(step)
                logs = train_step(batches)
                runner.on_train_batch_end(step, logs)
                done = step + 1
                if done % 10 == 0 or done == stop:
                    loss = float(logs["loss"])
                    if not math.isfinite(loss):
                        raise TrainingError(
                            "Training diverged: the loss is no longer a number",
                            received=f"step {done} of {steps}, learning rate {config.learning_rate:g}",
                            next_step="Lower learning_rate, or set clip_norm to 1",
                        )
                    if progress:
                        progress(done, steps, {"what": "training", "loss": loss, "evaluation": evaluation})
                if getattr(model, "stop_training", False):
                    break
            score = accuracy(model, validation, spec, graph=graph)
            logs = {**{k: float(v) for k, v in logs.items()}, "val_accuracy": score}
            history.append({"step": int(done), **logs})
            if progress:
                facts = {"what": "training", "loss": logs["loss"], "validation": score, "evaluation": evaluation}
                progress(done, steps, facts)
            runner.on_epoch_end(evaluation, logs)
            if config.patience and done >= settled:
                if score > best:
                    best, best_weights, misses = score, model.get_weights(), 0
                else:
                    misses += 1
            if (misses and misses >= config.patience) or getattr(model, "stop_training", False):
                break
        runner.on_train_end()
    after = history[-1]["val_accuracy"]
    if best > after:
        model.set_weights(best_weights)
        after = best
    return TrainReport(
        steps=int(done),
        images_seen=int(done * min(config.batch_size, len(train))),
        seconds=round(time.monotonic() - started, 3),
        loss=history[-1]["loss"],
        accuracy_before=before,
        accuracy_after=after,
        history=tuple(history),
        stopped_early=done < steps,
        validation_images=len(validation),
    )


@contextmanager
def _brisk_norms(model, steps: int, keras: ModuleType) -> Iterator[None]:
    """For the time of a training, no batch norm remembers more than a tenth of it.

    At the usual momentum of 0.99 the moving statistics trail the weights by a hundred steps, and after a
    short fine-tuning they would describe a network that is no more. Long trainings are not affected.
    """
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = min(layer.momentum, max(0.5, 1 - 10 / steps))
    try:
        yield
    finally:
        for layer, momentum in zip(norms, momenta):
            layer.momentum = momentum


def recalibrate(
    model, train: Split, spec: InputSpec, *, keras: ModuleType, batches: int = 16, batch_size: int = 128
) -> None:
    """Set every batch norm's moving statistics anew, as plain averages over some training batches.

    After surgery on kernels the old statistics describe another network, and at the usual momentum
    of 0.99 a short fine-tuning would end before they have caught up.
    """
    import tensorflow as tf

    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    if not norms:
        return
    # Class folders lie one class after the other, and the variance within one class is not that of all.
    sample = train.balanced(batches * batch_size)
    sample = sample.subset(np.argsort(sample.hashes, kind="stable"))
    share = tf.Variable(0.0)
    forward = tf.function(lambda images: model(images, training=True), reduce_retracing=True)
    try:
        for layer in norms:
            layer.momentum = share
        for count, (images, _) in enumerate(sample.batches(spec, batch_size)):
            share.assign(count / (count + 1))
            forward(tf.constant(images))
    finally:
        for layer, momentum in zip(norms, momenta):
            layer.momentum = momentum


def predict(
    model, split: Split, spec: InputSpec, batch_size: int = 256, *, graph: Callable | None = None
) -> np.ndarray:
    """The model's outputs on a split, float32 (count, classes), without Keras's predict machinery.

    graph: what `traced(model, spec)` gave, where one model is asked many times.
    """
    import tensorflow as tf

    graph = graph or traced(model, spec)
    outputs = [graph(tf.constant(images)).numpy() for images, _ in split.batches(spec, batch_size)]
    return np.concatenate(outputs).astype(np.float32)


def traced(model, spec: InputSpec) -> Callable:
    """The model as one graph for batches of any size; it reads the weights as they are at each call."""
    import tensorflow as tf

    signature = [tf.TensorSpec((None, *spec.shape), tf.float32)]
    return tf.function(lambda images: model(images, training=False), input_signature=signature)


def accuracy(model, split: Split, spec: InputSpec, *, graph: Callable | None = None) -> float:
    """Top-1 accuracy as a fraction."""
    return float(np.mean(classify(predict(model, split, spec, graph=graph), spec) == split.labels))


def classify(outputs: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Outputs of (count, classes), or (count, 1) of a sigmoid head, to class indices."""
    if outputs.shape[-1] == 1:
        threshold = 0.5 if spec.head == "sigmoid" else 0.0
        return (outputs[:, 0] > threshold).astype(np.int64)
    return outputs.argmax(-1)


def _uncompile(model) -> None:
    """Drop the training set-up: its loss is a closure that no file can hold, its optimizer triples the file."""
    model.compiled = False
    model.optimizer = None


def _check_fit(model, train: Split, spec: InputSpec) -> None:
    if tuple(model.input_shape[1:]) != spec.shape:
        raise TrainingError(
            "The images do not fit the model", received=f"input spec {spec.shape}", allowed=tuple(model.input_shape[1:])
        )
    classes = max(2, int(model.output_shape[-1]))
    if int(train.labels.max()) >= classes:
        raise TrainingError(
            "A label has no output in the model", received=f"label {train.labels.max()}", allowed=f"0 to {classes - 1}"
        )


@contextmanager
def _reading(failures: list[Problem]):
    """TensorFlow reports what went wrong inside its pipeline as text; give back the error itself."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        if failures:
            raise failures[0] from error
        raise


class _hooked:
    """For the time of a block, model.compute_loss also runs the hook; both Keras versions call it."""

    def __init__(self, model, hook: LossHook | None):
        self.model, self.hook = model, hook

    def __enter__(self):
        if self.hook is None:
            return
        import tensorflow as tf

        original, hook = self.model.compute_loss, self.hook
        # tf_keras reports the mean of the loss as it was before the hook; Keras 3 of what compute_loss returns.
        container = getattr(self.model, "compiled_loss", None)

        def compute_loss(x=None, y=None, y_pred=None, sample_weight=None, training=True):
            plain = original(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
            whole = hook(x, y, y_pred, plain)
            for mean in getattr(container, "metrics", ())[:1]:
                mean.total.assign_add((whole - plain) * tf.cast(tf.shape(y_pred)[0], mean.total.dtype))
            return whole

        object.__setattr__(self.model, "compute_loss", compute_loss)

    def __exit__(self, *_):
        if self.hook is not None:
            object.__delattr__(self.model, "compute_loss")
            self.model.train_function = None


def _callback_entry(entry) -> dict:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not (isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())) or {}, dict)):
        raise InputError("A callback is not NAME: {setting: value}", received=repr(entry), allowed=", ".join(CALLBACKS))
    ((name, settings),) = entry.items()
    if name not in CALLBACKS:
        raise unknown_name("callback for recipes", str(name), CALLBACKS)
    return {name: dict(settings or {})}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
