"""Quantization-aware training by TFMOT in its worker, and the int8 files that come of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers

from mobile_bench.metadata import embedded_spec
from tfopt import builders, models, training
from tfopt.data.splits import Split
from tfopt.errors import InputError, ModelRefused, Problem, TrainingError
from tfopt.technique import Context, OptimizedModel, Property
from tfopt.techniques import quantize
from tfopt.techniques.prune import Prune
from tfopt.techniques.quantize import QuantizeAware
from tfopt.tfmot import bridge, client, norms, rounding
from tfopt.training import TrainConfig

SHORT = TrainConfig(steps=30, batch_size=32, learning_rate=3e-4, evaluations=1)


def answers(tflite, images, spec):
    """The file's outputs as float32, one image at a time, and its tensors' types."""
    interpreter = Interpreter(str(tflite), num_threads=1)
    interpreter.allocate_tensors()
    (source,), (sink,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert source["dtype"] == sink["dtype"] == np.int8
    assert tuple(source["shape"]) == (1, *spec.shape)
    scale, zero = source["quantization"]
    ready = np.clip(np.round(spec.normalize(images) / scale + zero), -128, 127).astype(np.int8)
    outputs = []
    for image in ready:
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(sink["index"])[0].astype(np.float32))
    scale, zero = sink["quantization"]
    types = {np.dtype(tensor["dtype"]).name for tensor in interpreter.get_tensor_details()}
    return (np.array(outputs) - zero) * scale, types


@pytest.fixture(scope="module")
def chain(digits, spec, trained_file, tmp_path_factory):
    """Pruned, then trained for int8 with its zeros kept: (pruned, quantized, report of qat)."""
    work = tmp_path_factory.mktemp("chain")
    model = models.load(trained_file).model
    context = Context(digits, work / "prune", teacher=model)
    pruned, _ = Prune(sparsity=0.5, train=SHORT).apply(OptimizedModel(model, spec), context)
    context = dataclasses.replace(context, work=work / "qat", keep=frozenset({Property.SPARSE}))
    quantized, report = QuantizeAware(train=SHORT).apply(pruned, context)
    return pruned, quantized, report


@pytest.fixture(scope="module")
def exported(chain, digits, spec, tmp_path_factory):
    """(the .tflite, what the fake-quantized model answers on the test split)."""
    out = tmp_path_factory.mktemp("exported") / "int8.tflite"
    return out, client.export_quantized(chain[1].quantized, spec, out=out, split=digits["test"])


def test_the_zeros_stay_and_the_rest_moves(chain):
    pruned, quantized, report = chain
    assert quantized.properties == {Property.SPARSE, Property.FAKE_QUANT}
    moved = 0
    for before, after in zip(pruned.model.get_weights(), quantized.model.get_weights()):
        if before.ndim >= 2:
            assert np.all(after[before == 0] == 0) and np.mean(before == 0) > 0.4
            moved += int(np.sum(before != after))
    assert moved > 1000
    assert report.properties["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert {"stem", "classes"} <= set(report.touched)


def test_ranges_fit_before_the_first_step(chain, digits, spec):
    """Without calibration the simulated int8 network would start near chance; and training must not ruin it."""
    pruned, _, report = chain
    plain = training.accuracy(pruned.model, digits["validation"], spec)
    assert report.training["accuracy_before"] > plain - 0.1
    assert report.training["accuracy_after"] > plain - 0.1


def test_the_file_answers_as_the_fake_quantized_model(exported, digits, spec):
    out, expected = exported
    test = digits["test"]
    assert expected.shape == (len(test), 10) and expected.dtype == np.float32
    found, types = answers(out, test.pixels(spec), spec)
    assert types == {"int8", "int32"}, "something is left in float"
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.98
    assert np.mean(np.abs(found - expected)) < 0.01
    assert np.mean(found.argmax(1) == test.labels) > 0.8


def test_no_pixel_lies_between_two_int8_values(exported, spec):
    """±1 over 256 levels puts every pixel half-way, and then each runtime rounds it its own way."""
    assert spec.scaling == "signed"
    interpreter = Interpreter(str(exported[0]))
    scale, zero = interpreter.get_input_details()[0]["quantization"]
    levels = spec.normalize(np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)).ravel() / scale + zero
    assert np.min(np.abs(levels - np.floor(levels) - 0.5)) > 5e-4
    assert len(set(np.clip(np.round(levels), -128, 127))) >= 255


def test_the_file_says_how_to_feed_it(exported, spec):
    assert embedded_spec(exported[0].read_bytes()) == spec


@pytest.mark.slow
def test_convert_alone_gives_the_same_file(chain, exported, digits, spec, tmp_path):
    client.convert_quantized(chain[1].quantized, tmp_path / "again.tflite", spec)
    images = digits["test"].pixels(spec, slice(20))
    np.testing.assert_array_equal(
        answers(tmp_path / "again.tflite", images, spec)[0], answers(exported[0], images, spec)[0]
    )


def test_predict_alone_gives_the_same_outputs(chain, exported, digits, spec):
    some = digits["test"].subset(np.arange(20))
    np.testing.assert_allclose(client.predict_quantized(chain[1].quantized, some, spec), exported[1][:20], atol=1e-5)


def test_nothing_is_left_of_a_failed_conversion(tmp_path, spec):
    damaged = tmp_path / "quantized.npz"
    damaged.write_bytes(b"PK not a model")
    with pytest.raises(InputError, match=r"quantized\.npz"):
        client.convert_quantized(damaged, tmp_path / "int8.tflite", spec)
    assert [path.name for path in tmp_path.iterdir()] == ["quantized.npz"]


def test_a_network_of_mobile_parts_becomes_int8_throughout(digits, tmp_path):
    """Rescaling inside, hard swish, squeeze and excite, scalar arithmetic, depthwise, pooling, concatenation."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1))
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(image)
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x))
    x = layers.Activation("hard_silu")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="hard_sigmoid")(gate)
    x = layers.Multiply()([x, gate])
    y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
    y = layers.ReLU(6.0)(y)
    x = layers.Add()([x, y])
    x = keras.ops.relu6(x + 3.0) * (1.0 / 6.0)
    x = layers.Concatenate()([layers.AveragePooling2D(2)(x), layers.MaxPooling2D(2)(x)])
    x = layers.SeparableConv2D(16, 3, activation="relu")(x)
    model = keras.Model(image, layers.Dense(10, activation="softmax")(layers.Flatten()(x)))
    spec = builders_spec(raw=True)
    training.fit(
        model, digits["train"], digits["validation"], spec,
        TrainConfig(epochs=4, batch_size=32, learning_rate=5e-3, evaluations=1), keras=keras,
    )  # fmt: skip
    fixed = model.get_layer("rescale").get_config()
    result, report = QuantizeAware(train=SHORT).apply(OptimizedModel(model, spec), Context(digits, tmp_path, model))
    assert result.model.get_layer("rescale").get_config() == fixed and not report.notes
    out = tmp_path / "parts.tflite"
    test = digits["test"]
    expected = client.export_quantized(result.quantized, spec, out=out, split=test)
    found, types = answers(out, test.pixels(spec), spec)
    assert types == {"int8", "int32"}
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.95
    assert np.mean(found.argmax(1) == test.labels) > 0.6


