"""What a model file may be, what is refused, how the input spec is found, guessing, and new heads."""

from __future__ import annotations

import dataclasses
import json
import resource
import socket
import sys
import zipfile

import keras
import numpy as np
import pytest

from mobile_bench.inputs import InputSpec
from tfopt import builders, convert, data, models, training
from tfopt.errors import InputError, ModelError
from tfopt.modelfiles import SPEC_MEMBER

layers = keras.layers


def net(*front, shape=(8, 8, 1), outputs=3, activation="softmax", name="net"):
    """A small classifier with `front` before its first kernel."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input(shape), *front, layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(),
         layers.Dense(outputs, activation=activation)], name=name,
    )  # fmt: skip


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


# What counts as a classifier


class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(keras.ops.mean(x, (1, 2)))


def _two_inputs():
    a, b = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    return keras.Model([a, b], layers.Dense(2)(layers.Flatten()(layers.Add()([a, b]))))


def _two_outputs():
    a = keras.Input((8, 8, 1))
    flat = layers.Flatten()(a)
    return keras.Model(a, [layers.Dense(2)(flat), layers.Dense(3)(flat)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Subclassed, r"subclassed.*Subclassed.*Rebuild it with keras\.Input"),
        (lambda: keras.Sequential([layers.Dense(3)]), "not built.*input shape"),
        (_two_inputs, r"input is not that of an image classifier.*\(None, 8, 8, 1\), \(None, 8, 8, 1\)"),
        (_two_outputs, r"output is not that of an image classifier.*\(None, 2\), \(None, 3\)"),
        (lambda: keras.Sequential([keras.Input((5,)), layers.Dense(3)]), r"input is not that.*\(None, 5\)"),
        (lambda: keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(3, 3)]), r"output is not that.*6, 6, 3"),
        (lambda: keras.Sequential([keras.Input((8, 8, None)), layers.GlobalAveragePooling2D()]), "input is not that"),
        (lambda: net(shape=(8, 8, 4)), r"does not take images.*4 channels.*1 or 3"),
        (lambda: net(shape=(None, None, 3)), "any size.*--input-spec size=224"),
        (lambda: "a text", "not a Keras 3 model.*str"),
    ],
)
def test_what_is_no_image_classifier_is_said(make, message):
    with pytest.raises(ModelError, match=message):
        models.from_keras(make())


def test_a_subclassed_model_in_a_file_is_one_clear_error(tmp_path):
    model = Subclassed()
    model(np.zeros((1, 8, 8, 1), np.float32))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match=r"code that is not Keras's own.*Subclassed"):
        models.load(tmp_path / "m.keras")


def test_dictionaries_and_fixed_batches_are_put_right():
    image = keras.Input((8, 8, 1), name="image")
    scores = layers.Dense(3, activation="softmax")(layers.Flatten()(image))
    wrapped = keras.Model({"image": image}, {"scores": scores})
    plain = models.from_keras(wrapped).model
    assert plain.input_shape == (None, 8, 8, 1) and plain.output_shape == (None, 3)
    fixed = keras.Sequential([keras.Input(batch_shape=(1, 8, 8, 1)), layers.Flatten(), layers.Dense(3)])
    free = models.from_keras(fixed).model
    assert free.input_shape == (None, 8, 8, 1)
    image = np.ones((1, 8, 8, 1), np.float32)
    np.testing.assert_allclose(free(image), fixed(image))


def test_outputs_and_classes_must_agree():
    models.check_classes(models.from_keras(net()), ("a", "b", "c"))
    models.check_classes(models.from_keras(net(outputs=1, activation="sigmoid")), ("a", "b"))
    with pytest.raises(ModelError, match=r"does not match the data's classes.*3 outputs for 2 classes \(a, b"):
        models.check_classes(models.from_keras(net()), ("a", "b"))


def test_labels_are_added_where_there_are_none():
    loaded = models.with_labels(models.from_keras(net()), ("a", "b", "c"))
    assert loaded.spec.labels == ("a", "b", "c")
    assert models.with_labels(loaded, ("x", "y", "z")).spec.labels == ("a", "b", "c")


# Input specs


@pytest.mark.parametrize(
    ("model", "scaling", "origin"),
    [
        (lambda: net(), "signed", "an assumption"),
        (lambda: net(layers.Rescaling(1 / 255)), "raw", "the layers"),
        (lambda: net(layers.RandomFlip(), layers.Rescaling(1 / 127.5, -1)), "raw", "the layers"),
        (lambda: net(layers.Rescaling(2.0, -1)), "unit", "the layers"),
        (lambda: net(layers.Normalization(mean=[120.0], variance=[3000.0])), "raw", "the layers"),
        (lambda: net(layers.Normalization(mean=[0.5], variance=[0.04])), "unit", "the layers"),
        (lambda: net(keras.Sequential([layers.Rescaling(1 / 255)])), "raw", "the layers"),
        (lambda: net(name="resnet50"), "caffe", "keras.applications"),
        (lambda: net(name="mobilenetv2_1.00_224"), "signed", "keras.applications"),
        (lambda: net(keras.Sequential([keras.Input((8, 8, 1)), layers.ReLU()], name="densenet121")), "torch",
         "keras.applications"),
        (lambda: net(name="mobilenet_v3_small"), "signed", "an assumption"),
    ],
)  # fmt: skip
def test_the_scaling_comes_from_the_layers_or_the_application(model, scaling, origin):
    loaded = models.from_keras(model())
    assert loaded.spec == loaded.spec.with_scaling(scaling) and loaded.spec_from == origin


def test_arithmetic_without_layers_counts_as_scaling():
    image = keras.Input((8, 8, 3))
    scores = layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(image / 127.5 - 1.0)))
    loaded = models.from_keras(keras.Model(image, scores))
    assert (loaded.spec.scaling, loaded.spec_from) == ("raw", "the layers")


@pytest.mark.parametrize(
    ("end", "head"),
    [
        ([layers.Dense(3, activation="softmax")], "softmax"),
        ([layers.Dense(3), layers.Softmax()], "softmax"),
        ([layers.Dense(3), layers.Activation("softmax")], "softmax"),
        ([layers.Dense(3)], "logits"),
        ([layers.Dense(1, activation="sigmoid")], "sigmoid"),
        ([keras.Sequential([keras.Input((192,)), layers.Dense(3, activation="softmax")])], "softmax"),
    ],
)
def test_the_head_is_read_off_the_last_layer(end, head):
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), *end])
    assert models.from_keras(model).spec.head == head
    assert models.from_keras(model, input_spec="head=logits").spec.head == "logits"


def test_an_open_size_is_filled_in_by_the_user():
    model = net(shape=(None, None, 3))
    loaded = models.from_keras(model, input_spec="size=24,scaling=unit")
    assert loaded.model.input_shape == (None, 24, 24, 3) and loaded.spec_from == "the user"
    image = np.random.default_rng(0).random((1, 24, 24, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded.model(image), model(image), atol=1e-6)
    resized = models.from_keras(net(shape=(32, 32, 3)), input_spec="height=16,width=20")
    assert resized.model.input_shape == (None, 16, 20, 3)
    flat = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(3)])
    with pytest.raises(ModelError, match=r"cannot take images of that size.*\(16, 16, 1\).*\(8, 8, 1\)"):
        models.from_keras(flat, input_spec="size=16")


@pytest.mark.parametrize(
    ("text", "message"), [("scale=unit", "input spec key"), ("scaling=half", "no scaling of that name")]
)
def test_a_wrong_input_spec_is_said(text, message):
    with pytest.raises(InputError, match=message):
        models.from_keras(net(), input_spec=text)


# keras.applications


def test_every_application_is_known_by_its_own_name():
    for name, scaling in [("MobileNet", "signed"), ("MobileNetV3Small", "raw")]:
        loaded = models.load(f"keras:{name}:random")
        assert loaded.spec == loaded.spec.with_scaling(scaling)
        assert loaded.name == name.lower() and loaded.classes == 1000 and loaded.spec.head == "softmax"


@pytest.mark.parametrize("behaviour", ["nobody listens", "never answers"])
def test_weights_that_cannot_be_downloaded_end_in_an_error(monkeypatch, tmp_path, capsys, behaviour):
    from keras.src.utils import file_utils

    monkeypatch.setattr(models, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path / "keras"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        if behaviour == "nobody listens":
            server.close()
        with pytest.raises(ModelError, match=r"weights of MobileNet could not be downloaded.*keras:MobileNet:random"):
            models.load("keras:MobileNet")
    assert socket.getdefaulttimeout() is None
    assert capsys.readouterr().out == ""  # stdout belongs to --json


def test_wrong_applications_and_weights_list_what_exists():
    with pytest.raises(ModelError, match=r"Did you mean.*MobileNetV2"):
        models.load("keras:MobilNetV2")
    with pytest.raises(ModelError, match=r"Unknown weights.*noisy.*keras:MobileNet:random"):
        models.load("keras:MobileNet:noisy")


# Guessing


def test_a_trained_model_passes_with_its_accuracy(trained, digits):
    found = models.check_not_by_chance(trained, digits["validation"])
    assert found == training.accuracy(trained.model, digits["validation"], trained.spec) > 0.9


def test_a_wrong_scaling_is_found_out_and_named(trained, digits):
    far_off = dataclasses.replace(trained.spec, mean=(9000.0,), std=(3.0,))
    loaded = dataclasses.replace(trained, spec=far_off, spec_from="the user")
    message = r"no better than guessing.*scaling custom \(the user\); guessing gets 10\.0%.*--input-spec scaling=signed"
    with pytest.raises(ModelError, match=message):
        models.check_not_by_chance(loaded, digits["validation"])


def test_an_assumed_scaling_that_is_not_the_best_is_refused(trained, digits):
    """The digits' model still reads two in five images with pixels of 0..1, which nobody would call guessing."""
    spec = trained.spec.with_scaling("unit")
    assumed = dataclasses.replace(trained, spec=spec, spec_from="an assumption")
    with pytest.raises(ModelError, match=r"scaling is unknown.*scaling unit.*--input-spec scaling=signed"):
        models.check_not_by_chance(assumed, digits["validation"])
    said = dataclasses.replace(trained, spec=spec, spec_from="the user")  # and the user is not contradicted
    assert 0.15 < models.check_not_by_chance(said, digits["validation"]) < 0.8
    right = dataclasses.replace(trained, spec_from="an assumption")
    assert models.check_not_by_chance(right, digits["validation"]) > 0.9


