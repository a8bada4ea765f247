"""Read and write a study folder.

    STUDY/study.json
    STUDY/MODEL/VARIANT/{model.tflite, model.keras, variant.json}
    STUDY/MODEL/VARIANT/quality/{DATA}-{SPLIT}.json     what it answers
    STUDY/MODEL/VARIANT/bench/{TARGET}-{TIME}-{RUN}.json   how fast it is, one file a run
    STUDY/MODEL/VARIANT/xray/DELEGATE.json              where its operations run

Every file is written once and whole, so results copied back from a device merge by copying.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mobile_bench.errors import InputError, Problem
from mobile_bench.files import write_json
from mobile_bench.records import Measurement, Quality, StudyRecord, Variant, from_dict, to_dict
from mobile_bench.xray.record import FOLDER as XRAY_FOLDER
from mobile_bench.xray.record import XrayRecord
from mobile_bench.xray.report import XrayReport


@dataclass(frozen=True)
class Entry:
    """A variant with all that is known about it. `problems` names files that could not be read."""

    folder: Path
    variant: Variant
    qualities: tuple[Quality, ...]
    measurements: tuple[Measurement, ...]
    problems: tuple[str, ...] = ()
    xrays: tuple[XrayRecord, ...] = ()

    @property
    def tflite(self) -> Path:
        return self.folder / "model.tflite"

    def quality(self, split: str = "test") -> Quality | None:
        """The latest quality record of a split that speaks of this very file."""
        found = [q for q in self.qualities if q.split == split and q.sha256 in ("", self.variant.sha256)]
        return found[-1] if found else None

    def xray(self, delegate: str) -> XrayReport | None:
        """The stored report on a delegate that speaks of this very file."""
        found = (x.report for x in self.xrays if x.report.delegate == delegate and x.sha256 == self.variant.sha256)
        return next(found, None)


@dataclass(frozen=True)
class Study:
    """A study folder as read at one moment."""

    folder: Path
    record: StudyRecord
    entries: tuple[Entry, ...]
    problems: tuple[str, ...] = ()

    @property
    def damage(self) -> tuple[str, ...]:
        """Every record that cannot be read and every file that is gone or cut short, a sentence each."""
        return (*self.problems, *(problem for entry in self.entries for problem in entry.problems))

    @property
    def asked(self) -> tuple[Entry, ...]:
        """The entries that the last run asked for; the folder may hold others from before."""
        wanted = set(self.record.expected)
        return tuple(e for e in self.entries if f"{e.variant.model}/{e.variant.name}" in wanted)

    @property
    def missing(self) -> tuple[str, ...]:
        """'{model}/{variant}' names that the study promised and does not hold (yet)."""
        there = {f"{e.variant.model}/{e.variant.name}" for e in self.entries}
        return tuple(name for name in self.record.expected if name not in there)


def variant_folder(study: Path, model: str, variant: str) -> Path:
    return Path(study) / model / variant


def write_study(folder: Path, record: StudyRecord) -> Path:
    write_json(Path(folder) / "study.json", to_dict(record))
    return Path(folder) / "study.json"


def write_variant(folder: Path, variant: Variant) -> Path:
    write_json(Path(folder) / "variant.json", to_dict(variant))
    return Path(folder) / "variant.json"


def write_quality(folder: Path, quality: Quality) -> Path:
    path = Path(folder) / "quality" / f"{_safe(quality.data)}-{_safe(quality.split)}.json"
    write_json(path, to_dict(quality))
    return path


def write_measurement(folder: Path, measurement: Measurement) -> Path:
    moment = measurement.started_at.replace(":", "").replace("-", "")[:15]
    path = Path(folder) / "bench" / f"{measurement.target.name}-{_safe(moment)}-{_safe(measurement.run_id)}.json"
    write_json(path, to_dict(measurement))
    return path


def read_study(folder: str | Path) -> Study:
    """Everything in a study folder. A damaged record becomes a line in `problems`, not an exception.

    Raises InputError when the folder is no study at all.
    """
    folder = Path(folder)
    path = folder / "study.json"
    if not path.is_file():
        others = sorted(p.parent.name for p in folder.glob("*/study.json")) if folder.is_dir() else []
        raise InputError(
            "This folder is not a study",
            received=folder,
            allowed="a folder with study.json" + (f", such as {folder / others[0]}" if others else ""),
            next_step="Make one with: tfopt study --help",
        )
    record = _read(path, StudyRecord)
    entries, problems = [], []
    for found in sorted(folder.glob("*/*/variant.json")):
        try:
            entries.append(read_entry(found.parent))
        except Problem as problem:
            problems.append(str(problem))
    order = {name: place for place, name in enumerate(record.expected)}
    entries.sort(key=lambda e: order.get(f"{e.variant.model}/{e.variant.name}", len(order)))
    return Study(folder, record, tuple(entries), tuple(problems))


def read_entry(folder: str | Path) -> Entry:
    """One variant's folder."""
    folder = Path(folder)
    variant = _read(folder / "variant.json", Variant)
    problems = _file_problems(folder / "model.tflite", variant)
    qualities = _read_all(folder / "quality", Quality, problems)
    measurements = sorted(_read_all(folder / "bench", Measurement, problems), key=lambda m: m.started_at)
    xrays = _read_all(folder / XRAY_FOLDER, XrayRecord, problems)
    return Entry(folder, variant, tuple(qualities), tuple(measurements), tuple(problems), tuple(xrays))


def _file_problems(tflite: Path, variant: Variant) -> list[str]:
    """A file that is gone or of another size than its record says; its content is not read for this."""
    if variant.status != "ok":
        return []
    again = "run the study again, which makes it anew"
    if not tflite.is_file():
        return [f"{tflite} is gone: {again}"]
    size = tflite.stat().st_size
    if size != variant.size_bytes:
        return [f"{tflite} has {size} bytes, its record says {variant.size_bytes}: {again}"]
    return []


def find_studies(folder: str | Path) -> list[Path]:
    """Study folders directly below `folder`, the newest first."""
    found = [path.parent for path in Path(folder).glob("*/study.json")]
    return sorted(found, key=lambda p: (p / "study.json").stat().st_mtime, reverse=True)


def _read_all(folder: Path, kind: type, problems: list[str]) -> list:
    records = []
    for path in sorted(folder.glob("*.json"), key=lambda p: (p.stat().st_mtime, p.name)):
        try:
            records.append(_read(path, kind))
        except Problem as problem:
            problems.append(str(problem))
    return records


def _read(path: Path, kind: type):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "A record cannot be read", received=f"{path} ({error})", next_step="Delete it and run again"
        ) from error
    try:
        return from_dict(kind, values)
    except Problem as problem:
        raise InputError(f"{path}: {problem}") from problem


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
