"""Which layers of a student stand for which of a teacher, and what the student's answer in a training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from tfopt.errors import InputError, ModelRefused, unknown_name


def layers_of(model) -> dict:
    """The layers with features by name, in the order of the graph, nested models entered."""
    found: dict = {}
    for layer in model.layers:
        if hasattr(layer, "layers"):
            found |= {name: inner for name, inner in layers_of(layer).items() if name not in found}
        elif _shape(layer) is not None and "Input" not in type(layer).__name__:
            found.setdefault(layer.name, layer)
    return found


def pairs(student, teacher, named: dict[str, str] | None = None) -> dict[str, str]:
    """{student's layer: teacher's layer}.

    named: what the user says; a name that is none is refused with near misses, and so are images of different sizes:
    nothing is resized. Otherwise the ends of stages, which are the last layers of each image size in which a kernel
    works: with the teacher's layer of the same name where that has the same size, else with the end of that size.
    """
    own, other = layers_of(student), layers_of(teacher)
    if named:
        for mine, theirs in named.items():
            if mine not in own:
                raise unknown_name("layer of the student", mine, own)
            if theirs not in other:
                raise unknown_name("layer of the teacher", theirs, other)
            _check_pair(own[mine], other[theirs])
        return dict(named)
    ends, theirs = _ends(own), _ends(other)
    same = lambda layer, size: layer in other and len(_shape(other[layer])) == 4 and _size(other[layer]) == size
    found = {
        layer: layer if same(layer, size) else theirs[size]
        for size, layer in ends.items() if size in theirs or same(layer, size)
    }  # fmt: skip
    if not found:
        raise ModelRefused(
            "No layer of the student has images of the same size as one of the teacher",
            received=f"student {_sizes(ends)}, teacher {_sizes(theirs)}",
            next_step="Name the layers with pairs, or learn from answers alone",
        )
    return found


def check_teacher(teacher, named: Mapping[str, str]) -> None:
    """Raise InputError, with near misses, for the first of the user's names that is no layer of the teacher."""
    known = layers_of(teacher)
    for name in named.values():
        if name not in known:
            raise unknown_name("layer of the teacher", name, known)


@contextmanager
def listening(layers: Mapping[str, Any]) -> Iterator[dict]:
    """While this lasts, the dictionary holds what these layers answered when they were last called, by the same names.

    Inside a training step these are tensors of that step's graph, through which gradients flow.
    """
    heard: dict = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_tapped(layer, name, heard))
        yield heard


def chosen(model, names: Iterable[str]) -> dict:
    """The layers of those names."""
    known = layers_of(model)
    return {name: known[name] for name in names}


def channels(student, teacher, matched: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """student's layer -> (its channels, its teacher's)."""
    own, other = layers_of(student), layers_of(teacher)
    return {mine: (int(_shape(own[mine])[-1]), int(_shape(other[name])[-1])) for mine, name in matched.items()}


@contextmanager
def _tapped(layer, name: str, heard: dict) -> Iterator[None]:
    own = layer.call

    def call(*args, **kwargs):
        heard[name] = own(*args, **kwargs)
        return heard[name]

    object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        object.__delattr__(layer, "call")


def _shape(layer) -> tuple | None:
    try:
        shape = tuple(layer.output.shape)
    except (AttributeError, RuntimeError, ValueError):  # never called, or called twice
        return None
    return shape if len(shape) in (2, 4) else None


def _size(layer) -> tuple[int | None, int | None]:
    """(height, width) of a layer with images."""
    return _shape(layer)[1:3]


def _ends(layers: dict) -> dict[tuple, str]:
    """(height, width) -> the last layer of that size, where a kernel works at it and it is more than one pixel.

    A size that only padding, pooling or the scaling of pixels makes is no stage.
    """
    found, stages = {}, set()
    for name, layer in layers.items():
        if len(_shape(layer)) != 4 or None in _size(layer) or max(_size(layer)) == 1:
            continue
        if any(word in type(layer).__name__ for word in ("Padding", "Cropping")):
            continue
        found[_size(layer)] = name
        if any(len(weight.shape) > 1 for weight in layer.weights):
            stages.add(_size(layer))
    return {size: name for size, name in found.items() if size in stages}


def _sizes(ends: dict) -> str:
    return ", ".join(f"{height} x {width}" for height, width in ends) or "no images"


def _check_pair(mine, theirs) -> None:
    a, b = _shape(mine), _shape(theirs)
    if len(a) != len(b) or a[1:-1] != b[1:-1]:
        raise InputError(
            f"Layers {mine.name} and {theirs.name} have images of different sizes", received=f"{a[1:]} and {b[1:]}",
            allowed="the same height and width", next_step="Pair other layers",
        )  # fmt: skip
