"""The networks that learn: built at a width, cut from the model, read from a file, or the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.errors import ModelRefused, Problem

if TYPE_CHECKING:
    import keras


def from_file(path: str, classes: int, spec: InputSpec) -> tuple[keras.Model, list[str]]:
    """(the model in a file, taking images as `spec` says, and what a reader of the report must know of it).

    Where the file says that its pixels are scaled otherwise, a Rescaling layer before the model makes up for it.
    Raises ModelRefused for other classes, images or heads than the study's.
    """
    from tfopt import models

    try:
        loaded = models.load(path)
    except Problem as problem:
        raise ModelRefused(f"The student {path} cannot be used: {problem}") from problem
    own = loaded.spec
    given = (own.shape, own.head, int(loaded.model.output_shape[-1]))
    if given != (spec.shape, spec.head, classes):
        raise ModelRefused(
            f"The student {path} does not take this study's images, or tells other classes apart",
            received="{}, {}, {} outputs".format(*given), allowed=f"{spec.shape}, {spec.head}, {classes} outputs",
        )  # fmt: skip
    if own.labels and spec.labels and own.labels != spec.labels:
        raise ModelRefused(
            f"The student {path} names its classes otherwise than the study",
            received=f"{', '.join(own.labels[:4])} …", allowed=f"{', '.join(spec.labels[:4])} …",
        )  # fmt: skip
    notes = [f"The student is {path}"]
    if loaded.spec_from == "an assumption" or (own.mean, own.std, own.order) == (spec.mean, spec.std, spec.order):
        return loaded.model, notes
    if own.order != spec.order:
        raise ModelRefused(
            f"The student {path} takes its channels in another order", received=own.order, allowed=spec.order,
            next_step=f"Retrain it on {spec.order} images",
        )  # fmt: skip
    notes.append(f"A Rescaling layer turns the study's pixels ({spec.scaling}) into the student's ({own.scaling})")
    return _rescaling(loaded.model, spec, own), notes


def built(name: str, width: float, model: keras.Model, spec: InputSpec) -> keras.Model:
    """A new network of one of our architectures; 'narrow': of the model's own, at `width` of its channels."""
    from tfopt.builders import BUILDERS, build, parse

    if name == "narrow":
        known = parse(model.name)
        if known is None:
            raise ModelRefused(
                "The model is not of one of our architectures, so there is no narrower version of it",
                received=model.name,
                allowed=", ".join(BUILDERS),
                next_step="Name the student in the recipe, such as student: channels or student: mobilenet",
            )
        name, teacher_width = known
        width *= teacher_width
    classes = int(model.output_shape[-1])
    if classes < 2 or spec.head == "sigmoid":
        raise ModelRefused(
            "Distillation needs softmax or logits", received=f"a {spec.head} head with {classes} outputs"
        )
    student = build(name, spec.shape, classes, width)
    if spec.head == "logits":
        student.layers[-1].activation = _linear()
    return student


def select_weights(teacher: keras.Model, student: keras.Model) -> list[str]:
    """Give the student evenly spaced slices of the teacher's weights, axis by axis; returns the layers that got some.

    Weight selection (Xu et al. 2024, arXiv:2311.18823), for layers of the same name. The indices depend on the two
    sizes alone, so layers whose channels are tied pick the same ones.
    """
    from tfopt.graph import flat_layers

    sources = {layer.name: layer.get_weights() for layer in flat_layers(teacher)}
    inherited = []
    for layer in flat_layers(student):
        own, source = layer.get_weights(), sources.get(layer.name, [])
        fits = [w.ndim == s.ndim and all(a <= b for a, b in zip(w.shape, s.shape)) for w, s in zip(own, source)]
        if not own or len(own) != len(source) or not all(fits):
            continue
        layer.set_weights([s[np.ix_(*map(_evenly, s.shape, w.shape))] for w, s in zip(own, source)])
        inherited.append(layer.name)
    return inherited


def _evenly(available: int, wanted: int) -> np.ndarray:
    return np.linspace(0, available - 1, wanted).round().astype(int)


def _rescaling(model: keras.Model, given: InputSpec, wanted: InputSpec) -> keras.Model:
    """The model behind (x · given.std + given.mean - wanted.mean) / wanted.std."""
    import keras

    scale = np.divide(given.std, wanted.std)
    offset = np.subtract(given.mean, wanted.mean) / np.asarray(wanted.std)
    plain = lambda values: float(values[0]) if len(set(values)) == 1 else [float(value) for value in values]
    inputs = keras.Input(given.shape)
    scaled = keras.layers.Rescaling(plain(scale), plain(offset), name="own_scaling")(inputs)
    return keras.Model(inputs, model(scaled), name=model.name)


def _linear():
    import keras

    return keras.activations.linear
