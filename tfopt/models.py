"""Load the user's classifier safely, and say how it wants to be fed.

    loaded = tfopt.models.load("mine.keras")            # or .h5, a SavedModel folder
    loaded = tfopt.models.load("keras:MobileNetV2")     # ImageNet weights, downloaded by Keras
    loaded.model, loaded.spec

A model file is data, not code: Lambda layers, classes that Keras does not know and pickled arrays
are refused unless the caller says `trust=True`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import keras

from mobile_bench.files import atomic_path
from mobile_bench.inputs import InputSpec, override
from tfopt.errors import InputError, ModelError, unknown_name

SPEC_MEMBER = "tfopt_input_spec.json"

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
        model, stored = _from_path(path, trust)
        name = path.parent.name if path.stem == "model" else path.stem
    return from_keras(model, name=name, source=text, stored_spec=stored, input_spec=input_spec)


def from_keras(
    model: keras.Model, *, name: str | None = None, source: str = "Python", stored_spec: InputSpec | None = None,
    input_spec: str | None = None,
) -> LoadedModel:  # fmt: skip
    """Wrap a model that is already in memory; raises ModelError if it is no image classifier."""
    check_classifier(model)
    spec, origin = (stored_spec, "the model file") if stored_spec else _spec_of(model, input_spec)
    if input_spec:
        spec, origin = override(spec, input_spec), "the user"
    if tuple(model.input_shape[1:]) != spec.shape:
        model = _with_input_shape(model, spec.shape)
    return LoadedModel(model, spec, _slug(name or model.name), source, origin)


def save(model: keras.Model, path: str | Path, spec: InputSpec) -> None:
    """Write a .keras file that carries its InputSpec; any Keras 3 opens it as usual."""
    with atomic_path(path) as temporary:
        # Keras insists on the suffix, so the work file gets one and is folded back.
        work = temporary.with_name(temporary.name + ".keras")
        try:
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
    shapes = model.input_shape, model.output_shape
    for what, tensors, rank in (("input", model.inputs, 4), ("output", model.outputs, 2)):
        if len(tensors) != 1 or len(tensors[0].shape) != rank:
            raise ModelError(
                f"The model's {what} is not that of an image classifier",
                received=shapes[what == "output"],
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


def _from_path(path: Path, trust: bool) -> tuple[keras.Model, InputSpec | None]:
    if not path.exists():
        raise ModelError("The model file does not exist", received=path, allowed=".keras, .h5 or a SavedModel folder")
    if path.is_dir():
        from tfopt.tfmot.savedmodel import load_saved_model

        return load_saved_model(path, trust=trust), None
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        hint = "It is already converted: use tfopt evaluate or mobile-bench run" if path.suffix == ".tflite" else None
        raise ModelError(
            "The file is not a Keras model", received=path, allowed=".keras, .h5 or a SavedModel folder", next_step=hint
        )
    config, spec = _read_keras(path) if path.suffix == ".keras" else (_read_h5(path), None)
    if not trust:
        _refuse_foreign(config, path)
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=not trust), spec
    except Exception as error:  # noqa: BLE001 - whatever Keras raises here is about this file
        raise ModelError("Keras cannot load the model", received=f"{path} ({_first_line(error)})") from error


def _read_keras(path: Path) -> tuple[dict, InputSpec | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"{broken} is damaged")
            config = json.loads(archive.read("config.json"))
            spec = json.loads(archive.read(SPEC_MEMBER)) if SPEC_MEMBER in archive.namelist() else None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ModelError(
            "The .keras file is damaged, cut short or not a Keras 3 file",
            received=f"{path} ({_first_line(error)})",
            next_step="Copy it again, or save it again with model.save('NAME.keras')",
        ) from error
    return config, InputSpec.from_dict(spec) if spec else None


def _read_h5(path: Path) -> dict:
    import h5py

    try:
        with h5py.File(path) as file:
            config = file.attrs.get("model_config")
    except OSError as error:
        raise ModelError("The .h5 file is damaged, cut short or not HDF5", received=f"{path} ({error})") from error
    if config is None:
        raise ModelError(
            "The .h5 file holds weights only", received=path, next_step="Save the whole model: model.save('NAME.keras')"
        )
    return json.loads(config)


def _refuse_foreign(config: dict, path: Path) -> None:
    """Refuse whatever is not one of Keras's own classes, before any of it is imported."""
    for entry in _walk(config):
        name, module = entry.get("class_name"), entry.get("module")
        registered = entry.get("registered_name")
        known = registered and keras.saving.get_registered_object(registered) is not None
        foreign = module is not None and not known and module.split(".")[0] not in ("keras", "builtins", "tf_keras", "tensorflow")
        if name in ("Lambda", "__lambda__", "function") or foreign:
            raise ModelError(
                "The model file carries code that is not Keras's own",
                received=f"{path}: {name} {entry.get('config', {}).get('name', '') if isinstance(entry.get('config'), dict) else ''}".rstrip(),
                next_step="If you trust whoever made the file, say --trust (it may run any code on this machine)",
            )


