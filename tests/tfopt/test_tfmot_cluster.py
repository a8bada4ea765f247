"""Clustering by TFMOT in its worker, and what is left of zeros and clusters after training for int8."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tfopt import kept, models
from tfopt.errors import InputError, ModelRefused
from tfopt.technique import Context, OptimizedModel, Property, make
from tfopt.techniques.cluster import Cluster
from tfopt.techniques.quantize import QuantizeAware
from tfopt.tfmot import client
from tfopt.training import TrainConfig

SHORT = TrainConfig(steps=25, batch_size=32, learning_rate=3e-4, evaluations=1, validation_images=100)
SPARSE, CLUSTERED = Property.SPARSE, Property.CLUSTERED


@pytest.fixture(scope="module")
def half(trained_file):
    """The digits classifier with every second weight of most kernels zero, as pruning leaves it."""
    model = models.load(trained_file).model
    for layer in model.layers:
        if hasattr(layer, "kernel") and layer.name != "stem":
            kernel = layer.kernel.numpy()
            layer.kernel.assign(np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0, kernel))
    return model


@pytest.fixture(scope="module")
def chain(half, digits, spec, tmp_path_factory):
    """Clustered with the zeros kept, then trained for int8 with both kept: (half, clustered, quantized, reports).

    Clustering leaves out stage 3, training for int8 the last layer.
    """
    work = tmp_path_factory.mktemp("cluster")
    sparse = OptimizedModel(half, spec, frozenset({SPARSE}))
    technique = Cluster(clusters=16, layers={"stem": 8, "stage3_*": 0}, train=SHORT)
    clustered, first = technique.apply(sparse, Context(digits, work / "a", half, keep=frozenset({SPARSE})))
    context = Context(digits, work / "b", half, keep=frozenset({SPARSE, CLUSTERED}))
    quantized, second = QuantizeAware(train=SHORT, exclude=["classes"]).apply(clustered, context)
    return half, clustered, quantized, (first, second)


def kernels_of(model):
    return {layer.name: layer.get_weights()[0] for layer in model.layers if hasattr(layer, "kernel")}


def test_few_values_and_all_zeros(chain):
    half, clustered, _, (report, _) = chain
    assert clustered.properties == {SPARSE, CLUSTERED}
    before, after = kernels_of(half), kernels_of(clustered.model)
    skipped = {skip.layer for skip in report.skipped if skip.reason == "excluded by the recipe"}
    assert skipped == {name for name in before if name.startswith("stage3")} and skipped
    for name in report.touched:
        assert kept.distinct(after[name]) <= (8 if name == "stem" else 16), name
        assert np.all(after[name][before[name] == 0] == 0), name
        assert report.properties["layer_clusters"][name] == kept.distinct(after[name])
        assert not np.array_equal(before[name], after[name])
    for name in skipped:
        assert np.all(after[name][before[name] == 0] == 0) and not np.array_equal(before[name], after[name]), name
    assert set(report.touched) | skipped == set(before)
    assert kept.distinct(after["stem"]) == 8 and np.all(after["stem"] != 0), "it had no zeros to keep"
    assert report.properties["clusters"] == 16 and report.properties["sparsity"] > 0.45


def test_training_for_int8_keeps_both(chain):
    _, clustered, quantized, (_, report) = chain
    before, after = kernels_of(clustered.model), kernels_of(quantized.model)
    assert report.properties["clusters"] <= 16 and report.properties["sparsity"] > 0.45
    for name, kernel in before.items():
        assert np.all(after[name][kernel == 0] == 0), name
        if not name.startswith("stage3"):
            assert kept.distinct(after[name]) <= kept.distinct(kernel), name
            moved = not np.array_equal(kernel, after[name])
            assert moved == (name != "classes"), "the values themselves are trained, but for a layer left out"
    assert report.training["accuracy_after"] > 0.6


def test_in_the_file_a_clustered_kernel_has_as_many_numbers(chain, digits, spec, tmp_path):
    half, _, quantized, _ = chain
    client.convert_quantized(quantized.quantized, tmp_path / "int8.tflite", spec)
    rows = kept.measure(tmp_path / "int8.tflite", kept.kernels(quantized.model))
    kept.check(rows, sparse=True, clustered=True)
    for row in rows:
        assert row.found and row.zeros >= row.keras_zeros and row.lost == 0
        if row.clustered:
            assert row.values <= row.keras_values <= 16, "one range for all channels: no value more in the whole tensor"
    assert sum(row.clustered for row in rows) == sum("stage3" not in name for name in kernels_of(half))


def test_what_cannot_be_clustered_is_refused_before_training(half, digits, spec, tmp_path):
    work = tmp_path / "work"
    context = Context(digits, work, half, keep=frozenset({SPARSE}))
    sparse = OptimizedModel(half, spec, frozenset({SPARSE}))
    with pytest.raises(InputError, match="is sparse: two clusters are its zeros and one value"):
        Cluster(clusters=2, train=SHORT).apply(sparse, context)
    with pytest.raises(InputError, match="no layer of the model of that name"):
        Cluster(exclude=("head",), train=SHORT).apply(sparse, context)
    with pytest.raises(ModelRefused, match="No layer of the model can be clustered"):
        Cluster(exclude=("*",), train=SHORT).apply(sparse, context)
    with pytest.raises(ModelRefused, match="trained for int8 cannot be clustered"):
        make("cluster", {}).apply(dataclasses.replace(sparse, properties=frozenset({Property.FAKE_QUANT})), context)
    assert not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize("initialization", ["linear", "density"])
def test_other_initializations_and_no_zeros(half, digits, spec, tmp_path, initialization):
    model = OptimizedModel(half, spec, frozenset())
    technique = Cluster(clusters=4, initialization=initialization, train=SHORT)
    clustered, report = technique.apply(model, Context(digits, tmp_path, half))
    assert report.properties["clusters"] <= 4 and clustered.properties == {CLUSTERED}
    assert all(kept.distinct(kernel) <= 4 for kernel in kernels_of(clustered.model).values())
