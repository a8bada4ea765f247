"""Every scheme on the real converter and the real interpreter."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from mobile_bench.errors import Problem
from mobile_bench.flatbuffer import read_model
from mobile_bench.interpreter import open_model
from mobile_bench.metadata import embedded_spec
from tfopt import convert, convert_worker, models, training
from tfopt.errors import ConversionError, JobFailed, ModelError
from tfopt.schemes import parse

from .own_layers import Scaled, bent

#: a scheme -> the type of its input and output, and of its kernels.
TYPES = {
    "float32": ("float32", "float32"), "float16": ("float32", "float16"), "dynamic": ("float32", "int8"),
    "weight8": ("float32", "int8"), "weight4": ("float32", "int4"), "int8": ("int8", "int8"),
    "int16x8": ("int16", "int8"), "int8_uint8": ("uint8", "int8"), "int8_floatio": ("float32", "int8"),
    "int8_tensor": ("int8", "int8"), "int16x8_floatio": ("float32", "int8"),
    "int8_tensor_uint8": ("uint8", "int8"),
}  # fmt: skip
SPARSE = ("float32_sparse", "dynamic_sparse", "int8_sparse")


def convert_all(file, spec, schemes, out, **options):
    return {c.scheme: c for c in convert.convert(file, spec, schemes, out, work=out, **options)}


@pytest.fixture(scope="module")
def converted(trained_file, digits, tmp_path_factory):
    spec = models.load(trained_file).spec
    out = tmp_path_factory.mktemp("converted")
    return convert_all(trained_file, spec, list(TYPES), out, calibration=digits["calibration"])


@pytest.fixture(scope="module")
def pruned(trained_file, digits, tmp_path_factory):
    """The same network with nine of ten weights of each kernel at zero, and its files."""
    loaded = models.load(trained_file)
    for weight in loaded.model.trainable_weights:
        if len(weight.shape) > 1:
            values = weight.numpy()
            weight.assign(np.where(np.abs(values) >= np.quantile(np.abs(values), 0.9), values, 0))
    out = tmp_path_factory.mktemp("pruned")
    models.save(loaded.model, out / "pruned.keras", loaded.spec)
    schemes = (*SPARSE, *(scheme.removesuffix("_sparse") for scheme in SPARSE))
    return loaded, convert_all(out / "pruned.keras", loaded.spec, schemes, out, calibration=digits["calibration"])


def answers(path, images, spec):
    model = open_model(path)
    return np.concatenate([model.invoke(spec.normalize(image[None]))[0] for image in images])


def compared(found, expected):
    """(largest difference of the probabilities, the share of equal classes)."""
    return np.abs(found - expected).max(), np.mean(found.argmax(1) == expected.argmax(1))


def kernels(model):
    """The constant second inputs of convolutions and dense layers, looked for behind a DEQUANTIZE or DENSIFY."""
    graph = model.main
    source = {op.outputs[0]: op.inputs[0] for op in graph.operators if op.op in ("DEQUANTIZE", "DENSIFY")}
    for operator in graph.operators:
        if operator.op in ("CONV_2D", "FULLY_CONNECTED"):
            index = operator.inputs[1]
            while index in source:
                index = source[index]
            yield graph.tensors[index]


@pytest.mark.parametrize("scheme", TYPES)
def test_file_answers_as_keras_does(scheme, converted, trained, digits):
    made = converted[scheme]
    assert made.path, made.reason
    test = digits["test"].subset(np.arange(200))
    expected = training.predict(trained.model, test, trained.spec)
    difference, agreement = compared(answers(made.path, test.pixels(trained.spec), trained.spec), expected)
    assert difference <= parse(scheme).tolerance
    assert agreement == 1.0 if scheme == "float32" else agreement >= (0.9 if scheme == "weight4" else 0.97)


@pytest.mark.parametrize("scheme", TYPES)
def test_file_holds_what_its_name_says(scheme, converted, trained):
    model = read_model(converted[scheme].path)
    graph, (ends, weights) = model.main, TYPES[scheme]
    (image,), (row,) = graph.inputs, graph.outputs
    assert graph.tensors[image].shape == (1, *trained.spec.shape)
    assert graph.tensors[image].dtype == graph.tensors[row].dtype == ends
    # Small kernels of dynamic range stay as they are.
    assert {tensor.dtype for tensor in kernels(model)} - ({"float32"} if scheme == "dynamic" else set()) == {weights}
    scales = {len(tensor.scales) for tensor in kernels(model)}
    if "tensor" in scheme:
        assert scales == {1}
    elif weights == "int8" and scheme != "dynamic":
        assert min(scales) >= 8, "a scale for each output channel"
    (signature,) = model.signatures
    assert signature.key == "serving_default" and signature.inputs == {"image": image}
    assert list(signature.outputs.values()) == [row]
    floats = {t.dtype for op in graph.operators for i in op.inputs if i >= 0 for t in [graph.tensors[i]]} & {"float32"}
    assert bool(floats) == (ends == "float32")


def test_what_is_reported_is_what_the_file_does(converted, trained, digits):
    images = digits["calibration"].pixels(trained.spec)[: convert.CHECK_IMAGES]
    expected = np.asarray(trained.model(trained.spec.normalize(images)))
    for scheme in ("int8", "weight4", "float16"):
        made = converted[scheme]
        difference, agreement = compared(answers(made.path, images, trained.spec), expected)
        assert made.difference == pytest.approx(difference, rel=1e-2)
        assert (made.agreement, made.images, made.random) == (agreement, len(images), False)
        assert made.within_tolerance
    assert converted["int8"].calibration["used"] == len(digits["calibration"])
    assert converted["float16"].calibration is None


def test_smaller_schemes_are_smaller(converted):
    size = {scheme: c.path.stat().st_size for scheme, c in converted.items()}
    assert size["float16"] < 0.65 * size["float32"]
    assert max(size[scheme] for scheme in ("int8", "dynamic", "weight8", "int16x8")) < size["float16"]
    assert size["weight4"] < 0.8 * size["weight8"] and size["int8_tensor"] < size["int8"]


@pytest.mark.parametrize("scheme", SPARSE)
def test_a_pruned_model_is_stored_without_its_zeros(scheme, pruned, digits):
    loaded, made = pruned
    sparse, dense = made[scheme], made[scheme.removesuffix("_sparse")]
    assert sparse.path and dense.path, sparse.reason + dense.reason
    assert any(tensor.sparse for tensor in read_model(sparse.path).main.tensors)
    # What LiteRT could not open otherwise is stored as before, and that is said.
    assert bool(sparse.notes) == (scheme != "float32_sparse") and all("stored densely" in n for n in sparse.notes)
    smaller = {"float32_sparse": 0.5, "int8_sparse": 0.95, "dynamic_sparse": 1}[scheme]
    assert sparse.path.stat().st_size < smaller * dense.path.stat().st_size
    images = digits["test"].pixels(loaded.spec)[:50]
    one, other = (answers(c.path, images, loaded.spec) for c in (sparse, dense))
    assert np.abs(one - other).max() <= 1e-5


def test_sparse_storage_of_a_dense_model_is_remarked(trained, tmp_path):
    check = convert_worker.notes_of(read_model(_float32(trained, tmp_path)), parse("float32_sparse"))
    assert "prune first" in check[0]


def test_the_old_runtime_takes_all_but_int4(converted, run_python):
    pytest.importorskip("tflite_runtime", reason="tflite-runtime is not installed here")
    code = (
        "import json, sys, numpy as np; from mobile_bench.interpreter import open_model\n"
        "def run(path):\n"
        "    model = open_model(path, runtime='tflite-runtime')\n"
        "    return model.invoke(np.zeros(model.inputs[0].shape, np.float32))[0].tolist()\n"
        "print(json.dumps([run(path) for path in sys.argv[1:]]))"
    )
    paths = {scheme: c.path for scheme, c in converted.items() if scheme != "weight4"}
    done = run_python("-c", code, *paths.values())
    assert done.returncode == 0, done.stderr[-2000:]
    for scheme, found in zip(paths, json.loads(done.stdout)):
        here = open_model(paths[scheme])
        expected = here.invoke(np.zeros(here.inputs[0].shape, np.float32))[0]
        np.testing.assert_allclose(found, expected, atol=0.02, err_msg=scheme)


def test_the_file_alone_says_how_to_feed_it(converted, trained):
    for made in converted.values():
        assert embedded_spec(made.path.read_bytes()) == trained.spec
    content = converted["int8"].path.read_bytes()
    assert convert.input_shape(content) == (1, *trained.spec.shape)
    assert embedded_spec(content[:200]) is None
    again = convert.embed_spec(convert.embed_spec(content, trained.spec.with_scaling("unit")), trained.spec)
    assert embedded_spec(again) == trained.spec
    entry = open_model(converted["int8"].path).inputs[0]
    black, white = ((value - trained.spec.mean[0]) / trained.spec.std[0] for value in (0, 255))
    assert entry.scale == pytest.approx((white - black) / 255, rel=0.01), "a step for each value of a pixel"


def _graph(loaded):
    import tensorflow as tf

    image = tf.TensorSpec((1, *loaded.spec.shape), tf.float32, name="image")
    graph = tf.function(lambda image: loaded.model(image, training=False)).get_concrete_function(image)
    owner = tf.Module()
    owner.kept = [weight.value for weight in loaded.model.weights]
    return tf, graph, owner


def _float32(loaded, folder):
    path = folder / "float32.tflite"
    path.write_bytes(convert_worker.convert_one(*_graph(loaded), "float32", None, loaded.spec))
    return path


def test_int8_is_what_the_converter_alone_makes(converted, trained, digits, tmp_path):
    tf, graph, owner = _graph(trained)
    images = digits["calibration"].pixels(trained.spec)
    plain = tf.lite.TFLiteConverter.from_concrete_functions([graph], owner)
    plain.optimizations = [tf.lite.Optimize.DEFAULT]
    plain.representative_dataset = lambda: ([trained.spec.normalize(image[None])] for image in images)
    plain.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    plain.inference_input_type = plain.inference_output_type = tf.int8
    path = tmp_path / "plain.tflite"
    path.write_bytes(plain.convert())
    test = digits["test"].pixels(trained.spec)[:100]
    mine, theirs = (answers(file, test, trained.spec) for file in (converted["int8"].path, path))
    np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def wavy(trained_file, tmp_path_factory):
    """A classifier with a sine in it, which TFLite computes in float only."""
    spec = models.load(trained_file).spec
    image = keras.Input(spec.shape)
    wave = keras.ops.sin(keras.layers.Conv2D(4, 3, name="stem")(image))
    outputs = keras.layers.Dense(10, activation="softmax", name="classes")(keras.layers.Flatten()(wave))
    path = tmp_path_factory.mktemp("wavy") / "wavy.keras"
    keras.Model(image, outputs).save(path)
    return path, spec


def test_a_file_that_would_be_half_float_is_refused_by_the_operations_name(wavy, digits, tmp_path):
    done = convert_all(*wavy, ["int8", "int8_floatio", "dynamic"], tmp_path, calibration=digits["calibration"])
    for scheme in ("int8", "int8_floatio"):
        assert done[scheme].path is None and done[scheme].difference is None
        assert "1 operations would stay in float" in done[scheme].reason and "SIN of layer" in done[scheme].reason
        assert "choose dynamic or float16" in done[scheme].reason
    assert done["dynamic"].path.is_file()
    assert [file.name for file in tmp_path.glob("*.tflite")] == ["dynamic.tflite"]
    assert not list(tmp_path.glob(".*")), "what was refused is not left behind"


def test_a_look_at_what_runs_where_takes_it_half_float(wavy, digits):
    path, spec = wavy
    images = digits["calibration"].pixels(spec)[:4]
    content = convert_worker.convert_one(*_graph(models.load(path, input_spec="scaling=signed")), "int8", images, spec)
    model = read_model(content)
    assert "SIN" in [operator.op for operator in model.main.operators]
    convert_worker.check_form(model, parse("int8"), hybrid=True)
    with pytest.raises(ConversionError, match="SIN of layer"):
        convert_worker.check_form(model, parse("int8"), hybrid=False)


def test_int8_without_calibration_and_unknown_schemes_are_refused(trained_file, trained, tmp_path):
    with pytest.raises(Problem, match="needs images to calibrate on"):
        convert.convert(trained_file, trained.spec, ["int8"], tmp_path, work=tmp_path)
    with pytest.raises(Problem, match="int16x8 needs images"):
        convert.convert(trained_file, trained.spec, ["float32", "int16x8"], tmp_path, work=tmp_path)
    with pytest.raises(Problem, match="Did you mean int8"):
        convert.convert(trained_file, trained.spec, ["int88"], tmp_path, work=tmp_path)
    assert not list(tmp_path.glob("*.tflite"))


def test_an_op_without_a_builtin_fails_alone_with_its_name(trained, tmp_path):
    inputs = keras.Input(trained.spec.shape)
    bessel = keras.layers.Lambda(lambda x: __import__("tensorflow").math.bessel_i0(x), name="bessel")(inputs)
    outputs = keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(bessel))
    path = tmp_path / "odd.keras"
    keras.Model(inputs, outputs).save(path)
    (done,) = convert.convert(path, trained.spec, ["float32"], tmp_path, work=tmp_path, trust=True)
    assert done.path is None
    assert "operations that TFLite does not have" in done.reason and "BesselI0" in done.reason
    assert "Write these layers with other operations" in done.reason
    assert not list(tmp_path.glob("*.tflite"))


def test_a_model_that_answers_with_nan_is_not_exported(trained, tmp_path):
    path = _float32(trained, tmp_path)
    facts = convert_worker.Check(_graph(trained)[1], None, trained.spec, False).facts(path, parse("float32"))
    assert facts["difference"] <= 1e-5 and facts["random"] and facts["images"] == convert.RANDOM_IMAGES
    weight = trained.model.trainable_weights[0]
    whole = convert_worker.Check(_graph(trained)[1], None, trained.spec, False)
    _ = whole.expected
    weight.assign(np.full(weight.shape, np.nan))
    broken = convert_worker.Check(_graph(trained)[1], None, trained.spec, False)
    with pytest.raises(ConversionError, match="Keras model itself answers with NaN"):
        broken.facts(path, parse("float32"))
    with pytest.raises(ConversionError, match="file answers with NaN"):
        whole.facts(_float32(trained, tmp_path), parse("float32"))
    trained.model.save(tmp_path / "nan.keras")
    (made,) = convert.convert(tmp_path / "nan.keras", trained.spec, ["float32"], tmp_path, work=tmp_path)
    assert "not finite numbers" in made.reason and trained.model.layers[1].name in made.reason


def test_weights_behind_the_flatbuffer_come_along(trained, digits, tmp_path):
    """Where litert-quantizer puts the weights of all but small models."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    plain = _float32(trained, tmp_path)
    model = schema.ModelT.InitFromPackedBuf(plain.read_bytes(), 0)
    moved = [(buffer, bytes(buffer.data)) for buffer in model.buffers if buffer.data is not None and len(buffer.data)]
    content = b""
    for start in (1 << 20, None):  # the first packing shows where the flatbuffer ends
        place = start or len(content)
        for buffer, data in moved:
            buffer.data, buffer.offset, buffer.size = None, place, len(data)
            place += len(data)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        content = bytes(builder.Output())
    content += b"".join(data for _, data in moved)
    assert len(moved) > 10 and read_model(content).main.tensors
    whole = tmp_path / "whole.tflite"
    whole.write_bytes(convert.embed_spec(content, trained.spec))
    images = digits["test"].pixels(trained.spec)[:20]
    one, other = (answers(path, images, trained.spec) for path in (whole, plain))
    np.testing.assert_array_equal(one, other)


