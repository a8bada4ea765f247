"""Which architecture takes which of TFMOT's techniques, by tfopt and by TFMOT as it comes, proven on the .tflite.

    python benchmarks/tfmot_matrix.py --out docs/tfmot-matrix.jsonl --table docs/tfmot-matrix.md
    python benchmarks/tfmot_matrix.py --out docs/tfmot-matrix.jsonl --by tfmot --architectures ResNet50 --features qat

Each cell trains 20 steps and then measures the technique's property in the exported file, which is run under LiteRT.
One cell is one line of --out, so a run that was stopped goes on where it was; --again makes the failed ones anew.
--table only writes the table where all cells are there. Columns of `tfmot` start from tf_keras.applications, as
TFMOT's guides do, in the process of plain_tfmot.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("GLOG_minloglevel", "2")

FEATURES = {
    "bridge": "crosses", "prune": "prune 50%", "2:4": "2:4", "cluster": "cluster 16", "qat": "QAT", "pqat": "PQAT",
    "cqat": "CQAT", "pcqat": "PCQAT",
}  # fmt: skip
#: name -> height and width of its images
SIZES = {
    "ResNet20": 32, "MobileNet": 64, "MobileNetV2": 64, "MobileNetV3Small": 64, "MobileNetV3Large": 64,
    "ResNet50": 64, "ResNet50V2": 64, "EfficientNetB0": 64, "EfficientNetV2B0": 64, "DenseNet121": 64,
    "InceptionV3": 75, "Xception": 71, "NASNetMobile": 64, "VGG16": 64, "nested": 32,
}  # fmt: skip
STEPS, BATCH, CLASSES, CLUSTERS = 20, 8, 10, 16
#: Higher, and the batch norms' statistics of 20 steps lag so far behind that deep networks answer with infinities.
RATE = 1e-4
TIMEOUT_S = 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tfmot-matrix.jsonl"))
    parser.add_argument("--table", type=Path, help="write the table of all cells in --out as Markdown")
    parser.add_argument("--by", nargs="*", choices=("tfopt", "tfmot"), default=["tfopt", "tfmot"])
    parser.add_argument("--architectures", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--features", nargs="*", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--again", action="store_true", help="make cells anew that failed before")
    parser.add_argument("--models", type=Path, help="where models between cells are kept [default: beside --out]")
    chosen = parser.parse_args()
    models = chosen.models or chosen.out.with_suffix(".models")
    for by in chosen.by:
        for architecture in chosen.architectures:
            for feature in chosen.features:
                known = cells(chosen.out).get((by, architecture, feature))
                if (by, feature) == ("tfmot", "bridge") or (known and (known["works"] or not chosen.again)):
                    continue
                cell = make(by, architecture, feature, models)
                with open(chosen.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
                print(
                    by, architecture, feature, "works" if cell["works"] else cell["cause"], cell["measured"], flush=True
                )
    if chosen.table:
        chosen.table.write_text(table(cells(chosen.out)), encoding="utf-8")


def cells(path: Path) -> dict[tuple, dict]:
    """The last line of each cell."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            cell = json.loads(line)
            found[cell["by"], cell["architecture"], cell["feature"]] = cell
    return found


def make(by: str, architecture: str, feature: str, models: Path) -> dict:
    from mobile_bench.errors import Problem
    from tfopt.steps import tool_versions

    started, cause, measured = time.monotonic(), "", {}
    work = Path(tempfile.mkdtemp(prefix="matrix-"))
    try:
        if by == "tfopt":
            cause, measured = ours(architecture, feature, models / architecture, work)
        else:
            cause, measured = plain(architecture, feature, work)
    except Problem as problem:
        cause = str(problem)[:600]
    except Exception as error:  # noqa: BLE001 - a cell's failure is its result
        cause = f"{type(error).__name__}: {error}"[:600]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "by": by, "architecture": architecture, "feature": feature, "works": not cause, "cause": cause,
        "measured": measured, "size": SIZES[architecture], "steps": STEPS,
        "learning_rate": RATE, "norms": "measured", "seconds": round(time.monotonic() - started),
        "date": datetime.now(UTC).date().isoformat(), "versions": tool_versions(),
    }  # fmt: skip


# --- by tfopt


