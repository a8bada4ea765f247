"""A study folder, written and read back, whole and damaged."""

import dataclasses
import json
import os

import pytest

from mobile_bench import store
from mobile_bench.errors import InputError
from mobile_bench.records import Measurement, Quality, StudyRecord, Target, Variant

RECORD = StudyRecord(
    "demo", {"name": "digits"}, {"net": {}}, ("baseline",), ("net/b-int8", "net/b-float32", "net/b-float16")
)


def variant(scheme, **fields):
    return Variant(f"b-{scheme}", "net", "b", scheme, sha256=fields.pop("sha256", f"{scheme}-sha"), **fields)


def measurement(run_id, started_at, sha256):
    return Measurement(run_id, "latency", sha256, Target(), "ok", latency_ms=(1.0,), started_at=started_at)


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "demo"
    store.write_study(folder, RECORD)
    for scheme in ("float32", "int8"):
        place = store.variant_folder(folder, "net", f"b-{scheme}")
        store.write_variant(place, variant(scheme, size_bytes=5))
        (place / "model.tflite").write_bytes(b"bytes")
        store.write_quality(place, Quality("digits", "test", "f", 10, 9, sha256=f"{scheme}-sha"))
        store.write_measurement(place, measurement("bbbb", "2026-11-23T08:00:00+00:00", f"{scheme}-sha"))
        store.write_measurement(place, measurement("aaaa", "2026-11-23T07:00:00+00:00", f"{scheme}-sha"))
    return folder


def test_a_study_comes_back_in_the_promised_order(study):
    found = store.read_study(study)
    assert found.record == RECORD and found.problems == ()
    assert [e.variant.name for e in found.entries] == ["b-int8", "b-float32"]
    assert found.missing == ("net/b-float16",)
    entry = found.entries[0]
    assert [m.run_id for m in entry.measurements] == ["aaaa", "bbbb"], "by the time they were made"
    assert entry.quality().top1 == 0.9 and entry.quality("validation") is None
    assert entry.tflite == study / "net" / "b-int8" / "model.tflite"


def test_each_measurement_is_a_file_of_its_own(study):
    names = sorted(p.name for p in (study / "net/b-int8/bench").iterdir())
    assert names == ["local-cpu-t1-20261123T070000-aaaa.json", "local-cpu-t1-20261123T080000-bbbb.json"]


def test_names_cannot_lead_out_of_the_folder(tmp_path):
    quality = store.write_quality(tmp_path / "v", Quality("../../evil data", "te/st", "f", 1, 1))
    run = store.write_measurement(tmp_path / "v", measurement("../x", "../../2026", "s"))
    assert quality.parent == tmp_path / "v" / "quality" and run.parent == tmp_path / "v" / "bench"


def test_what_was_learned_of_an_earlier_file_does_not_count(study):
    place = study / "net" / "b-int8"
    store.write_variant(place, variant("int8", sha256="new"))
    assert store.read_entry(place).quality() is None


def test_damaged_records_are_reported_and_the_rest_is_read(study):
    bench = study / "net/b-int8/bench"
    (bench / "cut.json").write_text('{"schema_version": 1, "run_id"')
    (bench / "binary.json").write_bytes(b"\xff\xfe\x00")
    (bench / "other.json").write_text(json.dumps({"schema_version": 99}))
    (study / "net" / "b-float32" / "variant.json").write_text("[]")
    found = store.read_study(study)
    assert [e.variant.name for e in found.entries] == ["b-int8"]
    assert len(found.entries[0].measurements) == 2 and len(found.entries[0].problems) == 3
    assert len(found.problems) == 1 and "b-float32" in found.problems[0]
    assert "net/b-float32" in found.missing


def test_a_file_that_is_gone_or_cut_short_is_told(study):
    float32, int8 = (study / "net" / f"b-{scheme}" / "model.tflite" for scheme in ("float32", "int8"))
    assert not any(entry.problems for entry in store.read_study(study).entries)
    float32.unlink()
    int8.write_bytes(b"cut")
    told = [problem for entry in store.read_study(study).entries for problem in entry.problems]
    assert len(told) == 2
    assert any("is gone" in text and str(float32) in text for text in told)
    assert any("has 3 bytes, its record says 5" in text and str(int8) in text for text in told)


def test_names_beyond_ascii_survive(study, monkeypatch):
    store.write_study(study, dataclasses.replace(RECORD, name="Größe-日本"))
    assert store.read_study(study).record.name == "Größe-日本"


def test_no_study(tmp_path, study):
    with pytest.raises(InputError, match=r"not a study.*demo"):
        store.read_study(study.parent)
    with pytest.raises(InputError, match="not a study"):
        store.read_study(tmp_path / "none")
    (study / "study.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        store.read_study(study)


def test_studies_are_found_newest_first(study):
    other = study.with_name("other")
    store.write_study(other, RECORD)
    os.utime(study / "study.json", (1, 1))
    (study.parent / "no study").mkdir()
    assert store.find_studies(study.parent) == [other, study]
    assert store.find_studies(study / "none") == []
