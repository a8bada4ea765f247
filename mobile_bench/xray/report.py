"""The answer of an X-ray, and the one function that gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path

from mobile_bench.arena import arena_of
from mobile_bench.errors import ModelRefused, unknown_name
from mobile_bench.flatbuffer import TFLiteModel, read_model
from mobile_bench.interpreter import check_is_tflite

DELEGATES = ("cpu", "gpu", "edgetpu")
#: What each delegate's rules are about. The first is what is meant when nothing is said.
BACKENDS = {"cpu": ("xnnpack",), "gpu": ("webgpu", "opencl", "opengl"), "edgetpu": ("edgetpu",)}
#: What a person calls the two places of runs_on, 'delegate' and 'cpu'.
PLACES = {"cpu": ("XNNPACK", "plain CPU"), "gpu": ("GPU", "CPU"), "edgetpu": ("Edge TPU", "CPU")}


@dataclass(frozen=True)
class OpVerdict:
    """Where one operation runs.

    op: the TFLite builtin's name, a custom operation's own name. runs_on: 'delegate' or 'cpu'. reason, fix and
    source are '' where it runs on the delegate. layer: the Keras layer, '' where the file does not say.
    said: what the real delegate or compiler says where it was asked, 'delegate', 'cpu' or ''.
    """

    index: int
    op: str
    runs_on: str
    reason: str = ""
    fix: str = ""
    source: str = ""
    layer: str = ""
    said: str = ""


@dataclass(frozen=True)
class XrayReport:
    """Where a file's operations run.

    partitions: how many pieces the delegate gets. weights_bytes: constants of the operations that it takes;
    activation_bytes: the tensor arena of the whole file. asked: which real delegate or compiler was asked, ''
    for none. disagreements: sentences, where its word is not ours. notes: what else a user should know.
    """

    delegate: str
    backend: str
    ops: tuple[OpVerdict, ...]
    partitions: int
    weights_bytes: int = 0
    activation_bytes: int = 0
    asked: str = ""
    disagreements: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def delegated(self) -> int:
        return sum(op.runs_on == "delegate" for op in self.ops)

    @property
    def fallback(self) -> int:
        return len(self.ops) - self.delegated

    def to_dict(self) -> dict:
        """Plain values, for JSON; delegated and fallback are numbers of operations."""
        return {**dataclasses.asdict(self), "delegated": self.delegated, "fallback": self.fallback}


def xray(
    tflite: str | Path | bytes, delegate: str, *, backend: str = "", ask: bool = False,
) -> XrayReport:  # fmt: skip
    """Where each operation of a .tflite would run on `delegate`: one of DELEGATES.

    backend: one of BACKENDS[delegate], its first for ''. ask: also ask the real delegate or compiler where this
    machine has it. Raises InputError (unknown names, no such file) or ModelRefused (not a .tflite, damaged).
    """
    if delegate not in DELEGATES:
        raise unknown_name("delegate", str(delegate), DELEGATES)
    backend = backend or BACKENDS[delegate][0]
    if backend not in BACKENDS[delegate]:
        raise unknown_name(f"backend of {delegate}", str(backend), BACKENDS[delegate])
    if not isinstance(tflite, bytes):
        check_is_tflite(tflite)
    content = read_model(tflite)
    # Each delegate's room has look(model, tflite, backend=, ask=) -> XrayReport.
    room = import_module(f"mobile_bench.xray.{delegate}")
    return room.look(content, tflite, backend=backend, ask=ask)


@dataclass(frozen=True)
class Run:
    """Operations in a row with the same verdict: `first` to `last` of the file, both included."""

    ops: tuple[OpVerdict, ...]

    @property
    def place(self) -> str:
        """'7', or '0-27'."""
        first, last = self.ops[0].index, self.ops[-1].index
        return str(first) if first == last else f"{first}-{last}"

    @property
    def name(self) -> str:
        """'SOFTMAX', '3 x SPLIT' or '28 ops'."""
        names = {op.op for op in self.ops}
        if len(names) == 1:
            return self.ops[0].op if len(self.ops) == 1 else f"{len(self.ops)} x {self.ops[0].op}"
        return f"{len(self.ops)} ops"


def runs_of(ops: Sequence[OpVerdict]) -> tuple[Run, ...]:
    """Operations folded into rows: neighbours on the delegate, and neighbours left for the same reason."""
    said = groupby(ops, key=lambda op: (op.runs_on, op.reason, op.fix))
    return tuple(Run(tuple(group)) for _, group in said)


def weights_of(model: TFLiteModel, numbers: Sequence[int]) -> int:
    """Bytes of the constants that these operators of the main graph use, each counted once."""
    graph = model.main
    tensors = {t for n in numbers for t in graph.operators[n].inputs if t >= 0}
    buffers = {graph.tensors[t].buffer: graph.tensors[t].constant_bytes for t in tensors}
    return sum(buffers.values())


def arena_bytes(model: TFLiteModel, notes: list[str]) -> int:
    """Bytes of the activations; 0 where they are not known, which is noted."""
    try:
        return arena_of(model).arena_bytes
    except ModelRefused as problem:
        notes.append(f"The memory of its activations is not known: {problem.what.partition(': ')[2] or problem.what}")
        return 0