def ours(architecture: str, feature: str, kept: Path, work: Path) -> tuple[str, dict]:
    """('' or what fails, what was measured)."""
    import keras

    from tfopt.kept import kernels
    from tfopt.technique import Context, OptimizedModel, Property
    from tfopt.techniques.quantize import QuantizeAware
    from tfopt.tfmot import client

    keras.utils.set_random_seed(0)
    spec = spec_of(architecture)
    if feature == "bridge":
        difference = client.crossing(shaken(build(architecture)), spec)
        return ("" if difference <= 1e-5 else f"answers differ by {difference:.2g}"), {"difference": difference}
    data = images_of()
    context = lambda model: Context(data, work / "step", model)
    train = training()
    if feature in ("prune", "2:4", "cluster"):
        model = start(architecture, data, spec)
        step = technique(feature, train)
        result, report = step.apply(OptimizedModel(model, spec), context(model))
        _keep(result.model, kept / f"{feature.replace(':', '-')}.keras")
        left = [skip.layer for skip in report.skipped if skip.reason != "not a kernel layer"]
        tflite = float_file(result.model, spec, data, work)
        return judged(feature, tflite, kernels(result.model), left)
    if feature == "qat":
        model, properties = start(architecture, data, spec), frozenset()
    else:
        wanted = {"pqat": "prune", "cqat": "cluster", "pcqat": "both"}[feature]
        model = _before(architecture, wanted, kept, spec, data, context, train)
        properties = {"pqat": {Property.SPARSE}, "cqat": {Property.CLUSTERED}}.get(
            feature, {Property.SPARSE, Property.CLUSTERED}
        )
    before = kernels(model)
    result, report = QuantizeAware(train=train).apply(
        OptimizedModel(model, spec, frozenset(properties)), context(model)
    )
    out = work / "int8.tflite"
    test = data["test"]
    outputs = client.export_quantized(result.quantized, spec, out=out, split=test)
    cause, measured = judged(feature, out, kernels(result.model), [], before)
    measured["agreement"] = agreement(out, outputs, test, spec, work)
    return cause, measured


def technique(feature: str, train):
    from tfopt.techniques.cluster import Cluster
    from tfopt.techniques.prune import Prune

    if feature == "cluster":
        return Cluster(clusters=CLUSTERS, train=train)
    return Prune(sparsity=0.5, m_by_n=(2, 4) if feature == "2:4" else None, frequency=1, train=train)


def _before(architecture, wanted, kept, spec, data, context, train):
    """The pruned, clustered or (first one, then the other) pruned and clustered model of another cell."""
    import keras

    from tfopt.technique import OptimizedModel, Property

    path = kept / f"{wanted}.keras"
    if not path.exists():
        if wanted == "both":
            model = _before(architecture, "prune", kept, spec, data, context, train)
            sparse = OptimizedModel(model, spec, frozenset({Property.SPARSE}))
            result, _ = technique("cluster", train).apply(sparse, context(model))
        else:
            model = start(architecture, data, spec)
            result, _ = technique(wanted, train).apply(OptimizedModel(model, spec), context(model))
        _keep(result.model, path)
    return keras.models.load_model(path, compile=False)


def _keep(model, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)


