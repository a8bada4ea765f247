"""Run recipes x models x targets, keep every finished piece, and write the study folder.

A study can be stopped at any moment and started again: what is finished is found, and only the rest
is made. A variant that fails becomes a record with its reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from mobile_bench import device, store
from mobile_bench.files import sha256_of
from mobile_bench.lock import held, lock_path
from mobile_bench.records import StudyRecord, Target
from tfopt import steps
from tfopt.errors import InputError, Problem
from tfopt.plan import STEPS_FOLDER, Event, ModelSource, OnEvent, Plan, now, variant_key
from tfopt.recipe import Recipe
from tfopt.workshop import Workshop


def run(plan: Plan, on_event: OnEvent | None = None) -> store.Study:
    """Make what is missing of the study, and return all of it.

    Raises a Problem before any work when a model cannot be used at all. A recipe or scheme that fails
    later is a variant with status 'failed'.
    """
    say = on_event or (lambda event: None)
    out = Path(plan.out)
    busy = InputError(
        "A study is being made in this folder right now",
        received=out,
        next_step="Wait for it to end, or choose another --out",
    )
    # In the user's cache, so that a refused study leaves no lock file behind in a folder that is none.
    with held(lock_path(f"study-{steps.content_key(str(out.resolve()))}"), busy):
        return _run(plan, out, say)


def _run(plan: Plan, out: Path, say: OnEvent) -> store.Study:
    say(Event("plan", total=len(plan.expected())))
    new = not (out / "study.json").exists()
    for folder in (out, out / STEPS_FOLDER):  # what a process that was killed has left
        for left in folder.glob(f"{steps.WORK_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
    record = _begin(plan, out)
    work: list[tuple[Workshop, list[tuple[Recipe, list[str]]]]] = []
    try:
        # Every model is opened and checked before the first is worked on.
        for model in plan.models:
            jobs = [(recipe, *_missing(plan, model, recipe)) for recipe in plan.recipes]
            for _recipe, present, _ in jobs:
                for variant in present:
                    say(Event("variant", model.name, variant, text="already there"))
            jobs = [(recipe, missing) for recipe, _, missing in jobs if missing]
            if jobs:
                _check_files([recipe for recipe, _ in jobs])
                work.append((Workshop(plan, model, out, record, say), jobs))
    except BaseException:
        if new:
            _forget(out)
        raise
    for workshop, jobs in work:
        workshop.make(jobs)
    _measure_all(plan, out, say)
    record = dataclasses.replace(store.read_study(out).record, finished_at=now())
    store.write_study(out, record)
    return store.read_study(out)


def _check_files(recipes: Sequence[Recipe]) -> None:
    """Raise InputError for a file that a step names and that is not there."""
    for recipe in recipes:
        for number, step in enumerate(recipe.steps, 1):
            for name in step.files():
                if not (name.startswith("keras:") or Path(name).expanduser().exists()):
                    raise InputError(
                        f"Recipe {recipe.name}, step {number} ({step.name}) names a file that is not there",
                        received=name, next_step=f"Names are relative to {Path.cwd()}",
                    )  # fmt: skip


def _described(data: dict) -> str:
    counts = data.get("images") or {}
    return f"{data.get('name')} ({counts.get('train')} train, {counts.get('test')} test images)"


def _forget(out: Path) -> None:
    """Take back what _begin and the opening of models wrote into a folder that was no study before."""
    shutil.rmtree(out / STEPS_FOLDER, ignore_errors=True)
    (out / "study.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        out.rmdir()  # only if nothing else is in it


def _begin(plan: Plan, out: Path) -> StudyRecord:
    data = plan.data
    described = {
        "name": data.name, "source": data.source, "fingerprint": data.fingerprint, "note": data.note,
        "classes": list(data.class_names), "images": {name: len(split) for name, split in data.splits.items()},
    }  # fmt: skip
    try:
        known = store.read_study(out).record
        if known.data.get("fingerprint") != data.fingerprint:
            raise InputError(
                "The folder holds a study of other data",
                received=f"{out} made with {_described(known.data)}; asked for {_described(described)}",
                next_step="Choose another folder with --out, or delete this one",
            )
        created, models = known.created_at, dict(known.models)
        described = known.data  # where the images first came from, not the cache they come from now
    except Problem:
        if (out / "study.json").exists():
            raise
        if out.exists() and not out.is_dir():
            raise InputError("The study's place is a file", received=out, allowed="a folder") from None
        created, models = now(), {}
    record = StudyRecord(
        name=out.resolve().name,
        data=described,
        models={m.name: models.get(m.name, {"source": m.source}) for m in plan.models},
        recipes=tuple(recipe.name for recipe in plan.recipes),
        expected=plan.expected(),
        deadline_ms=plan.deadline_ms,
        seed=plan.seed,
        machine=device.describe(),
        tools=steps.tool_versions(),
        created_at=created,
    )
    store.write_study(out, record)
    return record


def _missing(plan: Plan, model: ModelSource, recipe: Recipe) -> tuple[list[str], list[str]]:
    """(names that are there already, schemes still to be made)."""
    present, missing = [], []
    for scheme, name in zip(recipe.schemes, recipe.variants()):
        folder = store.variant_folder(plan.out, model.name, name)
        try:
            entry = store.read_entry(folder)
            known = entry.variant
            whole = known.status == "ok" and known.cache_key == variant_key(model, recipe, scheme, plan)
            whole = whole and entry.quality() is not None and sha256_of(entry.tflite) == known.sha256
        except (Problem, OSError):
            whole = False
        if whole:
            present.append(name)
        else:
            missing.append(scheme)
    return present, missing


def _measure_all(plan: Plan, out: Path, say: OnEvent) -> None:
    """Time every variant that has no measurement of this target on this machine yet."""
    from mobile_bench.measure import measure

    entries = [e for e in store.read_study(out).entries if e.variant.status == "ok"]
    wanted = {name for name in plan.expected()}
    todo = [
        (entry, target)
        for entry in entries
        for target in plan.targets
        if f"{entry.variant.model}/{entry.variant.name}" in wanted and not _is_measured(entry, target)
    ]
    for number, (entry, target) in enumerate(todo):
        say(Event("measure", entry.variant.model, entry.variant.name, number, len(todo)))
        measurement = measure(entry.tflite, target, runs=plan.runs, seconds=0)
        store.write_measurement(entry.folder, measurement)
    if todo:
        say(Event("measure", done=len(todo), total=len(todo)))


def _is_measured(entry: store.Entry, target: Target) -> bool:
    return any(m.target == target and m.sha256 == entry.variant.sha256 and m.status == "ok" for m in entry.measurements)
