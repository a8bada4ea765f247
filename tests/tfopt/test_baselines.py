"""The shipped baselines are what their cards say, and the demo knows which of them fit which data."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

import tfopt
from mobile_bench.errors import Problem
from mobile_bench.stats import wilson_interval
from tfopt import baselines, demo, models
from tfopt.data import CLASSES

CARDS = sorted(demo.baselines_folder().glob("*/card.json"))


def test_two_architectures_for_each_data_set_in_five_megabytes():
    made = {(card["architecture"].split("_")[0], card["data"]["name"]) for card in map(read, CARDS)}
    assert made == {(a, d) for a in ("resnet8", "mobilenet") for d in ("fashion_mnist", "cifar10-jpeg")}
    assert sum(path.parent.joinpath("model.keras").stat().st_size for path in CARDS) < 5e6


def read(path):
    return baselines.read_card(path.parent)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_card_is_complete_and_consistent(path):
    card = read(path)
    low, high = card["test_top1_95"]
    correct = round(card["test_top1"] * card["test_images"])
    assert (low, high) == pytest.approx(wilson_interval(correct, card["test_images"]))
    assert card["command"].startswith("tfopt train ") and card["date"] and card["seed"] == 0
    loaded = models.load(path.parent / "model.keras")
    assert loaded.spec_from == "the model file" and loaded.classes == 10
    assert loaded.model.count_params() == card["parameters"]
    assert path.parent.joinpath("model.keras").stat().st_size == card["keras_bytes"]
    if "resnet" in card["architecture"]:
        assert card["test_top1"] >= {"fashion_mnist": 0.91, "cifar10-jpeg": 0.80}[card["data"]["name"]]


def test_the_accuracy_on_a_card_is_reproduced_on_fashion_mnist(tmp_path):
    from tfopt import commands

    card = baselines.read_card(demo.baselines_folder() / "resnet8-fashion")
    model = demo.baselines_folder() / "resnet8-fashion" / "model.keras"
    exported = commands.convert_one(str(model), "float32", tmp_path / "m.tflite", None, None, False)
    found = commands.evaluate_one(tmp_path / "m.tflite", "fashion_mnist", model, None, None, False)
    assert exported["size_bytes"] == card["tflite_bytes"]
    assert found["fingerprint"] == card["data"]["fingerprint"]
    assert found["top1"] == card["test_top1"]
    assert found["agreement"] == 1.0


def test_baselines_are_chosen_by_their_classes():
    fashion = baselines.for_classes(demo.baselines_folder(), CLASSES["fashion_mnist"])
    assert sorted(path.parent.name for path in fashion) == ["mobilenet-fashion", "resnet8-fashion"]
    cifar = baselines.for_classes(demo.baselines_folder(), CLASSES["cifar10"])
    assert sorted(path.parent.name for path in cifar) == ["mobilenet-cifar10-jpeg", "resnet8-cifar10-jpeg"]
    assert baselines.for_classes(demo.baselines_folder(), ("cat", "dog")) == []


@pytest.mark.slow
def test_data_with_other_classes_gets_a_new_head_and_says_so(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("TFOPT_CACHE", str(tmp_path))
    monkeypatch.setitem(demo.ADAPTATION, "steps", 12)
    few = dataclasses.replace(digits, class_names=tuple(f"digit {n}" for n in range(10)))
    monkeypatch.setattr(tfopt.data, "load", lambda place: few)
    said = []
    _, paths = demo.prepare("photos", progress=said.append)
    assert len(paths) == 2 and all(path.exists() for path in paths)
    assert sum("no shipped baseline knows these classes" in text for text in said) == 2
    loaded = models.load(paths[0])
    assert loaded.spec.labels == few.class_names and loaded.classes == 10
    before = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    demo.prepare("photos", progress=said.append)
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() == before, "adapted twice"


def test_a_damaged_card_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "card.json").write_text(json.dumps({"card_version": 99}))
    with pytest.raises(Problem, match="another version"):
        baselines.for_classes(tmp_path, ("a", "b"))
