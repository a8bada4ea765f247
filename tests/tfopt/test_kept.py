"""What a .tflite kept of zeros and clusters, on files of the real converter."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from mobile_bench.flatbuffer import read_model
from mobile_bench.inputs import InputSpec
from tfopt import convert, kept, models
from tfopt.errors import ConversionError
from tfopt.sparse import unpacked
from tfopt.xray import random_images

SCHEMES = ("float32", "int8", "float32_sparse", "int8_sparse")


@pytest.fixture(scope="module")
def net():
    """Five kernels of half zeros and eight values, with batch norms that give channels a factor and a sign."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 3))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, use_bias=False, name="conv")(image))
    x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, use_bias=False, name="deep")(layers.ReLU()(x)))
    x = layers.Conv2DTranspose(4, 2, name="up")(layers.ReLU()(x))
    x = layers.SeparableConv2D(6, 3, name="separable")(x)
    model = keras.Model(image, layers.Dense(10, name="dense")(layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    values = np.array([-0.7, -0.4, -0.2, 0.1, 0.3, 0.5, 0.9])
    for layer in model.layers:
        arrays = layer.get_weights()
        if isinstance(layer, layers.BatchNormalization):
            arrays = [rng.uniform(0.5, 2, len(arrays[0])) * rng.choice((-1, 1), len(arrays[0])), *arrays[1:]]
        else:
            arrays = [rng.choice(values, a.shape) * (rng.random(a.shape) < 0.5) if a.ndim > 1 else a for a in arrays]
        if layer.name == "dense":  # in blocks of four inputs, which the converter stores as blocks
            kept_blocks = rng.random((len(arrays[0]) // 4 + 1, 10)) < 0.25
            arrays[0] = rng.choice(values, arrays[0].shape) * kept_blocks.repeat(4, axis=0)[: len(arrays[0])]
        layer.set_weights(arrays)
    return model


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept")
    spec = InputSpec(12, 12, 3)
    models.save(net, out / "net.keras", spec)
    made = convert.convert(out / "net.keras", spec, SCHEMES, out, calibration=random_images(spec, 16), work=out)
    assert all(one.path for one in made), made
    return {one.scheme: one.path for one in made}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kernel_is_found_with_its_zeros_and_values(net, files, scheme):
    kernels = kept.kernels(net)
    assert [kernel.layer for kernel in kernels] == ["conv", "deep", "up", "separable", "separable", "dense"]
    rows = kept.measure(files[scheme], kernels)
    for row, kernel in zip(rows, kernels):
        assert row.found and row.lost == 0, row
        assert row.zeros == row.keras_zeros == int(np.sum(kernel.values == 0)) > 0.3 * row.weights
        assert row.channel_values <= row.keras_values <= min(8, row.values) and row.clustered
    by_layer = {row.layer: row for row in rows}
    assert by_layer["conv"].keras_values == by_layer["dense"].keras_values == 8
    assert by_layer["conv"].values > 8, "folded batch norms give each channel values of its own"
    assert by_layer["dense"].values == 8 or scheme.startswith("int8")
    kept.check(rows, sparse=True, clustered=True)
    summary = kept.summary(rows)
    assert summary["sparsity"] == summary["keras_sparsity"] and not summary["not_found"]


def test_a_lost_zero_and_a_new_value_are_errors(net, files):
    kernels = kept.kernels(net)
    more = kept.KernelWeights(
        "conv", np.where(np.arange(kernels[0].values.size).reshape(8, -1) % 9 == 0, 0, kernels[0].values)
    )
    with pytest.raises(ConversionError, match="Layer conv lost zeros on the way into the file"):
        kept.check(kept.measure(files["float32"], [more]), sparse=True, clustered=False)
    values = kernels[0].values
    merged = np.select([values > 0.8, np.isclose(values, 0.3), np.isclose(values, -0.4)], [0.5, 0.1, -0.2], values)
    fewer = kept.KernelWeights("conv", merged)
    with pytest.raises(ConversionError, match="Layer conv has more values in the file than it has clusters"):
        kept.check(kept.measure(files["int8"], [fewer]), sparse=True, clustered=True)


def test_blocks_longer_than_a_row_are_not_stored(tmp_path):
    """12 inputs, which the converter would pack as a block of 16."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(12, 3, activation="relu", name="conv")(image))
    model = keras.Model(image, layers.Dense(64, use_bias=False, name="dense")(x))
    (kernel,) = model.get_layer("dense").get_weights()
    model.get_layer("dense").set_weights([kernel * (np.arange(64) % 4 == 0)])
    spec = InputSpec(8, 8, 3)
    models.save(model, tmp_path / "net.keras", spec)
    images = random_images(spec, 16)
    (made,) = convert.convert(
        tmp_path / "net.keras", spec, ["int8_tensor_sparse"], tmp_path, calibration=images, work=tmp_path
    )
    assert made.path, made.reason
    assert any("stored densely" in note for note in made.notes) and made.within_tolerance


def test_kernels_of_one_weight_a_channel_are_told_apart_by_their_zeros(tmp_path):
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    thin = [layers.Conv2D(1, 1, name=f"thin{n}")(image) for n in range(2)]
    wide = [layers.Conv2D(24, 1, name=f"wide{n}")(x) for n, x in enumerate(thin)]
    model = keras.Model(image, layers.Dense(3)(layers.GlobalMaxPooling2D()(layers.Add()(wide))))
    for n in range(2):  # every second channel of one, a quarter of the other
        kernel, bias = model.get_layer(f"wide{n}").get_weights()
        kernel[..., n :: 2 + 2 * n] = 0
        model.get_layer(f"wide{n}").set_weights([kernel, bias])
    spec = InputSpec(8, 8, 3)
    models.save(model, tmp_path / "net.keras", spec)
    (made,) = convert.convert(tmp_path / "net.keras", spec, ["float32"], tmp_path, work=tmp_path)
    for kernels in (kept.kernels(model), kept.kernels(model)[::-1]):
        rows = {row.layer: row for row in kept.measure(made.path, kernels)}
        assert [rows[f"wide{n}"].zeros for n in range(2)] == [12, 6] and not any(row.lost for row in rows.values())


def test_a_kernel_that_is_not_there_says_so(files):
    rng = np.random.default_rng(1)
    (row,) = kept.measure(files["float32"], [kept.KernelWeights("conv", rng.normal(size=(8, 27)))])
    assert not row.found and kept.summary((row,))["not_found"] == ["conv"]
    assert not row.clustered and not kept.is_clustered(rng.normal(size=100))
    assert kept.is_clustered(np.repeat(rng.normal(size=10), 2)) and not kept.is_clustered(np.zeros(10))


@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_sparse_storage_stands_for_the_same_numbers(files, scheme):
    """The converter packs the dense kernel's inputs, no multiple of 4, in blocks of 4, and would cut two off."""
    packed = unpacked(files[f"{scheme}_sparse"].read_bytes())
    dense = [read_model(files[scheme]).constant(t) for t in read_model(files[scheme]).main.tensors]
    assert packed and not any(array.shape == (10, 294) for array in packed.values())
    for array in packed.values():
        assert any(same is not None and np.array_equal(array, same) for same in dense)
