"""A layer and an activation as a user writes them, in a module that another process can import."""

import keras


@keras.saving.register_keras_serializable(package="tests")
class Scaled(keras.layers.Layer):
    """x * factor * scale by channel, and a shift by a constant."""

    def __init__(self, shift: float, **kwargs):
        super().__init__(**kwargs)
        self.shift = shift

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="scale")

    def call(self, inputs):
        return inputs * self.scale + self.shift

    def get_config(self):
        return {**super().get_config(), "shift": self.shift}


@keras.saving.register_keras_serializable(package="tests")
def bent(x):
    return 2 * keras.ops.tanh(x)