def test_the_converters_words_become_one_sentence():
    said = "\n".join(["Quantization to 16x8-bit not yet supported for op: 'HARD_SWISH'."] * 3)
    refusal = str(convert_worker.refusal(RuntimeError(said)))
    assert refusal.count("HARD_SWISH") == 1 and "Choose int8" in refusal
    assert "RuntimeError" in str(convert_worker.refusal(RuntimeError()))


def test_a_crash_costs_only_the_scheme_that_was_under_way(trained_file, trained, tmp_path, monkeypatch):
    asked = []

    def run_job(module, job, folder, *, on_progress, **_):
        asked.append(job["schemes"])
        if "float16" in job["schemes"]:
            on_progress({"kind": "progress", "scheme": "float16"})
            raise JobFailed("The child process tfopt.convert was ended by SIGSEGV")
        return {"schemes": {scheme: {"reason": ""} for scheme in job["schemes"]}}

    monkeypatch.setattr(convert, "run_job", run_job)
    done = convert_all(trained_file, trained.spec, ["float16", "float32"], tmp_path)
    assert asked == [["float16", "float32"], ["float32"]]
    assert "SIGSEGV" in done["float16"].reason and done["float32"].path == tmp_path / "float32.tflite"


def test_a_child_that_does_not_even_start_is_not_started_again_and_again(trained_file, trained, tmp_path, monkeypatch):
    asked = []

    def run_job(*_, **__):
        asked.append(1)
        raise JobFailed("The child process tfopt.convert ended with exit code 1 and no result")

    monkeypatch.setattr(convert, "run_job", run_job)
    done = convert_all(trained_file, trained.spec, ["float16", "float32"], tmp_path)
    assert len(asked) == 1 and all("exit code 1" in c.reason for c in done.values())