def builders_spec(raw):
    from mobile_bench.inputs import InputSpec

    return InputSpec(8, 8, 1).with_scaling("raw" if raw else "signed")


def test_roundings_stand_where_tflite_has_tensors():
    graph, _ = bridge.describe(builders.build("resnet8", (8, 8, 1), 2, width=0.25))
    plan = rounding.plan(graph)
    assert plan["stem"] == "fused kernel" and plan["stem_bn"] == "none" and plan["stem_act"] == "output"
    # The shortcut's batch norm goes into an addition, whose ReLU is fused.
    assert plan["stage2_block1_shortcut_bn"] == "output"
    assert plan["stage2_block1_add"] == "none" and plan["stage2_block1_out"] == "output"
    assert plan["classes"] == "kernel" and plan["pool"] == "output"


def test_a_batch_norm_that_no_kernel_absorbs_is_named():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(image)
    x = layers.Add()([layers.BatchNormalization(name="alone")(x), x])
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(layers.BatchNormalization(name="second")(x))))
    graph, _ = bridge.describe(model)
    assert [node.source for node in rounding.unfolded(graph)] == ["alone", "second"]
    assert rounding.plan(graph)["conv"] == "kernel"


def preactivated(shape, classes):
    """A block as in ResNet V2 and DenseNet: batch norms before the convolutions, of several inputs together."""
    keras.utils.set_random_seed(0)
    image = keras.Input(shape)
    x = skip = layers.Conv2D(12, 3, padding="same", name="stem")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="before")(x))
    x = layers.Concatenate()([layers.Conv2D(12, 3, padding="same", name="inside")(x), skip])
    x = layers.ReLU()(layers.BatchNormalization(name="both")(x))
    x = layers.Dense(classes, activation="softmax", name="classes")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x)
    random = np.random.default_rng(0)
    for name in ("before", "both"):
        model.get_layer(name).set_weights([random.uniform(0.5, 1.5, w.shape) for w in model.get_layer(name).weights])
    return model


