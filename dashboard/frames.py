"""A study folder as a table: one row a variant. No streamlit here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import pandas as pd

from mobile_bench import stats
from mobile_bench.records import Measurement, Quality, Target
from mobile_bench.store import Entry, Study
from mobile_bench.xray.report import PLACES, XrayReport

#: What a variant is judged by: most accurate, fastest, smallest.
OBJECTIVES = {"top1": "max", "median_ms": "min", "size_bytes": "min"}


@dataclass(frozen=True)
class Place:
    """Where files were measured. Only times of one place are comparable, so a table shows one place.

    target: with its runtime left open. machine: the board or processor with its number of cores.
    runtime: the one that really ran, with its version.
    """

    target: Target
    machine: str
    runtime: str
    batch: int = 1

    @classmethod
    def of(cls, measurement: Measurement) -> Place:
        device, target = measurement.device, measurement.target
        runtime = " ".join(str(device[name]) for name in ("runtime", "runtime_version") if device.get(name))
        open_target = dataclasses.replace(target, runtime="auto")
        return cls(open_target, machine_name(device), runtime or target.runtime, measurement.batch)

    def __str__(self) -> str:
        target = self.target
        address = f"{target.transport} {target.address}".strip()
        parts = [
            self.machine if target.transport == "local" else f"{self.machine} ({address})",
            f"{target.accelerator.upper()}, {target.threads} thread{'s' if target.threads > 1 else ''}",
            self.runtime,
            f"batches of {self.batch}" if self.batch > 1 else "",
        ]
        return " · ".join(part for part in parts if part)


def machine_name(device: dict) -> str:
    """'Raspberry Pi 4 Model B' or 'Intel Xeon, 2 cores, x86_64' from the facts of a device."""
    name = device.get("board") or device.get("cpu") or "unknown machine"
    parts = [str(name), f"{device['cores']} cores" if device.get("cores") else "", str(device.get("machine") or "")]
    return ", ".join(part for part in parts if part)


def places(study: Study) -> list[Place]:
    """Every place that timed a file of this study, the one with the most variants first."""
    counts: Counter[Place] = Counter()
    for entry in study.entries:
        counts.update({Place.of(m) for m in _measured(entry)})
    return sorted(counts, key=lambda place: (-counts[place], str(place)))


def variants(study: Study, place: Place | None = None, deadline_ms: float | None = None) -> pd.DataFrame:
    """One row a variant, in the study's order; failed ones and those not there yet are rows too.

    place: whose times are shown, the first of places() by default; a variant without a time there has
    none. deadline_ms: the study's own by default. Index: 'MODEL/VARIANT'. Columns:

    model, variant, recipe, scheme, status ('ok', 'failed', 'refused', 'missing'), reason (why there is
    no file, or no time); top1, top1_low, top1_high (fractions; 95% Wilson interval), images, agreement
    (with its Keras model), baseline_agreement, keras_top1; delta_points (top-1 less that of the same
    model unoptimized, in points); size_bytes, gzip_bytes, parameters, macs, times_smaller; median_ms,
    median_low_ms, median_high_ms, p90_ms, p99_ms, fps, load_ms, peak_rss_bytes, samples, times_faster;
    deadline_ms; meets (True, False, or NA without a time), on_front (nothing beats it in accuracy, speed and size at
    once), is_baseline (no optimization at all: no step and float32), tflite (path, or '').
    """
    known = places(study)
    place = place or (known[0] if known else None)
    deadline_ms = deadline_ms or study.record.deadline_ms
    rows = [_row(study, entry, place, deadline_ms) for entry in study.entries]
    for name in study.missing:
        model, _, variant = name.partition("/")
        recipe, _, scheme = variant.rpartition("-")
        damaged = next((p for p in study.problems if f"/{name}/variant.json" in p), None)
        unmade = "not made yet" if not study.record.finished_at else "the study ended without it"
        reason = f"its record cannot be read: {damaged}" if damaged else unmade
        rows.append(
            {
                "model": model, "variant": variant, "recipe": recipe, "scheme": scheme, "status": "missing",
                "reason": reason, "tflite": "", "is_baseline": False, "on_front": False,
            }
        )  # fmt: skip
    order = {name: number for number, name in enumerate(study.record.expected)}
    rows.sort(key=lambda row: order.get(f"{row['model']}/{row['variant']}", len(order)))
    frame = pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)
    frame.index = pd.Index([f"{row['model']}/{row['variant']}" for row in rows], name="key", dtype=object)
    frame = frame[~frame.index.duplicated()]
    front = stats.pareto(
        frame[list(OBJECTIVES)].astype(float).to_numpy().tolist() if len(frame) else [], list(OBJECTIVES.values())
    )
    frame["on_front"] = [number in set(front) for number in range(len(frame))]
    return _against_baseline(frame)


def entry_of(study: Study, key: str) -> Entry | None:
    """The entry behind a row, None for a variant that is not there."""
    return next((e for e in study.entries if f"{e.variant.model}/{e.variant.name}" == key), None)


def measurement_of(entry: Entry, place: Place | None) -> Measurement | None:
    """The latest good measurement of this very file at a place."""
    found = [m for m in _measured(entry) if Place.of(m) == place]
    return found[-1] if found else None


def quality_of(study: Study, entry: Entry) -> Quality | None:
    """The latest test record of this very file on the study's own data."""
    fingerprint = study.record.data.get("fingerprint")
    found = [
        q for q in entry.qualities
        if q.split == "test" and q.sha256 in ("", entry.variant.sha256) and fingerprint in (None, q.fingerprint)
    ]  # fmt: skip
    return found[-1] if found else None


