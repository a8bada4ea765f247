"""A phone or board by adb, measured with TFLite's benchmark_model: stock Android has no Python.

The tool reports aggregates over inputs of its own, so ONE INVOCATION IS ONE SAMPLE: the average of its few runs.
Not their median: every version prints the average, so files measured with tools of different age stay comparable,
and the mean of the samples is the mean of all runs, as elsewhere. The binary is the user's own
(Connection.tool). Every name that reaches the device's shell is quoted, and every command is followed by a mark
with its exit code: when adbd dies half-way the connection merely ends, and that must not pass for success.
"""

from __future__ import annotations

import importlib.util
import math
import re
import secrets
import shlex
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mobile_bench import benchmark_model
from mobile_bench.errors import DelegateError, InputError, JobFailed, Problem, TransportError
from mobile_bench.files import sha256_of
from mobile_bench.jobs import OnProgress
from mobile_bench.records import Connection, Target
from mobile_bench.tool import default_path
from mobile_bench.transports import android
from mobile_bench.transports.adb_jobs import JOBS, Task
from mobile_bench.trust import State

PARENT = "/data/local/tmp"
_SHELL_S, _SETTLE_S, _CONNECT_S = 30.0, 5.0, 10.0
_OUTPUT_BYTES = 8 << 20
_WHAT_TO_DO = {
    "unauthorized": "Accept the dialog on its screen (Allow USB debugging), then look with: adb devices",
    "offline": "Unplug it and plug it in again, or: adb reconnect; then look with: adb devices",
    "no": "Let this user open USB devices (udev rules), then look with: adb devices",
}


