"""The vocabulary: what a study says about a file, a step, a target and a measurement.

Frozen dataclasses that refuse impossible values. Statistics and comparisons are derived, never
stored. Every JSON file made of them carries `schema_version`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from mobile_bench.errors import InputError, unknown_name
from mobile_bench.inputs import InputSpec

SCHEMA_VERSION = 1

#: Why a step left a layer alone. A fixed set, so that reports can be counted and compared.
SKIP_REASONS = (
    "not a kernel layer",
    "excluded by the recipe",
    "too small to gain",
    "first or last layer",
    "not supported by the technique",
    "no gain at this rank",
    "kept whole within the budget",
    "not faster on the target",
    "shape does not allow it",
)
STATUSES = ("ok", "refused", "failed")
KINDS = ("latency", "sweep", "stream", "sustained")
ACCELERATORS = ("cpu", "gpu", "edgetpu", "nnapi", "external")
TRANSPORTS = ("local", "ssh", "adb")


@dataclass(frozen=True)
class Skip:
    """One layer that a step left alone; `reason` is one of SKIP_REASONS, `detail` explains it."""

    layer: str
    reason: str
    detail: str = ""

    def __post_init__(self):
        _one_of("skip reason", self.reason, SKIP_REASONS)


@dataclass(frozen=True)
class StepReport:
    """What one step of a recipe did to a model.

    settings: the technique's hyper-parameters as given. training: a TrainReport as a dict, or None
    where nothing was trained. properties: measured facts such as {'sparsity': 0.5}. Accuracies
    inside `training` are fractions on the validation split.
    """

    technique: str
    settings: dict
    touched: tuple[str, ...]
    skipped: tuple[Skip, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    seconds: float
    training: dict | None = None
    properties: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        skips = tuple(s if isinstance(s, Skip) else Skip(**s) for s in self.skipped)
        object.__setattr__(self, "skipped", skips)
        for name in ("touched", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Tensor:
    """One input or output of a .tflite: shape, dtype name, and quantization (scale 0: none)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float = 0.0
    zero_point: int = 0

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))


@dataclass(frozen=True)
class Variant:
    """One exported file and how it came to be; stored as variant.json beside it.

    name: '{recipe}-{scheme}'. status 'failed' has a reason and no file (sha256 '' and sizes 0).
    parameters and macs are those of the Keras model that was converted; top-1 and agreement are
    in quality/*.json, measured times in bench/*.json.
    """

    name: str
    model: str
    recipe: str
    scheme: str
    status: str = "ok"
    reason: str = ""
    sha256: str = ""
    size_bytes: int = 0
    gzip_bytes: int = 0
    parameters: int = 0
    macs: int = 0
    spec: InputSpec | None = None
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    steps: tuple[StepReport, ...] = ()
    properties: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    tools: dict = field(default_factory=dict)
    seed: int = 0
    created_at: str = ""
    cache_key: str = ""

    def __post_init__(self):
        _one_of("variant status", self.status, STATUSES)
        if self.status != "ok" and not self.reason:
            raise InputError("A variant that failed has no reason", received=self.name)
        if self.spec is not None and not isinstance(self.spec, InputSpec):
            object.__setattr__(self, "spec", InputSpec.from_dict(self.spec))
        for name, kind in (("inputs", Tensor), ("outputs", Tensor), ("steps", StepReport)):
            values = tuple(v if isinstance(v, kind) else kind(**v) for v in getattr(self, name))
            object.__setattr__(self, name, values)
        object.__setattr__(self, "warnings", tuple(self.warnings))


@dataclass(frozen=True)
class Quality:
    """What a .tflite answers on one split; stored as quality/{data}-{split}.json.

    correct of `images` were right (top1 = correct / images). agreement: fraction of images on which
    the file and its own Keras model name the same class; baseline_agreement: the same against the
    model the study started from. Either is None where that model was not at hand.
    """

    data: str
    split: str
    fingerprint: str
    images: int
    correct: int
    agreement: float | None = None
    baseline_agreement: float | None = None
    keras_top1: float | None = None
    runtime: str = ""
    sha256: str = ""

    def __post_init__(self):
        if not 0 <= self.correct <= self.images or self.images < 1:
            raise InputError("A quality record is impossible", received=f"{self.correct} of {self.images} correct")

    @property
    def top1(self) -> float:
        return self.correct / self.images


