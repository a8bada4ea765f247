"""Keras -> TFLite, scheme after scheme, in a child process that may crash without harm.

`convert` is the parent's side; running this module is the child's. Which schemes there are says tfopt.schemes, how
int8 finds its ranges tfopt.calibration. A file is put in its place only when it has been read again, run, and
compared with the Keras model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench.files import atomic_path
from mobile_bench.flatbuffer import read_model
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import run_job
from mobile_bench.metadata import METADATA_KEY
from tfopt import calibration as calibrating
from tfopt import constants
from tfopt.data.splits import Split
from tfopt.errors import ConversionError, JobFailed, ModelError, Problem
from tfopt.schemes import parse

#: what a study makes where nothing else is said; tfopt.schemes.ALL are all that there are.
SCHEMES = ("float32", "float16", "dynamic", "int8")
TIMEOUT_S = 1800
#: A file is compared with Keras on at most so many images, and on so few random ones where none are given.
CHECK_IMAGES, RANDOM_IMAGES = 32, 8
#: `best` looks at no more images than these.
SCORE_IMAGES = 200


@dataclass(frozen=True)
class Converted:
    """One scheme's outcome: a path, or the reason why there is none.

    difference: the largest of an output from Keras's, under LiteRT, as a share of the range of Keras's outputs: 1 for
    probabilities, what they span for logits.
    agreement: the share of the images whose class is Keras's. images: how many those were, of the calibration or,
    where `random` is true, of noise. calibration: how many images, why as many, and which ranges; None without.
    """

    scheme: str
    path: Path | None
    reason: str = ""
    difference: float | None = None
    agreement: float | None = None
    images: int = 0
    random: bool = False
    calibration: dict | None = None
    notes: tuple[str, ...] = ()

    @property
    def within_tolerance(self) -> bool:
        return self.difference is not None and self.difference <= parse(self.scheme).tolerance


def check_schemes(schemes: Sequence[str]) -> None:
    """Raise ConversionError, with near misses, for a name that tfopt.schemes does not know."""
    for scheme in schemes:
        parse(str(scheme))


def convert(
    model_file: Path, spec: InputSpec, schemes: Sequence[str], out: Path, *,
    calibration: Split | np.ndarray | None = None, work: Path, trust: bool = False,
    calibration_images: int | str | None = None, ranges: str = "minmax",
    validation: Split | np.ndarray | None = None, seed: int = 0, hybrid: bool = False, frozen: Path | None = None,
) -> list[Converted]:  # fmt: skip
    """Convert a .keras file into OUT/SCHEME.tflite for each scheme.

    calibration: images for the ranges of int8 and int16x8 (ConversionError if missing there), and for the comparison
    with Keras. calibration_images: how many, class-balanced, 'auto' until the ranges settle, None for all. ranges: see
    tfopt.calibration; 'best' needs `validation` images to choose by. work: a folder for the job's files. A scheme that
    the converter refuses, crashes on or leaves partly in float (unless `hybrid`) is reported as failed, and the others
    are still made. frozen: what `freeze` wrote of the model, which is done here where it has classes of its own. The
    files take one image, (1, height, width, channels), and carry `spec` under the key 'tfopt'.
    """
    check_schemes(schemes)
    calibrating.check_options(calibration_images, ranges)
    needed = [scheme for scheme in schemes if parse(scheme).needs_calibration]
    if needed and (calibration is None or not len(calibration)):
        raise ConversionError(
            "Full int8 needs images to calibrate on" if needed[0] == "int8" else f"{needed[0]} needs images",
            next_step="Name a data set with --data, or choose another scheme",
        )
    job = {
        "model": str(Path(model_file).resolve()), "out": str(Path(out).resolve()), "spec": spec.to_dict(),
        "trust": trust, "count": calibration_images, "ranges": ranges, "hybrid": hybrid, "calibration": None,
        "validation": None, "frozen": None,
    }  # fmt: skip
    try:
        frozen = frozen or freeze(Path(model_file), spec, Path(work) / "frozen.npz")
    except ConversionError as problem:
        return [Converted(scheme, None, str(problem)) for scheme in schemes]
    job["frozen"] = str(frozen.resolve()) if frozen else None
    if calibration is not None and len(calibration):
        limit = calibration_images if needed else CHECK_IMAGES
        job["calibration"] = _saved(calibrating.choose(calibration, spec, limit, seed), work, "calibration")
    if needed and ranges == calibrating.BEST:
        job["validation"] = _saved(_apart(validation, calibration, spec, seed), work, "validation")
    outcomes: dict[str, Converted] = {}
    while left := [scheme for scheme in schemes if scheme not in outcomes]:
        started = {}
        try:
            result = run_job(
                "tfopt.convert_worker",
                {**job, "schemes": left},
                work,
                on_progress=started.update,
                timeout_s=TIMEOUT_S,
                environment={"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"},
            )
        except JobFailed as crash:
            # Only the scheme that was under way is to blame: the rest get a new process.
            for scheme in [started["scheme"]] if started else left:
                outcomes[scheme] = Converted(scheme, None, str(crash))
                unverified(Path(out), scheme).unlink(missing_ok=True)
        except Problem as problem:
            return [Converted(scheme, None, str(problem)) for scheme in schemes]
        else:
            for scheme, facts in result["schemes"].items():
                path = None if facts["reason"] else Path(out) / f"{scheme}.tflite"
                outcomes[scheme] = Converted(scheme, path, **{**facts, "notes": tuple(facts.get("notes", ()))})
    return [outcomes[scheme] for scheme in schemes]


def freeze(model_file: Path, spec: InputSpec, path: Path) -> Path | None:
    """Write a model of one image as constants, for a process without its classes; None where they are all Keras's.

    Raises ConversionError for weights that are not finite, and where its state cannot become constants.
    """
    from tfopt import modelfiles

    if not modelfiles.has_own_classes(model_file):
        return None
    import keras
    import tensorflow as tf

    model = keras.saving.load_model(model_file, compile=False, safe_mode=False)
    check_weights(model)
    image = tf.TensorSpec((1, *spec.shape), tf.float32)
    call = tf.function(lambda image: model(image, training=False), autograph=False)
    try:
        arrays = constants.frozen(call.get_concrete_function(image))
    except (ValueError, NotImplementedError, tf.errors.OpError) as error:
        raise ConversionError(
            "A layer of the model's own keeps state that cannot be exported", received=str(error).splitlines()[0],
            next_step="Keep in the layer nothing but weights",
        ) from error  # fmt: skip
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    return path


def _saved(images: np.ndarray, work: Path, name: str) -> str:
    path = Path(work) / f"{name}.npy"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, images)
    return str(path.resolve())


def _apart(validation, calibration, spec: InputSpec, seed: int) -> np.ndarray:
    """Images to choose ranges by, none of which they were found on."""
    if isinstance(validation, Split) and isinstance(calibration, Split):
        validation = validation.subset(np.flatnonzero(~np.isin(validation.hashes, calibration.hashes)))
    if validation is None or not len(validation):
        raise ConversionError(
            "Choosing the best ranges needs images that they were not found on", received="no validation images",
            next_step="Give validation images, or choose minmax, percentile, mse or entropy",
        )  # fmt: skip
    return calibrating.choose(validation, spec, SCORE_IMAGES, seed)


def refuse_tflite(path: str | Path) -> None:
    """Raise ModelError where `path` is a .tflite, and say which kind: nothing is left in it to convert."""
    try:
        with open(path, "rb") as file:
            if file.read(8)[4:] != b"TFL3":
                return
    except OSError:
        return
    next_step = "Give the Keras model that it was made from; for this file there are tfopt evaluate and mobile-bench"
    graph = read_model(path).main
    if any(operator.custom_code == "edgetpu-custom-op" for operator in graph.operators):
        what = "The file is compiled for the Edge TPU already"
    elif any(tensor.scales for tensor in graph.tensors):
        what = "The file is a .tflite that is quantized already"
    else:
        what = "The file is a .tflite: it is already converted"
    raise ModelError(what, received=path, allowed=".keras, .h5 or a SavedModel folder", next_step=next_step)


def embed_spec(content: bytes, spec: InputSpec) -> bytes:
    """The same .tflite with `spec` in its metadata, so that the file alone says how to feed it."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for known in model.buffers:
        # litert-quantizer puts large ones behind the flatbuffer, where they would be lost now.
        if known.offset > 1 and known.size:
            known.data = np.frombuffer(content, np.uint8, known.size, known.offset)
            known.offset = known.size = 0
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(json.dumps(spec.to_dict()).encode(), np.uint8)
    model.buffers.append(buffer)
    entry.name, entry.buffer = METADATA_KEY, len(model.buffers) - 1
    model.metadata = [m for m in model.metadata or [] if _text(m.name) != METADATA_KEY] + [entry]
    builder = flatbuffers.Builder(len(content) + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def input_shape(content: bytes) -> tuple[int, ...]:
    """The shape of a .tflite's first input, read without running it; () where it cannot be read."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        graph = schema.Model.GetRootAs(content, 0).Subgraphs(0)
        return tuple(int(n) for n in graph.Tensors(graph.Inputs(0)).ShapeAsNumpy())
    except Exception:  # noqa: BLE001 - a file that lies about its offsets has no readable shape
        return ()


def _text(name) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def unverified(out: Path, scheme: str) -> Path:
    return out / f".{scheme}.unverified"


def check_weights(model) -> None:
    from tfopt.graph import flat_layers

    for layer in flat_layers(model):
        wrong = sum(int(np.sum(~np.isfinite(array))) for array in layer.get_weights() if array.dtype.kind == "f")
        if wrong:
            raise ConversionError(
                f"Layer {layer.name} of the model has weights that are not finite numbers", received=f"{wrong} of them",
                next_step="Train the model again with a lower learning rate, or load an earlier checkpoint",
            )  # fmt: skip
