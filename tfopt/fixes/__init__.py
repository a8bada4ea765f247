"""Rewrites that make a Keras model acceptable to a delegate, each checked to leave its answers as they are.

    fixed = apply_fixes(loaded.model, ["all"], loaded.spec)
    fixed.model, fixed.spec, fixed.applied, fixed.refused

No fix trains anything. What runs where afterwards is what `mobile_bench.xray` says of the converted file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.errors import InputError, unknown_name
from tfopt.fixes import activations, convolutions, entry, spatial
from tfopt.fixes.check import TOLERANCE, largest_difference, probe_of, random_pixels
from tfopt.fixes.plan import Fix
from tfopt.modelfiles import first_line
from tfopt.models import LoadedModel, check_classifier
from tfopt.rebuild import Rebuild, View, check_names

__all__ = ["ALL", "FIXES", "TOLERANCE", "Fix", "Fixed", "apply_fixes", "chosen", "fix_loaded"]

#: In the order in which they are applied: what one leaves, the next may find.
FIXES: dict[str, Fix] = {
    fix.name: fix
    for fix in (
        entry.RESCALING, convolutions.GROUPS, convolutions.DILATION, convolutions.BATCH_NORM, activations.HARD_SWISH,
        activations.ACTIVATIONS, spatial.GLOBAL_POOL, spatial.RESIZE, entry.STATIC_BATCH,
    )
}  # fmt: skip
ALL = "all"


@dataclass(frozen=True)
class Fixed:
    """What became of a model.

    model: a new model, or the user's own where nothing was applied. spec: how it is fed now. applied: (fix, layers,
    largest difference of the outputs over their range). refused: (fix, reason).
    """

    model: keras.Model
    spec: InputSpec
    applied: tuple[tuple[str, tuple[str, ...], float], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """What was done and what was not, a sentence each, for a person."""
        done = [
            f"{name}: changed {_listed(layers)}, outputs within {difference:.1e} of their range"
            for name, layers, difference in self.applied
        ]
        return done + [f"{name}: refused. {reason}" for name, reason in self.refused]


def fix_loaded(loaded: LoadedModel, text: str, on_line: Callable[[str], None] = lambda line: None) -> LoadedModel:
    """A loaded model with the fixes that stand behind --fix: names with commas between them, or 'all'.

    on_line: gets each sentence of the report. Raises what apply_fixes raises.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    fixed = apply_fixes(loaded.model, names, loaded.spec)
    for line in fixed.lines():
        on_line(line)
    if fixed.spec != loaded.spec:
        mean, std = ("/".join(f"{value:g}" for value in values) for values in (fixed.spec.mean, fixed.spec.std))
        on_line(
            f"rescaling: the scaling is now outside the model, (pixel - {mean}) / {std}; the file's input spec says so"
        )
    return dataclasses.replace(loaded, model=fixed.model, spec=fixed.spec)


def chosen(names: Sequence[str]) -> list[Fix]:
    """The fixes of these names in the order of FIXES, 'all' for each with in_all. Raises InputError for others."""
    for name in names:
        if name not in FIXES and name != ALL:
            raise unknown_name("fix", str(name), [*FIXES, ALL], error=InputError)
    return [fix for fix in FIXES.values() if fix.name in names or (ALL in names and fix.in_all)]


def apply_fixes(model: keras.Model, names: Sequence[str], spec: InputSpec, seed: int = 0) -> Fixed:
    """The model with the named fixes, each of which leaves its answers as they are or is refused.

    names: of FIXES, or 'all'. Each fix is checked on random images, on the model's own weights and again with random
    batch norms and biases, as fresh ones (0 and 1) would hide a mistake. Raises InputError for an unknown name,
    ModelError and ModelRefused for a model whose graph cannot be walked.
    """
    names = [names] if isinstance(names, str) else list(names)
    fixes = chosen(names)
    check_classifier(model)
    if tuple(model.input_shape[1:]) != spec.shape:
        raise InputError("The input spec does not fit the model", received=spec.shape, allowed=model.input_shape[1:])
    check_names(View(model))
    pixels = random_pixels(spec, seed)
    probe = None
    applied, refused = [], []
    for fix in fixes:
        plan = fix.plan(View(model), spec)
        refused += [(fix.name, f"{_listed(layers)}: {reason}") for reason, layers in _by_reason(plan.refused).items()]
        if not plan.layers:
            if fix.name in names and not plan.refused:
                refused.append((fix.name, "no layer of the model needs it"))
            continue
        probe = probe or probe_of(model, seed)
        try:
            news = [_rewritten(fix, old, spec) for old in (model, probe)]
        except Exception as error:  # noqa: BLE001 - Keras raises whatever its layers raise
            refused.append((fix.name, f"the changed model cannot be built: {first_line(error)}"))
            continue
        new_spec = plan.spec or spec
        images, others = spec.normalize(pixels), new_spec.normalize(pixels)
        pairs = zip((model, probe), news)
        difference = float(np.max([largest_difference(old, new, images, others) for old, new in pairs]))
        if not difference <= TOLERANCE:
            found = f"its outputs differ by {difference:.1e} of their range, and {TOLERANCE:g} is allowed"
            refused.append((fix.name, f"{_listed(plan.layers)}: {found}"))
            continue
        (model, probe), spec = news, new_spec
        applied.append((fix.name, tuple(plan.layers), difference))
    return Fixed(model, spec, tuple(applied), tuple(refused))


def _by_reason(refused: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for layer, reason in refused:
        reasons.setdefault(reason, []).append(layer)
    return reasons


def _listed(layers: Sequence[str]) -> str:
    """Up to three names, and how many more there are."""
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return ", ".join(layers[:3]) + more


def _rewritten(fix: Fix, model: keras.Model, spec: InputSpec) -> keras.Model:
    view = View(model)
    plan = fix.plan(view, spec)
    return Rebuild(view, plan.changes, plan.batch).model()
