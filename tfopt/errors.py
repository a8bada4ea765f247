"""tfopt's branches of the one error tree; see mobile_bench/errors.py for its root.

Problem
├── ModelError              a Keras model that cannot be loaded, trusted or used
├── RecipeError             a recipe, technique or scheme that does not exist or cannot follow
├── TrainingError           a training configuration or run that cannot go on
└── ConversionError         the converter refused or crashed
"""

from __future__ import annotations

from mobile_bench.errors import DataError, InputError, JobFailed, ModelRefused, Problem, unknown_name

__all__ = [
    "ConversionError", "DataError", "InputError", "JobFailed", "ModelError", "ModelRefused", "Problem",
    "RecipeError", "TrainingError", "unknown_name",
]  # fmt: skip


class ModelError(Problem):
    """A Keras model that cannot be loaded, trusted or used."""


class RecipeError(Problem):
    """A recipe, technique or scheme that does not exist or cannot follow."""


class TrainingError(Problem):
    """A training configuration or run that cannot go on."""


class ConversionError(Problem):
    """The converter refused the model or crashed."""
