"""This machine: the worker is a child process."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mobile_bench.errors import JobFailed
from mobile_bench.jobs import OnProgress, run_job


class Local:
    place = "local"

    def run(
        self, tflite: Path, job: dict, *, on_progress: OnProgress | None = None, timeout_s: float | None = None
    ) -> dict:
        job = {**job, "tflite": str(Path(tflite).resolve())}
        with tempfile.TemporaryDirectory(prefix="mobile-bench-") as folder:
            try:
                return run_job("mobile_bench.worker", job, Path(folder), on_progress=on_progress, timeout_s=timeout_s)
            except JobFailed as failure:
                # The log goes with the folder; its last lines are in `received`.
                raise JobFailed(
                    failure.what.replace("child process mobile_bench.worker", "measuring process"),
                    received=failure.received,
                    next_step="If it crashed, the runtime cannot bear this file: convert it again or try another one",
                ) from failure
