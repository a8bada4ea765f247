"""Latency tables: how they are read and written, and what is chosen by them. No clock is asserted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_bench.errors import InputError, JobFailed, ModelRefused, Problem
from mobile_bench.turns import Timing, Turns, timings_of
from tfopt.channels import choose, costs, cut, dependencies, importance
from tfopt.latency import anchor, budget, channels, fill, grid, micro, parts, predict, table, widths
from tfopt.latency.knapsack import Option
from tfopt.latency.knapsack import choose as knapsack
from tfopt.techniques.narrow import Narrow

kinds = keras.layers
DEVICE = {"cpu": "made up", "machine": "x86_64", "runtime": "ai-edge-litert", "runtime_version": "1"}


def network(width: int = 32, size: int = 8):
    image = x = keras.Input((size, size, 3))
    x = kinds.ReLU()(kinds.BatchNormalization()(kinds.Conv2D(width, 3, padding="same", name="stem")(x)))
    y = kinds.ReLU()(kinds.Conv2D(width, 3, padding="same", name="a")(x))
    x = kinds.Add(name="add")([x, kinds.Conv2D(width, 3, padding="same", name="b")(y)])
    x = kinds.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = kinds.Conv2D(2 * width, 1, activation="relu6", name="point")(x)
    x = kinds.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, kinds.Dense(10, activation="softmax", name="classes")(x), name="small")


def stairs(family: str, read: int, made: int) -> float:
    """Made-up milliseconds: linear in what is read, in stairs of 16 in what is made."""
    return 1e-6 * parts.macs_of(family, read, 16 * math.ceil(made / 16) if made else None) + 0.002


class FakeTimer:
    """Times of files by their shapes, read from the file itself; fails at a given call."""

    def __init__(self, stop_at: int | None = None, device=DEVICE):
        self.calls, self.files, self._stop_at, self._device = 0, 0, stop_at, device

    def __call__(self, files, rounds):
        self.calls += 1
        if self.calls == self._stop_at:
            raise KeyboardInterrupt
        self.files += len(files)
        values = [self._ms(file) for file in files]
        timings = tuple(Timing(ms, 0.9 * ms, 1.1 * ms, ms / values[0]) for ms in values)
        return Turns(timings, rounds, dict(self._device), ())

    @staticmethod
    def _ms(file) -> float:
        from mobile_bench.flatbuffer import read_model
        from mobile_bench.opcost import macs_of

        model = read_model(file)
        return sum(macs_of(model, op) or 0 for op in model.main.operators) * 1e-6 + 0.0005


def measured(found, tmp_path, timer=None, **changes):
    place = micro.Place("local", "float32", 1)
    whole = lambda folder: micro.convert({"whole": network()}, "float32", folder / "w")["whole"]
    options = {"points": 2, "timer": timer or FakeTimer(), "profiler": lambda path: anchor.Anchor(0.9), **changes}
    return fill.measure(found, whole, "small", place, tmp_path / "table.json", **options)


def made_table(found, milliseconds=stairs, whole_ms=None, share=None) -> table.Table:
    """A table without any file: each cell is what `milliseconds` says."""
    families = {
        family: table.Family(points, {(c.read, c.made): milliseconds(family, c.read, c.made) for c in cells})
        for family, (points, cells) in fill.plan(found).items()
    }
    total = sum(families[p.family].ms(p.read.of(found.groups), p.made and p.made.of(found.groups)) for p in found.parts)
    ms = whole_ms or total
    return table.Table(
        table.Setting("local", "float32", 1), families, ms, ms, ms, share, total, DEVICE, "small",
        fill.model_key(found), "2026-01-01T00:00:00+00:00",
    )  # fmt: skip


# The knapsack.

PAIRS = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(st.lists(PAIRS, min_size=1, max_size=5), st.integers(0, 80))
def test_the_knapsack_loses_as_little_as_any_choice(groups, most):
    options = [[Option(lost, cost) for lost, cost in group] for group in groups]
    ways = [way for way in itertools.product(*options) if sum(option.cost for option in way) <= most]
    if not ways:
        with pytest.raises(InputError, match="cannot be reached"):
            knapsack(options, most)
        return
    picked = [group[index] for group, index in zip(options, knapsack(options, most))]
    assert sum(option.cost for option in picked) <= most
    assert sum(o.lost for o in picked) == pytest.approx(min(sum(o.lost for o in way) for way in ways))


def test_a_large_knapsack_merges_neighbours_and_still_keeps_the_budget(monkeypatch):
    random = np.random.default_rng(0)
    options = []
    for _ in range(25):
        costs = np.sort(random.uniform(0, 10, 12))
        options.append(
            [Option(float(lost), float(cost)) for lost, cost in zip(10 - costs + random.uniform(0, 3), costs)]
        )
    most = 0.4 * sum(group[-1].cost for group in options)
    found = {}
    for pairs in (200, 20_000):
        monkeypatch.setattr("tfopt.latency.knapsack.MOST_PAIRS", pairs)
        picked = [group[index] for group, index in zip(options, knapsack(options, most))]
        assert sum(option.cost for option in picked) <= most
        found[pairs] = sum(option.lost for option in picked)
    assert found[20_000] <= found[200] * (1 + 1e-9) and found[200] <= 1.05 * found[20_000]


class Chain:
    """Layers between neighbouring groups: the cost of each is the product of their counts, in stairs."""

    def __init__(self, weights, step=1):
        self.groups, self._weights, self._step = (1,) * (len(weights) + 1), weights, step

    def of(self, counts):
        up = [self._step * math.ceil(count / self._step) for count in counts]
        return sum(w * a * b for w, a, b in zip(self._weights, up, up[1:]))

    def seeing(self, group, counts):
        up = [self._step * math.ceil(count / self._step) for count in counts]
        terms = [w * a * b for w, a, b in zip(self._weights, up, up[1:])]
        return sum(terms[max(0, group - 1) : group + 1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.sampled_from([1, 2, 3]), st.floats(0.15, 0.95))
def test_coupled_groups_lose_hardly_more_than_the_best_of_all_combinations(seed, count, step, share):
    random = np.random.default_rng(seed)
    cost = Chain(random.uniform(0.5, 2, count - 1), step)
    options = [list(range(1, 6)) for _ in range(count)]
    lost = [np.cumsum([0, *np.sort(random.uniform(0, 1, 4))])[::-1] for _ in range(count)]
    most = share * cost.of([5] * count)
    search = budget.Search(cost, options, lost)
    ways = [way for way in itertools.product(range(5), repeat=count) if cost.of([way_ + 1 for way_ in way]) <= most]
    if not ways:
        with pytest.raises(ModelRefused, match="So little time"):
            search.within(most)
        return
    found = search.within(most)
    assert found.cost == pytest.approx(cost.of(found.counts)) and found.cost <= most
    best = min(sum(float(group[place]) for group, place in zip(lost, way)) for way in ways)
    assert best - 1e-9 <= found.lost <= 1.25 * best + 1e-9


# The table.


def test_between_its_cells_a_table_is_linear_and_keeps_the_stairs():
    plane = table.Family(((8, 64), (8, 64)), {(a, b): 3.0 * a + 2.0 * b for a in (8, 64) for b in (8, 64)})
    assert plane.ms(8, 64) == 152 and plane.ms(36, 36) == pytest.approx(180) and plane.ms(4, 8) == pytest.approx(28)
    stair = lambda a, b: a * 16 * math.ceil(b / 16)
    cells = {(a, b): float(stair(a, b)) for a, b in grid.cells(grid.axis([64]), grid.axis([64]))}
    few = grid.axis([64])[0]
    family = table.Family((few, few), cells)
    for read, made in itertools.product(range(8, 65, 4), range(8, 65, 8)):
        assert family.ms(read, made) == pytest.approx(stair(read, made), rel=0.15), (read, made)
    along = table.Family(((8, 16), ()), {(8, 0): 1.0, (16, 0): 3.0})
    assert along.ms(12, None) == pytest.approx(2.0) and along.ms(1, None) > 0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.booleans(), st.integers(2, 6), st.sampled_from([1, 2, 4]))
def test_axes_rise_hold_the_largest_and_stay_short(most, free, points, groups):
    most *= groups
    few, many = grid.axis([most] if free else [], [] if free else [most], points, groups)
    assert few[-1] == many[-1] == most and set(few) <= set(many)
    assert list(many) == sorted(set(many)) and len(few) <= points + 1 and len(many) <= 36
    assert all(value >= 1 and value % groups == 0 for value in many)


def test_a_model_is_taken_apart_as_the_converter_does():
    found = parts.anatomy(network())
    assert [part.layer for part in found.parts] == ["stem", "a", "b", "depthwise", "point", "classes"]
    assert {other.layer for other in found.others} == {"add", "pool", "classes"}  # the softmax is an operation
    assert found.parts[0].family == found.parts[1].family == found.parts[2].family != found.parts[4].family
    whole = found.groups
    assert [part.read.of(whole) for part in found.parts] == [3, 32, 32, 32, 32, 64]
    assert found.parts[3].made is None and found.parts[4].made.of(whole) == 64


def test_counts_of_channels_and_macs_follow_the_cut():
    """Concatenated, flattened and added: what a table is asked for is what the smaller model has."""
    image = x = keras.Input((6, 6, 3))
    one, two = kinds.Conv2D(16, 3, name="one")(x), kinds.Conv2D(8, 3, name="two")(x)
    x = kinds.Conv2D(24, 1, name="join")(kinds.Concatenate()([one, two]))
    x = kinds.Flatten()(kinds.Add()([x, kinds.Conv2D(24, 1, name="side")(one)]))
    model = keras.Model(image, kinds.Dense(5, name="out")(x))
    found = dependencies.analyze(model)
    scores = importance.scores(found, "l2")
    counts = [max(1, len(group) // 2) for group in found.groups]
    smaller = cut.cut(found, choose.by_counts(found, scores, counts))
    after = parts.anatomy(smaller)
    for part, same in zip(parts.anatomy(found).parts, after.parts, strict=True):
        assert part.family == same.family and part.read.of(counts) == same.read.of(after.groups)
        assert (part.made and part.made.of(counts)) == (same.made and same.made.of(after.groups))
    keep = found.keep(choose.by_counts(found, scores, counts))
    assert parts.anatomy(found).values(counts) == after.values(after.groups)
    assert predict.Macs(found).of(counts) == costs.Costs(found).macs(keep)


@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_a_widened_file_is_the_converters_own(scheme, tmp_path):
    spec = micro.LayerSpec
    layers = {
        "conv": (spec("Conv2D", (6, 6, 13), {"filters": 17, "kernel_size": 3}), {"filters": 24}),
        "grouped": (spec("Conv2D", (6, 6, 26), {"filters": 34, "kernel_size": 3, "groups": 2}), {"filters": 8}),
        "depthwise": (spec("DepthwiseConv2D", (6, 6, 13), {"kernel_size": 3, "depth_multiplier": 2}), {}),
        "dense": (spec("Dense", (13,), {"units": 17}), {"units": 24}),
        "up": (spec("Conv2DTranspose", (7, 7, 13), {"filters": 17, "kernel_size": 3, "strides": 2}), {"filters": 24}),
        "both": (spec("SeparableConv2D", (6, 6, 13), {"filters": 17, "kernel_size": 3}), {"filters": 24}),
    }
    specs = {name: template for name, (template, _) in layers.items()}
    for name, (template, config) in layers.items():
        specs[f"{name}-wide"] = spec(template.kind, (*template.shape[:-1], 40), {**template.config, **config})
    files = micro.convert_layers(specs, scheme, tmp_path)
    changes = {
        "grouped": {26: 40, 13: 20, 34: 8}, "depthwise": {13: 40, 26: 80},
        **{name: {13: 40, 17: 24} for name in ("conv", "dense", "up", "both")},
    }  # fmt: skip
    for name, change in changes.items():
        wide, made = files[f"{name}-wide"].read_bytes(), widths.widened(files[name].read_bytes(), change)
        assert widths.same_form(made, wide), name
        assert not widths.same_form(files[name].read_bytes(), wide), name
        (tmp_path / "made.tflite").write_bytes(made)
        from mobile_bench.interpreter import open_model

        model = open_model(tmp_path / "made.tflite")
        (answer,) = model.invoke(np.zeros(model.inputs[0].shape, model.inputs[0].dtype))
        assert np.isfinite(np.asarray(answer, float)).all(), name
    found = micro.times({name: files[name] for name in ("dense", "conv")}, micro.Place(scheme=scheme), seconds=0.05)
    assert list(found) == ["dense", "conv"] and found["dense"].ratio == 1
    assert all(0 < timing.low_ms <= timing.ms <= timing.high_ms for timing in found.values())


def test_a_table_is_measured_resumed_and_read_again(tmp_path, monkeypatch):
    found = parts.anatomy(network())
    seen = []
    monkeypatch.setattr(fill, "BATCH", 16)
    with pytest.raises(KeyboardInterrupt):
        measured(found, tmp_path, FakeTimer(stop_at=2))
    first = FakeTimer()
    made = measured(found, tmp_path, first, on_progress=lambda done, total, facts: seen.append((done, total, facts)))
    cells = sum(len(cells) for _, cells in fill.plan(found, 2).values())
    assert first.files < cells, "the first batch was measured twice"
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen) and seen[-1][0] < seen[-1][1]
    assert seen[-1][2]["seconds_left"] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
    again = table.load(tmp_path / "table.json")
    assert again.families.keys() == made.families.keys() and again.ratio == pytest.approx(made.ratio)
    cost = predict.Latency(found, again)
    assert cost.of(found.groups) == pytest.approx(again.whole_ms, rel=1e-6)
    half = [count // 2 for count in found.groups]
    assert 0.2 < cost.of(half) / cost.of(found.groups) < 0.6
    for group in range(len(found.groups)):
        one = [*found.groups]
        one[group] //= 2
        whole, own = cost.of(found.groups) - cost.of(one), cost.seeing(group, found.groups) - cost.seeing(group, one)
        assert own == pytest.approx(whole)
    assert sum(cost.layers(found.groups).values()) + again.rest_ms == pytest.approx(again.whole_ms)


def test_what_the_runtime_cannot_run_is_named_and_the_rest_kept():
    def timer(files, rounds):
        if any("64 -> 16" in file for file in files):
            raise JobFailed("The process crashed")
        return Turns(tuple(Timing(1, 1, 1, 1) for _ in files), rounds, DEVICE, ())

    (family,) = {part.family for part in parts.anatomy(network()).parts[:1]}
    cells = [fill.Cell(family, read, 16) for read in (8, 16, 24, 32, 64, 72)]
    files = SimpleNamespace(yardstick="y", nothing="n", cell=lambda cell: f"{cell.read} -> {cell.made}")
    kept = []
    with pytest.raises(ModelRefused, match="Conv2D 3x3 on 8x8, 64 channels in, 16 out: The process crashed"):
        for part, turns in fill._timed(cells, files, timer):
            assert len(turns.timings) == 2 + len(part)
            kept += part
    assert [cell.read for cell in kept] == [8, 16, 24, 32]


def test_cells_of_two_machines_make_no_table(tmp_path):
    notes = fill._Notes(tmp_path / "table.json", {})
    turns = Turns((Timing(1, 1, 1, 1), Timing(1, 1, 1, 1)), 3, DEVICE, ())
    notes.add([], turns)
    again = fill._Notes(tmp_path / "table.json", {})
    assert again.yardsticks == [1]
    with pytest.raises(InputError, match="another machine"):
        again.add([], Turns(turns.timings, 3, {**DEVICE, "cpu": "another"}, ()))
    assert fill._Notes(tmp_path / "table.json", {"points": 5}).yardsticks == []


def test_a_table_that_does_not_hold_is_refused(tmp_path):
    found = parts.anatomy(network())
    made = made_table(found)
    families = [part.family for part in found.parts]
    made.check(families, made.setting, DEVICE)
    for setting in (
        table.Setting("ssh://pi@board", "float32", 1), table.Setting("local", "int8", 1),
        table.Setting("local", "float32", 4),
    ):  # fmt: skip
        with pytest.raises(InputError, match="holds for another"):
            made.check(families, setting)
    for facts in ({**DEVICE, "cpu": "another"}, {**DEVICE, "runtime_version": "2"}):
        with pytest.raises(InputError, match="another machine or runtime"):
            made.check(families, made.setting, facts)
    other = parts.anatomy(network(size=9))
    with pytest.raises(InputError, match="another model"):
        made.check([part.family for part in other.parts])
    with pytest.raises(InputError, match="another machine"):
        channels.check(made, found, None)  # not what DEVICE says
    elsewhere = dataclasses.replace(made, setting=table.Setting("ssh://pi@board", "float32", 1))
    channels.check(elsewhere, found, None)
    with pytest.raises(InputError, match="another model"):
        channels.check(elsewhere, parts.anatomy(network(24)), None)
    path = tmp_path / "table.json"
    made.save(path)
    values = json.loads(path.read_text())
    for change in (
        "{", "[]", json.dumps({**values, "schema_version": 99}), json.dumps({**values, "format": "x"}),
        json.dumps({**values, "families": [{}]}), json.dumps({**values, "whole_ms": 0}),
    ):  # fmt: skip
        path.write_text(change)
        with pytest.raises(Problem) as caught:
            table.load(path)
        assert caught.value.received is not None or caught.value.allowed is not None
    with pytest.raises(InputError, match="cannot be read"):
        table.load(tmp_path / "nowhere.json")


def test_without_a_profile_the_rest_is_what_the_kernels_leave():
    found = parts.anatomy(network())
    slow = made_table(found, whole_ms=3 * made_table(found).whole_ms)
    assert slow.scale == 1 and slow.rest_ms == pytest.approx(slow.whole_ms - slow.parts_ms)
    fast = made_table(found, whole_ms=0.5 * made_table(found).whole_ms)
    assert fast.scale == pytest.approx(0.5) and fast.rest_ms == 0
    known = made_table(found, share=0.8)
    assert known.rest_ms == pytest.approx(0.2 * known.whole_ms) and known.ratio == pytest.approx(1.25)


def test_layers_cost_in_the_network_what_its_profile_says():
    found = parts.anatomy(network())
    made = dataclasses.replace(made_table(found, share=1.0), profiled={"a": 3.0, "b": 5.0, "point": 1.0, "stem": 0.001})
    layers = predict.Latency(found, made).layers(found.groups)
    assert sum(layers.values()) == pytest.approx(made.whole_ms)
    assert layers["a"] == pytest.approx(layers["b"]) == pytest.approx(4 * layers["point"])  # alike: the median of both
    alone = predict.Latency(found, made, anchored=False).layers(found.groups)
    assert alone["a"] / alone["stem"] != pytest.approx(layers["a"] / layers["stem"])
    rest = (layers["a"] + layers["b"] + layers["point"]) / (alone["a"] + alone["b"] + alone["point"])
    assert layers["stem"] / alone["stem"] == pytest.approx(rest)  # too short for the profiler


# The choice.


def test_a_choice_by_stairs_ends_on_steps_and_one_by_macs_does_not():
    keras.utils.set_random_seed(0)
    found = dependencies.analyze(network())
    scores = importance.scores(found, "l1")
    cost = predict.Latency(found, made_table(parts.anatomy(found)))
    whole = cost.of(cost.groups)
    choice = channels.search(found, scores, cost).within(0.6 * whole)
    assert choice.cost <= 0.6 * whole and all(count % 16 == 0 for count in choice.counts)
    units = channels.removed(found, scores, choice)
    assert len(units) == sum(cost.groups) - sum(choice.counts)
    macs = predict.Macs(found)
    blind = channels.search(found, scores, macs)
    by_macs = blind.within(0.6 * macs.of(macs.groups))
    assert cost.of(by_macs.counts) > 0.6 * whole or by_macs.lost >= choice.lost


def test_rounds_go_the_same_way_as_one_cut():
    found = dependencies.analyze(network(64))
    scores = importance.scores(found, "l1")
    first = parts.anatomy(found)
    plan = channels.Budget(channels.Wanted(latency=0.4), found, made_table(first))
    half = cut.cut(found, plan.choose(found, scores, 0.5, kind="l1", multiple=8))
    again = dependencies.analyze(half)
    assert predict.Latency(again, plan.table, first).of(parts.anatomy(half).groups) <= 0.4**0.5 * plan.before_ms
    units = plan.choose(again, importance.scores(again, "l1"), 1.0, kind="l1", multiple=8)
    end = dependencies.analyze(cut.cut(again, units))
    facts = plan.facts(end)
    assert facts["predicted_ms"] <= facts["budget_ms"] + 1e-6 == pytest.approx(0.4 * plan.before_ms, abs=1e-5)
    with pytest.raises(ModelRefused, match="and more"):
        tight = channels.Budget(channels.Wanted(milliseconds=1e-4), found, made_table(first))
        tight.choose(found, scores, 1.0, kind="l1", multiple=8)
    with pytest.raises(ModelRefused, match="as it is"):
        channels.Budget(channels.Wanted(milliseconds=1e4), found, made_table(first))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"latency": 0}, "latency is out of range"), ({"latency": 1.0}, "above 0, below 1"),
        ({"latency": "half"}, "out of range"), ({"milliseconds": -1}, "milliseconds is out of range"),
        ({"latency": 0.5, "ratio": 0.3}, "more than one way"), ({"latency": 0.5, "macs": 0.5}, "latency and macs"),
        ({"latency": 0.5, "milliseconds": 1}, "more than one way"), ({"latency": 0.5, "scope": "global"}, "scope"),
        ({"latency": 0.5, "layers": {"a": 0.5}}, "layers"), ({"table": "t.json"}, "none is asked for"),
        ({"latency": 0.5, "scheme": "float16"}, "no latency table of that scheme"),
        ({"latency": 0.5, "threads": -1}, "threads is out of range"), ({"latency": 0.5, "target": 3}, "no text"),
        ({"latency": True}, "out of range"), ({"latency": float("nan")}, "out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(values, words):
    with pytest.raises(InputError, match=words) as caught:
        Narrow(**values)
    assert caught.value.received is not None


def test_ratios_of_files_do_not_drift_with_the_machine():
    turns = [[[3.0, 3.0, 9.0], [1.5, 1.5, 1.6]], [[3.0], [1.5]]]
    slower = [[[2 * value for value in block] for block in turn] for turn in turns]
    yardstick, half = timings_of([turns, slower, turns])
    assert yardstick.ratio == 1 and yardstick.ms == pytest.approx(3)
    assert half.ratio == pytest.approx(0.5) and half.low_ms == pytest.approx(half.ms) == pytest.approx(half.high_ms)
