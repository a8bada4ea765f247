"""Records to rows: what each column says, and what is never mixed."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from dashboard import advice, frames, story
from mobile_bench import stats, store
from mobile_bench.records import Measurement, Quality, Target
from mobile_bench.store import read_study

from .conftest import DEVICE, FAILURE, ODD, add_variant, measurement, write_record


@pytest.fixture(scope="module")
def frame(study):
    return frames.variants(read_study(study))


def test_a_row_holds_what_the_records_say(study, frame):
    entry = frames.entry_of(read_study(study), "resnet8/qat-int8")
    row, summary = frame.loc["resnet8/qat-int8"], stats.summarize(entry.measurements[0])
    assert (row.model, row.variant, row.recipe, row.scheme, row.status) == ("resnet8", "qat-int8", "qat", "int8", "ok")
    assert (row.top1, row.images, row.agreement, row.baseline_agreement) == (0.8442, 10_000, 0.9987, 0.9312)
    assert (row.top1_low, row.top1_high) == stats.wilson_interval(8442, 10_000)
    assert (row.size_bytes, row.gzip_bytes, row.parameters, row.macs) == (99_100, 86_217, 78_000, 12_500_000)
    assert (row.median_ms, row.p90_ms, row.p99_ms, row.fps) == (
        summary.median_ms, summary.p90_ms, summary.p99_ms, summary.fps,
    )  # fmt: skip
    assert (row.median_low_ms, row.median_high_ms) == (summary.median_low_ms, summary.median_high_ms)
    assert (row.load_ms, row.peak_rss_bytes) == (2.31, 61_000_000)
    assert row.meets and row.tflite.endswith("resnet8/qat-int8/model.tflite")


def test_rows_come_in_the_studys_order_with_failed_and_missing_ones(study, frame):
    assert tuple(frame.index) == read_study(study).record.expected
    failed, missing = frame.loc[f"{ODD}/qat-int8"], frame.loc[f"{ODD}/lowrank-float32"]
    assert (failed.status, failed.reason) == ("failed", FAILURE)
    assert (missing.status, missing.recipe, missing.scheme) == ("missing", "lowrank", "float32")
    assert pd.isna(failed.meets) and pd.isna(missing.top1) and not missing.on_front


def test_a_variant_without_a_time_says_why(frame):
    assert frame.loc[f"{ODD}/baseline-int8"].reason == "not measured"
    assert "unresolved custom op: <odd>" in frame.loc[f"{ODD}/prune-int8"].reason
    assert pd.isna(frame.loc[f"{ODD}/prune-int8"].median_ms) and frame.loc[f"{ODD}/prune-int8"].top1 == 0.81


def test_differences_are_against_the_same_model(frame):
    row = frame.loc["mobilenet-w0.25/qat-int8"]
    base = frame.loc["mobilenet-w0.25/baseline-float32"]
    assert row.delta_points == pytest.approx(0.11)
    assert row.times_smaller == pytest.approx(base.size_bytes / row.size_bytes)
    assert row.times_faster == pytest.approx(base.median_ms / row.median_ms)
    assert frame[frame["is_baseline"]].index.tolist() == [
        "resnet8/baseline-float32", "mobilenet-w0.25/baseline-float32", f"{ODD}/baseline-float32",
    ]  # fmt: skip


def test_the_front_is_what_nothing_beats(frame):
    whole = frame[frame["median_ms"].notna()]
    for key, row in whole.iterrows():
        beaten = [
            other for other in whole.drop(key).itertuples()
            if other.top1 >= row.top1 and other.median_ms <= row.median_ms and other.size_bytes <= row.size_bytes
        ]  # fmt: skip
        assert row.on_front == (not beaten)
    assert 0 < frame["on_front"].sum() < len(whole)


def test_the_deadline_judges_p90(study):
    read = read_study(study)
    p90 = frames.variants(read).loc["resnet8/qat-int8"].p90_ms
    assert frames.variants(read, deadline_ms=p90 * 1.001).loc["resnet8/qat-int8"].meets
    assert not frames.variants(read, deadline_ms=p90 * 0.999).loc["resnet8/qat-int8"].meets


def test_machines_threads_and_runtimes_are_never_mixed(tmp_path):
    pi = {
        "board": "Raspberry Pi 4",
        "cores": 4,
        "machine": "aarch64",
        "runtime": "ai-edge-litert",
        "runtime_version": "2.3.0",
    }
    here = add_variant(tmp_path, "m", "baseline", "float32", 9000, 4000, 2.0)
    add_variant(tmp_path, "m", "baseline", "int8", 8900, 2000, 1.5)
    sha = store.read_entry(here).variant.sha256
    others = (
        (8.0, pi, Target("ssh", address="me@pi")),
        (1.1, DEVICE, Target(threads=2)),
        (2.9, {**DEVICE, "runtime_version": "2.4.0"}, Target()),
    )
    for number, (median_ms, device, target) in enumerate(others, 1):
        store.write_measurement(here, measurement(sha, median_ms, number, device, target))
    write_record(tmp_path, ())
    read = read_study(tmp_path)
    found = frames.places(read)
    assert len(found) == 4 and "AMD EPYC" in str(found[0]) and "1 thread ·" in str(found[0])
    times = {str(p): frames.variants(read, p)["median_ms"].tolist() for p in found}
    assert [round(t[0]) for t in times.values() if not pd.isna(t[0])].count(8) == 1
    on_pi = next(p for p in found if "Raspberry" in str(p))
    assert "ssh me@pi" in str(on_pi) and times[str(on_pi)][0] == pytest.approx(8, rel=0.1)
    assert pd.isna(times[str(on_pi)][1])
    assert frames.variants(read, on_pi).iloc[1].reason == "measured elsewhere only"


def test_records_of_another_file_or_of_other_data_are_not_shown(tmp_path):
    folder = add_variant(tmp_path, "m", "baseline", "int8", 9000, 4000, None)
    store.write_measurement(folder, measurement("another file", 1.0))
    sha = store.read_entry(folder).variant.sha256
    store.write_quality(folder, Quality("other", "test", "beef", 100, 100, sha256=sha))
    write_record(tmp_path, ())
    row = frames.variants(read_study(tmp_path)).iloc[0]
    assert pd.isna(row.median_ms) and row.top1 == 0.9 and row.images == 10_000


def test_the_latest_measurement_counts(tmp_path):
    folder = add_variant(tmp_path, "m", "baseline", "int8", 9000, 4000, 5.0)
    sha = store.read_entry(folder).variant.sha256
    later = dataclasses.replace(measurement(sha, 1.0, 2), started_at="2027-01-01T00:00:00+00:00")
    bad = Measurement("zz", "latency", sha, Target(), "failed", reason="killed", started_at="2028-01-01T00:00:00+00:00")
    for record in (later, bad):
        store.write_measurement(folder, record)
    write_record(tmp_path, ())
    assert frames.variants(read_study(tmp_path)).iloc[0].median_ms == pytest.approx(1.0, rel=0.1)


def test_an_empty_study_is_an_empty_table(tmp_path):
    write_record(tmp_path, ())
    assert frames.variants(read_study(tmp_path)).empty


def test_history_puts_all_steps_on_one_axis(study):
    entry = frames.entry_of(read_study(study), "resnet8/distill_prune_qat-int8")
    history = frames.history_frame(entry)
    assert list(dict.fromkeys(history["technique"])) == ["1. distill", "2. prune", "3. qat"]
    assert history["training_step"].iloc[[0, -1]].tolist() == [0, 600]


def test_advice_names_the_most_accurate_in_time_and_the_smallest_within_the_points(study):
    read = read_study(study)
    advised = advice.recommend(frames.variants(read), read.record.deadline_ms, points=1)
    assert (advised.best, advised.smallest) == ("resnet8/qat-int8", "resnet8/baseline-dynamic")
    assert "84.42%" in advised.sentence and "33.3 ms (30 frames/s)" in advised.sentence
    wider = advice.recommend(frames.variants(read), read.record.deadline_ms, points=5.5)
    assert wider.smallest == "mobilenet-w0.25/distill_prune_qat-int8"
    assert "10,000 test images cannot settle" in advised.caution


def test_a_damaged_record_is_not_called_unmade(own_study):
    damaged = sorted(own_study.glob("*/*/variant.json"))[0]
    damaged.write_text("{}")
    row = frames.variants(read_study(own_study)).loc[f"{damaged.parent.parent.name}/{damaged.parent.name}"]
    assert row["status"] == "missing" and "cannot be read" in row["reason"] and "variant.json" in row["reason"]


def test_advice_follows_the_deadline(study):
    read = read_study(study)
    quick = advice.recommend(frames.variants(read, deadline_ms=0.4), 0.4)
    assert quick.best == "mobilenet-w0.25/qat-int8"
    none = advice.recommend(frames.variants(read, deadline_ms=0.01), 0.01)
    assert none.best is None and none.sentence.startswith("Nothing meets 0.0100 ms")


def test_advice_has_words_for_a_study_without_times(tmp_path):
    add_variant(tmp_path, "m", "baseline", "int8", 9000, 4000, None)
    write_record(tmp_path, ())
    frame = frames.variants(read_study(tmp_path))
    assert "none of them measured" in advice.recommend(frame, 33).sentence
    assert "No variant is there" in advice.recommend(frame.iloc[:0], 33).sentence


def test_layers_of_a_step_are_told_one_by_one(study):
    (report,) = frames.entry_of(read_study(study), "resnet8/lowrank-float32").variant.steps
    report = dataclasses.replace(
        report, touched=("stem", "head"),
        properties={"channels": {"stem": [16, 8]}, "errors": {"head": 0.12345}, "latency": {"ms": 1}, "rounds": [{}]},
    )  # fmt: skip
    assert story.by_layer(report) == [
        {"layer": "stem", "channels": "16 → 8", "errors": ""}, {"layer": "head", "channels": "", "errors": "0.1235"},
    ]  # fmt: skip
    assert not any("rounds" in fact for fact in story.step_facts(report))
