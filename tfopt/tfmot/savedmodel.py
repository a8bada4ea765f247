"""SavedModel folders: written by Keras 2, loaded by tf_keras in the worker, handed over as .h5."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import numpy as np

from mobile_bench.jobs import run_job
from tfopt.errors import ModelError
from tfopt.modelfiles import KERAS_2_LAYERS, first_line
from tfopt.tfmot import neutral
from tfopt.tfmot.client import ENVIRONMENT, TOLERANCE, WORKER

_RESAVE = "In the program that made it, save the model as one file: model.save('NAME.keras')"
TIMEOUT_S = 600


def load_saved_model(path: Path, *, trust: bool) -> keras.Model:
    """The Keras model in a SavedModel folder. Raises ModelError where there is none or trust is missing."""
    path = Path(path)
    if not (path / "saved_model.pb").is_file():
        raise ModelError(
            "The folder is not a SavedModel: it has no saved_model.pb",
            received=path,
            allowed="a folder that Keras 2 wrote with model.save, a .keras or an .h5 file",
        )
    if not (path / "keras_metadata.pb").is_file():
        raise ModelError(
            "The SavedModel holds a bare function without Keras's description of its layers",
            received=path,
            allowed="a folder that Keras 2 wrote with model.save (it has a keras_metadata.pb)",
            next_step=_RESAVE,
        )
    if not trust:
        raise ModelError(
            "A SavedModel is a program, which can do anything on this machine once it is loaded",
            received=path,
            next_step=f"If you trust whoever made it, say --trust. {_RESAVE}",
        )
    with tempfile.TemporaryDirectory(prefix="savedmodel-") as folder:
        h5, probe = Path(folder) / "model.h5", Path(folder) / "probe.npz"
        job = {"operation": "savedmodel", "path": str(path.resolve()), "h5": str(h5), "probe": str(probe)}
        run_job(WORKER, job, Path(folder), environment=ENVIRONMENT, timeout_s=TIMEOUT_S)
        try:
            model = keras.saving.load_model(h5, custom_objects=KERAS_2_LAYERS, compile=False, safe_mode=False)
        except Exception as error:
            raise ModelError(
                "Keras 3 cannot load what Keras 2 saved", received=f"{path} ({first_line(error)})", next_step=_RESAVE
            ) from error
        if probe.exists():
            _check(model, neutral.load_arrays(probe), path)
    return model


def _check(model: keras.Model, probe: neutral.Weights, path: Path) -> None:
    """Some settings mean another thing in Keras 3 (hard_sigmoid does): the answers must still be the same."""
    expected = probe["outputs"]
    difference = float(np.max(np.abs(np.asarray(model(probe["images"], training=False)) - expected)))
    if not difference <= TOLERANCE * max(1.0, float(np.max(np.abs(expected)))):
        raise ModelError(
            "The model answers differently in Keras 3 than in Keras 2, which wrote it",
            received=f"{path}, difference {difference:.2g}",
            allowed=f"{TOLERANCE:g}",
            next_step="Rebuild it in Keras 3 and copy the weights; hard_sigmoid is one activation that has changed",
        )
