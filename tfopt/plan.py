"""What a study shall hold, and the models that it starts from; nothing here trains or measures."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mobile_bench.files import sha256_of
from mobile_bench.records import Target
from tfopt import steps
from tfopt.data import ImageData
from tfopt.errors import InputError
from tfopt.recipe import Recipe
from tfopt.technique import Limits

STEPS_FOLDER = ".steps"


@dataclass(frozen=True)
class Event:
    """Something a person watching the study wants to see.

    kind: 'plan' (total variants), 'step' (a technique's progress: done of total steps), 'evaluate',
    'convert', 'measure', 'variant' (one is finished, with status and text), 'note'.
    """

    kind: str
    model: str = ""
    name: str = ""
    done: int = 0
    total: int = 0
    text: str = ""
    facts: dict = field(default_factory=dict)


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class ModelSource:
    """A model that a study starts from: where it is, and how to open it (which imports TensorFlow).

    key: the hash of the model's content and of how it is fed.
    """

    name: str
    source: str
    key: str
    open: Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """What a study shall hold. runs: timed inferences per measurement. limits: of each step's own process."""

    out: Path
    models: tuple[ModelSource, ...]
    data: ImageData
    recipes: tuple[Recipe, ...]
    targets: tuple[Target, ...] = (Target(),)
    seed: int = 0
    deadline_ms: float = 1000 / 30
    runs: int = 50
    trust: bool = False
    callbacks: tuple = ()
    limits: Limits = Limits()  # noqa: RUF009 - frozen

    def __post_init__(self):
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise InputError(
                "Two models of a study have the same name", received=", ".join(names), next_step="Rename a file"
            )
        if not self.deadline_ms > 0:
            raise InputError("The deadline is not above 0", received=self.deadline_ms)

    def expected(self) -> tuple[str, ...]:
        return tuple(f"{m.name}/{variant}" for m in self.models for r in self.recipes for variant in r.variants())


def file_source(
    place: str | Path, *, input_spec: str | None = None, trust: bool = False, class_names: Sequence[str] = ()
) -> ModelSource:
    """A model by path or 'keras:NAME', opened only when something has to be made from it."""
    text = str(place)

    def open_model():
        from tfopt import models

        loaded = models.load(text, input_spec=input_spec, trust=trust)
        if class_names:
            models.check_classes(loaded, tuple(class_names))
        return models.with_labels(loaded, tuple(class_names))

    path = Path(text).expanduser()
    if text.startswith("keras:"):
        name, content = text.removeprefix("keras:").replace(":", "-").lower(), text
    else:
        if not path.exists():
            open_model()  # raises the error that says so
        name = path.parent.name if path.stem == "model" else path.stem
        content = _hash_path(path)
    return ModelSource(_slug(name), text, steps.content_key(content, input_spec or "", tuple(class_names)), open_model)


def model_source(loaded, class_names: Sequence[str] = ()) -> ModelSource:
    """A model that is already in memory (tfopt.models.LoadedModel)."""
    from tfopt import models

    models.check_classes(loaded, tuple(class_names))
    loaded = models.with_labels(loaded, tuple(class_names))
    digest = hashlib.blake2b(digest_size=16)
    digest.update(loaded.model.to_json().encode())
    for weight in loaded.model.get_weights():
        digest.update(weight.tobytes())
    key = steps.content_key(digest.hexdigest(), loaded.spec.to_dict())
    return ModelSource(loaded.name, loaded.source, key, lambda: loaded)


def variant_key(model: ModelSource, recipe: Recipe, scheme: str, plan: Plan) -> str:
    settings = [{step.name: step.settings()} for step in recipe.steps]
    return steps.content_key(model.key, settings, scheme, plan.data.fingerprint, plan.seed, steps.tool_versions())


def _hash_path(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "model"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
