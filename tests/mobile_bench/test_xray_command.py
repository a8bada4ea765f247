"""`mobile-bench xray` as a person or a script meets it, and the record that it stores."""

import json

import pytest

from mobile_bench import store
from mobile_bench.errors import InputError
from mobile_bench.files import sha256_of
from mobile_bench.records import StudyRecord, Variant, from_dict
from mobile_bench.xray import OpVerdict, XrayReport
from mobile_bench.xray.record import XrayRecord, write_record
from mobile_bench.xray.report import runs_of

from .small_graphs import write_chain


@pytest.fixture
def bench(run_python):
    return lambda *args, **options: run_python("-m", "mobile_bench", "xray", *args, **options)


@pytest.fixture
def variant(tiny, tmp_path):
    folder = tmp_path / "study" / "net" / "baseline-int8"
    folder.mkdir(parents=True)
    file = folder / "model.tflite"
    file.write_bytes(tiny.path("int8").read_bytes())
    facts = {"sha256": sha256_of(file), "size_bytes": file.stat().st_size}
    store.write_variant(folder, Variant("baseline-int8", "net", "baseline", "int8", **facts))
    store.write_study(tmp_path / "study", StudyRecord("study", {}, {}, (), ("net/baseline-int8",)))
    return folder


def test_it_reads_well_on_80_columns(bench, tiny):
    done = bench(tiny.path("int8"), "--delegate", "cpu", environment={"COLUMNS": "80"})
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("0-1" in line and "2 ops" in line and "XNNPACK" in line for line in lines)
    said = " ".join(done.stdout.replace("│", " ").split())
    assert "Fix: End the model with" in said and "XNNPACK: 3 of 8 operations in 2 pieces; plain CPU: 5" in said
    assert "Note: Kernels: 3 int8 (qs8)" in said


def test_a_wide_terminal_gets_a_column_each(bench, tiny):
    said = bench(tiny.path("int8"), "--delegate", "cpu", environment={"COLUMNS": "160"}).stdout
    heads = [part.strip() for part in said.splitlines()[2].split("┃")]
    assert heads[1:-1] == ["#", "Operation", "Layer", "Runs on", "Reason", "Fix"]


def test_a_reason_is_told_once(bench, tmp_path):
    file = write_chain(tmp_path / "m.tflite", "CUMSUM", "ABS", "CUMSUM", "ABS", "REVERSED")
    said = bench(file, "--delegate", "cpu").stdout
    assert said.count("no kernel for CUMSUM") == 1 and said.count("as 0") == 2


def test_json_is_one_object(bench, tiny):
    done = bench(tiny.path("int8"), "--delegate", "cpu", "--json")
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1 and (found["delegate"], found["backend"]) == ("cpu", "xnnpack")
    assert (found["delegated"], found["fallback"], found["partitions"], found["saved"]) == (3, 5, 2, None)
    assert {"index", "op", "runs_on", "reason", "fix", "source", "layer"} <= set(found["ops"][7])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nowhere", ("--delegate", "cpu"), "cannot be read"),
        ("text", ("--delegate", "cpu"), "not a TensorFlow Lite file"),
        ("truncated", ("--delegate", "gpu"), "damaged"),
        ("truncated", ("--delegate", "edgetpu"), "damaged"),
        ("custom_op", ("--delegate", "cpu"), "made-up-op"),
        ("int8", ("--delegate", "npu"), "cpu, edgetpu, gpu"),
        ("int8", ("--delegate", "gpu", "--backend", "metal"), "opencl, opengl, webgpu"),
        ("int8", (), "--delegate"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_words(bench, tiny, name, options, said):
    done = bench(tiny.path(name), *options)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_folder_is_no_file(bench, tmp_path):
    done = bench(tmp_path, "--delegate", "cpu")
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_saved_it_is_part_of_the_study(bench, variant):
    done = bench(variant / "model.tflite", "--delegate", "cpu", "--save", "--json")
    path = variant / "xray" / "cpu.json"
    assert json.loads(done.stdout)["saved"] == str(path) and path.is_file()
    entry = store.read_study(variant.parents[1]).entries[0]
    assert entry.problems == () and entry.xray("gpu") is None
    report = entry.xray("cpu")
    assert report.delegated == 3 and report.ops[7].op == "SOFTMAX" and isinstance(report.ops[7], OpVerdict)


def _report(**changes) -> XrayReport:
    ops = (OpVerdict(0, "ABS", "delegate"), OpVerdict(1, "CUMSUM", "cpu", "no kernel", "", "a file"))
    return XrayReport(**{"delegate": "gpu", "backend": "webgpu", "ops": ops, "partitions": 1, **changes})


def test_a_neighbours_report_is_not_overwritten(variant):
    neighbour = variant / "other.tflite"
    neighbour.write_bytes((variant / "model.tflite").read_bytes() + b"\0")
    path = write_record(variant / "model.tflite", _report())
    with pytest.raises(InputError, match=r"of another file.*model\.tflite"):
        write_record(neighbour, _report())
    (variant / "model.tflite").write_bytes(b"converted anew")
    assert write_record(neighbour, _report()) == path, "its file is gone"


def test_a_report_of_another_file_is_not_shown(variant):
    write_record(variant / "model.tflite", _report())
    assert store.read_entry(variant).xray("gpu") == _report()
    record = json.loads((variant / "xray/gpu.json").read_text())
    (variant / "xray/gpu.json").write_text(json.dumps({**record, "sha256": "another"}))
    entry = store.read_entry(variant)
    assert entry.xray("gpu") is None and entry.problems == ()


def _changed(**changes):
    return lambda record: {**record, "report": {**record["report"], **changes}}


DAMAGE = {
    "a list": lambda record: [],
    "another version": lambda record: {**record, "schema_version": 99},
    "no report": lambda record: {"schema_version": 1, "sha256": ""},
    "a report of nothing": lambda record: {**record, "report": {}},
    "report in words": lambda record: {**record, "report": "all of it"},
    "an unknown field": _changed(speed=1),
    "operations in words": _changed(ops=["ABS"]),
    "operations by number": _changed(ops=3),
    "an operation without a place": _changed(ops=[{"index": 0, "op": "ABS"}]),
    "an unknown place": _changed(ops=[{"index": 0, "op": "ABS", "runs_on": "moon"}]),
    "another delegate": _changed(delegate="npu"),
    "pieces in words": _changed(partitions="one"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_a_listed_problem(variant, damage):
    path = write_record(variant / "model.tflite", _report())
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    entry = store.read_entry(variant)
    assert entry.xray("gpu") is None and len(entry.problems) == 1 and "gpu.json" in entry.problems[0]


def test_a_record_cut_short_is_a_listed_problem(variant):
    path = write_record(variant / "model.tflite", _report())
    path.write_text(path.read_text()[:40])
    assert "gpu.json" in store.read_entry(variant).problems[0]
    with pytest.raises(InputError):
        from_dict(XrayRecord, {"schema_version": 1})


def test_neighbours_fold_into_a_row():
    left = {"runs_on": "cpu", "reason": "no", "fix": "do"}
    ops = [OpVerdict(n, "ABS", "delegate") for n in range(3)]
    ops += [OpVerdict(3, "SPLIT", **left), OpVerdict(4, "SPLIT", **left)]
    ops += [OpVerdict(5, "PACK", **{**left, "reason": "never"})]
    assert [(run.place, run.name) for run in runs_of(ops)] == [("0-2", "3 x ABS"), ("3-4", "2 x SPLIT"), ("5", "PACK")]