def judged(feature: str, tflite: Path, after: list, left: list[str], before: list | None = None) -> tuple[str, dict]:
    """Whether the property is in the file: zeros, values, whole numbers."""
    from mobile_bench.flatbuffer import read_model
    from tfopt import kept

    rows = kept.measure(tflite, after)
    measured = {"kernels": len(rows)}
    faults = [f"left out: {', '.join(left)}"] if left else []
    missing = [row.layer for row in rows if not row.found]
    if missing and feature != "qat":
        faults.append(f"not found in the file: {', '.join(missing)}")
    if feature in ("prune", "2:4", "pqat", "pcqat"):
        measured["least_sparsity"] = min(row.zeros / row.weights for row in rows)
        lost = [row.layer for row in rows if row.lost]
        faults += [f"zeros lost in {', '.join(lost)}"] if lost else []
        # Half of a kernel within one weight; 2 of every 4 of three inputs is one of three.
        floor = lambda row: 1 / 3 if feature == "2:4" else 0.5 - 1 / row.weights
        short = [row.layer for row in rows if row.found and row.zeros / row.weights < floor(row) - 1e-9]
        faults += [f"too few zeros in {', '.join(short)}"] if short else []
    if before is not None and feature in ("pqat", "pcqat"):
        asked = [int((kernel.values == 0).sum()) for kernel in before]
        fewer = [row.layer for row, zeros in zip(rows, asked) if row.zeros < zeros]
        faults += [f"fewer zeros than the pruned model in {', '.join(fewer)}"] if fewer else []
    if feature in ("cluster", "cqat", "pcqat"):
        measured["most_values"] = max(row.channel_values for row in rows)
        many = [row.layer for row in rows if row.channel_values > CLUSTERS]
        faults += [f"more than {CLUSTERS} values in {', '.join(many)}"] if many else []
    if feature in ("qat", "pqat", "cqat", "pcqat"):
        floats = [tensor.name for tensor in read_model(tflite).main.tensors if "float" in tensor.dtype.lower()]
        measured["float_tensors"] = len(floats)
        faults += [f"{len(floats)} float tensors: {', '.join(floats[:3])}"] if floats else []
    return "; ".join(faults)[:600], measured


def float_file(model, spec, data, work: Path) -> Path:
    """A float32 .tflite, run and compared with Keras."""
    from tfopt.convert import convert
    from tfopt.errors import ConversionError

    work.mkdir(exist_ok=True)
    model.save(work / "model.keras")
    (made,) = convert(work / "model.keras", spec, ["float32"], work, calibration=data["calibration"], work=work)
    # Of the range of the answers, which is small where 20 steps have taught a network next to nothing.
    if made.path is None or made.difference > 0.01:
        raise ConversionError("The file does not answer as the model", received=made.reason or made.difference)
    return made.path


def agreement(tflite: Path, outputs, split, spec, work: Path) -> float:
    """For how many images the file, under LiteRT, names the class of the fake-quantized model."""
    from tfopt import attest
    from tfopt.training import classify

    found = attest.answers(tflite, attest.save_split(split, spec, work), spec, work)
    return float((found.predictions == classify(outputs, spec)).mean())


# --- models and data


def build(architecture: str):
    import keras

    from tfopt import builders

    shape = (SIZES[architecture],) * 2 + (3,)
    if architecture == "ResNet20":
        return builders.build("resnet20", shape, CLASSES)
    if architecture == "nested":
        return nested(keras, shape, keras.ops.relu6)
    return getattr(keras.applications, architecture)(weights=None, input_shape=shape, classes=CLASSES)


def start(architecture: str, data, spec):
    """With batch norms that hold the statistics of the images, as every trained model's do.

    Where they hold 0 and 1 still, deep activations come near nothing and quantization's ranges with them. In training
    what is clipped to such a range hardly varies, each batch norm scales its gradient by up to 1/sqrt(epsilon), and
    EfficientNetB0's 49 of them make 1e18 of it.
    """
    import keras

    from tfopt import training

    model = build(architecture)
    training.recalibrate(model, data["train"], spec, keras=keras)
    return model


def nested(keras, shape, relu6):
    """A user's model: preprocessing, a backbone inside, squeeze-and-excite by hand, an own head inside. keras: either
    Keras, and relu6 as one writes it there."""
    layers = keras.layers
    inner = keras.Input((shape[0] // 2, shape[1] // 2, 16))
    x = layers.SeparableConv2D(24, 3, padding="same", activation="swish")(inner)
    x = layers.BatchNormalization()(x)
    squeezed = layers.GlobalAveragePooling2D(keepdims=True)(x)
    squeezed = layers.Conv2D(6, 1, activation="relu")(squeezed)
    x = layers.Multiply()([x, layers.Conv2D(24, 1, activation="hard_sigmoid")(squeezed)])
    block = keras.Model(inner, layers.Add()([layers.Conv2D(16, 1)(x), inner]), name="block")
    features = keras.Input((16,))
    head = keras.Model(features, layers.Dense(CLASSES)(layers.Dense(32, activation="relu")(features)), name="head")
    image = keras.Input(shape)
    x = layers.Rescaling(1 / 127.5, -1)(layers.RandomFlip("horizontal")(image))
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(x)
    x = relu6(layers.BatchNormalization()(x))
    x = layers.Dropout(0.1)(layers.GlobalAveragePooling2D()(block(block(x))))
    return keras.Model(image, layers.Softmax()(head(x)), name="nested")


def shaken(model):
    """The model with statistics in its batch norms that tell every one of them from the identity."""
    import keras
    import numpy as np

    from tfopt.graph import flat_layers

    random = np.random.default_rng(7)
    for layer in flat_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, array.shape) for array in layer.get_weights()])
    return model


