"""The child process in which tf_keras and TFMOT live: `python -m tfopt.tfmot.worker job.json`.

| operation  | reads                                   | leaves                                          |
|------------|-----------------------------------------|-------------------------------------------------|
| cross      | model.npz                               | how far the rebuilt model's answers are apart   |
| prune      | model.npz, splits                       | weights.npz                                     |
| cluster    | model.npz, splits                       | weights.npz                                     |
| quantize   | model.npz, splits                       | weights.npz, the fake-quantized model           |
| export     | a fake-quantized model, perhaps a split | an int8 .tflite, a float one where layers were  |
|            |                                         | left out, the model's outputs, or all of them   |
| foresee    | model.npz                               | the untrained fake-quantized model              |
| savedmodel | a SavedModel folder                     | an .h5 file, and what the model answers         |

The client writes the job and says where everything lies; see client.py for the fields.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # TFMOT's Keras is tf_keras; only ever said in this process

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.files import atomic_path, write_bytes
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import serve
from tfopt.data.splits import Split
from tfopt.errors import ConversionError, ModelError, ModelRefused, Problem
from tfopt.tfmot import neutral
from tfopt.training import TrainConfig, fit, predict

if TYPE_CHECKING:
    from tfopt.distillation.teachers import Loaded

_CALIBRATION_BATCHES = 10
_TOLERANCE = 1e-5


def main(job: dict, emit: Callable[..., None]) -> dict:
    operations = {
        "cross": cross, "prune": prune, "cluster": cluster, "quantize": quantize, "export": export,
        "foresee": foresee, "savedmodel": savedmodel,
    }  # fmt: skip
    return operations[job["operation"]](job, emit)


def cross(job: dict, emit) -> dict:
    graph, arrays = neutral.load(Path(job["model"]))
    return {"difference": _difference(graph, arrays)}


def prune(job: dict, emit) -> dict:
    from tfopt.tfmot.pruning import Pruner

    graph, weights = _model(job)
    config = TrainConfig.from_dict(job["train"])
    train = _split(job["splits"]["train"])
    pruner = Pruner(graph, weights, job["settings"], config.steps_for(len(train)))
    report = _fit(pruner.model, graph, train, job, config, emit, callbacks=pruner.callbacks(), settled=pruner.settled)
    return {"training": report, "policy": pruner.policy, "probe": _finish(job, graph, pruner.weights())}


def cluster(job: dict, emit) -> dict:
    from tfopt.tfmot.clustering import Clusterer
    from tfopt.tfmot.preserving import Holding

    graph, weights = _model(job)
    config = TrainConfig.from_dict(job["train"])
    clusterer = Clusterer(graph, weights, job["kernels"], job["initialization"])
    holding = Holding(clusterer.others(job["keep"]), zeros=True, clusters=False)
    report = _fit(clusterer.model, graph, _split(job["splits"]["train"]), job, config, emit, callbacks=[holding])
    return {"training": report, "probe": _finish(job, graph, clusterer.weights()), "held": holding.held}


def quantize(job: dict, emit) -> dict:
    from tfopt.tfmot import norms
    from tfopt.tfmot.fakequant import FakeQuantized
    from tfopt.tfmot.preserving import Holding
    from tfopt.tfmot.rounding import unfolded

    graph, weights = _model(job)
    whole, own, replaced = norms.as_convolutions(graph, weights)
    whole = dataclasses.replace(whole, floats=tuple(job.get("exclude", ())))
    config = TrainConfig.from_dict(job["train"])
    train, spec = _split(job["splits"]["train"]), InputSpec.from_dict(job["spec"])
    zeros, clusters = job["keep_zeros"], job["keep_clusters"]
    quantized = FakeQuantized(whole, own, keep_zeros=zeros, keep_clusters=clusters)
    holding = Holding(quantized.others(job["keep"]), zeros=zeros, clusters=clusters)
    some = train.balanced(_CALIBRATION_BATCHES * 64)
    quantized.calibrate((images for images, _ in some.batches(spec, 64)), spec)
    report = _fit(quantized.model, whole, train, job, config, emit, callbacks=[holding])
    quantized.save(Path(job["quantized"]))
    probe = _finish(job, graph, norms.back(replaced, weights, quantized.weights()))
    return {
        "training": report, "probe": probe, "kept": [*quantized.kept, *holding.held],
        "float": [node.source for node in unfolded(whole)],
        "norms": [node.source for node in replaced],
        "quantized": sorted({whole.node(w.layer.name).source for w in quantized.wrappers}),
    }  # fmt: skip


def export(job: dict, emit) -> dict:
    from tfopt.tfmot.fakequant import FakeQuantized
    from tfopt.tfmot.rebuild import build

    loaded = FakeQuantized.load(Path(job["quantized"]))
    model = loaded.model
    spec = InputSpec.from_dict(job["spec"])
    if job.get("outputs"):
        emit("progress", doing="predict")
        outputs = predict(model, _split(job["split"]), spec)
        with atomic_path(job["outputs"]) as temporary, open(temporary, "wb") as file:
            np.save(file, outputs)
    if job.get("tflite"):
        emit("progress", doing="convert")
        write_bytes(job["tflite"], _convert(model, spec))
        if loaded.graph.floats:
            write_bytes(job["float"], _convert(build(loaded.graph, loaded.weights())[0], spec, whole_numbers=False))
    return {"floats": list(loaded.graph.floats)}


def foresee(job: dict, emit) -> dict:
    """An int8 file of the untrained model: what its operations are does not depend on what it has learned."""
    from tfopt.tfmot import norms
    from tfopt.tfmot.fakequant import FakeQuantized

    graph, weights = _model(job)
    whole, own, replaced = norms.as_convolutions(graph, weights)
    whole = dataclasses.replace(whole, floats=tuple(job["exclude"]))
    spec = InputSpec.from_dict(job["spec"])
    quantized = FakeQuantized(whole, own)
    pixels = np.random.default_rng(0).integers(0, 256, (8, *spec.shape), np.uint8)
    emit("progress", doing="calibrate")
    quantized.calibrate([spec.normalize(pixels)], spec)
    quantized.save(Path(job["quantized"]))
    return {"norms": [node.source for node in replaced]}


def savedmodel(job: dict, emit) -> dict:
    import tf_keras

    path = job["path"]
    try:
        model = tf_keras.models.load_model(path, compile=False)
    except Exception as error:
        raise ModelError(
            "The SavedModel cannot be loaded",
            received=f"{path} ({_first_line(error)})",
            next_step="Save it again with Keras, best as one file: model.save('NAME.keras')",
        ) from error
    if not isinstance(model, (tf_keras.Sequential, tf_keras.Model)) or not getattr(model, "_is_graph_network", False):
        raise ModelError(
            "The SavedModel is not a functional or Sequential Keras model, so its layers cannot be walked",
            received=f"{path} ({type(model).__name__})",
            next_step="Rebuild it with keras.Input and keras.Model(inputs, outputs), then copy the weights",
        )
    try:
        with atomic_path(job["h5"]) as temporary:
            model.save(temporary, save_format="h5", include_optimizer=False)
    except Problem:
        raise
    except Exception as error:
        raise ModelError(
            "The SavedModel has layers that cannot be saved as .h5",
            received=f"{path} ({_first_line(error)})",
            next_step="Load it in the program that made it and save it with model.save('NAME.keras')",
        ) from error
    if len(model.inputs) == len(model.outputs) == 1 and model.inputs[0].shape.rank == 4:
        shape = [size or 64 for size in model.inputs[0].shape[1:]]
        images = np.random.default_rng(0).uniform(-1, 1, (2, *shape)).astype(np.float32)
        neutral.save_arrays(Path(job["probe"]), {"images": images, "outputs": model(images, training=False).numpy()})
    return {}


def _model(job: dict) -> tuple[neutral.Graph, neutral.Weights]:
    """The job's model, once it is certain that its rebuilt form answers as the user's own does."""
    graph, arrays = neutral.load(Path(job["model"]))
    difference = _difference(graph, arrays)
    if not difference <= _TOLERANCE:
        raise ModelRefused(
            "The model does not answer the same once it is rebuilt for TFMOT",
            received=f"{graph.name}, difference {difference:.2g}",
            allowed=f"{_TOLERANCE:g}",
            next_step="Use recipes without prune and qat, and report the model's architecture",
        )
    return graph, arrays


def _difference(graph: neutral.Graph, arrays: neutral.Weights) -> float:
    """Between the probe's answers and the rebuilt model's, as a share of the largest where that is above 1.

    Takes the probe out of `arrays`. Where float32 alone may be the cause, the answer in float64 decides.
    """
    from tfopt.tfmot.rebuild import build, exactly

    images, expected = arrays.pop("probe:images"), arrays.pop("probe:outputs")
    own = build(graph, arrays)[0](images, training=False).numpy()
    largest = max(1.0, float(np.max(np.abs(expected))))
    difference = float(np.max(np.abs(own - expected))) / largest
    if not difference <= _TOLERANCE:
        exact = exactly(graph, arrays)(images.astype(np.float64), training=False).numpy()
        difference = neutral.beyond_rounding(own, expected, exact) / largest
    return difference


def _finish(job: dict, graph: neutral.Graph, weights: neutral.Weights) -> str:
    """Write the trained weights with the answers that the user's model must give with them."""
    from tfopt.tfmot.rebuild import build

    images = neutral.load_arrays(Path(job["model"]))["probe:images"]
    model, _ = build(graph, weights)
    outputs = model(images, training=False).numpy()
    neutral.save_arrays(Path(job["weights"]), {**weights, "probe:images": images, "probe:outputs": outputs})
    return job["weights"]