@pytest.mark.parametrize(("name", "said"), [("float32", "already converted"), ("int8", "quantized already")])
def test_a_tflite_is_refused_whatever_it_is_called(name, said, tiny, tmp_path):
    disguised = tmp_path / "model.keras"
    disguised.write_bytes(tiny.path(name).read_bytes())
    for path in (tiny.path(name), disguised):
        with pytest.raises(ModelError, match=said):
            convert.refuse_tflite(path)
    convert.refuse_tflite(tmp_path / "nowhere.tflite")
    convert.refuse_tflite("keras:MobileNetV2")


def test_a_file_compiled_for_the_edge_tpu_is_refused_as_such(shared_model):
    with pytest.raises(ModelError, match="compiled for the Edge TPU"):
        convert.refuse_tflite(shared_model("mobilenet_v1_0.25_128_quant_edgetpu.tflite"))


@pytest.mark.parametrize("cut", [0, 100, 0.5, 0.99])
def test_a_file_that_is_cut_short_or_no_model_is_one_clear_error(cut, trained_file, tmp_path):
    from tfopt import commands

    content, path = trained_file.read_bytes(), tmp_path / "cut.keras"
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(ModelError, match="damaged, cut short"):
        commands.convert_one(str(path), "float32", tmp_path / "m.tflite", None, None, False)
    assert not (tmp_path / "m.tflite").exists()


