"""Whether a model fits its data: the classes, guessing, and new heads and shapes."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from tfopt import builders, data, models, training
from tfopt.errors import InputError, ModelError

from .small_nets import net

layers = keras.layers


# Classes


def test_outputs_and_classes_must_agree():
    models.check_classes(models.from_keras(net()), ("a", "b", "c"))
    models.check_classes(models.from_keras(net(outputs=1, activation="sigmoid")), ("a", "b"))
    with pytest.raises(ModelError, match=r"does not match the data's classes.*3 outputs for 2 classes \(a, b"):
        models.check_classes(models.from_keras(net()), ("a", "b"))


def test_labels_are_added_where_there_are_none():
    loaded = models.with_labels(models.from_keras(net()), ("a", "b", "c"))
    assert loaded.spec.labels == ("a", "b", "c")
    assert models.with_labels(loaded, ("x", "y", "z")).spec.labels == ("a", "b", "c")


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
