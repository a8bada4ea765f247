"""This side of the worker: hand it a model and images as files, take back weights and files.

No TFMOT and no tf_keras here.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import numpy as np

from mobile_bench.files import atomic_path
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import run_job
from mobile_bench.records import Skip
from tfopt.data.splits import Split
from tfopt.distillation import riding, teachers
from tfopt.distillation.frozen import freeze
from tfopt.distillation.hook import Lesson, lesson
from tfopt.distillation.teachers import Loaded
from tfopt.errors import InputError, ModelRefused, RecipeError
from tfopt.graph import in_dtype, in_float32
from tfopt.technique import Context, OptimizedModel
from tfopt.tfmot import bridge, neutral
from tfopt.tfmot.kernels import check_numbers
from tfopt.training import LOSSES, TrainConfig

EXPORT_TIMEOUT_S = 3600
WORKER = "tfopt.tfmot.worker"
ENVIRONMENT = {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
_PROBE_IMAGES = 4
#: How far from what it was rounded to a float weight may be, in steps of the rounding; half a one without folding.
_ROUNDING_STEPS = 1.5
TOLERANCE = 1e-5

if TYPE_CHECKING:
    from tfopt.rescue.graph import Graph, Layer


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training in the worker gave.

    model: a fresh Keras 3 model. before, after: the weights by the bridge's names. training: a
    TrainReport as a dict. result: what else the worker said. notes: on its teachers.
    """

    model: keras.Model
    before: neutral.Weights
    after: neutral.Weights
    training: dict
    result: dict
    graph: neutral.Graph
    notes: tuple[str, ...] = ()

    def source(self, weight: str) -> str:
        """The user's name of the layer that a weight belongs to."""
        return next(node.source for node in self.graph.nodes if weight in node.weights)


def train(operation: str, optimized: OptimizedModel, context: Context, config: TrainConfig, **job) -> Trained:
    """Run 'prune', 'cluster' or 'quantize' on a model in the worker. job: the operation's own fields.

    Raises InputError where all training images are of one class, ModelRefused where the model cannot cross, is not
    finite or comes back different, RecipeError for callbacks and losses that are Python, and whatever Problem the
    worker raised; JobFailed names its log.
    """
    if context.callbacks:
        raise RecipeError(
            "Callbacks from Python cannot be used where TFMOT trains: it works in a process of its own",
            received=", ".join(type(callback).__name__ for callback in context.callbacks),
            next_step="Leave the callbacks out of recipes with prune or qat; progress is reported without them",
        )
    if callable(config.loss):
        raise RecipeError(
            "A loss from Python cannot be used where TFMOT trains: it works in a process of its own",
            received=getattr(config.loss, "__name__", repr(config.loss)),
            allowed=", ".join(LOSSES),
        )
    spec, model = optimized.spec, optimized.model
    graph, before = bridge.describe(model)
    check_numbers(graph, before)
    _check_classes(context.data["train"])
    panel = _panel(config, context, spec, model)
    judged = riding.judged(panel, riding.judges(config, context))
    plan = _lesson(config, panel, model, graph)
    ride = riding.Ride(accuracies=judged, pairs=plan.pairs, known=tuple(teachers.notes(panel)))
    work = Path(context.work)
    with exchange(work) as folder:
        _save(folder / "model.npz", model, spec, graph, before)
        validation = context.data["validation"].balanced(config.validation_images or len(context.data["validation"]))
        splits = {"train": context.data["train"], "validation": validation}
        result = run_job(
            WORKER,
            {
                "operation": operation,
                "model": str(folder / "model.npz"),
                "weights": str(folder / "weights.npz"),
                "splits": {name: write_split(split, folder / name) for name, split in splits.items()},
                "spec": spec.to_dict(),
                "train": dataclasses.asdict(config),
                "seed": context.seed,
                "teachers": _hand_over(panel, plan, folder),
                "lesson": dataclasses.asdict(plan),
                **job,
            },
            work,
            on_progress=_relay(context),
            environment=ENVIRONMENT,
            **context.limits.for_job(),
        )
        after = neutral.load_arrays(folder / "weights.npz")
    expected = after.pop("probe:outputs")
    trained = bridge.with_weights(model, after)
    _check(trained, after.pop("probe:images"), expected)
    report = result.pop("training")
    notes = ride.notes(report["accuracy_after"])
    return Trained(trained, before, after, ride.report(report), result, graph, notes)


def _panel(config: TrainConfig, context: Context, spec: InputSpec, model: keras.Model) -> list[Loaded]:
    """The teachers of a fine-tuning."""
    if config.distill is None:
        return []
    return riding.panel_of(config, context.teacher, spec, model.name, int(model.output_shape[-1]))