def test_a_model_of_any_size_is_asked_for_one(tmp_path):
    from tfopt import commands

    image = keras.Input((None, None, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(image))
    keras.Model(image, keras.layers.Dense(2, activation="softmax")(pooled)).save(tmp_path / "open.keras")
    with pytest.raises(ModelError, match="--input-spec size=224"):
        commands.convert_one(str(tmp_path / "open.keras"), "float32", None, None, None, False)


@pytest.mark.parametrize(
    ("schemes", "options", "said"),
    [
        (["int8", "int8"], {}, "one twice"), (["int16x8"], {}, "Add --data"),
        (["float32"], {"calibration_images": 0}, "auto, or 1 and above"),
        (["float32"], {"calibration_images": "many"}, "auto, or 1 and above"),
        (["float32"], {"ranges": "entropie"}, "Did you mean entropy"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_the_model_is_opened(schemes, options, said):
    from tfopt import commands

    with pytest.raises(Problem, match=said):
        commands.convert_all("nowhere.keras", schemes, None, None, None, False, **options)


def test_the_command_writes_several_files_and_says_how_far_they_are(trained_file, tmp_path):
    from typer.testing import CliRunner

    from tfopt.cli import app

    arguments = ["convert", str(trained_file), "--data", "digits", "--out", str(tmp_path), "--json", "--fix", "all"]
    arguments += ["--scheme", "weight8", "--scheme", "int8_uint8", "--calibration-images", "24"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1 and found["path"] == found["files"][0]["path"]
    weight8, uint8 = found["files"]
    assert weight8["tool"] == "litert-quantizer" and weight8["calibration"] is None
    assert (uint8["calibration"]["used"], uint8["compared_on"]["images"]) == (24, 24)
    for file in (weight8, uint8):
        assert file["size_bytes"] == (tmp_path / f"digits-resnet-{file['scheme']}.tflite").stat().st_size
        assert 0 < file["difference"] <= file["tolerance"] and file["within_tolerance"] and file["agreement"] == 1.0
    assert "tolerance of int8_uint8: 20%" in done.stderr and "same class on 100% of 24 calibration" in done.stderr


def test_a_file_beyond_its_tolerance_is_warned_of():
    from tfopt import commands

    one = convert.Converted("int8", None, difference=0.31, agreement=0.5, images=32)
    written = {**commands._written(one, None), "path": "m.tflite", "size_bytes": 1000}
    lines = commands.conversion_lines(written)
    assert "within 31% of Keras's range (tolerance of int8: 20%)" in lines[0] and "warning" in lines[1]
    assert not written["within_tolerance"]


def test_python_exports_a_model_in_memory(trained, digits, tmp_path):
    import tfopt

    (done,) = tfopt.export(trained.model, "int8", tmp_path, calibration=digits, input_spec="scaling=signed")
    assert done.path == tmp_path / "int8.tflite" and done.agreement >= 0.9
    with pytest.raises(ConversionError, match="needs images"):
        tfopt.export(trained.model, ["int8"], tmp_path)


def test_layers_of_the_users_own_are_exported_without_their_class(digits, trained, tmp_path):
    image = keras.Input(trained.spec.shape)
    x = Scaled(0.1, name="own")(keras.layers.Conv2D(4, 3, activation="relu")(image))
    model = keras.Model(image, keras.layers.Dense(10, activation="softmax")(keras.layers.GlobalMaxPooling2D()(x)))
    model.get_layer("own").set_weights([np.array([1, 2, 3, 4])])
    models.save(model, tmp_path / "own.keras", trained.spec)
    made = convert_all(
        tmp_path / "own.keras", trained.spec, ["float32", "int8"], tmp_path, calibration=digits["calibration"]
    )
    assert made["float32"].difference < 1e-5 and made["float32"].agreement == 1, made["float32"].reason
    assert made["int8"].within_tolerance, made["int8"].reason


def test_an_activation_of_the_users_own_is_exported_without_its_function(digits, trained, tmp_path):
    image = keras.Input(trained.spec.shape)
    x = keras.layers.Conv2D(4, 3, activation=bent)(image)
    model = keras.Model(image, keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(x)))
    models.save(model, tmp_path / "own.keras", trained.spec)
    made = convert_all(tmp_path / "own.keras", trained.spec, ["float32"], tmp_path)
    assert made["float32"].difference < 1e-5 and made["float32"].agreement == 1, made["float32"].reason
