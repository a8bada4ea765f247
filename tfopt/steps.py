"""Run the steps of a recipe, one after the other, and keep what each one made.

A finished step is a folder named by the hash of everything that shaped it: the model's file, the
steps before it, the data, the seed and the tools' versions. The same prefix of another recipe, or a
second run, finds it there and trains nothing.

    KEY/{model.keras, step.json}          the model after the step, and its report
    KEY/quantized.*                       what quantization-aware training leaves for the converter
    KEY/classes-{FINGERPRINT}.npy         the classes this Keras model names on the test split
    KEY.log                               what the child process of a step said that failed
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench.errors import JobFailed
from mobile_bench.files import atomic_path, cannot_write, sha256_of, write_json
from mobile_bench.inputs import InputSpec
from mobile_bench.records import StepReport, from_dict, to_dict
from tfopt.data.splits import ImageData, Split
from tfopt.technique import Context, Limits, OptimizedModel, Property, Technique

WORK_PREFIX = ".work-"
_VERSIONED = ("tfopt", "tensorflow", "keras", "tf-keras", "tensorflow-model-optimization", "ai-edge-litert")


@dataclass(frozen=True)
class StepResult:
    """A model on disk after some steps; parameters and macs are 0 until its folder exists."""

    key: str
    folder: Path
    properties: frozenset[Property]
    reports: tuple[StepReport, ...]
    parameters: int
    macs: int

    @property
    def model_file(self) -> Path:
        return self.folder / "model.keras"

    @property
    def quantized(self) -> Path | None:
        return next(iter(sorted(self.folder.glob("quantized*"))), None)

    def open(self, spec: InputSpec) -> OptimizedModel:
        import keras

        model = keras.saving.load_model(self.model_file, compile=False, safe_mode=False)
        return OptimizedModel(model, spec, self.properties, self.quantized)

    def classes(self, spec: InputSpec, test: Split, fingerprint: str) -> np.ndarray:
        """The classes this Keras model names on the test split, computed once: int64 (count,)."""
        known = self._classes_file(fingerprint)
        if not known.exists():
            self._write_classes(known, keras_classes(self.model_file, self.quantized, test, spec))
        return np.load(known, allow_pickle=False)

    def keep_classes(self, outputs: np.ndarray, spec: InputSpec, fingerprint: str) -> None:
        """Remember what the model answered on the test split, where its outputs are at hand already."""
        from tfopt import training

        self._write_classes(self._classes_file(fingerprint), training.classify(outputs, spec))

    def _classes_file(self, fingerprint: str) -> Path:
        return self.folder / f"classes-{fingerprint}.npy"

    def _write_classes(self, path: Path, classes: np.ndarray) -> None:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, classes.astype(np.int64))


def keras_classes(model_file: Path, quantized: Path | None, split: Split, spec: InputSpec) -> np.ndarray:
    """What the Keras model behind a file answers: the fake-quantized one where there is one."""
    from tfopt import training

    if quantized is not None:
        from tfopt.tfmot.client import predict_quantized

        outputs = predict_quantized(quantized, split, spec)
    else:
        import keras

        # Whoever made this file has checked or trusted what is in it.
        outputs = training.predict(keras.saving.load_model(model_file, compile=False, safe_mode=False), split, spec)
    return training.classify(outputs, spec)


def tool_versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def content_key(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def step_key(before: str, technique: Technique, data: ImageData, seed: int) -> str:
    paths = [Path(path).expanduser() for path in technique.files()]
    files = [sha256_of(path) if path.is_file() else str(path) for path in paths]
    return content_key(
        before,
        technique.name,
        technique.settings(),
        *([files] if files else []),
        data.fingerprint,
        seed,
        tool_versions(),
    )


def find(folder: Path, key: str) -> StepResult | None:
    """A step that an earlier run has finished."""
    place = folder / key
    try:
        values = json.loads((place / "step.json").read_text())
        reports = tuple(from_dict(StepReport, report) for report in values["reports"])
        properties = frozenset(Property(name) for name in values["properties"])
        return StepResult(key, place, properties, reports, values["parameters"], values["macs"])
    except (OSError, ValueError, KeyError):
        return None


def start(folder: Path, key: str, model, spec: InputSpec) -> StepResult:
    """The model as it was loaded, as the result of no steps."""
    return find(folder, key) or _keep(folder, key, OptimizedModel(model, spec), ())


def run(
    folder: Path,
    key: str,
    technique: Technique,
    before: StepResult,
    spec: InputSpec,
    teacher,
    data: ImageData,
    seed: int,
    *,
    keep: frozenset[Property],
    callbacks=(),
    progress: Callable[[int, int, dict], None] | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> StepResult:
    """One step, found or made. Raises whatever the technique raises; of a failed job only its log stays."""
    known = find(folder, key)
    if known:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=folder))
    try:
        context = Context(
            data, work, teacher, keep=keep, seed=seed, progress=progress, callbacks=callbacks, limits=limits
        )
        optimized, report = technique.apply(before.open(spec), context)
        return _keep(folder, key, optimized, (*before.reports, report))
    except JobFailed as problem:
        log, kept = work / "log.txt", folder / f"{key}.log"
        if log.is_file() and problem.next_step:
            shutil.move(log, kept)
            problem.next_step = problem.next_step.replace(str(log), str(kept))
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _keep(folder: Path, key: str, optimized: OptimizedModel, reports: tuple[StepReport, ...]) -> StepResult:
    from tfopt import models
    from tfopt.graph import count_macs, count_parameters

    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=folder))
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        models.save(optimized.model, work / "model.keras", optimized.spec)
        if optimized.quantized:
            shutil.copy2(optimized.quantized, work / f"quantized{optimized.quantized.suffix}")
        facts = {
            "properties": sorted(prop.value for prop in optimized.properties),
            "reports": [to_dict(report) for report in reports],
            "parameters": count_parameters(optimized.model),
            "macs": count_macs(optimized.model),
        }
        write_json(work / "step.json", facts)
        place = folder / key
        shutil.rmtree(place, ignore_errors=True)
        work.rename(place)
    except OSError as error:
        raise cannot_write(folder / key, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return StepResult(key, place, optimized.properties, reports, facts["parameters"], facts["macs"])
