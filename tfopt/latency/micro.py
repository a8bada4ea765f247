"""Micro-models: a .tflite of one layer, or of the few that replace it, at the shape it has in the network.

All are converted in one child process, `python -m tfopt.latency.micro job.json`, since most of a conversion is the
start of TensorFlow. They are timed in turns by mobile_bench's comparison, so that what else the machine does hits all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from mobile_bench.compare import MIN_ROUNDS, compare
from mobile_bench.files import write_bytes
from mobile_bench.jobs import run_job, serve
from mobile_bench.lock import one_at_a_time
from mobile_bench.measure import check_can_run
from mobile_bench.targets import find_places
from mobile_bench.transports import transport_for
from tfopt.errors import InputError

if TYPE_CHECKING:
    import keras

    from mobile_bench.compare import Verdict

SCHEMES = ("float32", "int8")
#: A comparison takes this many files at most.
_TOGETHER = 8
#: Files that one process times in turns, and how many processes do so.
_IN_TURNS, ROUNDS = 16, 2


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

    def found(self):
        """mobile_bench's target and connection, with the threads; InputError where there is no such target."""
        import dataclasses

        (place,) = find_places([self.target])
        return dataclasses.replace(place.target, threads=self.threads), place.connection


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
    job = {"models": [str(path.with_suffix(".keras").resolve()) for path in files.values()], "scheme": scheme}
    run_job("tfopt.latency.micro", job, folder, environment={"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"})
    return files


def race(files: Sequence[Path], place: Place) -> list[Verdict]:
    """Each file against the first, timed in turns."""
    target, connection = place.found()
    verdicts: list[Verdict] = []
    for start in range(1, len(files), _TOGETHER - 1):
        group = [files[0], *files[start : start + _TOGETHER - 1]]
        found = compare(group, target, connection=connection, seconds=max(place.seconds, 1.0), rounds=MIN_ROUNDS)
        verdicts += found.verdicts
    return verdicts


def times(
    files: Sequence[Path], place: Place, *, seconds: float = 0.5, tell: Callable[[int, int], None] | None = None
) -> list[float]:
    """Median milliseconds of one run of each file; those of a group in turns, in ROUNDS fresh processes."""
    target, connection = place.found()
    check_can_run(target)
    found: list[float] = []
    transport = transport_for(target, connection)
    with one_at_a_time(transport.place, wait_s=3600), transport:
        for start in range(0, len(files), _IN_TURNS):
            group = files[start : start + _IN_TURNS]
            job = {
                "tflites": len(group), "specs": [None] * len(group), "batch": 1, "threads": target.threads,
                "runtime": target.runtime, "seed": 0, "seconds": seconds,
            }  # fmt: skip
            paths = {f"tflite_{index}": path for index, path in enumerate(group)}
            rounds = [
                transport.run("mobile_bench.interleave", {**job, "order_seed": n}, files=paths, timeout_s=900)["blocks"]
                for n in range(ROUNDS)
            ]
            for index in range(len(group)):
                medians = [median(block) for turns in rounds for turn in turns for block in [turn[index]]]
                found.append(float(median(medians)))
            if tell:
                tell(len(found), len(files))
    return found


def _child(job: dict, emit: Callable[..., None]) -> dict:
    import keras

    for path in map(Path, job["models"]):
        model = keras.saving.load_model(path, compile=False)
        write_bytes(path.with_suffix(".tflite"), _content(model, job["scheme"]))
        path.unlink()
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
    owner.kept = [variable.value for variable in model.variables]
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