@dataclass(frozen=True)
class Target:
    """Where and how a file is measured. address: '' for local, else 'user@host' or a serial."""

    transport: str = "local"
    accelerator: str = "cpu"
    address: str = ""
    threads: int = 1
    runtime: str = "auto"

    def __post_init__(self):
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("accelerator", self.accelerator, ACCELERATORS)
        if not isinstance(self.threads, int) or not 1 <= self.threads <= 256:
            raise InputError("The number of threads is out of range", received=self.threads, allowed="1 to 256")

    @property
    def name(self) -> str:
        """A file-name-safe label such as 'local-cpu-t1'."""
        place = self.transport + (
            "-" + "".join(c if c.isalnum() else "_" for c in self.address) if self.address else ""
        )
        return f"{place}-{self.accelerator}-t{self.threads}"


@dataclass(frozen=True)
class Connection:
    """How to reach a target that is not this machine; never stored with a measurement.

    address: 'user@host' for ssh, the serial for adb. identity_file: a private key; '' leaves the choice to
    ssh. known_hosts: '' is the user's own file. folder: where work files go on the device; '' lets the
    transport choose. python: the interpreter there. tool: the path here of the benchmark_model binary for adb.
    """

    address: str
    port: int | None = None
    identity_file: str = ""
    known_hosts: str = ""
    folder: str = ""
    python: str = "python3"
    tool: str = ""

    def __post_init__(self):
        if not self.address or self.address.startswith("-") or any(ord(c) < 32 for c in self.address):
            raise InputError("A target's address cannot be used", received=repr(self.address), allowed="user@host")
        if self.port is not None and not 1 <= self.port <= 65_535:
            raise InputError("A target's port is out of range", received=self.port, allowed="1 to 65535")


@dataclass(frozen=True)
class Delegate:
    """How an accelerator other than the CPU is reached. library: its path on the device, or a name that the
    loader there finds. options: name -> value, as the library's manual says. allow_fallback: the CPU may run the
    operations that it does not take. reference: a .tflite here whose answers on the CPU count as right; '' is the
    file itself, which one compiled for the Edge TPU cannot be.
    """

    library: str = ""
    options: dict[str, str] = field(default_factory=dict)
    allow_fallback: bool = False
    reference: str = ""


