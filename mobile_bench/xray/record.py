"""A report beside its file: FOLDER/xray/DELEGATE.json, where the study reader and the dashboard find it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mobile_bench.errors import InputError
from mobile_bench.files import sha256_of, write_json
from mobile_bench.records import to_dict
from mobile_bench.xray.report import BACKENDS, OpVerdict, XrayReport

FOLDER = "xray"


@dataclass(frozen=True)
class XrayRecord:
    """Where the operations of the file with this SHA-256 run."""

    sha256: str
    report: XrayReport

    def __post_init__(self):
        report = self.report
        if isinstance(report, dict):
            plain = {name: tuple(value) if isinstance(value, list) else value for name, value in report.items()}
            report = XrayReport(ops=tuple(OpVerdict(**op) for op in plain.pop("ops", ())), **plain)
            object.__setattr__(self, "report", report)
        if report.backend not in BACKENDS.get(report.delegate, ()):
            raise ValueError(f"there is no backend {report.backend!r} of {report.delegate!r}")
        if any(op.runs_on not in ("delegate", "cpu") for op in report.ops):
            raise ValueError("an operation runs nowhere")


def write_record(tflite: str | Path, report: XrayReport) -> Path:
    """Store a report beside the file that it speaks of. InputError where the one there is of a neighbour."""
    tflite = Path(tflite)
    path = tflite.parent / FOLDER / f"{report.delegate}.json"
    sha256 = sha256_of(tflite)
    other = _subject(path, [file for file in tflite.parent.glob("*.tflite") if file != tflite], sha256)
    if other:
        raise InputError(
            "A folder holds one X-ray for each delegate, and this one's is of another file",
            received=f"{path}, of {other}",
            next_step="Put each file into a folder of its own, or remove the record",
        )  # fmt: skip
    write_json(path, to_dict(XrayRecord(sha256, report)))
    return path


def _subject(record: Path, files: list[Path], sha256: str) -> Path | None:
    """Which of these files the record speaks of, where it is not of the one with this SHA-256."""
    try:
        known = json.loads(record.read_bytes())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((file for file in files if known != sha256 and file.is_file() and sha256_of(file) == known), None)
