"""Files of models: what opens with its weights, what is damaged, and whose code is trusted."""

from __future__ import annotations

import json
import resource
import sys
import zipfile

import keras
import numpy as np
import pytest

from mobile_bench.inputs import InputSpec
from tfopt import models
from tfopt.errors import InputError, ModelError
from tfopt.modelfiles import SPEC_MEMBER

from .small_nets import Subclassed, net

layers = keras.layers


def edited(path, change, member="config.json"):
    """Rewrite one JSON member of a .keras file by `change(config)`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members[member])
    members[member] = json.dumps(change(config) or config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def same_answers(first, second):
    images = np.random.default_rng(0).normal(size=(4, *first.input_shape[1:])).astype(np.float32)
    np.testing.assert_allclose(first(images), second(images), atol=1e-6)


# Files


def test_keras_and_h5_files_load_with_their_weights(tmp_path):
    model = net()
    for name in ("mine.keras", "mine.h5"):
        model.save(tmp_path / name)
        loaded = models.load(tmp_path / name)
        same_answers(model, loaded.model)
        assert (loaded.name, loaded.spec.shape, loaded.classes) == ("mine", (8, 8, 1), 3)
        assert (loaded.spec.scaling, loaded.spec_from, loaded.source) == (
            "signed",
            "an assumption",
            str(tmp_path / name),
        )


def test_a_saved_spec_comes_back_and_plain_keras_opens_the_file(tmp_path):
    spec = InputSpec(8, 8, 1, resize="crop", labels=("a", "b", "c")).with_scaling("unit")
    model = net()
    model.compile("adam", "mse")
    models.save(model, tmp_path / "resnet" / "model.keras", spec)
    loaded = models.load(tmp_path / "resnet" / "model.keras")
    assert loaded.spec == spec and loaded.spec_from == "the model file" and loaded.name == "resnet"
    plain = keras.saving.load_model(tmp_path / "resnet" / "model.keras")
    same_answers(model, plain)
    assert not plain.compiled
    assert models.load(tmp_path / "resnet" / "model.keras", input_spec="scaling=raw").spec.scaling == "raw"


def test_saving_on_a_full_disk_leaves_nothing(tmp_path):
    models.save(net(), tmp_path / "model.keras", InputSpec(8, 8, 1))
    before = (tmp_path / "model.keras").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written.*model\.keras.*Free some space"):
            models.save(net(layers.Conv2D(64, 5)), tmp_path / "model.keras", InputSpec(8, 8, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]
    assert (tmp_path / "model.keras").read_bytes() == before


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    place = content.find(b"HDF") + 3000
    content[place : place + 40] = bytes(255 - byte for byte in content[place : place + 40])
    path.write_bytes(content)


def _bomb(path):
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.extra", bytes(300 << 20))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("m.keras", lambda path: path.unlink(), r"does not exist.*m\.keras.*\.keras, \.h5 or a SavedModel folder"),
        ("m.keras", _cut, "damaged, cut short or not a Keras 3 file"),
        ("m.keras", _flip, "damaged, cut short"),
        ("m.keras", lambda path: path.write_bytes(b""), "damaged, cut short"),
        ("m.keras", lambda path: path.write_text("not a zip"), "damaged, cut short"),
        ("m.keras", _bomb, "damaged.*would unpack to 3145"),
        ("m.keras", lambda path: edited(path, lambda c: ["nonsense"]), "Keras cannot load the model"),
        ("m.keras", lambda path: edited(path, lambda c: {"class_name": "Nonsense", "config": {}}), "Keras cannot load"),
        ("m.keras", lambda path: edited(path, lambda c: c["config"]["layers"].pop(1) and None), "Keras cannot load"),
        ("m.h5", _cut, r"The \.h5 file is damaged"),
        ("m.h5", lambda path: path.write_bytes(b""), r"The \.h5 file is damaged"),
        ("m.h5", lambda path: path.write_text("not HDF5"), r"The \.h5 file is damaged"),
        ("m.weights.h5", lambda path: None, "holds weights only.*Save the whole model"),
    ],
)
def test_damaged_files_are_one_clear_error(tmp_path, name, spoil, message):
    path = tmp_path / name
    net().save_weights(path) if "weights" in name else net().save(path)
    spoil(path)
    with pytest.raises(ModelError, match=message) as raised:
        models.load(path)
    assert raised.value.exit_code == 2 and str(path) in str(raised.value)


def test_other_zip_files_and_other_kinds_of_files_are_refused(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.keras")
    (tmp_path / "m.tflite").write_bytes(b"TFL3")
    (tmp_path / "m.pt").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("arrays.keras", "no config.json"),
        ("m.tflite", "already converted: use tfopt evaluate"),
        ("m.pt", "not a Keras model"),
        ("folder", "not a SavedModel"),
    ]:
        with pytest.raises(ModelError, match=message):
            models.load(tmp_path / name)


def test_a_damaged_spec_in_the_file_is_said(tmp_path):
    models.save(net(), tmp_path / "m.keras", InputSpec(8, 8, 1))
    edited(tmp_path / "m.keras", lambda spec: {**spec, "std": [0.0]}, SPEC_MEMBER)
    with pytest.raises(ModelError, match=r"input spec in the model file is damaged.*m\.keras.*std must be above 0"):
        models.load(tmp_path / "m.keras")
    models.save(net(), tmp_path / "n.keras", InputSpec(8, 8, 1, labels=("a", "b")))
    with pytest.raises(ModelError, match=r"one label for each output.*2 labels.*3 labels"):
        models.load(tmp_path / "n.keras")


def test_a_deep_configuration_ends_in_an_error(tmp_path):
    net().save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = b"[" * 100_000 + b"]" * 100_000
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ModelError, match="damaged"):
        models.load(tmp_path / "m.keras")


# Code in files


def test_a_lambda_layer_needs_trust(tmp_path):
    model = net(layers.Lambda(lambda x: x * 2, output_shape=(8, 8, 1)))
    for name in ("m.keras", "m.h5"):
        model.save(tmp_path / name)
        with pytest.raises(ModelError, match=r"code that is not Keras's own.*Lambda lambda.*--trust"):
            models.load(tmp_path / name)
        same_answers(model, models.load(tmp_path / name, trust=True).model)


EVIL = {"class_name": "__lambda__", "config": {"value": ["4wEAAAAA", None, None]}}

EVIL_FUNCTION = {"module": "evil_module", "class_name": "function", "config": "f", "registered_name": "f"}


def _inside(config):
    """Where a nested model keeps its layers."""
    return config["config"]["layers"][1]["config"]["layers"]


@pytest.mark.parametrize(
    "hide",
    [
        lambda c: c["config"]["layers"][-1]["config"].update(activation=EVIL),
        lambda c: _inside(c)[-1]["config"].update(kernel_initializer=EVIL),
        lambda c: _inside(c)[-1].update(module="evil_module", class_name="Dense"),
        lambda c: _inside(c)[-1].update(module="evil_module", class_name=["unhashable"]),
        lambda c: _inside(c)[-1]["config"].update(activation=EVIL_FUNCTION),
        lambda c: c["config"]["layers"][1].update(compile_config={"loss": EVIL_FUNCTION}),
        lambda c: c["build_config"].update(deep=[[{"module": "evil_module.sub"}]]),
        lambda c: _inside(c)[-1].update(module="kerasevil", class_name="Dense"),
        lambda c: _inside(c)[-1].update(module=None, class_name="Evil", registered_name="Evil"),
    ],
)  # fmt: skip
def test_hidden_code_is_refused_and_never_imported(tmp_path, monkeypatch, hide):
    for name in ("evil_module", "kerasevil"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    nested = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(4)])
    keras.Sequential([keras.Input((8, 8, 1)), nested, layers.Dense(3)]).save(tmp_path / "m.keras")
    edited(tmp_path / "m.keras", hide)
    with pytest.raises(ModelError, match=r"code that is not Keras's own.*--trust"):
        models.load(tmp_path / "m.keras")
    assert not (tmp_path / "was-run").exists() and "evil_module" not in sys.modules


def test_classes_of_another_module_load_with_trust(tmp_path, monkeypatch):
    code = "import keras\nclass Doubled(keras.layers.Layer):\n    def call(self, x):\n        return x * 2\n"
    (tmp_path / "their_layers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import their_layers

    before = set(keras.saving.get_custom_objects())
    model = net(their_layers.Doubled())
    model.save(tmp_path / "m.keras")
    edited(tmp_path / "m.keras", lambda c: c["config"]["layers"][1].update(module="their_layers"))
    monkeypatch.delitem(sys.modules, "their_layers")
    with pytest.raises(ModelError, match=r"Doubled .*of module their_layers"):
        models.load(tmp_path / "m.keras")
    try:
        same_answers(model, models.load(tmp_path / "m.keras", trust=True).model)
    finally:
        for name in set(keras.saving.get_custom_objects()) - before:
            del keras.saving.get_custom_objects()[name]
    edited(tmp_path / "m.keras", lambda c: c["config"]["layers"][1].update(module="nowhere_to_be_found"))
    with pytest.raises(ModelError, match=r"not installed here.*nowhere_to_be_found.*PYTHONPATH"):
        models.load(tmp_path / "m.keras", trust=True)


def test_a_class_of_no_module_is_asked_for_in_one(tmp_path):
    class Halved(layers.Layer):
        def call(self, x):
            return x / 2

    net(Halved()).save(tmp_path / "m.keras")  # as Keras writes a class of the program's own file
    edited(tmp_path / "m.keras", lambda c: c["config"]["layers"][1].update(module=None, registered_name="Halved"))
    with pytest.raises(ModelError, match=r"Halved.*--trust"):
        models.load(tmp_path / "m.keras")
    with pytest.raises(ModelError, match=r"Halved, of which the file does not say where.*a module of its own"):
        models.load(tmp_path / "m.keras", trust=True)


def test_classes_that_the_caller_registered_are_known(tmp_path):
    @keras.saving.register_keras_serializable("tfopt_tests")
    class Tripled(layers.Layer):
        def call(self, x):
            return x * 3

    model = net(Tripled())
    model.save(tmp_path / "m.keras")
    same_answers(model, models.load(tmp_path / "m.keras").model)


def test_a_subclassed_model_in_a_file_is_one_clear_error(tmp_path):
    model = Subclassed()
    model(np.zeros((1, 8, 8, 1), np.float32))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match=r"code that is not Keras's own.*Subclassed"):
        models.load(tmp_path / "m.keras")