def _lesson(config: TrainConfig, panel: list[Loaded], model: keras.Model, graph: neutral.Graph) -> Lesson:
    """Which features are compared; ModelRefused where one is of a layer that the worker does not have."""
    plan = lesson(model, panel[0].model, config.distill) if panel else Lesson()
    for name in plan.pairs:
        if name not in {node.source for node in graph.nodes}:
            raise ModelRefused(
                f"Layer {name} takes no part where TFMOT trains, so its features cannot be learned there",
                received=f"{model.name}, {name}", next_step="Name other layers with pairs",
            )  # fmt: skip
    return plan


def _hand_over(panel: list[Loaded], plan: Lesson, folder: Path) -> list[dict]:
    """The teachers, frozen, for the worker, where they answer the same augmented images as the student."""
    written = []
    for number, teacher in enumerate(panel):
        path = folder / f"teacher{number}.npz"
        freeze(teacher.model, teacher.spec, path, () if number else list(dict.fromkeys(plan.pairs.values())))
        spec = dataclasses.replace(teacher.spec, head="logits").to_dict()
        written.append({"name": teacher.name, "path": str(path), "spec": spec, "weight": teacher.weight})
    return written


def crossing(model: keras.Model, spec: InputSpec) -> float:
    """How far the model's answers are apart from those of its rebuilt form, in units of the larger of 1 and the largest
    answer. Raises ModelRefused where it cannot be rebuilt."""
    with exchange(Path(tempfile.gettempdir())) as folder:
        hand_over(folder / "model.npz", model, spec)
        job = {"operation": "cross", "model": str(folder / "model.npz")}
        return run_job(WORKER, job, folder, environment=ENVIRONMENT)["difference"]


def hand_over(path: Path, model: keras.Model, spec: InputSpec) -> neutral.Graph:
    """Write a model for the worker. Raises ModelRefused where it cannot cross or has weights that are no numbers."""
    graph, weights = bridge.describe(model)
    check_numbers(graph, weights)
    _save(path, model, spec, graph, weights)
    return graph


def convert_quantized(quantized: Path, out: Path, spec: InputSpec) -> None:
    """A fake-quantized model file -> an int8 .tflite (int8 in and out, one image at a time).

    The file carries `spec` in its metadata, like all that tfopt.convert makes. Raises ConversionError
    where the converter refuses, JobFailed where it crashes.
    """
    export_quantized(quantized, spec, out=out)


def predict_quantized(quantized: Path, split: Split, spec: InputSpec) -> np.ndarray:
    """The outputs of a fake-quantized model on a split: float32 (count, classes)."""
    return export_quantized(quantized, spec, split=split)


def export_quantized(
    quantized: Path, spec: InputSpec, *, out: Path | None = None, split: Split | None = None
) -> np.ndarray | None:
    """Both of the above in one process, which saves one start of it: convert if `out`, predict if `split`."""
    from tfopt.convert import embed_spec

    with exchange(Path(tempfile.gettempdir())) as folder:
        job = {"operation": "export", "quantized": str(Path(quantized).resolve()), "spec": spec.to_dict()}
        if split is not None:
            job |= {"outputs": str(folder / "outputs.npy"), "split": write_split(split, folder / "split")}
        if out is not None:
            job |= {"tflite": str(folder / "model.tflite"), "float": str(folder / "float.tflite")}
        found = run_job(WORKER, job, folder, environment=ENVIRONMENT, timeout_s=EXPORT_TIMEOUT_S)
        if out is not None:
            content = (folder / "model.tflite").read_bytes()
            if found["floats"]:
                content = _in_float((folder / "float.tflite").read_bytes(), content, found["floats"])
            content = embed_spec(content, spec)
            with atomic_path(out) as temporary:
                temporary.write_bytes(content)
        return None if split is None else np.load(folder / "outputs.npy", allow_pickle=False)


def _in_float(floats: bytes, quantized: bytes, names: list[str]) -> bytes:
    """The int8 file with some layers in float: the converter itself rounds any kernel between two rounded tensors."""
    from tfopt.rescue.graph import Graph
    from tfopt.rescue.lift import lift
    from tfopt.rescue.refit import twins

    float_graph, graph = Graph(floats), Graph(quantized)
    own = lambda layer: {part.removeprefix("quant_") for part in layer.name.split("/")}
    pairs = [(layer, twin) for layer, twin in twins(float_graph, graph) if own(layer) & set(names)]
    for layer, twin in pairs:
        _unfold(float_graph, layer, graph, twin)
    return lift(float_graph, graph, {twin.operator: "float16" for _, twin in pairs}).pack()


def _unfold(floats: Graph, layer: Layer, graph: Graph, twin: Layer) -> None:
    """Take out of a float layer the constants that the converter has folded into it, where the int8 file has not.

    It adds the 3 of a hard sigmoid to the bias before it, and multiplies kernels; between two rounded tensors it does
    not. Where a float array is not what was rounded, the rounded one holds instead.
    """
    for own, other in ((layer.weights, twin.weights), (layer.bias, twin.bias)):
        if own < 0 or other < 0:
            continue
        scales, zeros = graph.scale(other)
        if not scales.size:
            continue
        raw = graph.array(other)
        shape = [1] * raw.ndim
        shape[graph.main.tensors[other].quantization.quantizedDimension if scales.size > 1 else 0] = scales.size
        steps = scales.reshape(shape)
        rounded = (raw - zeros.reshape(shape)) * steps
        if np.max(np.abs(floats.array(own) - rounded) / steps) > _ROUNDING_STEPS:
            floats.set_array(own, rounded)