def test_an_untrained_model_is_told_that_no_scaling_helps(digits):
    loaded = models.from_keras(net(outputs=10))
    with pytest.raises(ModelError, match=r"no better than guessing.*No other scaling helps"):
        models.check_not_by_chance(loaded, digits["validation"])


def test_a_model_that_has_diverged_is_called_that(digits):
    model = net(outputs=10)
    weights = model.get_weights()
    weights[-1][:2] = np.nan
    model.set_weights(weights)
    with pytest.raises(ModelError, match=r"Layer \w+ of the model has weights that are not finite.*2 of 10"):
        models.check_not_by_chance(models.from_keras(model), digits["validation"])


def test_classes_in_another_order_are_recognised(trained, digits):
    validation = digits["validation"]
    moved = dataclasses.replace(validation, labels=((validation.labels + 3) % 10).astype(np.int32))
    with pytest.raises(ModelError, match=r"follow the classes in another order: 9\d\.\d% would be right"):
        models.check_not_by_chance(trained, moved)


def test_a_handful_of_images_never_stops_anything(trained, digits):
    validation = digits["validation"].balanced(4)
    wrong = dataclasses.replace(validation, labels=((validation.labels + 3) % 10).astype(np.int32))
    assert models.check_not_by_chance(trained, wrong) == 0.0


