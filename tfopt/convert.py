"""Keras -> TFLite, one scheme at a time, in a child process that may crash without harm.

`convert` is the parent's side; running this module is the child's.

| scheme  | weights | activations | needs calibration | input and output |
|---------|---------|-------------|-------------------|------------------|
| float32 | float32 | float32     | no                | float32          |
| float16 | float16 | float32     | no                | float32          |
| dynamic | int8    | float32     | no                | float32          |
| int8    | int8    | int8        | yes               | int8             |
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench.files import atomic_path, write_bytes
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import run_job, serve
from mobile_bench.metadata import METADATA_KEY
from tfopt.data.splits import Split
from tfopt.errors import ConversionError, JobFailed, Problem, unknown_name

SCHEMES = ("float32", "float16", "dynamic", "int8")
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Converted:
    """One scheme's outcome: a path, or the reason why there is none."""

    scheme: str
    path: Path | None
    reason: str = ""


def check_schemes(schemes: Sequence[str]) -> None:
    for scheme in schemes:
        if scheme not in SCHEMES:
            raise unknown_name("scheme", str(scheme), SCHEMES, error=ConversionError)


def convert(
    model_file: Path, spec: InputSpec, schemes: Sequence[str], out: Path, *, calibration: Split | None = None,
    work: Path, trust: bool = False,
) -> list[Converted]:  # fmt: skip
    """Convert a .keras file into OUT/SCHEME.tflite for each scheme.

    calibration: images for the int8 scheme's ranges (ConversionError if it is missing there). work: a
    folder for the job's files. A scheme on which the converter crashes is reported as failed, and the
    others are still made. The files take one image, (1, height, width, channels), and carry `spec` as
    metadata under the key 'tfopt'.
    """
    check_schemes(schemes)
    job = {
        "model": str(Path(model_file).resolve()),
        "out": str(Path(out).resolve()),
        "spec": spec.to_dict(),
        "trust": trust,
        "calibration": None,
    }
    if "int8" in schemes:
        if calibration is None or not len(calibration):
            raise ConversionError(
                "Full int8 needs images to calibrate on",
                next_step="Name a data set with --data, or choose another scheme",
            )
        images = Path(work) / "calibration.npy"
        with atomic_path(images) as temporary, open(temporary, "wb") as file:
            np.save(file, calibration.pixels(spec))
        job["calibration"] = str(images.resolve())
    outcomes: dict[str, Converted] = {}
    while left := [scheme for scheme in schemes if scheme not in outcomes]:
        started = {"scheme": left[0]}
        try:
            result = run_job(
                "tfopt.convert",
                {**job, "schemes": left},
                work,
                on_progress=started.update,
                timeout_s=TIMEOUT_S,
                environment={"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"},
            )
        except JobFailed as crash:
            # Only the scheme that was under way is to blame: the rest get a new process.
            outcomes[started["scheme"]] = Converted(started["scheme"], None, str(crash))
        except Problem as problem:
            return [Converted(scheme, None, str(problem)) for scheme in schemes]
        else:
            result = result["schemes"]
            for scheme in left:
                if scheme in result:
                    reason = result[scheme]
                    outcomes[scheme] = Converted(scheme, None if reason else Path(out) / f"{scheme}.tflite", reason)
    return [outcomes[scheme] for scheme in schemes]


def embed_spec(content: bytes, spec: InputSpec) -> bytes:
    """The same .tflite with `spec` in its metadata, so that the file alone says how to feed it."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
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


def _child(job: dict, emit) -> dict:
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import keras
    import tensorflow as tf

    spec = InputSpec.from_dict(job["spec"])
    # The parent has already refused foreign code, or the user has said that it is trusted.
    if job["trust"]:
        keras.config.enable_unsafe_deserialization()
    model = keras.saving.load_model(job["model"], compile=False)
    images = np.load(job["calibration"], allow_pickle=False) if job["calibration"] else None
    # A batch of one, fixed: delegates refuse dynamic shapes.
    image = tf.TensorSpec((1, *spec.shape), tf.float32, name="image")
    graph = tf.function(lambda image: model(image, training=False)).get_concrete_function(image)
    # Given the Keras model itself, the converter would first save it whole, every layer traced anew.
    owner = tf.Module()
    owner.kept = [weight.value for weight in model.weights]
    results = {}
    for scheme in job["schemes"]:
        emit("progress", scheme=scheme)
        try:
            content = _convert_one(tf, graph, owner, scheme, images, spec)
            write_bytes(Path(job["out"]) / f"{scheme}.tflite", embed_spec(content, spec))
            results[scheme] = ""
        except Problem as problem:
            results[scheme] = str(problem)
        except Exception as error:  # noqa: BLE001 - the converter raises whatever its passes raise
            lines = [line for line in str(error).splitlines() if line.strip()]
            results[scheme] = f"The converter refused the model: {' '.join(lines[:3])[:500]}"
    return {"schemes": results}


def _convert_one(tf, graph, owner, scheme: str, images: np.ndarray | None, spec: InputSpec) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph], owner)
    if scheme != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if scheme == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif scheme == "dynamic":
        # Without this the file needs a FULLY_CONNECTED that tflite-runtime 2.14 does not have.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    elif scheme == "int8":
        converter.representative_dataset = lambda: ([spec.normalize(image[None])] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


if __name__ == "__main__":
    serve(_child)
