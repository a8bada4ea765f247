"""What a training minimises and how it steps: optimizer, loss, metric and callbacks, for keras and tf_keras alike."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from tfopt.errors import InputError

if TYPE_CHECKING:
    from tfopt.training import TrainConfig


def optimizer(keras: ModuleType, config: TrainConfig, steps: int):
    """The optimizer with its schedule over `steps` steps."""
    schedules = keras.optimizers.schedules
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        warmup = round(config.warmup * steps)
        rate = schedules.CosineDecay(
            rate / 20 if warmup else rate,
            max(1, steps - warmup),
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
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


def metric(keras: ModuleType, head: str, outputs: int):
    """Top-1 accuracy, named 'accuracy', of labels as class indices."""
    if outputs == 1:
        return keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.5 if head == "sigmoid" else 0.0)
    return keras.metrics.SparseCategoricalAccuracy(name="accuracy")


def loss(keras: ModuleType, config: TrainConfig, head: str, outputs: int):
    """(labels of shape (batch,), outputs of shape (batch, outputs)) -> loss, as the head needs it."""
    import tensorflow as tf

    binary = outputs == 1
    losses = keras.losses
    from_logits = head == "logits"

    def prepare(labels, scores):
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
        if binary:
            return tf.cast(labels, scores.dtype)[:, None]
        return tf.one_hot(labels, outputs, dtype=scores.dtype)

    if callable(config.loss):
        return config.loss
    if config.loss == "mse":
        function = losses.MeanSquaredError()
    elif config.loss == "focal":
        kind = losses.BinaryFocalCrossentropy if binary or head == "sigmoid" else losses.CategoricalFocalCrossentropy
        function = kind(from_logits=from_logits, label_smoothing=config.label_smoothing)
    else:
        kind = losses.BinaryCrossentropy if binary or head == "sigmoid" else losses.CategoricalCrossentropy
        function = kind(from_logits=from_logits, label_smoothing=config.label_smoothing)

    return lambda labels, scores: function(prepare(labels, scores), scores)


def callbacks(keras: ModuleType, config: TrainConfig) -> list:
    """The callbacks that a recipe names, of the module the model belongs to."""
    made = []
    for entry in config.callbacks:
        ((name, settings),) = entry.items()
        try:
            made.append(getattr(keras.callbacks, name)(**settings))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The callback {name} does not take its settings", received=f"{settings} ({error})"
            ) from error
    return made
