"""The one place where a model is fitted, by Keras 3 here and by tf_keras in the TFMOT worker.

`fit` takes the Keras module it shall work with, so that fine-tuning, distillation, pruning and
quantization-aware training share schedule, augmentation, early stopping and progress. A technique
that wants another loss passes a loss hook instead of writing a loop.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.data.augment import AUGMENTATIONS
from tfopt.data.splits import Split
from tfopt.errors import InputError, TrainingError, unknown_name

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("cosine", "constant", "exponential")
LOSSES = ("crossentropy", "focal", "mse")

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
    weights; 0 trains to the end. Validation runs once an epoch, or `evaluations` times in all.
    `loss` 'crossentropy' follows the head: categorical for softmax and logits, binary for sigmoid.
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
    loss: str = "crossentropy"
    label_smoothing: float = 0.0
    augmentation: str = "none"
    patience: int = 0
    evaluations: int | None = None
    clip_norm: float | None = None

    def __post_init__(self):
        for name, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("loss", self.loss, LOSSES),
            ("augmentation", self.augmentation, AUGMENTATIONS),
        ):
            if value not in allowed:
                raise unknown_name(name, str(value), allowed)
        if self.epochs is not None and self.steps is not None:
            raise InputError("Training has both epochs and steps", received=self, allowed="one of them")
        limits = [
            ("epochs", self.epochs, 0, math.inf), ("steps", self.steps, 0, math.inf), ("batch_size", self.batch_size, 0, 65536),
            ("learning_rate", self.learning_rate, 0, 100), ("clip_norm", self.clip_norm, 0, math.inf),
            ("evaluations", self.evaluations, 0, 1000),
        ]  # fmt: skip
        for name, value, low, high in limits:
            if value is not None and not (_is_number(value) and low < value <= high):
                raise InputError(f"{name} is out of range", received=repr(value), allowed=f"a number above {low}")
        for name in ("warmup", "label_smoothing", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise InputError(f"{name} is out of range", received=repr(value), allowed="0 to below 1")
        for name in ("steps", "batch_size", "patience", "evaluations"):
            value = getattr(self, name)
            if value is not None and value != int(value):
                raise InputError(f"{name} is not a whole number", received=repr(value))

    def steps_for(self, images: int) -> int:
        """How many batches this training takes on a split of that many images."""
        if self.steps is not None:
            return int(self.steps)
        return max(1, round((self.epochs or 1) * max(1, images // min(self.batch_size, images))))

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name("training setting", str(name), known)
        return cls(**values)


@dataclass(frozen=True)
class TrainReport:
    """What a training did. Accuracies are fractions on the validation split."""

    steps: int
    images_seen: int
    seconds: float
    loss: float
    accuracy_before: float | None
    accuracy_after: float
    history: tuple[dict, ...]
    stopped_early: bool

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
) -> TrainReport:
    """Train `model` in place.

    keras: the module the model belongs to (keras, or tf_keras inside the worker). callbacks: that
    module's own. Raises TrainingError when the loss stops being a number, with the step.
    """
    keras.utils.set_random_seed(seed)
    steps = config.steps_for(len(train))
    images_per_epoch = max(1, len(train) // min(config.batch_size, len(train)))
    evaluations = min(steps, config.evaluations or max(1, round(steps / images_per_epoch)))
    edges = np.linspace(0, steps, evaluations + 1).round().astype(int)
    model.compile(
        optimizer=_optimizer(keras, config, steps),
        loss=_loss(keras, config, spec.head, int(model.output_shape[-1])),
        metrics=["accuracy"],
        jit_compile=False,
    )
    batches = iter(train.stream(spec, config.batch_size, augmentation=config.augmentation, seed=seed))
    before = accuracy(model, validation, spec)
    best, best_weights, misses, history = -1.0, None, 0, []
    started = time.monotonic()
    with _hooked(model, loss_hook):
        runner = keras.callbacks.CallbackList(list(callbacks), model=model, epochs=evaluations, steps=steps)
        model.make_train_function()
        train_step = model.train_function
        runner.on_train_begin()
        done = 0
        for evaluation, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
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
                        progress(done, steps, {"loss": loss, "evaluation": evaluation})
            score = accuracy(model, validation, spec)
            logs = {**{k: float(v) for k, v in logs.items()}, "val_accuracy": score}
            history.append({"step": int(done), **logs})
            if progress:
                progress(done, steps, {"loss": logs["loss"], "validation": score, "evaluation": evaluation})
            runner.on_epoch_end(evaluation, logs)
            if config.patience:
                if score > best:
                    best, best_weights, misses = score, model.get_weights(), 0
                else:
                    misses += 1
            if misses and misses >= config.patience or getattr(model, "stop_training", False):
                break
        runner.on_train_end()
    if best_weights is not None and best > history[-1]["val_accuracy"]:
        model.set_weights(best_weights)
    after = max(best, history[-1]["val_accuracy"]) if config.patience else history[-1]["val_accuracy"]
    return TrainReport(
        steps=int(done),
        images_seen=int(done * min(config.batch_size, len(train))),
        seconds=round(time.monotonic() - started, 3),
        loss=history[-1]["loss"],
        accuracy_before=before,
        accuracy_after=after,
        history=tuple(history),
        stopped_early=done < steps,
    )


def predict(model, split: Split, spec: InputSpec, batch_size: int = 256) -> np.ndarray:
    """The model's outputs on a split, float32 (count, classes), without Keras's predict machinery."""
    import tensorflow as tf

    call = tf.function(lambda images: model(images, training=False), reduce_retracing=True)
    outputs = [call(tf.constant(images)).numpy() for images, _ in split.batches(spec, batch_size)]
    return np.concatenate(outputs).astype(np.float32)


def accuracy(model, split: Split, spec: InputSpec) -> float:
    """Top-1 accuracy as a fraction."""
    return float(np.mean(classify(predict(model, split, spec), spec) == split.labels))


def classify(outputs: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Outputs of (count, classes), or (count, 1) of a sigmoid head, to class indices."""
    if outputs.shape[-1] == 1:
        threshold = 0.5 if spec.head == "sigmoid" else 0.0
        return (outputs[:, 0] > threshold).astype(np.int64)
    return outputs.argmax(-1)


