"""Latency tables in use: the command from a model to a table, and the technique `channels` from a table to a model."""

from __future__ import annotations

import json
import sys

import keras
import pytest
from typer.testing import CliRunner

from mobile_bench.cli_support import exit_code_of
from tests.tfopt.test_latency import made_table
from tfopt import builders, models
from tfopt.cli import app
from tfopt.errors import InputError, ModelRefused, Problem
from tfopt.latency import anchor, channels, fill, parts, predict, table
from tfopt.technique import Context, OptimizedModel
from tfopt.techniques.narrow import Narrow
from tfopt.training import TrainConfig

kinds = keras.layers
SHORT = TrainConfig(steps=2, learning_rate=1e-4, evaluations=1, validation_images=20)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory, spec):
    keras.utils.set_random_seed(0)
    image = keras.Input(spec.shape)
    x = kinds.Conv2D(8, 3, activation="relu", name="conv")(image)
    x = kinds.Dense(10, activation="softmax", name="classes")(kinds.GlobalAveragePooling2D()(x))
    path = tmp_path_factory.mktemp("latency") / "tiny.keras"
    models.save(keras.Model(image, x, name="tiny"), path, spec)
    return path


def tfopt(*arguments):
    return CliRunner().invoke(app, ["latency", *map(str, arguments)])


def test_the_command_measures_once_and_refuses_what_does_not_hold(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "WHOLE_ROUNDS", 2)
    monkeypatch.setattr(anchor, "REPEATS", 1)
    out = tmp_path / "table.json"
    options = [tiny_file, "--points", 2, "--seconds", 0.05, "--out", out]
    first = tfopt(*options, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert not found["reused"] and found["whole_ms"] > 0 and found["ratio"] > 0
    assert set(found["layers_ms"]) == {"conv", "classes"} and found["setting"]["scheme"] == "float32"
    assert found["device"]["runtime_version"] and "timing the whole model" in first.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
    before = out.read_bytes()
    again = tfopt(*options)
    assert again.exit_code == 0 and "it was there and still holds" in again.stdout and out.read_bytes() == before
    for changes, words in (
        (["--scheme", "int8"], "another scheme"), (["--threads", 2], "another number of threads"),
        (["--points", 1], "--points is out of range"), (["--seconds", "nan"], "--seconds is out of range"),
        (["--scheme", "float16"], "no such scheme"), (["--threads", 0], "threads is out of range"),
        (["--target", "nowhere"], "target"), (["--out", tiny_file], "overwrite"),
    ):  # fmt: skip
        refused = tfopt(*options, *changes)
        assert isinstance(refused.exception, Problem) and words in str(refused.exception), changes
    assert out.read_bytes() == before


def test_a_problem_is_no_traceback(tiny_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tfopt", "latency", str(tiny_file), "--points", "99", "--json"])
    assert exit_code_of(app) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["received"] == "99" and "Traceback" not in printed.err


@pytest.fixture(scope="module")
def network(spec):
    keras.utils.set_random_seed(0)
    return builders.build("resnet8", spec.shape, 10)


def elsewhere(model, tmp_path) -> str:
    """A table of that model, made up, of another machine."""
    made = made_table(parts.anatomy(model))
    values = {**made.to_dict(), "setting": {"target": "ssh://pi@board", "scheme": "int8", "threads": 4}}
    path = tmp_path / "board.json"
    path.write_text(json.dumps(values))
    return str(path)


def apply(technique, model, digits, spec, tmp_path):
    return technique.apply(OptimizedModel(model, spec), Context(digits, tmp_path, teacher=model))


def test_channels_go_until_the_budget_is_kept(network, digits, spec, tmp_path):
    path = elsewhere(network, tmp_path)
    technique = Narrow(latency=0.5, table=path, importance="l1", rounds=2, train=SHORT)
    assert path in technique.files() and technique.ratio is None
    result, report = apply(technique, network, digits, spec, tmp_path)
    facts = report.properties["latency"]
    assert facts["target"] == "ssh://pi@board" and facts["threads"] == 4
    assert facts["predicted_ms"] <= facts["budget_ms"] == pytest.approx(0.5 * facts["measured_ms"], abs=1e-5)
    after = parts.anatomy(result.model)
    cost = predict.Latency(after, table.load(path), parts.anatomy(network))
    assert cost.of(after.groups) == pytest.approx(facts["predicted_ms"], abs=1e-5)
    assert report.macs_after < 0.7 * report.macs_before
    assert any("ms predicted after" in note for note in report.notes)
    milliseconds = Narrow(milliseconds=0.5 * facts["measured_ms"], table=path, importance="l1", train=SHORT)
    smaller = milliseconds.cut_once(OptimizedModel(network, spec), Context(digits, tmp_path, teacher=network))
    again = parts.anatomy(smaller)
    assert (
        predict.Latency(again, table.load(path), parts.anatomy(network)).of(again.groups) <= facts["budget_ms"] + 1e-5
    )


def test_refusals_come_before_any_training(network, digits, spec, tmp_path, monkeypatch):
    def fit(*args, **kwargs):
        raise AssertionError("trained before the refusal")

    monkeypatch.setattr("tfopt.training.fit", fit)
    monkeypatch.setattr("tfopt.training.recalibrate", fit)
    (tmp_path / "mine").mkdir()
    path = elsewhere(network, tmp_path / "mine")
    other = elsewhere(builders.build("resnet8", spec.shape, 10, width=0.5), tmp_path)
    for technique, kind, words in (
        (Narrow(latency=0.001, table=path, importance="l1"), ModelRefused, "So little time cannot be reached"),
        (Narrow(milliseconds=1e6, table=path, importance="l1"), ModelRefused, "keeps the budget as it is"),
        (Narrow(latency=0.5, table=other), InputError, "of another model"),
        (Narrow(latency=0.5, table=path, scheme="float32"), InputError, "holds for another scheme"),
        (Narrow(latency=0.5, table=path, threads=1), InputError, "another number of threads"),
        (Narrow(latency=0.5, table=path, target="local"), InputError, "holds for another target"),
        (Narrow(latency=0.5, table=str(tmp_path / "nowhere.json")), InputError, "cannot be read"),
        (Narrow(latency=0.5, target="nowhere"), InputError, "target"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words) as caught:
            apply(technique, network, digits, spec, tmp_path)
        assert caught.value.received is not None
    (tmp_path / "mine" / "board.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        apply(Narrow(latency=0.5, table=path), network, digits, spec, tmp_path)


def test_without_a_table_one_is_measured_once_and_kept(network, spec, tmp_path, monkeypatch):
    from tfopt.channels import dependencies

    monkeypatch.setenv("TFOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(channels, "here", lambda: {"cpu": "made up"})
    found, calls = dependencies.analyze(network), []

    def measure(first, whole, name, place, out, on_progress):
        calls.append(place)
        made = made_table(first)
        made.save(out)
        return made

    monkeypatch.setattr(channels, "measure", measure)
    wanted = channels.Wanted(latency=0.5)
    first, _ = channels.table_for(wanted, found, spec)
    again, _ = channels.table_for(wanted, found, spec)
    assert len(calls) == 1 and calls[0].target == "local" and again.whole_ms == first.whole_ms
    monkeypatch.setattr(channels, "here", lambda: {"cpu": "another"})
    channels.table_for(wanted, found, spec)
    assert len(calls) == 2, "a table of another machine was taken"