def sources(quantized: Path) -> dict[str, str]:
    """The layers of a fake-quantized model file: the name in its .tflite -> the user's name."""
    return {node.name: node.source for node in neutral.load(Path(quantized))[0].nodes}


def write_split(split: Split, folder: Path) -> dict[str, str]:
    """A split as .npy files: name -> path. Pixels that are mapped from a file already stay where they are."""
    files = {}
    for name in ("labels", "hashes", "images", "paths"):
        array = getattr(split, name)
        if array is None:
            continue
        mapped = _file_of(array)
        if mapped is None:
            mapped = folder / f"{name}.npy"
            with atomic_path(mapped) as temporary, open(temporary, "wb") as file:
                np.save(file, np.array([str(path) for path in array]) if name == "paths" else array, allow_pickle=False)
        files[name] = str(mapped)
    return files


def touched(sources: list[str]) -> tuple[str, ...]:
    """Each layer once, in order."""
    return tuple(dict.fromkeys(sources))


def skips(rows: list) -> tuple[Skip, ...]:
    return tuple(Skip(*row) for row in rows)


def notes(trained: Trained) -> tuple[str, ...]:
    """What a reader of the report must know about the crossing."""
    found = trained.notes
    if trained.graph.dropped:
        found += (f"Layers that act in training only took no part: {', '.join(trained.graph.dropped)}",)
    whole = in_float32(trained.model)
    if whole is not trained.model:
        images = np.random.default_rng(0).uniform(-1, 1, (_PROBE_IMAGES, *trained.graph.shape)).astype(np.float32)
        answers = [np.asarray(model(images, training=False), np.float64) for model in (trained.model, whole)]
        apart = float(np.max(np.abs(answers[0] - answers[1])))
        found += (f"Trained in float32; the model in its mixed precision answers within {apart:.2g} of that",)
    return found


def _file_of(array: np.ndarray) -> Path | None:
    """The .npy file of which an array is all, or None."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return None
    try:
        whole = np.load(array.filename, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    place = lambda mapped: (mapped.shape, mapped.dtype, mapped.strides, mapped.offset)
    return Path(array.filename).resolve() if place(whole) == place(array) else None


@contextmanager
def exchange(parent: Path) -> Iterator[Path]:
    """A folder for files that only the two processes need; removed in the end."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="exchange-", dir=parent.resolve()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(path: Path, model: keras.Model, spec: InputSpec, graph: neutral.Graph, weights: neutral.Weights) -> None:
    """The model for the worker, with what it answers to some images."""
    if len(graph.shapes) != 1 or len(graph.outputs) != 1 or len(graph.shape) != 3:
        raise ModelRefused(
            "The model is not an image classifier", received=f"{len(graph.shapes)} inputs of {graph.shapes}, "
            f"{len(graph.outputs)} outputs", allowed="one image in and one row of scores out",
        )  # fmt: skip
    images = _probe(spec)
    outputs = np.asarray(in_float32(model)(images, training=False), np.float32)
    neutral.save(path, graph, {**weights, "probe:images": images, "probe:outputs": outputs})


def _probe(spec: InputSpec) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (_PROBE_IMAGES, *spec.shape), np.uint8)
    return spec.normalize(pixels)


def _check(model: keras.Model, images: np.ndarray, expected: np.ndarray) -> None:
    own = np.asarray(in_float32(model)(images, training=False))
    difference = float(np.max(np.abs(own - expected)))
    if not difference <= TOLERANCE * max(1.0, float(np.max(np.abs(expected)))):
        # Float32 alone may part two sums of the same numbers by more: the exact answer tells by how much.
        exact = np.asarray(in_dtype(model, "float64")(images.astype(np.float64), training=False))
        difference = neutral.beyond_rounding(own, expected, exact)
    if not difference <= TOLERANCE * max(1.0, float(np.max(np.abs(expected)))):
        raise ModelRefused(
            "The model does not answer the same once the trained weights are back in it",
            received=f"{model.name}, difference {difference:.2g}",
            allowed=f"{TOLERANCE:g}",
            next_step="Use recipes without prune and qat, and report the model's architecture",
        )


def _check_classes(train: Split) -> None:
    classes = np.unique(train.labels)
    if len(classes) < 2:
        raise InputError(
            "The training images are all of one class: a model learns nothing from them, and no range fits the others",
            received=f"{len(train)} images of class {', '.join(map(str, classes))}",
            allowed="images of two classes at least",
        )


def _relay(context: Context):
    if context.progress is None:
        return None
    return lambda m: context.progress(m["step"], m["steps"], m["facts"]) if m.get("kind") == "progress" else None
