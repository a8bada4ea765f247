"""The converter's process: a model, or its constants, into one file a scheme, each read again, run and compared."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np

from mobile_bench.evaluate import classes_of
from mobile_bench.files import write_bytes
from mobile_bench.flatbuffer import TFLiteModel, read_model
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import open_model
from mobile_bench.jobs import serve
from mobile_bench.profile import layers_of
from tfopt import calibration as calibrating
from tfopt import constants
from tfopt.convert import CHECK_IMAGES, RANDOM_IMAGES, check_weights, embed_spec, unverified
from tfopt.errors import ConversionError, Problem
from tfopt.schemes import Scheme, parse


class Maker:
    """The child's work on one model: what several schemes need is made once."""

    def __init__(self, tf, graph, owner, spec: InputSpec, images: np.ndarray | None, count=None, ranges="minmax"):
        self.tf, self.graph, self.owner, self.spec = tf, graph, owner, spec
        self.images, self.count, self.ranges = images, count, ranges
        self.validation: np.ndarray | None = None
        self.notes: list[str] = []

    def content(self, scheme: Scheme) -> tuple[bytes, dict | None]:
        """The .tflite without its spec, and how it was calibrated."""
        if scheme.base == "int8":
            return self._int8(scheme)
        if scheme.base == "int16x8":
            return self._int16x8(scheme)
        if scheme.base in ("weight8", "weight4"):
            from tfopt.litert_quantize import weight_only

            return weight_only(self.float32, int(scheme.base[-1])), None
        if scheme.base == "float32":
            return self._stored(self.float32, scheme), None
        converter = self._converter()
        converter.optimizations = [self.tf.lite.Optimize.DEFAULT]
        if scheme.base == "float16":
            converter.target_spec.supported_types = [self.tf.float16]
        elif scheme.base == "dynamic":
            # Without this the file needs a FULLY_CONNECTED that tflite-runtime 2.14 does not have.
            converter._experimental_disable_per_channel_quantization_for_dense_layers = True
        return self._stored(converter.convert(), scheme), None

    def _stored(self, content: bytes, scheme: Scheme) -> bytes:
        if not scheme.sparse:
            return content
        from tfopt.sparse import sparsified

        content, notes = sparsified(content)
        self.notes += notes
        return content

    @cached_property
    def float32(self) -> bytes:
        return self._converter().convert()

    @cached_property
    def calibrated(self) -> tuple[bytes, calibrating.Count]:
        """The float model that the quantizer starts from, with each tensor's smallest and largest value."""
        converter = self._converter()
        converter.optimizations = [self.tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_ops = [self.tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = lambda: ([self.spec.normalize(image[None])] for image in self.images[:1])
        converter._experimental_calibrate_only = True
        return calibrating.calibrate(converter.convert(), self.images, self.spec, self.count)

    @cached_property
    def _counts(self) -> dict[int, np.ndarray]:
        content, count = self.calibrated
        return calibrating.histograms(content, self.images[: count.used], self.spec)

    def _converter(self):
        return self.tf.lite.TFLiteConverter.from_concrete_functions([self.graph], self.owner)

    def _int8(self, scheme: Scheme) -> tuple[bytes, dict]:
        count = self.calibrated[1]
        if self.ranges != calibrating.BEST:
            return self._quantized(scheme, self.ranges), {**asdict(count), "ranges": self.ranges}
        made = {way: self._quantized(scheme, way) for way in calibrating.WAYS}
        best, scores = calibrating.best_of(made, self.float32, self.validation, self.spec)
        return made[best], {**asdict(count), "ranges": best, "candidates": scores, "scored_on": len(self.validation)}

    def _quantized(self, scheme: Scheme, way: str) -> bytes:
        from tensorflow.lite.python.convert import mlir_quantize

        content = self.calibrated[0]
        if way != "minmax":
            known = calibrating.ranges_of(content)
            content = calibrating.with_ranges(content, calibrating.narrowed(way, known, self._counts))
        ends = {"": self.tf.int8, "uint8": self.tf.uint8, "float": self.tf.float32}[scheme.io]
        content = mlir_quantize(content, scheme.per_tensor, input_data_type=ends, output_data_type=ends)
        return self._stored(content, scheme)

    def _int16x8(self, scheme: Scheme) -> tuple[bytes, dict]:
        # Only the converter's older quantizer knows 16 bits, and it takes no ranges from outside.
        why = "all that were given" if self.count is None else "as asked"
        count = calibrating.Count(len(self.images), len(self.images), why)
        count = self.calibrated[1] if self.count == calibrating.AUTO else count
        converter = self._converter()
        converter.optimizations = [self.tf.lite.Optimize.DEFAULT]
        sets = self.tf.lite.OpsSet
        converter.target_spec.supported_ops = [sets.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8]
        images = self.images[: count.used]
        converter.representative_dataset = lambda: ([self.spec.normalize(image[None])] for image in images)
        ends = self.tf.float32 if scheme.io else self.tf.int16
        converter.inference_input_type = converter.inference_output_type = ends
        return converter.convert(), {**asdict(count), "ranges": "minmax"}


def convert_one(tf, graph, owner, scheme: str, images: np.ndarray | None, spec: InputSpec) -> bytes:
    return Maker(tf, graph, owner, spec, images).content(parse(scheme))[0]


class Check:
    """The child's second look: whether a file is what its scheme says, and how far it is from Keras."""

    def __init__(self, graph, images: np.ndarray | None, spec: InputSpec, hybrid: bool):
        self.random = images is None
        if images is None:
            images = np.random.default_rng(0).integers(0, 256, (RANDOM_IMAGES, *spec.shape), np.uint8)
        self.images, self.spec, self.hybrid, self.graph = images[:CHECK_IMAGES], spec, hybrid, graph

    @cached_property
    def expected(self) -> np.ndarray:
        """What Keras answers, float32 (count, outputs)."""
        rows = [np.asarray(self.graph(image=self.spec.normalize(image[None]))) for image in self.images]
        found = np.concatenate([row.reshape(1, -1) for row in rows])
        if not np.isfinite(found).all():
            raise ConversionError(
                "The Keras model itself answers with NaN or infinity", received=f"on {len(self.images)} images",
                next_step="Look at its weights: the training that made them has diverged",
            )  # fmt: skip
        return found

    def facts(self, path: Path, scheme: Scheme) -> dict:
        """What Converted says of a file beside its path. Raises a Problem where it is not to be used."""
        expected = self.expected
        model = read_model(path)
        check_form(model, scheme, self.hybrid)
        found = calibrating.answers(open_model(path), self.images, self.spec)
        if not np.isfinite(found).all():
            raise ConversionError(
                "The file answers with NaN or infinity where Keras does not", received=scheme,
                next_step="Weights or activations pass the largest number of its types: choose float32",
            )  # fmt: skip
        # Probabilities range from 0 to 1, also those of an untrained model, which hardly differ.
        width = float(np.ptp(expected)) if self.spec.head == "logits" else 1.0
        same = classes_of(found, self.spec.head) == classes_of(expected, self.spec.head)
        return {
            "difference": float(np.abs(found - expected).max()) / (width or 1.0), "agreement": float(np.mean(same)),
            "images": len(self.images), "random": self.random, "notes": notes_of(model, scheme),
        }  # fmt: skip


def check_form(model: TFLiteModel, scheme: Scheme, hybrid: bool) -> None:
    """Fixed shapes, the signature with its one input 'image', and whole numbers where the scheme promises them."""
    graph, layers = model.main, layers_of(model)
    described = lambda index: f"{graph.operators[index].op} of layer {layers[index] or '(unnamed)'}"
    signature = next((s for s in model.signatures if s.key == "serving_default"), None)
    if signature is None or list(signature.inputs) != ["image"]:
        raise ConversionError(
            "The file has no signature serving_default with the input image", received=model.signatures
        )
    open_ended = [
        n for n, op in enumerate(graph.operators) if any(-1 in graph.tensors[i].shape_signature for i in op.outputs)
    ]
    if open_ended:
        raise ConversionError(
            "The model has shapes that are known only when it runs, which delegates refuse",
            received=", ".join(described(n) for n in open_ended[:5]),
            next_step="Compute these shapes from numbers, not from the image (keras.ops.shape)",
        )
    if not scheme.whole_numbers or hybrid:
        return
    is_float = lambda index: index >= 0 and graph.tensors[index].dtype.startswith(("float", "bfloat"))
    left = []
    for number, operator in enumerate(graph.operators):
        ends = {"QUANTIZE": operator.inputs[:1] == graph.inputs, "DEQUANTIZE": operator.outputs[:1] == graph.outputs}
        if any(map(is_float, (*operator.inputs, *operator.outputs))) and not (scheme.io and ends.get(operator.op)):
            left.append(number)
    left = [n for n in left if graph.operators[n].op not in ("QUANTIZE", "DEQUANTIZE")] or left
    if left:
        raise ConversionError(
            f"{len(left)} operations would stay in float in a file that promises whole numbers",
            received=", ".join(described(n) for n in left[:5]) + (", …" if len(left) > 5 else ""),
            allowed="operations that TFLite has in int8",
            next_step="Replace these layers (tfopt convert --fix all knows some), or choose dynamic or float16",
        )


def notes_of(model: TFLiteModel, scheme: Scheme) -> list[str]:
    if scheme.sparse and not any(tensor.sparse for tensor in model.main.tensors):
        return ["No weights have zeros enough to be stored sparsely, so the file is an ordinary one: prune first"]
    return []


def _child(job: dict, emit) -> dict:
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import keras
    import tensorflow as tf

    spec = InputSpec.from_dict(job["spec"])
    # A batch of one, fixed: delegates refuse dynamic shapes.
    image = tf.TensorSpec((1, *spec.shape), tf.float32, name="image")
    # Given the Keras model itself, the converter would first save it whole, every layer traced anew.
    owner = tf.Module()
    if job["frozen"]:
        with np.load(job["frozen"], allow_pickle=False) as arrays:
            answer = constants.thawed(arrays["graph"], arrays["ends"])
        graph = tf.function(lambda image: answer(image)[0]).get_concrete_function(image)
    else:
        # The parent has already refused foreign code, or the user has said that it is trusted.
        if job["trust"]:
            keras.config.enable_unsafe_deserialization()
        model = keras.saving.load_model(job["model"], compile=False)
        check_weights(model)
        graph = tf.function(lambda image: model(image, training=False)).get_concrete_function(image)
        owner.kept = [weight.value for weight in model.weights]
    loaded = lambda name: np.load(job[name], allow_pickle=False) if job[name] else None
    images = loaded("calibration")
    maker = Maker(tf, graph, owner, spec, images, job["count"], job["ranges"])
    maker.validation = loaded("validation")
    check = Check(graph, images, spec, job["hybrid"])
    results = {}
    for name in job["schemes"]:
        emit("progress", scheme=name)
        maker.notes = []
        draft = unverified(Path(job["out"]), name)
        try:
            content, calibration = maker.content(parse(name))
            write_bytes(draft, embed_spec(content, spec))
            facts = check.facts(draft, parse(name))
            notes = list(dict.fromkeys([*maker.notes, *facts["notes"]]))
            results[name] = {"reason": "", "calibration": calibration, **facts, "notes": notes}
            draft.replace(Path(job["out"]) / f"{name}.tflite")
        except Problem as problem:
            results[name] = {"reason": str(problem)}
        except Exception as error:  # noqa: BLE001 - the converter raises whatever its passes raise
            results[name] = {"reason": str(refusal(error))}
        finally:
            draft.unlink(missing_ok=True)
    return {"schemes": results}


def refusal(error: Exception) -> ConversionError:
    """The converter's pages of text as one sentence: the operations that TFLite lacks, where that is what it is."""
    text = str(error)
    lacking = re.findall(r"(?:TF Select|Flex|Custom) ops: ([^\n]+)", text)
    if lacking:
        named = sorted({name.strip() for line in lacking for name in line.split(",")})
        return ConversionError(
            "The model has operations that TFLite does not have", received=", ".join(named),
            allowed="TFLite's built-in operations, which every runtime and delegate knows",
            next_step="Write these layers with other operations of keras.ops or keras.layers",
        )  # fmt: skip
    narrow = sorted(set(re.findall(r"16x8-bit not yet supported for op: '([^']+)'", text)))
    if narrow:
        return ConversionError(
            "TFLite does not have all operations of the model with 16-bit activations", received=", ".join(narrow),
            next_step="Choose int8, or replace these layers (tfopt convert --fix all knows some)",
        )  # fmt: skip
    said = " ".join([line for line in text.splitlines() if line.strip()][:3])[:500]
    return ConversionError("The converter refused the model", received=said or type(error).__name__)


if __name__ == "__main__":
    serve(_child)