def test_naming_the_larger_class_only_is_guessing_too(digits):
    """Nine of ten images are of one class, so a model that always names it is right 90% of the time."""
    random = np.random.default_rng(0)
    labels = (np.arange(1000) % 10 == 0).astype(np.int64)
    uneven = data.from_arrays((random.integers(0, 256, (1000, 8, 8, 1), np.uint8), labels))
    model = net(outputs=2)
    model.layers[-1].set_weights([np.zeros((4, 2), np.float32), np.array([1.0, 0.0], np.float32)])
    with pytest.raises(ModelError, match=r"no better than guessing.*(8|9)\d\.\d% right.*guessing gets 50"):
        models.check_not_by_chance(models.from_keras(model), uneven["train"])


# New heads


def test_a_new_head_keeps_every_other_weight(trained, digits):
    adapted = models.adapt(trained, ("even", "odd"), seed=3)
    assert adapted.model.output_shape == (None, 2) and adapted.spec.labels == ("even", "odd")
    assert trained.model.output_shape == (None, 10)
    old = {layer.name: layer.get_weights() for layer in trained.model.layers}
    for layer in adapted.model.layers:
        for mine, theirs in zip(layer.get_weights(), old[layer.name]):
            if layer.name != "classes":
                np.testing.assert_array_equal(mine, theirs)
    again, other = models.adapt(trained, 2, seed=3), models.adapt(trained, 2, seed=4)
    np.testing.assert_array_equal(again.model.layers[-1].kernel, adapted.model.layers[-1].kernel)
    assert not np.array_equal(other.model.layers[-1].kernel, adapted.model.layers[-1].kernel)


