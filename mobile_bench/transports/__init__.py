"""How a job reaches the machine that a file is measured on. One method is the whole contract.

    transport = transport_for(target)
    facts = transport.run(tflite, job, on_progress=..., timeout_s=...)

`run` starts `mobile_bench.worker` in a fresh process on the target, gives it the file and the job, and
returns its result. It raises ModelRefused when the runtime there will not take the file, JobFailed when
the worker crashed or ran out of time. `place` names the machine: one measurement at a time on each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mobile_bench.errors import InputError
from mobile_bench.jobs import OnProgress
from mobile_bench.records import Target


class Transport(Protocol):
    place: str

    def run(
        self, tflite: Path, job: dict, *, on_progress: OnProgress | None = None, timeout_s: float | None = None
    ) -> dict: ...


def transport_for(target: Target) -> Transport:
    """The transport of a target; InputError for one that this version cannot reach."""
    if target.transport == "local":
        from mobile_bench.transports.local import Local

        return Local()
    raise InputError(
        "This version measures on this machine only",
        received=target.transport,
        allowed="local",
        next_step="Install mobile_bench on the device and run mobile-bench there",
    )