def _fit(
    model, graph: neutral.Graph, train: Split, job: dict, config: TrainConfig, emit, callbacks=(), settled: int = 0
) -> dict:
    import tf_keras

    spec = InputSpec.from_dict(job["spec"])
    with ExitStack() as stack:
        hook = None
        if job.get("teachers"):
            from tfopt.distillation.hook import Lesson, learning

            panel, plan = [_teacher(facts) for facts in job["teachers"]], Lesson(**job["lesson"])
            layers = _by_source(model, graph, plan.pairs)
            hook = stack.enter_context(learning(layers, panel, panel[0].model.heard, plan, config.distill, spec))
        report = fit(
            model, train, _split(job["splits"]["validation"]), spec, config, keras=tf_keras,
            seed=job["seed"], loss_hook=hook, callbacks=callbacks, settled=settled,
            progress=lambda step, steps, facts: emit("progress", step=step, steps=steps, facts=facts),
        )  # fmt: skip
    return report.to_dict()


def _by_source(model, graph: neutral.Graph, names: Iterable[str]) -> dict:
    """The layers that stand for those of the user's model, by their names there: the last part of each."""
    own = {getattr(layer, "layer", layer).name: layer for layer in model.layers}
    last = {node.source: node.name for node in graph.nodes}
    return {name: own[last[name]] for name in names}


def _teacher(facts: dict) -> Loaded:
    from tfopt.distillation.frozen import Thawed
    from tfopt.distillation.teachers import Loaded

    model = Thawed(Path(facts["path"]), facts["name"])
    return Loaded(facts["name"], model, InputSpec.from_dict(facts["spec"]), facts["weight"])


def _split(files: dict) -> Split:
    arrays = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in files.items()}
    return Split(np.asarray(arrays["labels"]), np.asarray(arrays["hashes"]), arrays.get("images"), arrays.get("paths"))


def _convert(model, spec: InputSpec, whole_numbers: bool = True) -> bytes:
    import tensorflow as tf

    call = tf.function(lambda image: model(image, training=False))
    # A batch of one, fixed: delegates refuse dynamic shapes.
    concrete = call.get_concrete_function(tf.TensorSpec((1, *spec.shape), tf.float32, name="image"))
    # Given the model itself, the converter first saves it as a whole, every layer traced: six times slower.
    owner = tf.Module()
    owner.kept = model.weights
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], owner)
    if whole_numbers:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    try:
        return converter.convert()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConversionError("The converter refused the model", received=" ".join(lines[:3])[:500]) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


if __name__ == "__main__":
    serve(main)
