"""What a .tflite answers: the class of each image, by the file itself under its runtime.

Images go through one at a time, as they would on a device; several interpreters share the work where
that pays. The runtime releases Python's lock while it computes, so threads are enough, and no answer
depends on how many there are. Running this module is the child's side of `evaluate_apart`.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.device import usable_cores
from mobile_bench.errors import DataError, InputError, ModelRefused
from mobile_bench.files import check_is_file
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import Model, dequantize, open_model, quantize
from mobile_bench.jobs import serve
from mobile_bench.records import Connection, Delegate, Target, Tensor
from mobile_bench.transports import transport_for

if TYPE_CHECKING:
    from mobile_bench.delegates import Wanted

Progress = Callable[[int, int], None]
_LOCAL = Target()

MAX_WORKERS = 16
_PROBE_IMAGES, _PROBE_S = 8, 0.02
_CHUNK_S, _CHUNK_BYTES = 0.02, 4 << 20
_THREAD_START_S = 0.002


@dataclass(frozen=True, eq=False)
class Evaluation:
    """predictions: int64 (images,), the class of each. runtime: such as 'ai-edge-litert 2.3.0'.

    inputs and outputs are what the file says about itself. seconds includes loading the file.
    """

    predictions: np.ndarray
    correct: int
    images: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    runtime: str
    workers: int
    seconds: float

    @property
    def top1(self) -> float:
        """The fraction of images whose class was right."""
        return self.correct / self.images

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def evaluate(
    tflite: str | Path, images: np.ndarray, labels: np.ndarray, spec: InputSpec, *, workers: int | None = None,
    runtime: str = "auto", progress: Progress | None = None, wanted: Wanted | None = None,
) -> Evaluation:  # fmt: skip
    """Run every image through a classifier and count the right answers.

    images: uint8 RGB (count, height, width, 1 or 3), or anything with len() whose slices are that.
    labels: int (count,). spec: how to scale them and read the head; another size is resized. workers:
    interpreters at work at once; None chooses by timing the first images. progress(done, count) is
    called from the calling thread. wanted: another processor than the CPU, which one worker then uses.
    Raises InputError, DataError or ModelRefused; a file that crashes
    the runtime takes the process along, so use `evaluate_apart` for a file from elsewhere.
    """
    labels = np.asarray(labels)
    if len(labels) != len(images) or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            "Labels do not fit the images",
            received=f"{labels.dtype} labels of shape {labels.shape} for {len(images)} images",
            allowed="one whole number per image",
        )
    return _Evaluator(Path(tflite), images, labels, spec, workers, runtime, progress, wanted).run()


def predictions_only(
    tflite: str | Path, images: np.ndarray, spec: InputSpec, *, workers: int | None = None, runtime: str = "auto",
    progress: Progress | None = None,
) -> np.ndarray:  # fmt: skip
    """The class of each image, int64 (count,), where no labels are known. Otherwise as `evaluate`."""
    labels = np.zeros(len(images), np.int32)
    return evaluate(tflite, images, labels, spec, workers=workers, runtime=runtime, progress=progress).predictions


def evaluate_apart(
    tflite: str | Path, sample: str | Path, spec: InputSpec, target: Target = _LOCAL, *,
    connection: Connection | None = None, delegate: Delegate | None = None, workers: int | None = None,
    progress: Progress | None = None, tell: Callable[[str], None] | None = None, timeout_s: float | None = None,
) -> Evaluation:  # fmt: skip
    """`evaluate` on a sample .npz in a process of its own, here or on another target, on the target's accelerator.

    delegate: how an accelerator other than the CPU is reached. tell: gets what takes a while otherwise, such as a
    runtime that is installed on a board. Raises DelegateError where it is missing, fails or
    leaves operations to the CPU without leave, JobFailed where the file crashes the runtime, TransportError where the
    target cannot be reached.
    """
    from mobile_bench.measure import accelerator_job

    job = {"spec": spec.to_dict(), "workers": workers, "runtime": target.runtime, "threads": target.threads}
    accelerator_job(job, target, delegate)  # its reference is for timing: here the answers themselves are looked at

    def relay(message: dict) -> None:
        if progress and "done" in message:
            progress(message["done"], message["total"])
        elif tell and message.get("text"):
            tell(message["text"])

    with tempfile.TemporaryDirectory(prefix="mobile-bench-") as folder, transport_for(target, connection) as transport:
        out = Path(folder) / "predictions.npy"
        result = transport.run(
            "mobile_bench.evaluate", job, files={"tflite": Path(tflite), "sample": Path(sample)}, outputs={"out": out},
            on_progress=relay, timeout_s=timeout_s,
        )  # fmt: skip
        tensors = {side: tuple(Tensor(**t) for t in result.pop(side)) for side in ("inputs", "outputs")}
        return Evaluation(predictions=np.load(out, allow_pickle=False), **result, **tensors)


def read_sample(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A sample for a device: an .npz of `images` (uint8, NHWC) and `labels` (int32)."""
    allowed = "an .npz of images (uint8, of shape (count, height, width, 1 or 3)) and labels (int32, one an image)"
    make = "Make one with numpy: np.savez('sample.npz', images=images, labels=labels)"
    problem = lambda what: DataError(
        "The sample cannot be used", received=f"{path}, {what}", allowed=allowed, next_step=make
    )
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise problem(f"which cannot be read ({error.strerror})") from error
    if head.startswith(b"\x93NUMPY"):
        raise problem("which is a single array (.npy)")
    if not head.startswith(b"PK"):
        raise problem("which is no .npz")
    try:
        with np.load(path, allow_pickle=False) as content:
            lacking = [name for name in ("images", "labels") if name not in content]
            if lacking:
                raise problem(f"which holds {', '.join(content) or 'nothing'} and no {' and no '.join(lacking)}")
            images, labels = content["images"], content["labels"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise problem(f"which is damaged or holds something else than numbers ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or not all(images.shape[1:]):
        raise DataError(
            "The sample's images have the wrong form",
            received=f"{images.dtype} of shape {images.shape}",
            allowed="uint8 of shape (count, height, width, 1 or 3)",
        )
    return images, labels


def misfit(inputs: Sequence[Tensor], spec: InputSpec) -> InputError:
    """The error for a file that does not take the images of a spec: names what differs, size or channels."""
    shape = inputs[0].shape if len(inputs) == 1 else ()
    what, items = "The file does not take the images that the input spec describes", []
    if len(shape) == 4 and shape[0] == 1 and shape[3] in (1, 3):
        if shape[1:3] != spec.shape[:2]:
            items.append(f"size={shape[1]}" if shape[1] == shape[2] else f"height={shape[1]},width={shape[2]}")
        if shape[3] != spec.channels:
            kinds = {1: "gray images (1 channel)", 3: "RGB images (3 channels)"}
            what = f"The file takes {kinds[shape[3]]}, and the input spec describes {kinds[spec.channels]}"
            items.append(f"channels={shape[3]}")
    next_step = f"Correct the spec with --input-spec {','.join(items)}: images are made to fit it" if items else None
    received, allowed = ", ".join(str(tensor.shape) for tensor in inputs), f"one input of shape {(1, *spec.shape)}"
    return InputError(what, received=received, allowed=allowed, next_step=next_step)


def classes_of(outputs: np.ndarray, head: str) -> np.ndarray:
    """The class that each row names: float32 (count, classes) to int64 (count,).

    The largest output, the first of equals. A single output is the second class of two: above 0.5 for a
    'sigmoid' head, above 0 for 'logits'.
    """
    if outputs.shape[1] > 1:
        return outputs.argmax(axis=1)
    return (outputs[:, 0] > (0.5 if head == "sigmoid" else 0.0)).astype(np.int64)


def choose_workers(remaining_s: float, open_s: float, cores: int) -> int:
    """How many interpreters to use for work that would take one of them `remaining_s`.

    Each further one costs its opening and a thread; it is worth that only where the time it saves is
    clearly more, because the estimate rests on a few images and a busy machine may have no core to spare.
    """
    workers = 1
    while workers < min(cores, MAX_WORKERS):
        saved_s = remaining_s / workers - remaining_s / (workers + 1)
        if saved_s < 4 * (open_s + _THREAD_START_S):
            break
        workers += 1
    return workers


@dataclass(eq=False)
class _Evaluator:
    """One evaluation under way: chunks of images, taken from a common pile by whoever is free."""

    tflite: Path
    images: np.ndarray
    labels: np.ndarray
    spec: InputSpec
    workers: int | None
    runtime: str
    progress: Progress | None
    wanted: Wanted | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: int = 0
    _done: int = 0

    def run(self) -> Evaluation:
        started = time.perf_counter()
        count = len(self.images)
        if not count:
            raise DataError("There are no images to evaluate")
        if self.workers is not None and not 1 <= self.workers <= 256:
            raise InputError("The number of workers is out of range", received=self.workers, allowed="1 to 256")
        model = self._open()
        opened_s = time.perf_counter() - started
        self._check(model)
        self.predictions = np.empty(count, np.int64)
        image_s = self._probe(model)
        workers, left = 1, count - self._next
        if left:
            images_that_fit = _CHUNK_BYTES // (4 * math.prod(self.spec.shape))
            self.chunk = max(1, min(256, int(_CHUNK_S / image_s), images_that_fit))
            workers = self.workers or choose_workers(left * image_s, opened_s, usable_cores())
            workers = workers if self.wanted is None else 1  # there is one accelerator
            self._share(model, workers)
        if self.progress:
            self.progress(count, count)
        return Evaluation(
            self.predictions, int(np.sum(self.predictions == self.labels)), count, model.inputs, model.outputs,
            str(model.runtime), workers, time.perf_counter() - started,
        )  # fmt: skip

    def _open(self) -> Model:
        size = (self.spec.height, self.spec.width)
        if self.wanted is None:
            return open_model(self.tflite, runtime=self.runtime, size=size)
        from mobile_bench.delegates import open_on

        return open_on(self.wanted, str(self.tflite), {"threads": 1, "runtime": self.runtime, "batch": 1}, size)

    def _check(self, model: Model) -> None:
        if len(model.inputs) != 1 or model.inputs[0].shape != (1, *self.spec.shape):
            raise misfit(model.inputs, self.spec)
        shape = model.outputs[0].shape if len(model.outputs) == 1 else ()
        if not shape or math.prod(shape[:-1]) != 1 or shape[-1] < 1:
            raise ModelRefused(
                "The file is not an image classifier",
                received="outputs of shape " + ", ".join(str(tensor.shape) for tensor in model.outputs),
                allowed="one output of shape (1, classes)",
            )
        outputs = shape[-1]
        if outputs == 1 and self.spec.head == "softmax":
            raise InputError(
                "A softmax over a single output has only one answer",
                received="a file with one output",
                next_step="Say what it is with --input-spec head=sigmoid (or head=logits)",
            )
        classes = max(2, outputs)
        for label in (int(self.labels.min()), int(self.labels.max())):
            if not 0 <= label < classes:
                raise DataError(
                    "A label is not one of the model's classes", received=label, allowed=f"0 to {classes - 1}"
                )
        if self.spec.labels and len(self.spec.labels) != classes:
            raise InputError(
                "The input spec names another number of classes than the file has",
                received=f"{len(self.spec.labels)} labels",
                allowed=classes,
            )

    def _probe(self, model: Model) -> float:
        """Answer the first images and say what one takes, in seconds. The very first only warms up.

        The second gives a first idea, and where that is cheap a few more together give a better one.
        """
        image_s, end = 1e-6, 0
        for images in (1, 1, _PROBE_IMAGES):
            start, end = end, min(end + images, len(self.images))
            if start == end or images * image_s > _PROBE_S:
                end = start
                break
            started = time.perf_counter()
            self._answer(model, start, end)
            image_s = max((time.perf_counter() - started) / (end - start), 1e-6)
        self._next = self._done = end
        return image_s

    def _share(self, model: Model, workers: int) -> None:
        if workers == 1:
            self._work(model)
            return
        with ThreadPoolExecutor(workers - 1) as pool:
            others = [pool.submit(self._work, None) for _ in range(workers - 1)]
            self._work(model)
            for other in others:
                other.result()

    def _work(self, model: Model | None) -> None:
        here = model is not None
        try:
            model = model or self._open()
            while (part := self._take()) is not None:
                self._answer(model, *part)
                with self._lock:
                    self._done += part[1] - part[0]
                if here and self.progress:
                    self.progress(self._done, len(self.images))
        except BaseException:
            # An interrupt too: nobody starts another chunk, and the pool ends soon.
            with self._lock:
                self._next = len(self.images)
            raise

    def _take(self) -> tuple[int, int] | None:
        with self._lock:
            start, count = self._next, len(self.images)
            if start >= count:
                return None
            self._next = min(count, start + self.chunk)
            return start, self._next

    def _answer(self, model: Model, start: int, end: int) -> None:
        pixels = self.spec.normalize(self.spec.fit(self.images[start:end]))
        values = quantize(pixels, model.inputs[0])
        rows = []
        for index in range(end - start):
            model.set_inputs(values[index : index + 1])
            model.run()
            rows.append(model.get_outputs()[0].reshape(-1))
        outputs = dequantize(np.array(rows), model.outputs[0])
        if np.isnan(outputs).any():
            raise ModelRefused(
                "The file answers with values that are not numbers (NaN)",
                received=self.tflite,
                next_step="Check the scaling, and the ranges of a quantized file",
            )
        self.predictions[start:end] = classes_of(outputs, self.spec.head)


def _child(job: dict, emit) -> dict:
    from mobile_bench.delegates import Wanted

    images, labels = read_sample(job["sample"])
    result = evaluate(
        job["tflite"], images, labels, InputSpec.from_dict(job["spec"]), workers=job["workers"],
        runtime=job["runtime"], progress=lambda done, total: emit("progress", done=done, total=total),
        wanted=Wanted.of(job),
    )  # fmt: skip
    np.save(job["out"], result.predictions)
    facts = {name: getattr(result, name) for name in ("correct", "images", "runtime", "workers", "seconds")}
    return {**facts, "inputs": [asdict(t) for t in result.inputs], "outputs": [asdict(t) for t in result.outputs]}


if __name__ == "__main__":
    serve(_child)
