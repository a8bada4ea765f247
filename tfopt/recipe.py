"""A recipe: ordered steps, the schemes to export, and what may follow what.

    name: distill_prune_qat
    description: One line that a reader of the study sees.
    steps:
      - distill: {width: 0.5, train: {epochs: 8}}
      - prune: {sparsity: 0.5}
      - qat: {}
    schemes: [int8]

All hybrids are such data: a technique does not know the others. Before anything is trained, the
recipe follows the properties that each step adds and keeps, and refuses a step that would lose one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tfopt.convert import SCHEMES, check_schemes
from tfopt.errors import InputError, Problem, RecipeError, unknown_name
from tfopt.technique import Property, Technique, make
from tfopt.training import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """What to do to a model; raises RecipeError when a step cannot follow the ones before it."""

    name: str
    steps: tuple[Technique, ...] = ()
    schemes: tuple[str, ...] = SCHEMES
    description: str = ""

    def __post_init__(self):
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "schemes", tuple(self.schemes))
        safe = isinstance(self.name, str) and self.name.replace("_", "").replace(".", "").isalnum()
        if not safe or self.name.startswith("."):
            raise RecipeError(
                "A recipe's name is not usable as a folder",
                received=repr(self.name),
                allowed="letters, digits, _ and .",
            )
        if not self.schemes or len(set(self.schemes)) != len(self.schemes):
            raise RecipeError(f"Recipe {self.name} has no schemes or one twice", received=self.schemes)
        check_schemes(self.schemes)
        carried = self._follow()
        if Property.FAKE_QUANT in carried and self.schemes != ("int8",):
            raise RecipeError(
                f"Recipe {self.name} trains for int8 and exports something else",
                received=f"schemes {', '.join(self.schemes)} after qat",
                allowed="int8",
            )

    def _follow(self) -> frozenset[Property]:
        """The properties the recipe ends with."""
        carried: dict[Property, str] = {}
        for number, step in enumerate(self.steps, 1):
            for prop, origin in carried.items():
                if prop not in step.keeps:
                    beside = step.name == "distill" and prop in (Property.SPARSE, Property.CLUSTERED)
                    rides = f", or let it ride along: {origin}: {{train: {{distill: true}}}}" if beside else ""
                    raise RecipeError(
                        f"Recipe {self.name}: step {number} ({step.name}) would lose "
                        f"what {origin} gained: {prop.value}",
                        received=" > ".join(s.name for s in self.steps),
                        next_step=f"Leave one {origin} out"
                        if step.name == origin
                        else f"Put {step.name} before {origin}, or leave one out{rides}",
                    )
            try:
                step.check_after(frozenset(carried))
            except Problem as problem:
                raise RecipeError(f"Recipe {self.name}, step {number} ({step.name}): {problem}") from problem
            carried.update(dict.fromkeys(step.adds, step.name))
        return frozenset(carried)

    def with_training(self, changes: dict[str, dict]) -> Recipe:
        """The same recipe with training settings changed: {'prune': {'steps': 100}, '*': {…}}."""
        for change in changes.values():
            TrainConfig.from_dict(change)  # what no step uses must make sense all the same
        steps = []
        for step in self.steps:
            change = {**changes.get("*", {}), **changes.get(step.name, {})}
            if change:
                values = dataclasses.asdict(step.train)
                if {"steps", "epochs"} & set(change):
                    values.update(steps=None, epochs=None)
                step = dataclasses.replace(step, train=TrainConfig.from_dict({**values, **change}))
            steps.append(step)
        return dataclasses.replace(self, steps=tuple(steps))

    def variants(self) -> tuple[str, ...]:
        """'{recipe}-{scheme}', the name of each file it makes."""
        return tuple(f"{self.name}-{scheme}" for scheme in self.schemes)

    def to_dict(self) -> dict:
        steps = [{step.name: step.settings()} for step in self.steps]
        return {"name": self.name, "description": self.description, "steps": steps, "schemes": list(self.schemes)}


def named_recipes() -> dict[str, str]:
    """Name -> description of every recipe that comes with tfopt."""
    return {recipe.name: recipe.description for recipe in map(load, sorted(_files()))}


def load(place: str | Path | Recipe) -> Recipe:
    """A recipe by name, from a .yaml file, or as it is."""
    if isinstance(place, Recipe):
        return place
    text = str(place)
    if text in _files():
        return _parse(_files()[text].read_text(), text)
    if text.endswith((".yaml", ".yml")):
        try:
            return _parse(Path(text).expanduser().read_text(), text)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                "The recipe file cannot be read", received=f"{text} ({error})",
                next_step=f"Name a .yaml file, or one of {', '.join(_files())}",
            ) from error  # fmt: skip
    raise unknown_name("recipe", text, _files(), error=RecipeError)


def load_all(places: Iterable[str | Path | Recipe]) -> tuple[Recipe, ...]:
    """Several recipes; raises RecipeError when two have one name."""
    recipes = tuple(map(load, places))
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError("Two recipes have the same name", received=name, next_step="Rename one of them")
    if not recipes:
        raise RecipeError("No recipe was given", allowed=", ".join(_files()))
    return recipes


def _files() -> dict[str, resources.abc.Traversable]:
    folder = resources.files("tfopt") / "recipes"
    return {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def _values(text: str, origin: str):
    """What the YAML says. Of a key that stands twice YAML takes the last, and the first would be lost silently."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen: dict = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and seen.setdefault((key.tag, key.value), key) is not key:
                    first = seen[key.tag, key.value].start_mark.line + 1
                    raise RecipeError(
                        "A key stands twice in the recipe",
                        received=f"{origin}: {key.value!r} in line {first} and again in line {key.start_mark.line + 1}",
                        allowed="each key once; a step that comes twice is two lines of the list",
                        next_step="Remove one of them",
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError("The recipe is not YAML", received=f"{origin} ({' '.join(str(error).split())})") from error


def _parse(text: str, origin: str) -> Recipe:
    values = _values(text, origin)
    if isinstance(values, dict) and isinstance(values.get("name"), (int, float)):  # bool among them: 'name: on'
        raise RecipeError(
            "The recipe's name is not text", received=f"{origin}: {values['name']!r}", allowed="name: my_recipe",
            next_step="Put it in quotes",
        )  # fmt: skip
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise RecipeError(
            "The recipe has no name", received=origin, allowed="name, description, steps, schemes",
            next_step="Begin the file with 'name: my_recipe'",
        )  # fmt: skip
    for key in values:
        if key not in ("name", "description", "steps", "schemes"):
            raise unknown_name(
                "key of a recipe", str(key), ("name", "description", "steps", "schemes"), error=RecipeError
            )
    listed = values.get("steps", [])
    if not isinstance(listed, list):
        raise RecipeError(
            f"The steps of {origin} are not a list", received=repr(listed),
            allowed="'- prune: {sparsity: 0.5}', a line each; 'steps: []' for the model as it is",
        )  # fmt: skip
    steps = []
    for number, entry in enumerate(listed, 1):
        name, settings = _step(entry, number, origin)
        try:
            steps.append(make(name, settings))
        except Problem as problem:
            raise RecipeError(f"{origin}, step {number} ({name}): {problem}") from problem
    schemes = values.get("schemes", list(SCHEMES))
    if not isinstance(schemes, list):
        raise RecipeError(f"The schemes of {origin} are not a list", received=repr(schemes), allowed="[float32, int8]")
    return Recipe(values["name"], tuple(steps), tuple(map(str, schemes)), str(values.get("description", "")))


def _step(entry, number: int, origin: str) -> tuple[str, dict]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, settings),) = entry.items()
        if settings is None or isinstance(settings, dict):
            return str(name), dict(settings or {})
    raise InputError(
        f"Step {number} of {origin} is not a technique", received=repr(entry), allowed="- NAME: {setting: value}"
    )