def _walk(value):
    if isinstance(value, dict):
        if isinstance(value.get("class_name"), str):
            yield value
        for child in value.values():
            yield from _walk(child)
    elif isinstance(value, list):
        for child in value:
            yield from _walk(child)


def _application(text: str) -> tuple[keras.Model, str]:
    name, _, weights = text.partition(":")
    known = [n for n in dir(keras.applications) if n[0].isupper()]
    if name not in known:
        raise unknown_name("model in keras.applications", name, known, error=ModelError)
    if weights not in ("", "random"):
        raise ModelError("Unknown weights", received=weights, allowed=f"keras:{name} or keras:{name}:random")
    try:
        return getattr(keras.applications, name)(weights=None if weights else "imagenet"), name.lower()
    except Exception as error:  # noqa: BLE001 - download failures come as many types
        raise ModelError(
            f"The ImageNet weights of {name} could not be downloaded",
            received=_first_line(error),
            next_step=f"Connect to the internet once, or take random weights: keras:{name}:random",
        ) from error


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
        raise ModelError(str(error)) from error
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)][:3]
    application = _application_of(model)
    if application:
        return spec.with_scaling(_SCALING_OF[application]), "keras.applications"
    if any(isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)) for layer in layers):
        return spec.with_scaling("raw"), "the layers"
    return spec.with_scaling("signed"), "an assumption"


def _application_of(model: keras.Model) -> str | None:
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"_\d\.\d+_\d+$", "", model.name.lower()))
    return next((name for name in _SCALING_OF if name.lower() == plain), None)


def _head_of(model: keras.Model) -> str:
    last = model.layers[-1]
    while isinstance(last, keras.Model):
        last = last.layers[-1]
    if isinstance(last, keras.layers.Softmax):
        return "softmax"
    activation = getattr(getattr(last, "activation", None), "__name__", "linear")
    return {"softmax": "softmax", "sigmoid": "sigmoid"}.get(activation, "logits")


def _with_input_shape(model: keras.Model, shape: tuple[int, int, int]) -> keras.Model:
    try:
        resized = keras.models.clone_model(model, input_tensors=keras.Input(shape, name=model.inputs[0].name.split(":")[0]))
        resized.set_weights(model.get_weights())
    except Exception as error:  # noqa: BLE001 - a shape that does not fit fails in many ways
        raise ModelError(
            "The model cannot take images of that size", received=f"{shape} ({_first_line(error)})", allowed=model.input_shape[1:]
        ) from error
    return resized


def with_labels(loaded: LoadedModel, class_names: tuple[str, ...]) -> LoadedModel:
    """The same model whose spec carries the data's class names, where it has none of its own."""
    if loaded.spec.labels:
        return loaded
    return dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, labels=tuple(class_names)))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