def test_what_was_learned_helps_with_other_classes(trained, digits):
    """The features of ten digits tell even from odd after a few steps of a new head."""
    parity = {name: (digits[name].images, digits[name].labels % 2) for name in ("train", "validation", "test")}
    pair = data.from_arrays(**parity)
    adapted = models.adapt(trained, ("even", "odd"))
    config = training.TrainConfig(steps=20, batch_size=64, learning_rate=3e-3)
    report = training.fit(adapted.model, pair["train"], pair["validation"], adapted.spec, config, keras=keras)
    assert report.accuracy_before < 0.8 and report.accuracy_after > 0.9


def test_our_architectures_are_built_anew_for_another_shape():
    small = models.from_keras(builders.build("mobilenet", (28, 28, 1), 10, 0.25))
    large = models.adapt(small, 5, shape=(96, 96, 3))
    assert large.model.input_shape == (None, 96, 96, 3) and large.spec.shape == (96, 96, 3)
    assert large.model.get_layer("stem").strides == (2, 2)  # as built for that size
    kernel = lambda loaded: loaded.model.get_layer("block3_pointwise").kernel
    np.testing.assert_array_equal(kernel(large), kernel(small))
    colour = models.from_keras(builders.build("resnet8", (32, 32, 3), 10), input_spec="scaling=caffe")
    gray = models.adapt(colour, 4, shape=(16, 16, 1))
    assert gray.model.input_shape == (None, 16, 16, 1) and gray.spec.channels == 1 and len(gray.spec.mean) == 1


def test_other_networks_keep_their_layers_on_another_shape():
    theirs = models.from_keras(net(shape=(16, 16, 1)))
    adapted = models.adapt(theirs, ("a", "b"), shape=(24, 20, 1))
    assert adapted.model.input_shape == (None, 24, 20, 1) and adapted.model.output_shape == (None, 2)
    np.testing.assert_array_equal(adapted.model.layers[1].kernel, theirs.model.layers[0].kernel)


def test_heads_of_every_kind_are_replaced():
    binary = models.adapt(models.from_keras(net(outputs=1, activation="sigmoid")), 4)
    assert binary.spec.head == "softmax"
    np.testing.assert_allclose(binary.model(np.ones((2, 8, 8, 1), np.float32)).numpy().sum(-1), 1, atol=1e-6)
    logits = models.adapt(models.from_keras(net(activation=None)), 4)
    assert logits.spec.head == "logits" and logits.model.output_shape == (None, 4)
    tailed = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(3), layers.Softmax()])
    assert models.adapt(models.from_keras(tailed), 4).model.output_shape == (None, 4)
    pooled = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(3, 1), layers.GlobalAveragePooling2D()])
    with pytest.raises(ModelError, match="does not end in a Dense layer"):
        models.adapt(models.from_keras(pooled), 4)
    with pytest.raises(InputError, match="at least two classes"):
        models.adapt(models.from_keras(net()), ["only"])


def test_an_untrained_application_fits_the_images_and_says_how_it_is_fed():
    model, spec = models.untrained_application("MobileNetV3Small", (32, 32, 1), ("a", "b", "c"))
    assert model.input_shape == (None, 32, 32, 1) and model.output_shape == (None, 3)
    assert spec.labels == ("a", "b", "c") and spec.scaling == "raw"
    with pytest.raises(ModelError, match="larger image"):
        models.untrained_application("MobileNetV2", (8, 8, 3), ("a", "b"))
    with pytest.raises(ModelError, match="Did you mean MobileNetV2"):
        models.untrained_application("MobilNetV2", (32, 32, 3), ("a", "b"))


def test_a_model_of_mixed_precision_computes_in_float32(tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs = keras.Input((8, 8, 3))
        x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, activation="relu")(inputs))
        inner = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Conv2D(4, 3), keras.layers.ReLU()])
        x = keras.layers.GlobalAveragePooling2D()(inner(x))
        model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy(before)
    model.save(tmp_path / "mixed.keras")
    loaded = models.load(tmp_path / "mixed.keras", input_spec="scaling=signed")
    assert {layer.compute_dtype for layer in models.flat_layers(loaded.model)} == {"float32"}
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    answers = np.asarray(loaded.model(images))
    assert answers.dtype == np.float32 and np.allclose(answers, np.asarray(model(images)), atol=5e-3)
    models.save(loaded.model, tmp_path / "model.keras", loaded.spec)
    (made,) = convert.convert(tmp_path / "model.keras", loaded.spec, ["float32"], tmp_path, work=tmp_path)
    assert made.within_tolerance, made.reason
