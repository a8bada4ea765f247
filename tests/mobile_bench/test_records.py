"""The vocabulary refuses impossible values, and files of this version stay readable."""

import json
from pathlib import Path

import numpy as np
import pytest

from mobile_bench.errors import InputError, Problem
from mobile_bench.inputs import InputSpec
from mobile_bench.records import (
    Measurement,
    Quality,
    Skip,
    StepReport,
    StudyRecord,
    Target,
    Tensor,
    Variant,
    from_dict,
    to_dict,
)

GOLDEN = Path(__file__).parent / "golden"
STEP = StepReport(
    technique="prune",
    settings={"sparsity": 0.5},
    touched=("conv1",),
    skipped=(Skip("head", "excluded by the recipe"),),
    parameters_before=10,
    parameters_after=10,
    macs_before=100,
    macs_after=100,
    seconds=1.5,
    training={"steps": 3, "accuracy_after": 0.5},
    properties={"sparsity": 0.5},
    notes=("a note",),
)
RECORDS = {
    "variant": Variant(
        name="prune-int8",
        model="resnet8",
        recipe="prune",
        scheme="int8",
        sha256="ab" * 32,
        size_bytes=100,
        gzip_bytes=50,
        parameters=10,
        macs=100,
        spec=InputSpec(28, 28, 1, labels=("shirt", "bag")),
        inputs=(Tensor("image", (1, 28, 28, 1), "int8", 0.5, -3),),
        outputs=(Tensor("class", (1, 2), "int8", 0.25, 0),),
        steps=(STEP,),
        properties={"sparsity": 0.5},
        warnings=("a warning",),
        tools={"keras": "3.15.1"},
        seed=7,
        created_at="2026-11-23T06:55:26+00:00",
        cache_key="cd",
    ),
    "quality": Quality(
        "fashion_mnist", "test", "f" * 16, 10_000, 9_200, 0.99, 0.97, 0.921, "ai-edge-litert 2.3.0", "ab" * 32
    ),
    "measurement": Measurement(
        run_id="12345678",
        kind="latency",
        sha256="ab" * 32,
        target=Target(threads=2),
        status="ok",
        batch=1,
        input_shape=(1, 28, 28, 1),
        load_ms=6.5,
        first_inference_ms=0.5,
        warmup_ms=(0.4, 0.3),
        latency_ms=(0.25, 0.5, 0.25),
        peak_rss_bytes=55_000_000,
        base_rss_bytes=50_000_000,
        device={"cpu": "a CPU", "cores": 2},
        load_average=0.5,
        warnings=("a warning",),
        started_at="2026-11-23T06:55:26+00:00",
    ),
    "study": StudyRecord(
        name="demo",
        data={"name": "fashion_mnist"},
        models={"resnet8": {"source": "baseline"}},
        recipes=("baseline", "prune"),
        expected=("resnet8/prune-int8",),
        machine={"cpu": "a CPU"},
        tools={"keras": "3.15.1"},
        seed=7,
        created_at="2026-11-23T06:00:00+00:00",
        finished_at="2026-11-23T07:00:00+00:00",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_files_of_version_1_are_read_as_they_were_meant(name):
    """The golden files are never edited: another layout needs another schema version and an upgrade."""
    stored = json.loads((GOLDEN / f"{name}-v1.json").read_text())
    assert from_dict(type(RECORDS[name]), stored) == RECORDS[name]


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_written_is_read_back(name):
    record = RECORDS[name]
    assert from_dict(type(record), json.loads(json.dumps(to_dict(record), allow_nan=False))) == record


def test_numpy_values_become_plain_ones():
    step = StepReport("t", {"a": np.float32(0.5), "b": np.arange(3)}, (), (), *(np.int64(1),) * 4, seconds=0.0)
    assert json.loads(json.dumps(to_dict(step)))["settings"] == {"a": 0.5, "b": [0, 1, 2]}


MEASURED = {"run_id": "r", "kind": "latency", "sha256": "s", "target": Target(), "status": "ok", "latency_ms": (1.0,)}


@pytest.mark.parametrize(
    "change",
    [
        {"latency_ms": ()},
        {"latency_ms": (float("nan"),)},
        {"latency_ms": (-1.0,)},
        {"status": "fine"},
        {"kind": "speed"},
        {"status": "failed"},
    ],
)
def test_impossible_measurements(change):
    Measurement(**MEASURED)
    with pytest.raises(InputError):
        Measurement(**{**MEASURED, **change})


def test_impossible_values():
    for make in (
        lambda: Target(transport="usb"),
        lambda: Target(accelerator="npu"),
        lambda: Target(threads=0),
        lambda: Target(threads="2"),
        lambda: Skip("layer", "no reason"),
        lambda: Quality("d", "test", "f", 10, 11),
        lambda: Quality("d", "test", "f", 0, 0),
        lambda: Variant("v", "m", "r", "int8", status="failed"),
    ):
        with pytest.raises(InputError):
            make()


@pytest.mark.parametrize(
    "values",
    [
        [],
        None,
        {},
        {"schema_version": 2},
        {"schema_version": 1},
        {**to_dict(RECORDS["measurement"]), "speed": 1},
        {**to_dict(RECORDS["measurement"]), "target": 5},
        {**to_dict(RECORDS["measurement"]), "latency_ms": ["fast"]},
        {**to_dict(RECORDS["measurement"]), "latency_ms": 5},
        {**to_dict(RECORDS["measurement"]), "target": {"threads": 0}},
    ],
)
def test_damaged_records_are_an_error_in_words(values):
    with pytest.raises(InputError, match=r"Measurement record|threads"):
        from_dict(Measurement, values)


@pytest.mark.parametrize(
    "change",
    [{"inputs": [5]}, {"inputs": [{"name": "x", "shape": ["a"], "dtype": "int8"}]}, {"spec": [1]}, {"steps": [{}]}],
)
def test_damaged_variants_are_an_error_in_words(change):
    with pytest.raises(Problem):
        from_dict(Variant, {**to_dict(RECORDS["variant"]), **change})


def test_a_targets_name_can_be_part_of_a_file_name():
    assert Target().name == "local-cpu-t1"
    assert Target("ssh", "edgetpu", "pi@board.local:22/x; rm", 2).name == "ssh-pi_board_local_22_x__rm-edgetpu-t2"
