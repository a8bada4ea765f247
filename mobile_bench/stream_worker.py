"""The process of a stream: frames as they arrive, what is done with each, and when. Started by mobile_bench.stream."""

from __future__ import annotations

import gc
import math
import os
import queue as queues
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mobile_bench import device, frames, trust
from mobile_bench.errors import DataError
from mobile_bench.evaluate import classes_of, misfit
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import Model, dequantize, open_model, quantize
from mobile_bench.jobs import serve
from mobile_bench.stream import DATA_STAGES, STAGES
from mobile_bench.worker import STEADY_CHANGE, warm_up

_WARM_UP_FRAMES = 3


def next_frame(untaken: int, passed_s: float, fps: float, queue: int | None) -> int:
    """The number of the frame to take `passed_s` after frame 0 arrived, where those before `untaken` are gone.

    It may still be to come. queue: how many may wait, the oldest of them being dropped; None for all.
    """
    came = math.floor(passed_s * fps) + 1
    return untaken if queue is None else max(untaken, came - queue)


@dataclass(slots=True)
class _Taken:
    """A frame on its way: times by perf_counter in seconds; stages in milliseconds."""

    number: int
    arrived_s: float
    load: Callable[[], frames.Frame]
    started_s: float = 0.0
    done_s: float = 0.0
    stages_ms: list[float] = field(default_factory=list)
    skipped_ms: float = 0.0
    encoded_bytes: int = 0
    decoded_bytes: int = 0
    values: np.ndarray | None = None
    answer: int = -1


class _Paced:
    """Frames of a file by the clock; no thread is needed to know which of them wait."""

    def __init__(self, source: frames.Images | frames.Video, fps: float, seconds: float, queue: int | None):
        self._source, self._fps, self._seconds, self._queue = source, fps, seconds, queue
        self.about, self.close = source.about, source.close
        self._untaken, self.arrived = 0, math.ceil(fps * seconds)

    def warm_up(self) -> Iterator[Callable[[], frames.Frame]]:
        """The first frames, before the stream."""
        return (self._source.read for _ in range(_WARM_UP_FRAMES))

    def start(self) -> float:
        """Frame 0 arrives now, by perf_counter."""
        self._start_s = time.perf_counter()
        return self._start_s

    def take(self) -> _Taken | None:
        """The frame whose turn it is, when it has come; None when the stream is over."""
        passed_s = time.perf_counter() - self._start_s
        number = next_frame(self._untaken, passed_s, self._fps, self._queue)
        if number >= self.arrived or passed_s >= self._seconds:
            return None
        arrives_s = self._start_s + number / self._fps
        while (early_s := arrives_s - time.perf_counter()) > 0:
            time.sleep(early_s)
        if number >= self.arrived:  # stopped meanwhile
            return None
        passed_over, self._untaken = number - self._untaken, number + 1
        return _Taken(number, arrives_s, lambda: self._load(passed_over))

    def stop(self) -> None:
        """No further frame comes from now on. May be called from a signal's handler."""
        self._seconds = min(self._seconds, time.perf_counter() - self._start_s)
        self.arrived = max(self._untaken, min(self.arrived, math.ceil(self._fps * self._seconds)))

    @property
    def waiting(self) -> int:
        left = self.arrived - self._untaken
        return left if self._queue is None else min(left, self._queue)

    def _load(self, passed_over: int) -> frames.Frame:
        began = time.perf_counter()
        skipped_bytes = self._source.skip(passed_over)
        skipped_s = time.perf_counter() - began
        frame = self._source.read()
        return frames.Frame(frame.picture, frame.encoded_bytes + skipped_bytes, skipped_s)


class _Live:
    """Frames of a camera, when it gives them."""

    def __init__(self, camera: frames.Camera, seconds: float):
        self._camera, self._seconds = camera, seconds
        self.about, self.close = camera.about, camera.close
        self.arrived = self.waiting = self._bytes = 0

    def warm_up(self) -> Iterator[Callable[[], frames.Frame]]:
        self._camera.start()
        for _ in range(_WARM_UP_FRAMES):
            packet = self._camera.take(math.inf).packet
            yield lambda packet=packet: self._camera.decode(packet)

    def start(self) -> float:
        self._camera.forget()
        self._start_s = time.perf_counter()
        return self._start_s

    def stop(self) -> None:
        """No further frame is taken from now on."""
        self._seconds = min(self._seconds, time.perf_counter() - self._start_s)

    def take(self) -> _Taken | None:
        came = self._camera.take(self._start_s + self._seconds)
        if came is None:
            self.arrived, self.waiting = self._camera.counts()
            return None
        new_bytes, self._bytes = came.total_bytes - self._bytes, came.total_bytes
        load = lambda: frames.Frame(self._camera.decode(came.packet).picture, new_bytes)
        return _Taken(came.number, came.arrived_s, load)


