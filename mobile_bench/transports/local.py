"""This machine: the job is a child process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from mobile_bench.errors import JobFailed
from mobile_bench.jobs import OnProgress, run_job


class Local:
    place = "local"

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_) -> None:
        """Nothing is left: each job's folder goes with the job."""

    def run(
        self, module: str, job: dict, *, files: Mapping[str, Path], outputs: Mapping[str, Path] | None = None,
        on_progress: OnProgress | None = None, timeout_s: float | None = None, finish_s: float = 0.0,
    ) -> dict:  # fmt: skip
        job = {**job, **{key: str(Path(path).resolve()) for key, path in {**files, **(outputs or {})}.items()}}
        with tempfile.TemporaryDirectory(prefix="mobile-bench-") as folder:
            try:
                return run_job(
                    module, job, Path(folder), on_progress=on_progress, timeout_s=timeout_s, finish_s=finish_s,
                    environment={"TMPDIR": folder},  # what it makes for itself goes too, however it ends
                )  # fmt: skip
            except JobFailed as failure:
                # The log goes with the folder; its last lines are in `received`.
                raise JobFailed(
                    failure.what.replace(f"child process {module}", "measuring process"),
                    received=failure.received,
                    next_step="If it crashed, the runtime cannot bear this file: convert it again or try another one",
                ) from failure
