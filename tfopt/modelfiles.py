"""Open a Keras model file without running what is in it.

A model file is data, not code. Before Keras sees it, its configuration is searched for everything
that would run: Lambda layers, pickled functions, classes of modules other than Keras's own. With
`trust`, those modules are imported and their classes registered, which may run any code.
"""

from __future__ import annotations

import importlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import keras

from mobile_bench.inputs import InputSpec
from tfopt.errors import ModelError, Problem

SPEC_MEMBER = "tfopt_input_spec.json"
ALLOWED = ".keras, .h5 or a SavedModel folder"
#: Keras stores weights as they are, so a real file hardly grows when it is unpacked.
_MOST_EXPANSION = 20
_MOST_CONFIG_BYTES = 64 << 20


def read(path: Path, trust: bool) -> tuple[keras.Model, InputSpec | None]:
    """The model and, where tfopt.models.save wrote the file, its InputSpec. Raises ModelError."""
    if not path.exists():
        raise ModelError("The model file does not exist", received=path, allowed=ALLOWED)
    if path.is_dir():
        from tfopt.tfmot.savedmodel import load_saved_model

        return load_saved_model(path, trust=trust), None
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        hint = "It is already converted: use tfopt evaluate or mobile-bench run" if path.suffix == ".tflite" else None
        raise ModelError("The file is not a Keras model", received=path, allowed=ALLOWED, next_step=hint)
    config, spec = _read_keras(path) if path.suffix == ".keras" else (_read_h5(path), None)
    foreign = list(_foreign(config))
    if foreign and not trust:
        raise ModelError(
            "The model file carries code that is not Keras's own",
            received=f"{path}: {_describe(foreign[0])}",
            next_step="If you trust whoever made the file, say --trust (it may run any code on this machine)",
        )
    for entry in foreign:
        _register(entry)
    try:
        objects = None if path.suffix == ".keras" else KERAS_2_LAYERS
        return keras.saving.load_model(path, custom_objects=objects, compile=False, safe_mode=not trust), spec
    except Exception as error:
        raise ModelError("Keras cannot load the model", received=f"{path} ({first_line(error)})") from error


def _without_groups(kind: type[keras.Layer]) -> type[keras.Layer]:
    """Keras 2 writes 'groups' into layers that have none in Keras 3, which then refuses the file."""

    class Shim(kind):
        @classmethod
        def from_config(cls, config, **_):
            return kind.from_config({key: value for key, value in config.items() if key != "groups"})

    return Shim


#: custom_objects for .h5 files that Keras 2 wrote; what they make are Keras 3's own layers.
KERAS_2_LAYERS = {
    kind.__name__: _without_groups(kind)
    for kind in (keras.layers.DepthwiseConv2D, keras.layers.Conv2DTranspose, keras.layers.SeparableConv2D)
}


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _read_keras(path: Path) -> tuple[dict, InputSpec | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_bomb(archive, path)
            broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"{broken} is damaged")
            if "config.json" not in archive.namelist():
                raise zipfile.BadZipFile("it has no config.json")
            config = json.loads(archive.read("config.json"))
            spec = json.loads(archive.read(SPEC_MEMBER)) if SPEC_MEMBER in archive.namelist() else None
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, EOFError) as error:
        raise ModelError(
            "The .keras file is damaged, cut short or not a Keras 3 file",
            received=f"{path} ({first_line(error)})",
            next_step="Copy it again, or save the whole model again with model.save('NAME.keras')",
        ) from error
    try:
        return config, InputSpec.from_dict(spec) if spec is not None else None
    except Problem as problem:
        raise ModelError("The input spec in the model file is damaged", received=f"{path} ({problem})") from problem


def _refuse_bomb(archive: zipfile.ZipFile, path: Path) -> None:
    unpacked = sum(member.file_size for member in archive.infolist())
    config = [member.file_size for member in archive.infolist() if member.filename.endswith(".json")]
    if unpacked > max(1 << 20, _MOST_EXPANSION * path.stat().st_size) or sum(config) > _MOST_CONFIG_BYTES:
        raise zipfile.BadZipFile(f"it would unpack to {unpacked} bytes")


def _read_h5(path: Path) -> dict:
    import h5py

    try:
        with h5py.File(path) as file:
            config = file.attrs.get("model_config")
        if config is not None:
            config = json.loads(config)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ModelError(
            "The .h5 file is damaged, cut short or not HDF5", received=f"{path} ({first_line(error)})"
        ) from error
    if config is None:
        raise ModelError(
            "The .h5 file holds weights only", received=path, next_step="Save the whole model: model.save('NAME.keras')"
        )
    return config


def _foreign(config: dict) -> Iterator[dict]:
    """The entries of a model's configuration that would run other code than Keras's own."""
    config = (
        {key: value for key, value in config.items() if key != "compile_config"} if isinstance(config, dict) else config
    )
    for entry in _walk(config):
        if entry.get("class_name") in ("Lambda", "__lambda__") or not (_is_keras(entry) or _is_registered(entry)):
            yield entry


def has_own_classes(path: Path) -> bool:
    """Whether a .keras file has layers or activations that are not Keras's: only who registered them can load it."""
    return any(
        entry.get("module") == "builtins"  # a registered function; Keras's own go by their names alone
        if entry.get("class_name") == "function"
        else not _is_keras(entry) and entry.get("class_name") not in ("Lambda", "__lambda__")
        for entry in _walk({key: value for key, value in _read_keras(path)[0].items() if key != "compile_config"})
    )


def _walk(value) -> Iterator[dict]:
    """Every object in a configuration, however deep; written without recursion, for it may be very deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "class_name" in value or "module" in value:
                yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _is_keras(entry: dict) -> bool:
    module = entry.get("module")
    if module is None:
        # .h5 files name no modules at all; .keras files leave it out for classes of the caller's own.
        return "module" not in entry or entry.get("registered_name") is None
    return str(module).split(".")[0] in ("keras", "builtins")


def _is_registered(entry: dict) -> bool:
    """Whether the caller's own program has brought that class or function."""
    names = (entry.get("registered_name"), entry.get("class_name"), entry.get("config"))
    return any(isinstance(name, str) and keras.saving.get_registered_object(name) is not None for name in names)


def _describe(entry: dict) -> str:
    config = entry.get("config")
    own = config.get("name", "") if isinstance(config, dict) else ""
    module = entry.get("module")
    return " ".join(filter(None, (str(entry.get("class_name")), str(own), f"of module {module}" if module else "")))


def _register(entry: dict) -> None:
    """Import what a trusted file names; Keras itself would not."""
    module, name = entry.get("module"), entry.get("class_name")
    if name in ("Lambda", "__lambda__") or not isinstance(name, str):
        return
    name = entry.get("config") if name == "function" else name
    try:
        found = getattr(importlib.import_module(module or "__main__"), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            "The model needs code that is not installed here",
            received=f"{name} of module {module} ({first_line(error)})"
            if module
            else f"{name}, of which the file does not say where it is",
            next_step="Put the module on PYTHONPATH, or import it yourself before tfopt.models.load"
            if module
            else "Write the class in a module of its own, save the model anew, and put the module on PYTHONPATH",
        ) from error
    keras.saving.get_custom_objects()[entry.get("registered_name") or name] = found
