"""Micro-models: a .tflite of one layer, or of the few that replace it, at the shape it has in the network.

All are converted in one child process, `python -m tfopt.latency.micro job.json`, since most of a conversion is the
start of TensorFlow. They are timed in turns by mobile_bench's comparison, so that what else the machine does hits all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.compare import MIN_ROUNDS, compare
from mobile_bench.files import write_bytes
from mobile_bench.jobs import OnProgress, run_job, serve
from mobile_bench.targets import find_places
from mobile_bench.turns import Timing, time_in_turns
from tfopt.errors import InputError

if TYPE_CHECKING:
    import keras

    from mobile_bench.compare import Verdict

SCHEMES = ("float32", "int8")
#: A comparison takes this many files at most.
_TOGETHER = 8
_MOST_THREADS = 256


@dataclass(frozen=True)
class Place:
    """Where and how micro-models are timed.

    target: 'local', 'ssh://user@host', 'adb:SERIAL' or a name in targets.toml. scheme: 'float32' or 'int8'. seconds:
    of each comparison.
    """

    target: str = "local"
    scheme: str = "float32"
    threads: int = 1
    seconds: float = 6.0

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise InputError("Micro-models have no such scheme", received=repr(self.scheme), allowed=", ".join(SCHEMES))
        if not isinstance(self.target, str) or not self.target:
            raise InputError("The target is no text", received=repr(self.target), allowed="local, ssh://…, adb:SERIAL")
        whole = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        if not whole or not 1 <= self.threads <= _MOST_THREADS:
            raise InputError("threads is out of range", received=repr(self.threads), allowed=f"1 to {_MOST_THREADS}")

    def found(self):
        """mobile_bench's target and connection, with the threads; InputError where there is no such target."""
        (place,) = find_places([self.target])
        return dataclasses.replace(place.target, threads=self.threads), place.connection


@dataclass(frozen=True)
class LayerSpec:
    """A Keras layer by the name of its class and its settings, on an input of that shape without the batch."""

    kind: str
    shape: tuple[int, ...]
    config: dict = field(default_factory=dict)


def chain(layers: Sequence[keras.Layer], shape: tuple[int, ...]) -> keras.Model:
    """The layers one after the other, on an input of that shape without the batch."""
    import keras

    return keras.Sequential([keras.Input(shape), *layers])


def convert(models: Mapping[str, keras.Model], scheme: str, folder: Path) -> dict[str, Path]:
    """A .tflite of each model, for one image; int8 ones with ranges of noise, which times do not depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, (name, model) in enumerate(models.items()):
        files[name] = folder / f"{number}.tflite"
        model.save(folder / f"{number}.keras")
    _run([{"keras": str(path.with_suffix(".keras").resolve())} for path in files.values()], scheme, folder, None)
    return files


def convert_layers(
    layers: Mapping[str, LayerSpec], scheme: str, folder: Path, on_progress: OnProgress | None = None
) -> dict[str, Path]:
    """The same of single layers with their initial weights: FOLDER/NAME.tflite each. Those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.tflite" for name in layers}
    jobs = [
        {**dataclasses.asdict(layer), "out": str(files[name].resolve())}
        for name, layer in layers.items() if not files[name].is_file()
    ]  # fmt: skip
    if jobs:
        _run(jobs, scheme, folder, on_progress)
    return files


def race(files: Sequence[Path], place: Place) -> list[Verdict]:
    """Each file against the first, timed in turns: faster, slower or cannot tell, with the ratio and its interval."""
    target, connection = place.found()
    verdicts: list[Verdict] = []
    for start in range(1, len(files), _TOGETHER - 1):
        group = [files[0], *files[start : start + _TOGETHER - 1]]
        found = compare(group, target, connection=connection, seconds=max(place.seconds, 1.0), rounds=MIN_ROUNDS)
        verdicts += found.verdicts
    return verdicts


def times(files: Mapping[str, Path], place: Place, seconds: float = 1.0) -> dict[str, Timing]:
    """Milliseconds of each file with their 95% interval, all timed in turns, the first being the yardstick.

    seconds: of timing in each of the three processes. At most mobile_bench.turns.MOST_FILES files.
    """
    target, connection = place.found()
    found = time_in_turns(list(files.values()), target, connection=connection, seconds=seconds)
    return dict(zip(files, found.timings, strict=True))


def _run(models: list[dict], scheme: str, folder: Path, on_progress: OnProgress | None) -> None:
    run_job(
        "tfopt.latency.micro", {"models": models, "scheme": scheme}, folder, on_progress=on_progress,
        environment={"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"},
    )  # fmt: skip


def _child(job: dict, emit: Callable[..., None]) -> dict:
    import keras

    for number, one in enumerate(job["models"]):
        emit("progress", done=number, total=len(job["models"]))
        if "keras" in one:
            path = Path(one["keras"])
            write_bytes(
                path.with_suffix(".tflite"), _content(keras.saving.load_model(path, compile=False), job["scheme"])
            )
            path.unlink()
        else:
            layer = getattr(keras.layers, one["kind"])(**one["config"])
            write_bytes(one["out"], _content(chain([layer], tuple(one["shape"])), job["scheme"]))
    return {}


def _content(model, scheme: str) -> bytes:
    import numpy as np
    import tensorflow as tf

    shape = tuple(model.inputs[0].shape[1:])
    if None in shape or not math.prod(shape):
        raise InputError("A micro-model needs an input of fixed size", received=shape)
    call = tf.function(lambda values: model(values, training=False))
    concrete = call.get_concrete_function(tf.TensorSpec((1, *shape), tf.float32))
    owner = tf.Module()
    owner.kept = [weight.value for weight in model.weights]
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], owner)
    if scheme == "int8":
        noise = np.random.default_rng(0).normal(size=(4, 1, *shape)).astype(np.float32)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([values] for values in noise)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


if __name__ == "__main__":
    serve(_child)
