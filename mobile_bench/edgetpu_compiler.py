"""Google's edgetpu_compiler: run where this machine has it, and what it prints as facts.

    compiled = compile_model("model_int8.tflite")
    print(compiled.mapped, compiled.left, compiled.on_chip_bytes)

It exists for x86-64 Linux only. Formats: https://coral.ai/docs/edgetpu/compiler/ and the output of versions 2 to 16 in
https://github.com/google-coral/edgetpu/issues. It has never run here: the tests replay what it printed elsewhere.
"""

from __future__ import annotations

import dataclasses
import errno
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mobile_bench.errors import DelegateError, InputError, JobFailed, ModelRefused, Problem
from mobile_bench.files import atomic_path
from mobile_bench.flatbuffer import TFLiteModel

TOOL = "edgetpu_compiler"
CUSTOM_OP = "edgetpu-custom-op"
MAPPED = "Mapped to Edge TPU"
TIMEOUT_S = 600
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TAIL = 400


@dataclass(frozen=True)
class Row:
    """One line of the compiler's table: ('CONV_2D', 63, 'Mapped to Edge TPU')."""

    op: str
    count: int
    status: str


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of one model.

    on_chip_bytes: parameters that are kept in the Edge TPU's memory; free_bytes: what is left there; streamed_bytes:
    parameters that are sent again for every inference. All are None where this version does not say, as are the
    sizes of the files, `subgraphs`, `operations` and compile_ms. content: the compiled model, b'' where only text
    was read.
    """

    version: str
    table: tuple[Row, ...]
    on_chip_bytes: int | None = None
    free_bytes: int | None = None
    streamed_bytes: int | None = None
    input_bytes: int | None = None
    output_bytes: int | None = None
    subgraphs: int | None = None
    operations: int | None = None
    compile_ms: float | None = None
    content: bytes = field(default=b"", repr=False, compare=False)

    @property
    def mapped(self) -> int:
        """Operations that run on the Edge TPU."""
        return sum(row.count for row in self.table if row.status == MAPPED)

    @property
    def left(self) -> int:
        """Operations that run on the CPU."""
        return sum(row.count for row in self.table) - self.mapped

    def to_dict(self) -> dict:
        """Plain values, for JSON, without the compiled model."""
        plain = dataclasses.asdict(dataclasses.replace(self, content=b""))
        del plain["content"]
        return {**plain, "mapped": self.mapped, "left": self.left}


def find_compiler() -> str:
    """The path of the compiler on PATH, '' where there is none."""
    return shutil.which(TOOL) or ""


def compile_model(
    tflite: str | Path | bytes, *, out: str | Path | None = None, timeout_s: float = TIMEOUT_S
) -> Compiled:
    """Compile a file for one Edge TPU; with `out` (a path) the compiled model is written there, whole or not at all.

    Raises InputError (no such file), DelegateError (no compiler on PATH, or one for another processor), ModelRefused
    (the compiler does not take this model) and JobFailed (it crashed, or ran longer than timeout_s).
    """
    tool = find_compiler()
    if not tool:
        raise DelegateError(
            f"There is no {TOOL} on PATH", allowed="x86-64 Linux",
            next_step="Install it: https://coral.ai/docs/edgetpu/compiler/#system-requirements",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "model.tflite", Path(folder) / "out"
        target.mkdir()
        _copy(tflite, path)
        text = _run([tool, "-s", "-o", str(target), str(path)], timeout_s)
        made, log = target / "model_edgetpu.tflite", target / "model_edgetpu.log"
        if not made.is_file():
            raise _failure(text, 0)
        if log.is_file():
            text = f"{text}\n{log.read_text(encoding='utf-8', errors='replace')}"
        found = dataclasses.replace(parse(text), content=made.read_bytes())
    if out is not None:
        with atomic_path(Path(out)) as temporary:
            temporary.write_bytes(found.content)
    return found


def parse(text: str) -> Compiled:
    """What the compiler printed, its log or both one after the other. Raises the Problem that the text tells of."""
    text = text.replace("\r\n", "\n")
    version = re.search(r"Edge TPU Compiler version (\S+)", text)
    table = _table(text)
    if version is None or not table:
        raise _failure(text, 0)
    return Compiled(
        version=version[1],
        table=table,
        on_chip_bytes=_bytes(text, r"On-chip memory used for caching model parameters"),
        free_bytes=_bytes(text, r"On-chip memory remaining for caching model parameters"),
        streamed_bytes=_bytes(text, r"Off-chip memory used for streaming uncached model parameters"),
        input_bytes=_bytes(text, r"Input size"),
        output_bytes=_bytes(text, r"Output size"),
        subgraphs=_number(text, r"Number of Edge TPU subgraphs: (\d+)"),
        operations=_number(text, r"Total number of operations: (\d+)"),
        compile_ms=_number(text, r"Model compiled successfully in (\d+) ms"),
    )


def left_on_cpu(original: TFLiteModel, compiled: TFLiteModel) -> tuple[int, ...] | None:
    """Which operations of `original` are still there in its compiled twin, by the names of what they give.

    None where the two do not fit: the twin has an operation that is neither the compiler's own nor the original's.
    """
    before, after = original.main, compiled.main
    makers = {before.tensors[t].name: operator for operator in before.operators for t in operator.outputs}
    left = []
    for operator in after.operators:
        if operator.custom_code == CUSTOM_OP:
            continue
        names = (after.tensors[t].name for t in operator.outputs)
        maker = next((makers[name] for name in names if name in makers), None)
        if maker is None or (maker.op, maker.custom_code) != (operator.op, operator.custom_code):
            return None
        left.append(maker.index)
    return tuple(sorted(left))


def _copy(tflite: str | Path | bytes, path: Path) -> None:
    try:
        path.write_bytes(tflite if isinstance(tflite, bytes) else Path(tflite).read_bytes())
    except OSError as error:
        raise InputError("The model cannot be read", received=f"{tflite} ({error.strerror})") from error


def _run(command: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
            text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise JobFailed(
            f"{TOOL} was ended after {timeout_s:g} s", next_step="Give it longer, or make the model smaller"
        ) from error
    except OSError as error:
        wrong = error.errno == errno.ENOEXEC
        raise DelegateError(
            f"{TOOL} is for another processor" if wrong else f"{TOOL} cannot be started",
            received=f"{command[0]} ({error.strerror})",
            next_step="Compile on x86-64 Linux, and copy the compiled model" if wrong else None,
        ) from error
    if done.returncode:
        raise _failure(done.stdout, done.returncode)
    return done.stdout


#: A pattern in what the compiler prints, what it means, and what helps.
_FAILURES = (
    (r"Model not quantized", "it is not quantized", "Convert with the scheme int8 and calibration images"),
    (
        r"only supports static-sized tensors[^\n]*",
        "it has tensors whose size is known only at run time",
        "Give the model a fixed batch before converting, keras.Input(…, batch_size=1)",
    ),
    (
        r"Didn't find op for builtin opcode[^\n]*|builtin_code out of range[^\n]*",
        "it has an operation that is newer than the compiler",
        "Convert with an older TensorFlow: the compiler is from 2021",
    ),
    (
        r"large activation tensors[^\n]*",
        "its activations are too large for the Edge TPU's memory",
        "Use a smaller input or fewer channels",
    ),
    (r"Encountered unresolved custom op[^\n]*", "it has a custom operation", "Take the operation out of the model"),
    (r"Invalid model[^\n]*|Compilation failed:[^\n]*", "it is no model that the compiler reads", "Convert it again"),
)


def _failure(text: str, exit_code: int) -> Problem:
    """The Problem that the compiler's text tells of."""
    for pattern, meaning, fix in _FAILURES:
        if found := re.search(pattern, text):
            return ModelRefused(f"{TOOL} does not take this model: {meaning}", received=found[0], next_step=fix)
    if found := re.search(r"Internal compiler error[^\n]*", text):
        return JobFailed(
            f"{TOOL} crashed on this model", received=found[0],
            next_step="Large tensors are the usual cause: use a smaller input, and cut resizes and reshapes at the end",
        )  # fmt: skip
    tail = " ".join(text.split())[-_TAIL:] or "nothing"
    ended = f"ended with {exit_code}" if exit_code else "compiled nothing"
    return JobFailed(f"{TOOL} {ended}", received=tail, next_step="Run it by hand to see more")


def _table(text: str) -> tuple[Row, ...]:
    """The rows of the last table in the text: output and log carry the same one."""
    start = text.rfind("Operator")
    if start < 0 or not re.match(r"Operator\s+Count\s+Status", text[start:]):
        return ()
    rows = []
    for line in text[start:].splitlines()[1:]:
        if not line.strip():
            continue
        row = re.fullmatch(r"\s*(\S+)\s+(\d+)\s+(\S.*?)\s*", line)
        if row is None:
            break
        rows.append(Row(row[1], int(row[2]), row[3]))
    return tuple(rows)


def _bytes(text: str, name: str) -> int | None:
    found = re.search(rf"{name}: ([\d.]+)(B|KiB|MiB|GiB)\b", text)
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


def _number(text: str, pattern: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
