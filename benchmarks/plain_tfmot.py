"""One cell of tfmot_matrix.py by TFMOT as it comes: tf_keras, TFMOT's own calls on the whole model, as its guides say.

A process of its own: `python -m plain_tfmot job.json`.
"""

from __future__ import annotations

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

from pathlib import Path

import numpy as np
import tfmot_matrix as matrix

from mobile_bench.jobs import serve


def main(job: dict, emit) -> dict:
    import tf_keras

    from tfopt import training

    tf_keras.utils.set_random_seed(0)
    architecture, feature, out = job["architecture"], job["feature"], Path(job["out"])
    try:
        model = build(architecture, job.get("graph"))
        training.recalibrate(model, matrix.images_of()["train"], matrix.spec_of(architecture), keras=tf_keras)
        before, after, content = cell(model, architecture, feature)
    except Exception as error:  # noqa: BLE001 - what TFMOT or the converter says is the cell's result
        line = " ".join(str(error).split())
        return {"cause": f"{type(error).__name__}: {line}"[:400], "measured": {}}
    out.write_bytes(content)
    run(content, architecture)
    cause, measured = matrix.judged(feature, out, kernels(after), [], kernels(before) if before else None)
    return {"cause": cause, "measured": measured}


def cell(model, architecture: str, feature: str):
    """(the model before QAT, if any; the trained one; the .tflite)."""
    import tensorflow_model_optimization as tfmot

    quantization = tfmot.quantization.keras
    if feature in ("prune", "2:4"):
        pruned = prune(model, architecture, (2, 4) if feature == "2:4" else (0, 0))
        return None, pruned, convert(pruned, architecture, whole_numbers=False)
    if feature == "cluster":
        clustered = cluster(model, architecture)
        return None, clustered, convert(clustered, architecture, whole_numbers=False)
    if feature == "qat":
        trained = train(quantization.quantize_model(model), architecture)
        return None, trained, convert(trained, architecture)
    schemes = tfmot.experimental.combine
    if feature == "pqat":
        before, scheme = prune(model, architecture), schemes.Default8BitPrunePreserveQuantizeScheme()
    elif feature == "cqat":
        before, scheme = cluster(model, architecture), schemes.Default8BitClusterPreserveQuantizeScheme(False)
    else:
        before = cluster(prune(model, architecture), architecture, preserve_sparsity=True)
        scheme = schemes.Default8BitClusterPreserveQuantizeScheme(True)
    trained = train(quantization.quantize_apply(quantization.quantize_annotate_model(before), scheme), architecture)
    return before, trained, convert(trained, architecture)


def prune(model, architecture: str, m_by_n=(0, 0)):
    import tensorflow_model_optimization as tfmot

    sparsity = tfmot.sparsity.keras
    if m_by_n == (0, 0):
        schedule = sparsity.PolynomialDecay(0.0, 0.5, 0, 3 * matrix.STEPS // 4, frequency=1)
        wrapped = sparsity.prune_low_magnitude(model, schedule)
    else:
        wrapped = sparsity.prune_low_magnitude(model, sparsity_m_by_n=m_by_n)
    return sparsity.strip_pruning(train(wrapped, architecture, [sparsity.UpdatePruningStep()]))


def cluster(model, architecture: str, **options):
    import tensorflow_model_optimization as tfmot
    from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster as experimental

    clustering = tfmot.clustering.keras
    settings = {
        "number_of_clusters": matrix.CLUSTERS,
        "cluster_centroids_init": clustering.CentroidInitialization.KMEANS_PLUS_PLUS,
    }
    make = experimental.cluster_weights if options else clustering.cluster_weights
    return clustering.strip_clustering(train(make(model, **settings, **options), architecture))


def train(model, architecture: str, callbacks=()):
    import tf_keras

    images, labels = pixels(architecture)
    model.compile(tf_keras.optimizers.Adam(matrix.RATE), "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(images, labels, batch_size=matrix.BATCH, epochs=1, verbose=0, callbacks=list(callbacks))
    return model


def pixels(architecture: str):
    spec, split = matrix.spec_of(architecture), matrix.images_of()["train"]
    return spec.normalize(split.pixels(spec)), split.labels


def convert(model, architecture: str, whole_numbers: bool = True) -> bytes:
    import tensorflow as tf

    size = matrix.SIZES[architecture]
    call = tf.function(lambda image: model(image, training=False))
    concrete = call.get_concrete_function(tf.TensorSpec((1, size, size, 3), tf.float32))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], model)
    if whole_numbers:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def run(content: bytes, architecture: str) -> None:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (entry,) = interpreter.get_input_details()
    interpreter.set_tensor(entry["index"], np.zeros(entry["shape"], entry["dtype"]))
    interpreter.invoke()


def kernels(model) -> list:
    """The kernels of a tf_keras model, inside TFMOT's wrappers and nested models too."""
    from tfopt.kept import KernelWeights, by_channel

    found = []
    for layer in model._flatten_layers(recursive=True, include_self=False):
        if hasattr(layer, "_weight_vars"):  # a wrapper of QAT: the layer's own attribute is the rounded tensor
            arrays = [variable for variable, *_ in layer._weight_vars]
            kind = type(layer.layer).__name__
        else:
            names = ("depthwise_kernel", "pointwise_kernel", "kernel")
            arrays = [getattr(layer, name) for name in names if hasattr(getattr(layer, name, None), "numpy")]
            kind = type(layer).__name__
        for array in arrays:
            depthwise = "depthwise" in array.name
            own = "DepthwiseConv2D" if depthwise else kind.replace("Separable", "")
            found.append(KernelWeights(layer.name, by_channel(array.numpy(), own)))
    return found


def build(architecture: str, graph: str | None):
    import tensorflow as tf
    import tf_keras

    shape = (matrix.SIZES[architecture],) * 2 + (3,)
    if graph:
        from tfopt.tfmot import neutral, rebuild

        return rebuild.build(*neutral.load(Path(graph)))[0]
    if architecture == "nested":
        return matrix.nested(tf_keras, shape, tf.nn.relu6)
    return getattr(tf_keras.applications, architecture)(weights=None, input_shape=shape, classes=matrix.CLASSES)


if __name__ == "__main__":
    serve(main)
