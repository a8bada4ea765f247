"""Small classifiers that no one has trained."""

from __future__ import annotations

import keras

layers = keras.layers


def net(*front, shape=(8, 8, 1), outputs=3, activation="softmax", name="net"):
    """A small classifier with `front` before its first kernel."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input(shape), *front, layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(),
         layers.Dense(outputs, activation=activation)], name=name,
    )  # fmt: skip


class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(keras.ops.mean(x, (1, 2)))