def spec_of(architecture: str):
    from mobile_bench.inputs import InputSpec

    size = SIZES[architecture]
    inside = architecture == "nested" or architecture.startswith(("MobileNetV3", "EfficientNet"))
    return InputSpec(size, size, 3).with_scaling("raw" if inside else "signed")


def training():
    from tfopt.training import TrainConfig

    return TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=RATE, evaluations=1, validation_images=32)


def images_of():
    """scikit-learn's digits: small, and the same everywhere."""
    from tfopt import data

    digits = data.load("digits")
    most = {"train": STEPS * BATCH, "validation": 40, "test": 100, "calibration": 40}
    splits = {name: split.balanced(min(len(split), most[name])) for name, split in digits.splits.items()}
    return dataclasses.replace(digits, splits=splits)


# --- by TFMOT as it comes


def plain(architecture: str, feature: str, work: Path) -> tuple[str, dict]:
    """The same in tf_keras, with TFMOT's own calls and nothing else."""
    from mobile_bench.jobs import run_job

    job = {"architecture": architecture, "feature": feature, "out": str(work / "model.tflite")}
    if architecture == "ResNet20":  # tf_keras.applications has none of so few layers
        from tfopt.tfmot import bridge, neutral

        neutral.save(work / "graph.npz", *bridge.describe(build(architecture)))
        job["graph"] = str(work / "graph.npz")
    environment = {"TF_USE_LEGACY_KERAS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    found = run_job("plain_tfmot", job, work, environment=environment, timeout_s=TIMEOUT_S)
    return found["cause"], found["measured"]


# --- the table


def table(found: dict[tuple, dict]) -> str:
    """Markdown: a row an architecture, a column a feature, tfopt's word before TFMOT's."""
    dates = sorted({cell["date"] for cell in found.values()})
    early = sum("norms" not in cell for cell in found.values())
    versions = next(iter(found.values()))["versions"]
    lines = [
        "# TFMOT on every Keras model",
        "",
        f"Written by `benchmarks/tfmot_matrix.py`, {dates[0]} to {dates[-1]}: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Each cell trained {STEPS} steps of {BATCH} images (learning rate {RATE:g}) from random weights,",
        "with batch norms that hold the statistics of the images; its property was then measured in the exported",
        "`.tflite` under LiteRT. **yes** works; a number refers to the causes below; · has not been run.",
        *([f"{early} of {len(found)} cells began with batch norms as new, some of them at 1e-3."] if early else []),
        "",
    ]
    causes: list[str] = []
    for by, title in (("tfopt", "tfopt"), ("tfmot", "TFMOT as it comes, on tf_keras")):
        features = [name for name in FEATURES if (by, name) != ("tfmot", "bridge")]
        lines += [f"## {title}", "", "| architecture | " + " | ".join(FEATURES[name] for name in features) + " |"]
        lines += ["|:--|" + ":-:|" * len(features)]
        for architecture, size in SIZES.items():
            row = []
            for name in features:
                cell = found.get((by, architecture, name))
                if cell is None or cell["works"]:
                    row.append("·" if cell is None else "yes")
                    continue
                if cell["cause"] not in causes:
                    causes.append(cell["cause"])
                row.append(f"**no** ({causes.index(cell['cause']) + 1})")
            lines.append(f"| {architecture}, {size} px | " + " | ".join(row) + " |")
        for name in features:
            column = [cell for (b, _, f), cell in found.items() if (b, f) == (by, name)]
            if column:
                lines += [] if name != features[0] else [""]
                lines.append(f"- {FEATURES[name]}: {sum(c['works'] for c in column)} of {len(column)}")
        lines.append("")
    if causes:
        lines += ["## Causes", "", *(f"{number}. {' '.join(cause.split())}" for number, cause in enumerate(causes, 1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
