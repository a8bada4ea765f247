"""Write the tiny .tflite files that the tests run: `python make_tiny_models.py FOLDER`.

Real conversions of tiny Keras models, with what Keras answers to the same images beside them, and a few
files that are damaged on purpose. Run once in a process of its own by conftest.py, because it needs
TensorFlow and the tests of mobile_bench must not.
"""

import os
import sys
from pathlib import Path

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow")

import flatbuffers
import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from keras import layers

SHAPE, CLASSES = (12, 12, 3), 4


def classifier(head="softmax", outputs=CLASSES, shape=SHAPE, pool=False):
    image = x = keras.Input(shape, name="image")
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    x = layers.GlobalMaxPooling2D()(x) if pool else layers.Flatten()(x)
    initializer = keras.initializers.RandomNormal(stddev=0.3, seed=7)
    return keras.Model(image, layers.Dense(outputs, activation=head, kernel_initializer=initializer)(x))


def convert(model, images, scheme="float32"):
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if scheme != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if scheme == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif scheme != "float32":
        converter.representative_dataset = lambda: ([image[None]] for image in images)
        ops = tf.lite.OpsSet
        sixteen = ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        converter.target_spec.supported_ops = [sixteen if scheme == "int16" else ops.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = getattr(tf, scheme)
    return converter.convert()


def pack(model):
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def one_operation(operation, inputs, options=None, options_type=0, custom=None):
    """A file of one operation from bool to bool."""
    model, graph, code, node = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    model.version, model.buffers, graph.name = 3, [schema.BufferT()], "main"
    graph.tensors = []
    for name in ("given", "answer"):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name, np.array([1], np.int32), schema.TensorType.BOOL
        graph.tensors.append(tensor)
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([1], np.int32)
    node.inputs, node.outputs = np.array(inputs, np.int32), np.array([1], np.int32)
    node.builtinOptions, node.builtinOptionsType = options, options_type
    code.builtinCode, code.deprecatedBuiltinCode, code.version = operation, min(operation, 127), 1
    code.customCode = custom
    graph.operators, model.subgraphs, model.operatorCodes = [node], [graph], [code]
    return pack(model)


def self_calling():
    """An IF whose branches are the graph it stands in: preparing it overflows the stack of the runtime."""
    options = schema.IfOptionsT()
    options.thenSubgraphIndex = options.elseSubgraphIndex = 0
    return one_operation(schema.BuiltinOperator.IF, [0, 0], options, schema.BuiltinOptions.IfOptions)


def not_a_number(content):
    """A file with a NaN among the weights of its last layer."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    dense = [o for o in graph.operators if model.operatorCodes[o.opcodeIndex].builtinCode == 9][-1]
    buffer = model.buffers[graph.tensors[dense.inputs[1]].buffer]
    weights = np.asarray(buffer.data, np.uint8).view(np.float32).copy()
    weights[0] = np.nan
    buffer.data = weights.view(np.uint8)
    return pack(model)


def main(folder):
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (300, *SHAPE), np.uint8)
    scaled = (images.astype(np.float32) - 127.5) / 127.5
    softmax, sigmoid, logits = classifier(), classifier("sigmoid", 1), classifier(None)
    files = {name: convert(softmax, scaled[:100], name) for name in ("float32", "float16", "int8", "uint8", "int16")}
    files["sigmoid"], files["logits"] = convert(sigmoid, scaled), convert(logits, scaled)
    files["open_size"] = convert(classifier(shape=(None, None, 3), pool=True), scaled)
    left, right = keras.Input(SHAPE, name="left"), keras.Input(SHAPE, name="right")
    together = layers.Flatten()(layers.Conv2D(2, 3, strides=4)(layers.Add()([left, right])))
    files["two_inputs"] = convert(keras.Model([left, right], layers.Dense(3)(together)), None)
    files["two_outputs"] = convert(keras.Model(left, [layers.Conv2D(2, 3)(left), layers.Flatten()(left)]), None)
    files["truncated"] = files["float32"][: len(files["float32"]) // 2]
    files["text"], files["empty"] = b"this is no model\n", b""
    files["self_calling"] = self_calling()
    files["custom_op"] = one_operation(schema.BuiltinOperator.CUSTOM, [0], custom="made-up-op")
    files["not_a_number"] = not_a_number(files["float32"])
    for name, content in files.items():
        (folder / f"{name}.tflite").write_bytes(content)
    answers = {name: model.predict(scaled, verbose=0) for name, model in
               {"softmax": softmax, "sigmoid": sigmoid, "logits": logits}.items()}  # fmt: skip
    labels = random.integers(0, CLASSES, len(images)).astype(np.int32)
    np.savez(folder / "sample.npz", images=images, labels=labels)
    np.savez(folder / "keras.npz", **answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