def test_such_a_batch_norm_becomes_a_convolution_and_comes_back():
    model = preactivated((8, 8, 1), 10)
    graph, weights = bridge.describe(model)
    whole, own, replaced = norms.as_convolutions(graph, weights)
    assert [node.source for node in replaced] == ["before", "both"] and not rounding.unfolded(whole)
    assert {whole.node(node.name).kind for node in replaced} == {"DepthwiseConv2D"}
    again = norms.back(replaced, weights, own)
    assert again.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-5, atol=1e-6)


def test_batch_norms_before_convolutions_end_in_whole_numbers(digits, spec, tmp_path):
    model = preactivated(spec.shape, 10)
    config = TrainConfig(steps=250, batch_size=32, learning_rate=5e-3, evaluations=1)
    training.fit(model, digits["train"], digits["validation"], spec, config, keras=keras)
    result, report = QuantizeAware(train=SHORT).apply(OptimizedModel(model, spec), Context(digits, tmp_path, model))
    assert any("1x1 depthwise convolutions: before, both" in note for note in report.notes)
    assert not any("in float" in note for note in report.notes)
    out, test = tmp_path / "int8.tflite", digits["test"].subset(np.arange(200))
    expected = client.export_quantized(result.quantized, spec, out=out, split=test)
    found, types = answers(out, test.pixels(spec), spec)
    assert types == {"int8", "int32"}
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.97
    before, after = (dict(zip("gbmv", m.get_layer("both").get_weights())) for m in (model, result.model))
    assert np.any(before["g"] != after["g"]) and np.array_equal(before["v"], after["v"])


def test_a_lost_zero_is_an_error(chain):
    pruned = chain[0]
    graph, before = bridge.describe(pruned.model)
    after = {name: array + (name == "stem:0") for name, array in before.items()}
    trained = client.Trained(pruned.model, before, after, {}, {"kept": ["classes:0", "stem:0"]}, graph)
    with pytest.raises(TrainingError, match="Layer stem lost zeros"):
        quantize._zeros_kept(trained)


def test_a_model_trained_for_int8_is_not_trained_again(chain, digits, spec, tmp_path):
    for technique in (QuantizeAware(train=SHORT), Prune(train=SHORT)):
        with pytest.raises(ModelRefused):
            technique.apply(chain[1], Context(digits, tmp_path, chain[1].model))


def test_images_that_cannot_be_used_are_a_clear_error(chain, digits, spec):
    broken = Split(digits["test"].labels[:3], digits["test"].hashes[:3], images=np.zeros((3, 5, 5, 2), np.uint8))
    with pytest.raises(Problem):
        client.predict_quantized(chain[1].quantized, broken, spec)


def test_splits_cross_by_path_where_they_are_files(digits, tmp_path):
    whole = tmp_path / "pixels.npy"
    split = digits["test"]
    np.save(whole, split.images)
    mapped = dataclasses.replace(split, images=np.load(whole, mmap_mode="r"))
    files = client.write_split(mapped, tmp_path / "a")
    assert Path(files["images"]) == whole.resolve() and Path(files["labels"]).parent == tmp_path / "a"
    part = dataclasses.replace(mapped, images=mapped.images[5:])
    files = client.write_split(part, tmp_path / "b")
    assert np.array_equal(np.load(files["images"]), split.images[5:])
    paths = Split(split.labels[:2], split.hashes[:2], paths=np.array([Path("a.png"), Path("b/ü.png")], object))
    files = client.write_split(paths, tmp_path / "c")
    assert np.load(files["paths"], allow_pickle=False).tolist() == ["a.png", "b/ü.png"] and "images" not in files