class _hooked:
    """For the time of a block, model.compute_loss also runs the hook; both Keras versions call it."""

    def __init__(self, model, hook: LossHook | None):
        self.model, self.hook = model, hook

    def __enter__(self):
        if self.hook is None:
            return
        original, hook = self.model.compute_loss, self.hook

        def compute_loss(x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return hook(x, y, y_pred, original(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight))

        object.__setattr__(self.model, "compute_loss", compute_loss)

    def __exit__(self, *_):
        if self.hook is not None:
            object.__delattr__(self.model, "compute_loss")
            self.model.train_function = None


def _optimizer(keras: ModuleType, config: TrainConfig, steps: int):
    schedules = keras.optimizers.schedules
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        warmup = round(config.warmup * steps)
        rate = schedules.CosineDecay(
            rate / 20 if warmup else rate, max(1, steps - warmup), warmup_target=rate if warmup else None, warmup_steps=warmup
        )
    elif config.schedule == "exponential":
        rate = schedules.ExponentialDecay(rate, steps, 0.01)
    common = {"learning_rate": rate, "weight_decay": config.weight_decay or None, "clipnorm": config.clip_norm}
    if config.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=config.momentum, nesterov=config.momentum > 0, **common)
    if config.optimizer == "rmsprop":
        return keras.optimizers.RMSprop(momentum=config.momentum, **common)
    if config.optimizer == "adamw":
        return keras.optimizers.AdamW(**{**common, "weight_decay": config.weight_decay})
    return keras.optimizers.Adam(**common)


def _loss(keras: ModuleType, config: TrainConfig, head: str, classes: int):
    import tensorflow as tf

    binary = classes == 1
    losses = keras.losses
    from_logits = head == "logits"

    def prepare(labels, outputs):
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
        if binary:
            return tf.cast(labels, outputs.dtype)[:, None]
        return tf.one_hot(labels, classes, dtype=outputs.dtype)

    if config.loss == "mse":
        function = losses.MeanSquaredError()
    elif config.loss == "focal":
        kind = losses.BinaryFocalCrossentropy if binary or head == "sigmoid" else losses.CategoricalFocalCrossentropy
        function = kind(from_logits=from_logits, label_smoothing=config.label_smoothing)
    else:
        kind = losses.BinaryCrossentropy if binary or head == "sigmoid" else losses.CategoricalCrossentropy
        function = kind(from_logits=from_logits, label_smoothing=config.label_smoothing)

    def loss(labels, outputs):
        return function(prepare(labels, outputs), outputs)

    return loss


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
