"""tfopt: make Keras image classifiers fast and small, and prove it on the exported file.

    tfopt.optimize(model, data, recipe)      variants of one model
    tfopt.run_study(models, data, recipes)   the same with measurements, in a study folder
    tfopt.export(model, schemes, out)        .tflite files, quantized after training
    tfopt.data.load("photos/")               a data set; tfopt.models.load("mine.keras") a model

Importing tfopt is light: TensorFlow is imported when a model is opened.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = ["builders", "data", "export", "models", "optimize", "recipe", "run_study"]


def __getattr__(name: str):
    if name in ("export", "optimize", "run_study"):
        return getattr(importlib.import_module("tfopt.api"), name)
    if name in ("builders", "data", "models", "recipe"):
        return importlib.import_module(f"tfopt.{name}")
    raise AttributeError(f"module 'tfopt' has no attribute {name!r}")
