"""Follow recipes with one model: train, export, attest, and put each variant into the study's folder."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import shutil
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mobile_bench import interrupts, store
from mobile_bench.files import cannot_write
from mobile_bench.inputs import InputSpec
from mobile_bench.records import StepReport, StudyRecord, Variant
from tfopt import attest, convert, kept, residual, steps
from tfopt.errors import ConversionError, Problem
from tfopt.plan import STEPS_FOLDER, Event, ModelSource, OnEvent, Plan, now, variant_key
from tfopt.recipe import Recipe
from tfopt.schemes import parse
from tfopt.technique import Property

#: A file that agrees less often with its own Keras model is warned of.
_LEAST_AGREEMENT = 0.9


class Workshop:
    """Makes the missing variants of one model."""

    def __init__(self, plan: Plan, model: ModelSource, out: Path, record: StudyRecord, say: OnEvent):
        from tfopt import models

        self.plan, self.model, self.out, self.say = plan, model, out, say
        self.steps_folder = out / STEPS_FOLDER
        say(Event("note", model.name, text=f"loading {model.source}"))
        self.loaded = model.open()
        self.spec: InputSpec = self.loaded.spec
        self.data = plan.data.decoded(self.spec)
        self.base = steps.start(self.steps_folder, model.key, self.loaded.model, self.spec)
        known = record.models.get(model.name, {})
        validation = known.get("validation_top1")
        if validation is None or known.get("key") != model.key:
            validation = models.check_not_by_chance(self.loaded, self.data["validation"])
        self.validation = validation
        facts = {
            "source": model.source, "spec_from": self.loaded.spec_from, "scaling": self.spec.scaling, "key": model.key,
            "validation_top1": validation, "parameters": self.base.parameters, "macs": self.base.macs,
        }  # fmt: skip
        latest = store.read_study(out)
        if known and known.get("key") != model.key:
            self._tell_of_others(latest)
        latest = latest.record
        store.write_study(out, dataclasses.replace(latest, models={**latest.models, model.name: facts}))

    def _tell_of_others(self, latest: store.Study) -> None:
        """Say which variants of another model of this name stay beside those that are made now."""
        own = [entry.variant.name for entry in latest.entries if entry.variant.model == self.model.name]
        asked = {entry.variant.name for entry in latest.asked}
        stale = [name for name in own if name not in asked]
        if stale:
            what = f"warning: {self.out} keeps variants of another model of this name: {', '.join(stale)}"
            self.say(Event("note", self.model.name, text=f"{what}. Choose another --out, or remove their folders"))

    def make(self, jobs: list[tuple[Recipe, list[str]]]) -> None:
        """Train here, one recipe after the other, while a thread exports and attests those that are trained.

        That thread only starts child processes and moves files: Keras is used by one thread alone, so
        a study's numbers do not depend on who was first.
        """
        exports = []
        folder = tempfile.TemporaryDirectory(prefix=steps.WORK_PREFIX, dir=self.out)
        with folder as work, ThreadPoolExecutor(1) as exporter:
            self.work = Path(work)
            try:
                for recipe, schemes in jobs:
                    try:
                        result = self._follow(recipe)
                        # What needs Keras is made here, in the one thread that uses it.
                        ready = self._kernels(result), self._frozen(result)
                    except Exception as error:  # noqa: BLE001 - one recipe's failure must not end the study
                        for scheme in schemes:
                            self._fail(recipe, scheme, error)
                        continue
                    exports.append(exporter.submit(self._export, recipe, result, schemes, *ready))
                for export in exports:
                    export.result()
            finally:
                exporter.shutdown(wait=True, cancel_futures=True)

    def _follow(self, recipe: Recipe) -> steps.StepResult:
        test, fingerprint = self.data["test"], self.data.fingerprint
        self.base.classes(self.spec, test, fingerprint)
        self._check(recipe)
        result, carried = self.base, frozenset()
        for step in recipe.steps:
            key = steps.step_key(result.key, step, self.data, self.plan.seed)
            label = f"{recipe.name}: {step.name}"
            report = lambda done, total, facts, label=label: self.say(
                Event("step", self.model.name, label, done, total, facts=facts)
            )
            kept = "(kept from before) " if steps.find(self.steps_folder, key) else ""
            result = steps.run(
                self.steps_folder, key, step, result, self.spec, self.loaded.model, self.data, self.plan.seed,
                keep=carried & step.keeps, callbacks=self.plan.callbacks, progress=report, limits=self.plan.limits,
            )  # fmt: skip
            text = _step_text(result.reports[-1], self.validation)
            self.say(Event("note", self.model.name, label, text=kept + text))
            carried = result.properties
        if Property.FAKE_QUANT not in carried:
            result.classes(self.spec, test, fingerprint)
        return result

    def _check(self, recipe: Recipe) -> None:
        """Raise what is known before any training not to work in a step that is still to be made."""
        key, same_names = self.base.key, True
        for step in recipe.steps:
            key = steps.step_key(key, step, self.data, self.plan.seed)
            if steps.find(self.steps_folder, key) is None:
                step.check(self.loaded.model, self.spec)
                if same_names:
                    step.check_layers(self.loaded.model, self.spec)
            same_names = same_names and not step.renames

    def _kernels(self, result: steps.StepResult) -> list[kept.KernelWeights]:
        """The kernels whose zeros or clusters every file of this result must have; [] where it has none."""
        carried = {Property.SPARSE, Property.CLUSTERED} & result.properties
        return kept.kernels(result.open(self.spec).model) if carried else []

    def _frozen(self, result: steps.StepResult) -> Path | None:
        """The model as constants, where it has classes that the converter's process has not."""
        if Property.FAKE_QUANT in result.properties:
            return None
        return convert.freeze(result.model_file, self.spec, self.work / f"{result.key}.npz")

    def _export(
        self, recipe: Recipe, result: steps.StepResult, schemes: list[str], kernels: list, frozen: Path | None
    ) -> None:
        self.say(Event("convert", self.model.name, recipe.name, total=len(schemes)))
        for converted in self._convert(result, schemes, frozen):
            try:
                if converted.path is None:
                    raise ConversionError(converted.reason)
                self._finish(recipe, result, converted, kernels)
            except Exception as error:  # noqa: BLE001 - the other schemes go on
                self._fail(recipe, converted.scheme, error)

    def _convert(self, result: steps.StepResult, schemes: list[str], frozen: Path | None) -> list[convert.Converted]:
        folder = self.work / result.key
        folder.mkdir(exist_ok=True)
        if Property.FAKE_QUANT not in result.properties:
            return convert.convert(
                result.model_file, self.spec, schemes, folder, calibration=self.data["calibration"], work=folder,
                trust=self.plan.trust, frozen=frozen,
            )  # fmt: skip
        from tfopt.tfmot import client

        path = folder / "int8.tflite"
        test, fingerprint = self.data["test"], self.data.fingerprint
        try:
            # The worker takes seconds to start, so it converts and answers the test split in one go.
            outputs = client.export_quantized(result.quantized, self.spec, out=path, split=test)
        except Problem as problem:
            return [convert.Converted("int8", None, str(problem))]
        result.keep_classes(outputs, self.spec, fingerprint)
        return [convert.Converted("int8", path)]

    def _finish(self, recipe: Recipe, result: steps.StepResult, converted: convert.Converted, kernels: list) -> None:
        name = f"{recipe.name}-{converted.scheme}"
        properties: dict = {prop.value: True for prop in sorted(result.properties, key=lambda p: p.value)}
        warnings: tuple[str, ...] = ()
        if kernels:
            rows = kept.measure(converted.path, kernels)
            kept.check(
                rows, sparse=Property.SPARSE in result.properties, clustered=Property.CLUSTERED in result.properties
            )
            properties["weights"] = found_kept = kept.summary(rows)
            if found_kept["not_found"]:
                names = ", ".join(found_kept["not_found"])
                warnings += (f"Kernels not found in the file, so their zeros and values are not checked: {names}",)
        if converted.difference is not None and not converted.within_tolerance:
            warnings += (
                f"Outputs are up to {converted.difference:.1%} of their range from Keras's on {converted.images} "
                f"images; {converted.scheme} tolerates {parse(converted.scheme).tolerance:.1%}",
            )
        if converted.scheme.startswith("int8"):
            from tfopt.tfmot import client

            sources = client.sources(result.quantized) if result.quantized else None
            floats = residual.float_tensors(converted.path, sources)
            properties["float_tensors"] = [dataclasses.asdict(tensor) for tensor in floats]
            if floats:
                names = ", ".join(residual.layers(floats))
                warnings += (f"{len(floats)} tensors of this file are float, those of: {names}",)
        test, fingerprint = self.data["test"], self.data.fingerprint
        images = attest.save_split(test, self.spec, self.work)
        progress = lambda done, total, _: self.say(Event("evaluate", self.model.name, name, done, total))
        found = attest.answers(converted.path, images, self.spec, self.work, progress=progress)
        content = converted.path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        quality = attest.quality(
            found, test.labels, data=self.data.name, split="test", fingerprint=fingerprint, sha256=sha256,
            keras=result.classes(self.spec, test, fingerprint),
            baseline=self.base.classes(self.spec, test, fingerprint),
        )  # fmt: skip
        far = quality.agreement is not None and quality.agreement < _LEAST_AGREEMENT
        if far:
            warnings += (
                f"The file names the class that its own Keras model names for {quality.agreement:.1%} of the test "
                "images only: tfopt rescue finds what conversion lost",
            )
        variant = Variant(
            name=name,
            model=self.model.name,
            recipe=recipe.name,
            scheme=converted.scheme,
            sha256=sha256,
            size_bytes=len(content),
            gzip_bytes=len(gzip.compress(content, 9, mtime=0)),
            parameters=result.parameters,
            macs=result.macs,
            spec=self.spec,
            inputs=found.inputs,
            outputs=found.outputs,
            steps=result.reports,
            properties=properties,
            warnings=warnings,
            tools={**steps.tool_versions(), "runtime": found.runtime},
            seed=self.plan.seed,
            created_at=now(),
            cache_key=variant_key(self.model, recipe, converted.scheme, self.plan),
        )
        with self._folder(name) as folder:
            shutil.copy2(converted.path, folder / "model.tflite")
            _link(result.model_file, folder / "model.keras")
            if result.quantized:
                _link(result.quantized, folder / result.quantized.name)
            store.write_quality(folder, quality)
            store.write_variant(folder, variant)
        text = f"top-1 {quality.top1:.2%}, {len(content) / 1e3:.0f} kB"
        text += f"; warning: agrees with its own Keras model on {quality.agreement:.1%} only" if far else ""
        self.say(Event("variant", self.model.name, name, text=text))

    def _fail(self, recipe: Recipe, scheme: str, error: Exception) -> None:
        if interrupts.asked():
            raise KeyboardInterrupt from error  # the error is what became of it
        name = f"{recipe.name}-{scheme}"
        reason = str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
        try:
            with self._folder(name) as folder:
                if not isinstance(error, Problem):
                    (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
                store.write_variant(
                    folder,
                    Variant(
                        name=name, model=self.model.name, recipe=recipe.name, scheme=scheme, status="failed",
                        reason=reason or type(error).__name__, created_at=now(), tools=steps.tool_versions(),
                    ),
                )  # fmt: skip
        except Problem as second:
            reason = f"{reason} (and its record could not be written: {second})"
        what = reason.partition(" Received: ")[0]  # the whole of it stands in the record and below the table
        self.say(Event("variant", self.model.name, name, text=f"failed: {what}", facts={"failed": True}))

    def _folder(self, name: str):
        return _whole_folder(store.variant_folder(self.out, self.model.name, name))


class _whole_folder:
    """A folder that appears at its place complete or not at all; what was there before is replaced."""

    def __init__(self, place: Path):
        self.place = place

    def __enter__(self) -> Path:
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self.work = Path(tempfile.mkdtemp(prefix=f".{self.place.name}-", dir=self.place.parent))
        except OSError as error:
            raise cannot_write(self.place, error) from error
        return self.work

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                shutil.rmtree(self.place, ignore_errors=True)
                self.work.chmod(0o755)
                self.work.rename(self.place)
        except OSError as failure:
            raise cannot_write(self.place, failure) from failure
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(self.place, error) from error
        return False


def _link(source: Path, target: Path) -> None:
    """The same file at a second place, without a second copy where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _step_text(report: StepReport, original: float) -> str:
    """What a step cost and gave. original: the validation accuracy of the model before all steps."""
    parts, training = [], report.training or {}
    if training:
        parts.append(f"{training['steps']} steps, {training['images_seen']} images")
    costs = {
        "parameters": (report.parameters_before, report.parameters_after),
        "MACs": (report.macs_before, report.macs_after),
    }
    for what, (before, after) in costs.items():
        if before and after != before:
            parts.append(f"{what} to {after / before:.0%}")
    if "sparsity" in report.properties:
        parts.append(f"zeros {report.properties['sparsity']:.1%} of the kernels it worked on")
    if "clusters" in report.properties:
        parts.append(f"at most {report.properties['clusters']} values a kernel")
    if report.skipped:
        parts.append(f"{len(report.skipped)} layers left alone")
    if training:
        before = training.get("accuracy_before")
        change = f"{before:.2%} before training, " if before is not None else ""
        parts.append(f"validation {change}{training['accuracy_after']:.2%} after it (the model's own {original:.2%})")
    return "; ".join(parts) or "done"