@dataclass(frozen=True)
class Measurement:
    """One run of one file on one target; stored as bench/{target}-{time}-{run_id}.json.

    latency_ms holds every timed sample, in order; warmup_ms the ones before them. rounds: how many of latency_ms
    each fresh process made, in order; () where one made all of them. load_ms and first_inference_ms are the
    medians over the processes. peak_rss_bytes is the whole process at its largest, base_rss_bytes the same
    before it loaded the file. A measurement that is 'refused' or 'failed' has a reason; one that failed after
    some rounds keeps their samples. started_at is UTC, ISO 8601.
    """

    run_id: str
    kind: str
    sha256: str
    target: Target
    status: str
    reason: str = ""
    batch: int = 1
    input_shape: tuple[int, ...] = ()
    load_ms: float | None = None
    first_inference_ms: float | None = None
    warmup_ms: tuple[float, ...] = ()
    latency_ms: tuple[float, ...] = ()
    rounds: tuple[int, ...] = ()
    peak_rss_bytes: int | None = None
    base_rss_bytes: int | None = None
    delegated_ops: tuple[str, ...] = ()
    fallback_ops: tuple[str, ...] = ()
    output_drift: float | None = None
    energy_mj: float | None = None
    energy_source: str = "not measured"
    device: dict = field(default_factory=dict)
    load_average: float | None = None
    warnings: tuple[str, ...] = ()
    started_at: str = ""

    def __post_init__(self):
        _one_of("measurement kind", self.kind, KINDS)
        _one_of("measurement status", self.status, STATUSES)
        if not isinstance(self.target, Target):
            object.__setattr__(self, "target", Target(**self.target))
        for name in ("input_shape", "warmup_ms", "latency_ms", "rounds", "delegated_ops", "fallback_ops", "warnings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.status == "ok" and not self.latency_ms:
            raise InputError("A measurement without samples is not ok", received=self.run_id)
        if self.status != "ok" and not self.reason:
            raise InputError("A measurement that failed has no reason", received=self.run_id)
        if self.rounds and (sum(self.rounds) != len(self.latency_ms) or min(self.rounds) < 1):
            raise InputError("A measurement's rounds do not add up to its samples", received=self.run_id)
        if any(not math.isfinite(v) or v < 0 for v in self.latency_ms):
            raise InputError("A latency is not a positive number", received=self.run_id)


@dataclass(frozen=True)
class StudyRecord:
    """study.json: what was asked, on what data and machine.

    data: name, source, fingerprint, note, classes, images per split. models: name -> facts about
    the baseline it started from (source, spec_from, sha256, validation accuracy). expected: the
    '{model}/{variant}' names that the study is meant to hold, in order. deadline_ms: the frame time
    by which rows are judged, 33.3 for 30 frames a second.
    """

    name: str
    data: dict
    models: dict
    recipes: tuple[str, ...]
    expected: tuple[str, ...]
    deadline_ms: float = 1000 / 30
    seed: int = 0
    machine: dict = field(default_factory=dict)
    tools: dict = field(default_factory=dict)
    created_at: str = ""
    finished_at: str = ""

    def __post_init__(self):
        for name in ("recipes", "expected"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 < self.deadline_ms < math.inf:
            raise InputError("A study's deadline is not above 0", received=self.deadline_ms)


def to_dict(record: Any) -> dict:
    """A record as plain JSON values with its schema version first."""
    return {"schema_version": SCHEMA_VERSION, **_plain(record)}


def from_dict(kind: type, values: dict) -> Any:
    """A record of `kind` from what to_dict gave; raises InputError for anything else."""
    if not isinstance(values, dict):
        raise InputError(f"A {kind.__name__} record is not an object", received=type(values).__name__)
    values = dict(values)
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InputError(
            f"A {kind.__name__} record has another schema version",
            received=version,
            allowed=SCHEMA_VERSION,
            next_step="Make it again with this version, or read it with the version that wrote it",
        )
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"A {kind.__name__} record has unknown fields", received=", ".join(unknown))
    wrong = _misfit(values, kind)
    if wrong:
        raise InputError(f"A {kind.__name__} record has a value of the wrong type", received=wrong)
    try:
        return kind(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"A {kind.__name__} record is incomplete or has a value of the wrong type", received=str(error)
        ) from error


def _misfit(value: Any, hint: Any, where: str = "") -> str | None:
    """The first JSON value that does not fit its field's annotation, however deep it lies; None if all fit."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _misfit(value, next(arg for arg in args if arg is not type(None)), where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        inside = ((value[n], hints[n], f"{where}.{n}" if where else n) for n in value if n in hints)
    elif origin is tuple and isinstance(value, (list, tuple)):
        inside = ((item, args[0], f"{where}[{number}]") for number, item in enumerate(value))
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = {int: number and value == int(value), float: number} if number and math.isfinite(value) else {}
        plain = dict if dataclasses.is_dataclass(hint) else origin or hint
        if fits.get(hint, hint not in (int, float) and isinstance(value, plain)):
            return None
        name = {dict: "object", tuple: "list"}.get(plain, getattr(plain, "__name__", str(plain)))
        return f"{where} = {value!r:.60}, which is not of type {name}"
    return next(filter(None, (_misfit(*item) for item in inside)), None)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value  # NumPy's scalars and arrays


def _one_of(kind: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise unknown_name(kind, str(value), allowed)
