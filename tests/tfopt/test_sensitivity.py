"""Which layer can lose how much: in Python and by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from tfopt import sensitivity, training
from tfopt.errors import InputError


def test_one_layer_at_a_time_and_the_model_stays_as_it_is(trained, digits, spec):
    model = trained.model
    weights = [array.copy() for array in model.get_weights()]
    found = sensitivity.analyze(model, digits["validation"], spec, levels=(0.5, 0.99), images=100, exclude=("stage*",))
    assert all(np.array_equal(old, new) for old, new in zip(weights, model.get_weights()))
    split = digits["validation"].balanced(100)
    assert found.accuracy == pytest.approx(training.accuracy(model, split, spec)) and found.images == len(split)
    assert [row.layer for row in found.layers] == ["stem", "classes"]
    for row in found.layers:
        layer = model.get_layer(row.layer)
        kernel = layer.kernel.numpy()
        order = np.argsort(np.abs(kernel), axis=None, kind="stable")
        pruned = kernel.ravel().copy()
        pruned[order[: int(0.99 * kernel.size)]] = 0
        layer.kernel.assign(pruned.reshape(kernel.shape))
        assert row.accuracies[1] == pytest.approx(training.accuracy(model, split, spec)), row.layer
        layer.kernel.assign(kernel)
        assert row.accuracies[1] < row.accuracies[0], "99% of a layer is more than it can lose"
    assert set(found.sparsities(1.0).values()) == {0.99} and set(found.sparsities(0.0).values()) <= {0, 0.5}


def test_the_most_a_layer_can_lose_ends_at_the_first_fall():
    row = sensitivity.LayerSensitivity("a:0", "a", "Dense", 10, (0.3, 0.5, 0.9), (0.9, 0.7, 0.9))
    assert row.most(0.9, 0.01) == 0.3 and row.most(0.9, 0.2) == 0.9 and row.most(0.95, 0.01) == 0


@pytest.mark.parametrize("levels", [(), (0,), (0.5, 1.0), ("half",)])
def test_levels_that_are_no_sparsities(trained, digits, spec, levels):
    with pytest.raises(InputError, match="levels are not sparsities"):
        sensitivity.analyze(trained.model, digits["validation"], spec, levels=levels)


def test_images_of_one_class_prove_nothing(trained, digits, spec):
    split = digits["validation"]
    with pytest.raises(InputError, match=r"all of one class.*of class 3"):
        sensitivity.analyze(trained.model, split.subset(np.flatnonzero(split.labels == 3)), spec)


def test_the_command_prints_one_object_and_draws(trained_file, tmp_path):
    picture = tmp_path / "layers.svg"
    done = subprocess.run(
        [sys.executable, "-m", "tfopt.cli", "sensitivity", str(trained_file), "--data", "digits", "--images", "50",
         "--level", "0.5", "--level", "0.9", "--max-drop", "5", "--exclude", "stage1*", "--json",
         "--picture", str(picture)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["levels"] == [0.5, 0.9] and printed["max_drop"] == 0.05
    names = [row["layer"] for row in printed["layers"]]
    assert "stem" in names and not any(name.startswith("stage1") for name in names)
    assert all(row["sparsity"] in (0, 0.5, 0.9) and set(row["drops"]) == {"0.5", "0.9"} for row in printed["layers"])
    texts = [element.text for element in xml.etree.ElementTree.parse(picture).iter() if element.text]
    assert set(names) <= set(texts)
