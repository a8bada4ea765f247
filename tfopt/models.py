"""Load the user's classifier safely, and say how it wants to be fed.

    loaded = tfopt.models.load("mine.keras")            # or .h5, a SavedModel folder
    loaded = tfopt.models.load("keras:MobileNetV2")     # ImageNet weights, downloaded by Keras
    loaded.model, loaded.spec

A model file is data, not code: Lambda layers, classes that Keras does not know and pickled arrays
are refused unless the caller says `trust=True` (see tfopt.modelfiles).
"""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from mobile_bench.files import atomic_path
from mobile_bench.inputs import InputSpec, override
from tfopt import modelfiles
from tfopt.chance import check_not_by_chance
from tfopt.errors import InputError, ModelError, unknown_name
from tfopt.graph import calls, finish_normalizations, flat_layers, in_float32, rewrite, uncompiled
from tfopt.modelfiles import SPEC_MEMBER, first_line

__all__ = [
    "LoadedModel", "adapt", "check_classes", "check_classifier", "check_not_by_chance", "from_keras", "load", "save",
    "with_labels",
]  # fmt: skip

#: height and width of the applications that take any; they were trained on it.
APPLICATION_SIZE = 224
#: a server that says nothing for so long is given up.
SILENCE_SECONDS = 20

#: how each family of keras.applications wants its pixels; 'raw' ones scale inside the model.
APPLICATION_SCALING = {
    "signed": "MobileNet MobileNetV2 InceptionV3 InceptionResNetV2 Xception NASNetMobile NASNetLarge "
              "ResNet50V2 ResNet101V2 ResNet152V2",
    "caffe": "ResNet50 ResNet101 ResNet152 VGG16 VGG19",
    "torch": "DenseNet121 DenseNet169 DenseNet201",
    "raw": "MobileNetV3Small MobileNetV3Large " + " ".join(f"EfficientNetB{i}" for i in range(8)) + " "
           + " ".join(f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")) + " "
           + " ".join(f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
}  # fmt: skip
_ARITHMETIC = ("Add", "Divide", "Multiply", "Subtract", "TrueDivide")
_SCALING_OF = {name: scaling for scaling, names in APPLICATION_SCALING.items() for name in names.split()}


@dataclass(frozen=True)
class LoadedModel:
    """A Keras 3 classifier with one image in and one row of class scores out.

    `spec_from` says where the InputSpec comes from: 'the model file', 'keras.applications',
    'the layers', 'the user', or 'an assumption'.
    """

    model: keras.Model
    spec: InputSpec
    name: str
    source: str
    spec_from: str

    @property
    def classes(self) -> int:
        """Classes the model tells apart; a single sigmoid output tells two apart."""
        return max(2, int(self.model.output_shape[-1]))


def load(source: str | Path, *, input_spec: str | None = None, trust: bool = False) -> LoadedModel:
    """Load `source`: a .keras or .h5 file, a SavedModel folder, or 'keras:NAME[:random]'.

    input_spec: what the user wrote behind --input-spec, see mobile_bench.inputs.override.
    Raises ModelError with what is wrong with the file and what to do.
    """
    text = str(source)
    if text.startswith("keras:"):
        model, name = _application(text.removeprefix("keras:"))
        stored = None
    else:
        path = Path(text).expanduser()
        model, stored = modelfiles.read(path, trust)
        name = path.parent.name if path.stem == "model" else path.stem
    return from_keras(model, name=name, source=text, stored_spec=stored, input_spec=input_spec)


def from_keras(
    model: keras.Model, *, name: str | None = None, source: str = "Python", stored_spec: InputSpec | None = None,
    input_spec: str | None = None,
) -> LoadedModel:  # fmt: skip
    """Wrap a model that is already in memory; raises ModelError if it is no image classifier."""
    check_classifier(model)
    model = in_float32(model)
    if not isinstance(model.input_shape, tuple) or not isinstance(model.output_shape, tuple):
        # Built on a dictionary or list of one tensor: the same graph without it.
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    spec, origin = (stored_spec, "the model file") if stored_spec else _spec_of(model, input_spec)
    if input_spec:
        spec, origin = override(spec, input_spec), "the user"
    if model.input_shape != (None, *spec.shape):
        model = _with_input_shape(model, spec.shape)
    loaded = LoadedModel(model, spec, _slug(name or model.name), source, origin)
    if spec.labels and len(spec.labels) != loaded.classes:
        raise ModelError(
            "The input spec does not have one label for each output",
            received=f"{len(spec.labels)} labels", allowed=f"{loaded.classes} labels, or none",
        )  # fmt: skip
    return loaded


def save(model: keras.Model, path: str | Path, spec: InputSpec) -> None:
    """Write a .keras file that carries its InputSpec; any Keras 3 opens it as usual.

    The optimizer's state and the training set-up are left out: the file is what gets shipped.
    """
    with atomic_path(path) as temporary:
        # Keras insists on the suffix, so the work file gets one and is folded back.
        work = temporary.with_name(temporary.name + ".keras")
        try:
            with uncompiled(model):
                model.save(work)
            with zipfile.ZipFile(work, "a") as archive:
                archive.writestr(SPEC_MEMBER, json.dumps(spec.to_dict()))
            work.replace(temporary)
        finally:
            work.unlink(missing_ok=True)


def check_classifier(model: keras.Model) -> None:
    """One image in, one row of scores out, a graph of layers that can be walked."""
    if not isinstance(model, keras.Model):
        raise ModelError("This is not a Keras 3 model", received=type(model).__name__, allowed="a keras.Model")
    if not hasattr(model, "_nodes_by_depth") and not isinstance(model, keras.Sequential):
        raise ModelError(
            "The model is subclassed, so its layers cannot be walked",
            received=f"{model.name} of class {type(model).__name__}",
            allowed="functional and Sequential models",
            next_step="Rebuild it with keras.Input and keras.Model(inputs, outputs), then copy the weights",
        )
    if not model.built:
        raise ModelError("The model is not built", received=model.name, next_step="Give its first layer an input shape")
    for what, tensors, rank in (("input", model.inputs, 4), ("output", model.outputs, 2)):
        if len(tensors) != 1 or len(tensors[0].shape) != rank or tensors[0].shape[-1] is None:
            raise ModelError(
                f"The model's {what} is not that of an image classifier",
                received=", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "nothing",
                allowed="one input (batch, height, width, channels) and one output (batch, classes)",
            )


def check_classes(loaded: LoadedModel, class_names: tuple[str, ...]) -> None:
    """Raise ModelError unless the model's outputs are as many as the data's classes."""
    if loaded.classes != len(class_names):
        raise ModelError(
            "The model's output does not match the data's classes",
            received=f"{loaded.classes} outputs for {len(class_names)} classes ({', '.join(class_names[:4])}, …)",
            next_step="Choose the data set it was trained on, or train a model for this one: tfopt train --help",
        )


def _application(text: str) -> tuple[keras.Model, str]:
    name, _, weights = text.partition(":")
    make = _application_maker(name)
    if weights not in ("", "random"):
        raise ModelError("Unknown weights", received=weights, allowed=f"keras:{name} or keras:{name}:random")
    try:
        with _impatient():
            model = make(weights=None if weights else "imagenet")
    except Exception as error:
        raise ModelError(
            f"The ImageNet weights of {name} could not be downloaded",
            received=first_line(error),
            next_step=f"Connect to the internet once, or take random weights: keras:{name}:random",
        ) from error
    if None in model.input_shape[1:]:
        model = _with_input_shape(model, (APPLICATION_SIZE, APPLICATION_SIZE, 3))
    return model, name.lower()


def untrained_application(
    name: str, shape: tuple[int, int, int], labels: tuple[str, ...]
) -> tuple[keras.Model, InputSpec]:
    """A fresh model of keras.applications for images of (height, width, channels), a class for each label.

    Raises ModelError for a name that is not there, and for a size that the architecture does not take.
    """
    make = _application_maker(name)
    try:
        model = make(weights=None, input_shape=shape, classes=len(labels))
    except ValueError as error:
        raise ModelError(
            f"{name} cannot be made for these images", received=f"{shape}, {first_line(error)}",
            next_step="Choose a larger image with --size",
        ) from error  # fmt: skip
    return model, InputSpec(*shape, labels=labels).with_scaling(_SCALING_OF.get(name, "signed"))


def _application_maker(name: str):
    known = [n for n in dir(keras.applications) if n[0].isupper()]
    if name not in known:
        raise unknown_name("model in keras.applications", name, known, error=ModelError)
    return getattr(keras.applications, name)


@contextmanager
def _impatient() -> Iterator[None]:
    """Keras downloads without a time limit, so a silent network would hang for ever, and reports on stdout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _spec_of(model: keras.Model, input_spec: str | None) -> tuple[InputSpec, str]:
    height, width, channels = model.input_shape[1:]
    if None in (height, width):
        size = re.search(r"\b(?:size|height)=(\d+)", input_spec or "")
        if not size:
            raise ModelError(
                "The model takes images of any size, and a mobile file needs one",
                received=model.input_shape,
                next_step="Choose it: --input-spec size=224",
            )
        height = width = int(size.group(1))
    try:
        spec = InputSpec(int(height), int(width), int(channels), head=_head_of(model))
    except InputError as error:
        raise ModelError(
            "The model does not take images",
            received=f"{model.input_shape}: {error}",
            allowed="(batch, height, width, 1 or 3)",
        ) from error
    inside = _scaling_inside(model)
    if inside:
        return spec.with_scaling(inside), "the layers"
    application = _application_of(model)
    if application and _SCALING_OF[application] != "raw":
        return spec.with_scaling(_SCALING_OF[application]), "keras.applications"
    return spec.with_scaling("signed"), "an assumption"


def assumption(loaded: LoadedModel) -> str:
    """What a user must hear of a model whose file does not say how its images are scaled; '' where it is known."""
    if loaded.spec_from != "an assumption":
        return ""
    return (
        f"warning: {loaded.name} does not say how its images are scaled: {loaded.spec.scaling} is assumed "
        "(-1..1); if it was trained otherwise, say so with --input-spec scaling=raw|unit|torch|caffe"
    )


def _scaling_inside(model: keras.Model) -> str | None:
    """What the arithmetic before the first kernel takes: 'raw' pixels, 'unit' ones; None without any."""
    for operation, _, _ in calls(model):
        if getattr(operation, "kernel", None) is not None:
            return None
        if isinstance(operation, keras.layers.Rescaling):
            return "raw" if np.abs(operation.scale).max() < 0.1 else "unit"
        if isinstance(operation, keras.layers.Normalization):
            return "raw" if np.sqrt(np.asarray(operation.variance)).max() > 2 else "unit"
        if not isinstance(operation, keras.Layer) and type(operation).__name__ in _ARITHMETIC:
            return "raw"
    return None


def _application_of(model: keras.Model) -> str | None:
    """The keras.applications name of the model, or of the first model inside it."""
    for candidate in (model, *(layer for layer in model.layers if isinstance(layer, keras.Model))):
        plain = re.sub(r"[^a-z0-9]", "", re.sub(r"_\d\.\d+_\d+$", "", candidate.name.lower()))
        plain = {"nasnet": "nasnetmobile"}.get(plain, plain)
        found = next((name for name in _SCALING_OF if name.lower() == plain), None)
        if found:
            return found
    return None


def _head_of(model: keras.Model) -> str:
    last = model.layers[-1]
    while isinstance(last, keras.Model):
        last = last.layers[-1]
    if isinstance(last, keras.layers.Softmax):
        return "softmax"
    activation = getattr(getattr(last, "activation", None), "__name__", "linear")
    return {"softmax": "softmax", "sigmoid": "sigmoid"}.get(activation, "logits")


def _with_input_shape(model: keras.Model, shape: tuple[int, int, int], *, copy_all: bool = True) -> keras.Model:
    """The same layers on images of another shape, with their weights (or those that still fit)."""
    name = model.inputs[0].name.split(":")[0]
    try:
        resized = keras.models.clone_model(model, input_tensors=keras.Input(shape, name=name))
        if copy_all:
            resized.set_weights(model.get_weights())
            finish_normalizations(resized)
    except Exception as error:
        raise ModelError(
            "The model cannot take images of that size",
            received=f"{shape} ({first_line(error)})",
            allowed=model.input_shape[1:],
        ) from error
    if not copy_all:
        _copy_matching(model, resized)
    return resized


def adapt(
    loaded: LoadedModel, classes: Sequence[str] | int, *, shape: tuple[int, int, int] | None = None, seed: int = 0
) -> LoadedModel:  # fmt: skip
    """The same network with a new head for other classes, and for images of another shape if asked.

    classes: their names, or how many. shape: (height, width, channels), by default as it is. One of our
    own architectures is built anew for another shape, since its stem depends on it; any other network
    keeps its layers. Copied is every weight that has the same shape in a layer of the same name:
    all but the head, and the stem where the channels differ. New weights are drawn from `seed`.
    Raises ModelError where the network does not end in a Dense layer or cannot take that shape.
    """
    count = classes if isinstance(classes, int) else len(classes)
    if count < 2:
        raise InputError("A classifier needs at least two classes", received=count)
    keras.utils.set_random_seed(seed)
    spec = dataclasses.replace(loaded.spec, labels=() if isinstance(classes, int) else tuple(classes))
    shape = tuple(shape or spec.shape)
    if spec.head == "sigmoid" and loaded.model.output_shape[-1] == 1:
        spec = dataclasses.replace(spec, head="softmax")
    model = loaded.model
    if shape != spec.shape:
        model = _rebuilt(loaded, shape) or _with_input_shape(model, shape, copy_all=False)
        spec = _with_shape(spec, shape)
    model = _with_head(model, count, spec.head)
    return dataclasses.replace(loaded, model=model, spec=spec, source=f"{loaded.source} with a new head")


def _rebuilt(loaded: LoadedModel, shape: tuple[int, int, int]) -> keras.Model | None:
    """One of our own architectures for another shape, weights copied where they fit; None for any other model."""
    from tfopt import builders

    known = builders.parse(loaded.model.name)
    if known is None:
        return None
    architecture, width = known
    same = builders.build(architecture, loaded.spec.shape, loaded.classes, width)
    if [w.shape for w in same.get_weights()] != [w.shape for w in loaded.model.get_weights()]:
        return None
    rebuilt = builders.build(architecture, shape, loaded.classes, width)
    _copy_matching(loaded.model, rebuilt)
    return rebuilt


def _with_head(model: keras.Model, units: int, head: str) -> keras.Model:
    kernels = [layer for layer in flat_layers(model) if getattr(layer, "kernel", None) is not None]
    if not kernels or not isinstance(kernels[-1], keras.layers.Dense):
        raise ModelError(
            "The model does not end in a Dense layer, so it cannot get another head",
            received=kernels[-1].name if kernels else model.name,
        )
    old = kernels[-1]
    config = {**old.get_config(), "units": units}
    if old.units == 1 and head == "softmax":
        config["activation"] = "softmax"
    return rewrite(model, {old.name: [keras.layers.Dense.from_config(config)]})


def _with_shape(spec: InputSpec, shape: tuple[int, int, int]) -> InputSpec:
    height, width, channels = shape
    scaling = spec.scaling
    if channels != spec.channels and scaling != "custom":
        plain = dataclasses.replace(spec, mean=(0.0,), std=(1.0,), order="rgb", channels=channels)
        spec = plain.with_scaling(scaling)
    return dataclasses.replace(spec, height=height, width=width, channels=channels)


def _copy_matching(source: keras.Model, target: keras.Model) -> None:
    weights = {layer.name: layer.weights for layer in flat_layers(source)}
    for layer in flat_layers(target):
        for mine, theirs in zip(layer.weights, weights.get(layer.name, ())):
            if mine.shape == theirs.shape:
                mine.assign(theirs)
    finish_normalizations(target)


def with_labels(loaded: LoadedModel, class_names: tuple[str, ...]) -> LoadedModel:
    """The same model whose spec carries the data's class names, where it has none of its own."""
    if loaded.spec.labels:
        return loaded
    return dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, labels=tuple(class_names)))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