class Adb:
    """One device. connection: its serial as the address, the tool here, and where to work there.

    folder: where its own folder is made there, else /data/local/tmp. Raises InputError at once without adbutils or
    a tool; entering raises TransportError where the device is not there or does not let us in.
    """

    def __init__(self, connection: Connection | None, target: Target | None = None):
        if importlib.util.find_spec("adbutils") is None:
            raise InputError("Measuring by adb needs adbutils", next_step="pip install 'tfopt[remote]'")
        self.target = target or Target("adb", address=connection.address if connection else "")
        self.serial = connection.address if connection else self.target.address
        self.place = f"adb-{self.serial}"
        self.tool = Path(connection.tool).expanduser() if connection and connection.tool else default_path()
        self.parent = (connection.folder if connection else "") or PARENT
        if not self.tool.is_file():
            raise InputError(
                "Measuring by adb needs TFLite's benchmark_model, built for the device",
                received=f"{self.tool}, which is not there",
                next_step='Fetch it with: mobile-bench fetch-tool (or name yours as tool = "…" in targets.toml)',
            )
        self._there: dict[str, str] = {}
        self.folder, self._device, self._connected, self._can_time_out = "", None, None, False

    def __enter__(self) -> Adb:
        import adbutils

        _start_server(adbutils)
        self._client = adbutils.AdbClient(socket_timeout=_SHELL_S)
        try:
            self._device = self._client.device(self._find())
            self._can_time_out = self._shell("command -v timeout")[1] == 0
            folder = f"{self.parent.rstrip('/')}/mobile-bench-{secrets.token_hex(4)}"
            text, code = self._shell(f"umask 077; mkdir {shlex.quote(folder)}")
            if code:
                raise TransportError(
                    "The device does not let us make a folder", received=text.strip()[-300:],
                    next_step=f"Choose another one with folder = \"…\" (now {self.parent})",
                )  # fmt: skip
            self.folder = folder
            self._push(self.tool, "benchmark_model", 0o755)
            self._checked("chmod 755 ./benchmark_model")
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._clean_up()

    def run(
        self, module: str, job: dict, *, files: Mapping[str, Path], outputs: Mapping[str, Path] | None = None,
        on_progress: OnProgress | None = None, timeout_s: float | None = None, finish_s: float = 0.0,
    ) -> dict:  # fmt: skip
        """What these modules do there: worker, interleave, profile, sustained_worker and evaluate. Others need Python:
        InputError.

        job: also allow_fallback, True for a delegate that need not take the whole model, and
        external_delegate_path, a library on the device (files may hold it as 'delegate').
        """
        deadline = time.monotonic() + (timeout_s or math.inf)
        if module not in (*JOBS, "mobile_bench.evaluate"):
            raise InputError(
                "That needs Python on the device, and adb targets have none",
                received=module.removeprefix("mobile_bench.").removesuffix("_worker"),
                allowed="run, compare, profile, sustained and evaluate", next_step="Use a target by ssh, or local",
            )  # fmt: skip
        for path in files.values():
            if not Path(path).is_file():
                raise InputError("There is no such file", received=path)
        there = {key: f"{key}.tflite" for key in files if key.startswith("tflite")}
        for key, name in there.items():
            self._push_once(Path(files[key]), name)
        if "delegate" in files:
            self._push_once(Path(files["delegate"]), "delegate.so", 0o755)
            job = {**job, "external_delegate_path": "./delegate.so"}
        tell = on_progress or (lambda _: None)
        if module == "mobile_bench.evaluate":
            return self._evaluate(job, files, outputs or {}, tell, deadline)
        here = [Path(files[key]) for key in there]
        return JOBS[module](Task(self, job, here, list(there.values()), tell, deadline, timeout_s))

    def invoke(self, name: str, job: dict, deadline: float, **options) -> benchmark_model.Report:
        """One invocation on a file there; options are those of benchmark_model.arguments."""
        arguments = benchmark_model.arguments(
            name, self._target(job), delegate=job.get("external_delegate_path", ""),
            full_delegation=not job.get("allow_fallback"), **options,
        )  # fmt: skip
        return self._invoke(arguments, job, deadline)

    def state(self) -> tuple[State, dict]:
        """What changes while it is measured, and the device's facts; what cannot be read is absent."""
        return android.read(self.said())

    def said(self) -> str:
        """What the device prints of itself: mobile_bench.transports.android reads it."""
        return self._shell(android.COMMAND)[0]

    def read(self, name: str) -> bytes:
        """A file that was written there."""
        with self._reaching(f"reading {name}"):
            return self._device.sync.read_bytes(f"{self.folder}/{name}")

    @property
    def tool_version(self) -> str:
        """The binary does not say its version: the beginning of its SHA-256."""
        return sha256_of(self.tool)[:12]

    def _evaluate(self, job: dict, files: Mapping, outputs: Mapping, tell: OnProgress, deadline: float) -> dict:
        from mobile_bench.transports.adb_evaluate import evaluate_there

        invoke = lambda content, inputs: self._answer(content, inputs, job, deadline)
        return evaluate_there(invoke, job, files, outputs, tell, f"benchmark_model {self.tool_version}")

    def _target(self, job: dict) -> Target:
        return replace(self.target, threads=job.get("threads", self.target.threads))

    def _answer(self, content: bytes, inputs: dict, job: dict, deadline: float) -> bytes:
        """The raw output tensors for one raw input tensor; `inputs` is its name -> shape."""
        self._push(content, "input.raw")
        self._checked("rm -f output.raw")
        arguments = benchmark_model.arguments(
            "tflite.tflite", self._target(job), runs=1, warmup_runs=1, warmup_secs=0, inputs=inputs,
            memory=False, value_files=dict.fromkeys(inputs, "input.raw"), output="output.raw",
            delegate=job.get("external_delegate_path", ""), full_delegation=not job.get("allow_fallback"),
        )  # fmt: skip
        report = self._invoke(arguments, job, deadline)
        lacking = {"output_filepath", "input_layer_value_files"} & set(report.ignored_flags)
        if lacking or self._shell(f"test -f {self._quoted('output.raw')}")[1]:
            raise JobFailed(
                "This benchmark_model can only time a model: it does not take images or give its answers",
                received=", ".join(f"--{name}" for name in sorted(lacking)) or "no output file",
                next_step="Take a newer one, or evaluate here or by ssh: that needs Python on the device",
            )
        return self.read("output.raw")

    def _invoke(self, arguments: list[str], job: dict, deadline: float) -> benchmark_model.Report:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise _too_long()
        limit = f"timeout -s KILL {math.ceil(left_s)} " if self._can_time_out and left_s < math.inf else ""
        tool = f"{limit}sh -c 'echo $$ >pid; exec \"$@\"' sh {shlex.join(['./benchmark_model', *arguments])}"
        text, code = self._shell(
            f"cd {shlex.quote(self.folder)} || exit 125\n{tool}\ncode=$?; rm -f pid; exit $code",
            left_s + 3 if limit else left_s, on_timeout=self._kill,
        )  # fmt: skip
        if code in (124, 137) and time.monotonic() >= deadline:
            raise _too_long()
        if code:
            raise benchmark_model.failure(text, code, self.target.accelerator)
        report = benchmark_model.parse(text)
        self._check_delegate(report, job)
        return report

    def _check_delegate(self, report: benchmark_model.Report, job: dict) -> None:
        target = self.target
        if target.accelerator == "cpu" or job.get("allow_fallback") or report.delegated == "full":
            return
        flag = {"external": "external_delegate_path"}.get(target.accelerator, f"use_{target.accelerator}")
        if flag in report.ignored_flags:
            what = "the tool was built without it"
        elif report.delegated == "partial":
            what = f"it took part of the model only, in {report.delegate_kernels} pieces"
        else:
            what = {"none": "it took nothing of the model"}.get(report.delegated, "the tool does not say that it ran")
        raise DelegateError(
            f"The {target.accelerator} delegate does not run the whole model: {what}",
            received=" | ".join(report.errors)[:300] or None,
            next_step="Measure on the CPU, make the model of operations that it has, or allow the fallback",
        )

    def _find(self) -> str:
        """The serial of a device that is there and lets us in."""
        until, said = time.monotonic() + _SETTLE_S, ""
        while True:
            with self._reaching("asking for the devices"):
                states = self._states()
                if re.fullmatch(r"[^\s/]+:\d+", self.serial) and self.serial not in states and not self._connected:
                    self._connected = self.serial
                    said = self._client.connect(self.serial, timeout=_CONNECT_S)
                    continue
            state = states.get(self.serial)
            if state == "device":
                return self.serial
            # A device is 'offline' or 'authorizing' for a moment after it was connected.
            if state not in ("offline", "authorizing", "connecting") or time.monotonic() > until:
                break
            time.sleep(0.1)
        seen = ", ".join(f"{name} ({state})" for name, state in states.items()) or said or "no device"
        if state is None:
            raise TransportError(
                f"The device {self.serial} is not there", received=seen,
                next_step="Plug it in, switch USB debugging on, and take the serial that this shows: adb devices",
            )  # fmt: skip
        raise TransportError(
            f"The device {self.serial} does not let us in", received=state,
            next_step=_WHAT_TO_DO.get(state.split()[0], "Look with: adb devices"),
        )  # fmt: skip

    def _states(self) -> dict[str, str]:
        """serial -> state. Not by adbutils' list(), which splits a serial with a space in it."""
        with self._client.make_connection() as server:
            server.send_command("host:devices")
            server.check_okay()
            return dict(line.rsplit("\t", 1) for line in server.read_string_block().splitlines() if "\t" in line)

    def _push_once(self, source: Path, name: str, mode: int = 0o644) -> None:
        digest = sha256_of(source)
        if self._there.get(name) != digest:
            self._there.pop(name, None)
            self._push(source, name, mode)
            self._there[name] = digest

    def _push(self, source: Path | bytes, name: str, mode: int = 0o644) -> None:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        try:
            with self._reaching(f"sending {name}"):
                self._device.sync.push(source, f"{self.folder}/{name}", mode, check=True)
        except TransportError as error:
            free = None
            with suppress(Problem):
                free = android.free_bytes(self._shell(f"df -k {shlex.quote(self.folder)}")[0])
            if free is not None and free < size:
                raise TransportError(
                    "There is not enough space on the device",
                    received=f"{size} bytes for {free} free in {self.folder}",
                    next_step='Free some, or choose another place with folder = "…"',
                ) from error  # fmt: skip
            raise

    def _quoted(self, name: str) -> str:
        return shlex.quote(f"{self.folder}/{name}")

    def _checked(self, command: str) -> str:
        text, code = self._shell(f"cd {shlex.quote(self.folder)} && {command}")
        if code:
            raise TransportError("A command failed on the device", received=f"{command}: {text.strip()[-300:]}")
        return text

    def _shell(
        self, command: str, timeout_s: float = _SHELL_S, *, on_timeout: Callable[[], None] | None = None
    ) -> tuple[str, int]:
        """What a command prints, both streams, and its exit code."""
        mark = f"mobile-bench-{secrets.token_hex(8)}"
        until, received = time.monotonic() + timeout_s, bytearray()
        with self._reaching("running a command"):
            channel = self._device.open_transport(timeout=_SHELL_S)
            try:
                # A busy adbd may close the connection before it has passed on the last lines of a shell that has ended.
                # So the shell ends only when we have read them, or are gone.
                channel.send_command(f"shell:(\n{command}\n) </dev/null 2>&1; c=$?; echo; echo {mark}:$c; read -r c")
                channel.check_okay()
                ended = re.compile(rb"\n%s:\d+\r?\n" % mark.encode())
                while not ended.search(received, max(0, len(received) - 200)):
                    left_s = until - time.monotonic()
                    if left_s <= 0:
                        raise TimeoutError
                    channel.conn.settimeout(None if left_s == math.inf else left_s)
                    part = channel.conn.recv(65_536)
                    if not part:
                        break
                    received += part
                    if len(received) > _OUTPUT_BYTES:
                        del received[: -_OUTPUT_BYTES // 2]
            except TimeoutError:
                if on_timeout is None:
                    raise
                on_timeout()
                raise _too_long() from None
            finally:
                channel.close()
        text = received.decode(errors="replace").replace("\r\n", "\n")
        body, found, tail = text.rpartition(f"\n{mark}:")
        if not found or not tail.endswith("\n") or not tail.strip().isdigit():
            raise TransportError(
                "The device went away half-way", received=text.strip()[-300:] or None,
                next_step="Look at its cable, and with: adb devices"
                + (f"; when it is back, remove {self.folder} there" if self.folder else ""),
            )  # fmt: skip
        return body, int(tail)

    def _kill(self) -> None:
        """End what still runs there. Its number was written by itself, and is removed when it ends."""
        with suppress(Problem):
            self._shell(f"test -f {self._quoted('pid')} && kill -9 $(cat {self._quoted('pid')})")

    def _clean_up(self) -> None:
        """Whatever happens here must not hide why we leave."""
        with suppress(Problem):
            if self.folder:
                self._kill()
                self._shell(f"rm -rf {shlex.quote(self.folder)}")
        self.folder = ""
        if self._connected:
            with suppress(Problem), self._reaching("leaving"):
                self._client.disconnect(self._connected)
            self._connected = None

    @contextmanager
    def _reaching(self, doing: str) -> Iterator[None]:
        import adbutils

        try:
            yield
        except Problem:
            raise
        # adbutils asserts and unpacks what a dying connection left of an answer.
        except (
            adbutils.AdbError, OSError, EOFError, AssertionError, ValueError, struct.error, subprocess.SubprocessError,
        ) as error:  # fmt: skip
            raise TransportError(
                f"The device cannot be reached, while {doing}",
                received=f"{self.serial}: {' '.join(str(error).split())[:300] or type(error).__name__}",
                next_step="Look at its cable, and with: adb devices; then measure again",
            ) from error


def _start_server(adbutils) -> None:
    """Start adb's server where none runs, without a word: its own way prints into our output."""
    if _listens(adbutils.adb.host, adbutils.adb.port):
        return
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        subprocess.run([adbutils.adb_path(), "start-server"], timeout=20, **quiet)
    except (adbutils.AdbError, OSError, subprocess.SubprocessError) as error:
        raise TransportError(
            "adb's server cannot be started", received=error, next_step="Try by hand: adb start-server"
        ) from error


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _too_long() -> JobFailed:
    return JobFailed("Measuring on the device took longer than its limit", next_step="Give it more time, or fewer runs")
