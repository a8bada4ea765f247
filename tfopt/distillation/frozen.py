"""A teacher as a graph of constants in a file: a process with another Keras asks it without rebuilding it.

teacher.npz    'graph': the GraphDef's bytes; 'ends': the names of its input and output; 'images', 'outputs': a probe
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobile_bench.files import atomic_path
from mobile_bench.inputs import InputSpec
from tfopt import constants
from tfopt.errors import ModelRefused

#: Both processes run the same kernels, but may share the work among threads otherwise.
_TOLERANCE = 1e-4
_PROBE_IMAGES = 4


def freeze(model, spec: InputSpec, path: Path, layers: Sequence[str] = ()) -> None:
    """Write what gives the logits of a classifier of any Keras, layers of the user's own included.

    layers: the names of those whose answers are learned as well.

    Raises ModelRefused where TensorFlow cannot make constants of its state.
    """
    import tensorflow as tf

    from tfopt.distillation import features
    from tfopt.distillation.losses import logits_of

    signature = [tf.TensorSpec((None, *spec.shape), tf.float32)]

    def answer(images):
        with features.listening(features.chosen(model, layers)) as heard:
            logits = logits_of(model(images, training=False), spec.head)
        return [logits, *(heard[name] for name in layers)]

    call = tf.function(answer, input_signature=signature, autograph=False)
    try:
        graph = constants.frozen(call.get_concrete_function())
    except (ValueError, NotImplementedError, tf.errors.OpError) as error:
        raise ModelRefused(
            f"Teacher {model.name} keeps state that no other process can have", received=str(error).splitlines()[0],
            next_step="Distill in a step of its own before prune, cluster or qat",
        ) from error  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (_PROBE_IMAGES, *spec.shape), np.uint8)
    images = spec.normalize(pixels)
    arrays = {
        **graph,
        "features": np.array(list(layers), dtype=str),
        "images": images,
        "outputs": np.asarray(call(tf.constant(images))[0], np.float32),
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


class Thawed:
    """(images of (batch, height, width, channels), training) -> logits of (batch, classes).

    heard: what the layers of the file answered when it was last called, by name. Raises ModelRefused where it does not
    answer as the model did.
    """

    def __init__(self, path: Path, name: str):
        import tensorflow as tf

        with np.load(path, allow_pickle=False) as arrays:
            self._answer = constants.thawed(arrays["graph"], arrays["ends"])
            self._layers = list(map(str, arrays["features"]))
            images, expected = arrays["images"], arrays["outputs"]
        self.name, self.heard = name, {}
        difference = float(np.max(np.abs(self(tf.constant(images)).numpy() - expected)))
        if not difference <= _TOLERANCE * max(1.0, float(np.max(np.abs(expected)))):
            raise ModelRefused(
                f"Teacher {name} does not answer the same in the process that trains",
                received=f"difference {difference:.2g}",
                allowed=f"{_TOLERANCE:g}",
                next_step="Distill in a step of its own before prune, cluster or qat",
            )

    def __call__(self, images, training: bool = False):
        logits, *features = self._answer(images)
        self.heard.update(zip(self._layers, features))
        return logits
