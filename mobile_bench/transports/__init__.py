"""How a job reaches the machine that a file is measured on. One method is the whole contract.

    with transport_for(target, connection) as transport:
        facts = transport.run("mobile_bench.worker", job, files={"tflite": path}, on_progress=..., timeout_s=...)

`run` starts a module of this package in a fresh process on the target and returns its result. files: keys of
the job whose value is a file here; it is put on the target and the job gets its path there. outputs: keys of
the job under which the module writes a file; it ends at the given path here. job["requires"]: modules that it
imports beside numpy and the runtime, name -> what pip knows it by. finish_s: for a module that ends early when it
gets SIGINT: an interrupt here is passed on, and raised as Interrupted with what it gives within that time. Raises
ModelRefused when the runtime there will not take the file, JobFailed when the process crashed, was cut off or ran
out of time, TransportError when the target cannot be reached or will not let us in. `place` names the machine: one
measurement at a time on each. Leaving the block removes everything that was put on the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from mobile_bench.errors import InputError
from mobile_bench.jobs import OnProgress
from mobile_bench.records import Connection, Target

_NOTHING: Mapping[str, Path] = {}


class Transport(Protocol):
    place: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(
        self, module: str, job: dict, *, files: Mapping[str, Path], outputs: Mapping[str, Path] = _NOTHING,
        on_progress: OnProgress | None = None, timeout_s: float | None = None, finish_s: float = 0.0,
    ) -> dict: ...  # fmt: skip


def transport_for(target: Target, connection: Connection | None = None) -> Transport:
    """The transport of a target; InputError for one that this version cannot reach."""
    if target.transport == "local":
        from mobile_bench.transports.local import Local

        return Local()
    if connection is None:
        raise InputError("A target that is not this machine needs an address", received=target.name)
    if target.transport == "ssh":
        try:
            from mobile_bench.transports.ssh import Ssh

            return Ssh(connection)
        except ImportError as error:
            raise InputError(
                "SSH needs a library that is not installed", received=error, next_step="pip install 'tfopt[remote]'"
            ) from error
    from mobile_bench.transports.adb import Adb

    return Adb(connection, target)