class _Consumer:
    """What is done with a frame. `prepare` and `answer` may run in two threads."""

    def __init__(self, model: Model, spec: InputSpec):
        self._model, self._spec = model, spec
        shape = model.outputs[0].shape if len(model.outputs) == 1 else ()
        self._classifies = len(shape) > 0 and math.prod(shape[:-1]) == 1 and shape[-1] >= 1

    def prepare(self, taken: _Taken) -> _Taken:
        clock = time.perf_counter
        taken.started_s = began = clock()
        frame = taken.load()
        decoded = clock()
        pixels = self._spec.fit_picture(frame.picture)
        resized = clock()
        taken.values = quantize(self._spec.normalize(pixels[None]), self._model.inputs[0])
        normalized = clock()
        width, height = frame.picture.size
        taken.skipped_ms = 1000 * frame.skipped_s
        taken.encoded_bytes, taken.decoded_bytes = frame.encoded_bytes, 3 * width * height
        taken.stages_ms = [1000 * s for s in (decoded - began, resized - decoded, normalized - resized)]
        return taken

    def answer(self, taken: _Taken) -> _Taken:
        clock = time.perf_counter
        began = clock()
        self._model.set_inputs(taken.values)
        copied = clock()
        self._model.run()
        inferred = clock()
        outputs = [dequantize(v, tensor) for v, tensor in zip(self._model.get_outputs(), self._model.outputs)]
        if self._classifies:
            scores = outputs[0].reshape(1, -1)
            if self._spec.head == "logits" and scores.shape[1] > 1:
                scores = np.exp(scores - scores.max())
                scores /= scores.sum()
            taken.answer = int(classes_of(scores, self._spec.head)[0])
        taken.done_s = clock()
        taken.stages_ms[DATA_STAGES - 1] += 1000 * (copied - began)
        taken.stages_ms += [1000 * (inferred - copied), 1000 * (taken.done_s - inferred)]
        taken.values = None
        return taken


def _in_two_threads(arrivals: _Paced | _Live, prepare: Callable[[_Taken], _Taken]) -> Iterator[_Taken]:
    """Prepared frames, made by a second thread while the caller works on the one before; one of them may wait."""
    handed: queues.Queue = queues.Queue(1)

    def work() -> None:
        try:
            while (taken := arrivals.take()) is not None:
                handed.put(prepare(taken))
            handed.put(None)
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is raised where it can be reported
            handed.put(error)

    threading.Thread(target=work, daemon=True).start()
    while (item := handed.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def _in_one_thread(arrivals: _Paced | _Live, prepare: Callable[[_Taken], _Taken]) -> Iterator[_Taken]:
    while (taken := arrivals.take()) is not None:
        yield prepare(taken)


def _child(job: dict, emit: Callable[..., None]) -> dict:
    spec = InputSpec.from_dict(job["spec"])
    facts, load_average = device.describe(), device.load_average()
    model = open_model(job["tflite"], job["threads"], job["runtime"], size=(spec.height, spec.width))
    if len(model.inputs) != 1 or model.inputs[0].shape != (1, *spec.shape):
        raise misfit(model.inputs, spec)
    emit(text=f"reading {job['source']}")
    arrivals, consumer = _arrivals(job), _Consumer(model, spec)
    emit(text="warming up")
    for load in arrivals.warm_up():
        consumer.answer(consumer.prepare(_Taken(0, 0.0, load)))
    warmup_ms, steady = warm_up(model)
    before = trust.read_state()
    emit(text=f"{job['seconds']:g} s at {job['fps']:g} frames a second from {arrivals.about}")
    gc.collect()
    gc.freeze()
    start_s, stopped_s = arrivals.start(), []

    def stop(*_) -> None:
        arrivals.stop()
        stopped_s.append(time.perf_counter() - start_s)

    signal.signal(signal.SIGINT, stop)
    prepared = (_in_two_threads if job["pipelined"] else _in_one_thread)(arrivals, consumer.prepare)
    done = [consumer.answer(taken) for taken in prepared]
    during = trust.between(before, trust.read_state())
    arrivals.close()
    if not done:
        raise DataError("Not one frame came in time", received=job["source"], next_step="Give it more --seconds")
    after_ms = lambda moment_s: 1000 * (moment_s - start_s)
    threads = job["threads"] + (1 if job["pipelined"] else 0)
    return {
        "seconds": min([job["seconds"], *stopped_s]),
        "about": arrivals.about, "arrived": arrivals.arrived, "waiting": arrivals.waiting,
        "number": [t.number for t in done],
        "arrived_ms": [after_ms(t.arrived_s) for t in done], "started_ms": [after_ms(t.started_s) for t in done],
        "done_ms": [after_ms(t.done_s) for t in done],
        "stages_ms": {name: [t.stages_ms[place] for t in done] for place, name in enumerate(STAGES)},
        "skipped_ms": [t.skipped_ms for t in done], "classes": [t.answer for t in done],
        "encoded_bytes": sum(t.encoded_bytes for t in done),
        "decoded_bytes": sum(t.decoded_bytes for t in done),
        "input_bytes": math.prod(model.inputs[0].shape) * np.dtype(model.inputs[0].dtype).itemsize,
        "device": {
            **facts, "runtime": model.runtime.name, "runtime_version": model.runtime.version, "during": during,
        },
        "warnings": trust.warnings_of(facts, load_average, threads, during, steady, len(warmup_ms), STEADY_CHANGE),
    }  # fmt: skip


def _arrivals(job: dict) -> _Paced | _Live:
    """The frames of a job as they arrive."""
    fps, seconds, queue, source = job["fps"], job["seconds"], job["queue"], job["source"]
    if job.get("from_home") and not source.startswith("camera:"):
        # Nobody means the work folder of this process; ssh and scp begin in the home folder, too.
        source = os.path.join(os.path.expanduser("~"), os.path.expanduser(source))
    kind = frames.kind_of(source)
    if kind == "camera":
        return _Live(frames.Camera(source, fps, queue), seconds)
    if kind == "video":
        return _Paced(frames.Video(source), fps, seconds, queue)
    return _Paced(frames.Images(source, max(1, math.ceil(fps * seconds))), fps, seconds, queue)


if __name__ == "__main__":
    serve(_child)