def samples_frame(measurement: Measurement) -> pd.DataFrame:
    """Every run in order: run (1 is the first warm-up), latency_ms, phase ('warm-up' or 'timed')."""
    values = [*measurement.warmup_ms, *measurement.latency_ms]
    phase = ["warm-up"] * len(measurement.warmup_ms) + ["timed"] * len(measurement.latency_ms)
    return pd.DataFrame({"run": range(1, len(values) + 1), "latency_ms": values, "phase": phase})


def history_frame(entry: Entry) -> pd.DataFrame:
    """The training of all steps on one axis: step_number, technique, training_step, accuracy, loss.

    accuracy is a fraction on the validation split; each step starts with what the model had before it.
    """
    rows, offset = [], 0
    for number, report in enumerate(entry.variant.steps, 1):
        training = report.training or {}
        label = f"{number}. {report.technique}"
        if training.get("accuracy_before") is not None:
            rows.append((number, label, offset, training["accuracy_before"], None))
        for point in training.get("history") or ():
            rows.append((number, label, offset + point.get("step", 0), point.get("val_accuracy"), point.get("loss")))
        offset += training.get("steps") or 0
    return pd.DataFrame(rows, columns=["step_number", "technique", "training_step", "accuracy", "loss"])


def operations_frame(report: XrayReport) -> pd.DataFrame:
    """A row an operation: index, op, layer, place (where it runs, as a person calls it), reason, fix, source."""
    there, here = PLACES[report.delegate]
    rows = [dataclasses.asdict(op) | {"place": there if op.runs_on == "delegate" else here} for op in report.ops]
    return pd.DataFrame(rows, columns=["index", "op", "layer", "place", "reason", "fix", "source"])


def _row(study: Study, entry: Entry, place: Place | None, deadline_ms: float) -> dict:
    variant, quality = entry.variant, quality_of(study, entry)
    row = {
        "model": variant.model, "variant": variant.name, "recipe": variant.recipe, "scheme": variant.scheme,
        "status": variant.status, "reason": variant.reason, "on_front": False,
        "is_baseline": not variant.steps and variant.scheme == "float32" and variant.status == "ok",
        "tflite": str(entry.tflite) if entry.tflite.is_file() else "",
    }  # fmt: skip
    if variant.status != "ok":
        return row
    row |= {name: getattr(variant, name) or None for name in ("size_bytes", "gzip_bytes", "parameters", "macs")}
    if quality:
        low, high = stats.wilson_interval(quality.correct, quality.images)
        row |= {"top1": quality.top1, "top1_low": low, "top1_high": high}
        row |= {n: getattr(quality, n) for n in ("images", "agreement", "baseline_agreement", "keras_top1")}
    measurement = measurement_of(entry, place)
    if measurement is None:
        return row | {"reason": _why_no_time(entry, place)}
    summary = stats.summarize(measurement)
    row |= {
        n: getattr(summary, n)
        for n in ("median_ms", "median_low_ms", "median_high_ms", "p90_ms", "p99_ms", "fps", "samples")
    }
    row |= {n: getattr(measurement, n) for n in ("load_ms", "peak_rss_bytes")}
    return row | {"deadline_ms": deadline_ms, "meets": summary.meets(deadline_ms)}


def _against_baseline(frame: pd.DataFrame) -> pd.DataFrame:
    """Differences from the same model without any optimization, where the study holds it."""
    bases = frame[frame["is_baseline"]].drop_duplicates("model").set_index("model")
    base = lambda column: frame["model"].map(bases[column]).astype(float)
    frame["delta_points"] = (frame["top1"] - base("top1")) * 100
    frame["times_smaller"] = base("size_bytes") / frame["size_bytes"]
    frame["times_faster"] = base("median_ms") / frame["median_ms"]
    return frame


def _measured(entry: Entry) -> list[Measurement]:
    """Latency measurements with samples, of the file that is there now."""
    return [
        m for m in entry.measurements if m.status == "ok" and m.kind == "latency" and m.sha256 == entry.variant.sha256
    ]  # fmt: skip


def _why_no_time(entry: Entry, place: Place | None) -> str:
    bad = [m for m in entry.measurements if m.status != "ok" and (place is None or m.target.name == place.target.name)]
    if bad:
        return f"measurement {bad[-1].status}: {bad[-1].reason}"
    return "measured elsewhere only" if _measured(entry) else "not measured"


_COLUMNS = {
    **dict.fromkeys(("model", "variant", "recipe", "scheme", "status", "reason"), "object"),
    **dict.fromkeys(
        (
            "top1", "top1_low", "top1_high", "images", "agreement", "baseline_agreement", "keras_top1", "delta_points",
            "size_bytes", "gzip_bytes", "parameters", "macs", "times_smaller", "median_ms", "median_low_ms",
            "median_high_ms", "p90_ms", "p99_ms", "fps", "load_ms", "peak_rss_bytes", "samples", "times_faster",
            "deadline_ms",
        ),
        "float64",
    ),
    "meets": "boolean",
    "on_front": "bool",
    "is_baseline": "bool",
    "tflite": "object",
}  # fmt: skip


def counted(frame: pd.DataFrame) -> str:
    """'22 variants, 1 failed, 1 missing'"""
    counts = frame["status"].value_counts()
    others = [f"{counts[status]} {status}" for status in ("failed", "refused", "missing") if status in counts]
    made = int(counts.get("ok", 0))
    return ", ".join([f"{made} variant{'' if made == 1 else 's'}", *others])


def study_name(study: Study) -> str:
    return study.record.name or study.folder.resolve().name
