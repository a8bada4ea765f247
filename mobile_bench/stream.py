"""A file under frames that arrive by themselves, as from a camera: what keeps up, what is dropped, and where it waits.

Frame n of a folder or a video arrives at start + n / fps by an absolute clock, ready or not, and its latency counts
from then: a slow frame makes those behind it late, and they are counted as late (no coordinated omission). At most
`queue` frames wait; when another comes the oldest of them is dropped, as cameras do. The child's side is
mobile_bench.stream_worker.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from mobile_bench import frames
from mobile_bench.errors import InputError, Interrupted
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import check_is_tflite
from mobile_bench.jobs import OnProgress
from mobile_bench.lock import one_at_a_time
from mobile_bench.records import Connection, Target
from mobile_bench.stats import percentiles
from mobile_bench.transports import transport_for

#: What is done with a frame, in this order. normalize holds quantizing and copying it into the model; postprocess
#: reading the outputs, dequantizing, softmax and the class.
STAGES = ("decode", "resize", "normalize", "inference", "postprocess")
DATA_STAGES = 3
MOST_FRAMES = 200_000
#: What is sent to a board at most; of images the first of them, see frames.MOST_IMAGE_BYTES.
MOST_VIDEO_BYTES = 1 << 30
#: Before a source that lies on the board itself.
BOARD = "board:"
#: What an interrupted stream may take to finish the frames under way.
_FINISH_S = 10.0
_LOCAL = Target()


@dataclass(frozen=True)
class Stream:
    """One run. Of each frame that was processed, in order: its number, when it arrived, began and was done (ms after
    the start), its stages (ms, in the order of STAGES), and its class (-1 where the file is no classifier).
    skipped_ms is the part of decode that went into dropped frames before it, which a video needs.

    arrived: all frames that came; waiting: those not begun at the end; the rest was dropped. encoded_bytes,
    decoded_bytes: of the frames that came as long as frames were taken, and of those that were decoded, as RGB.
    interrupted: it was ended early, after `seconds`.
    """

    sha256: str
    target: Target
    source: str
    about: str
    fps: float
    seconds: float
    deadline_ms: float
    queue: int | None
    pipelined: bool
    arrived: int
    waiting: int
    number: tuple[int, ...]
    arrived_ms: tuple[float, ...]
    started_ms: tuple[float, ...]
    done_ms: tuple[float, ...]
    stages_ms: dict[str, tuple[float, ...]]
    skipped_ms: tuple[float, ...]
    classes: tuple[int, ...]
    encoded_bytes: int
    decoded_bytes: int
    input_bytes: int
    labels: tuple[str, ...] = ()
    device: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    started_at: str = ""
    interrupted: bool = False

    def __post_init__(self):
        if not isinstance(self.target, Target):
            object.__setattr__(self, "target", Target(**self.target))
        for name in ("number", "arrived_ms", "started_ms", "done_ms", "skipped_ms", "classes", "labels", "warnings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "stages_ms", {name: tuple(self.stages_ms[name]) for name in STAGES})
        if not self.number:
            raise InputError("A stream without a frame tells nothing", received=self.source)


@dataclass(frozen=True)
class Stage:
    """One stage's times, and its share of the mean time spent on a frame."""

    name: str
    median_ms: float
    p99_ms: float
    share: float


@dataclass(frozen=True)
class StreamSummary:
    """A Stream in numbers. median_ms to max_ms: from a frame's arrival until it is done; wait_ms: the median of what
    it waited of that.

    late: frames done after their deadline; missed: these, and those dropped or still waiting at the end. jitter: of
    the times between two frames done, against 1 / fps: their standard deviation and the 99th percentile of the
    difference; None for one frame. bottleneck: the stage with the largest share; bound_by: 'data' where decode,
    resize and normalize together take longer than inference. sustainable_fps: one over the mean time spent on a
    frame and no other, or with two threads on the slower one's part of it. Rates are bytes a second: as they
    arrive, of decoded RGB, and into the model.
    """

    processed: int
    dropped: int
    waiting: int
    late: int
    missed: int
    achieved_fps: float
    sustainable_fps: float
    median_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    wait_ms: float
    jitter_std_ms: float | None
    jitter_p99_ms: float | None
    stages: tuple[Stage, ...]
    bottleneck: str
    bound_by: str
    encoded_rate: float
    decoded_rate: float
    input_rate: float


def stream(
    tflite: str | Path, source: str, spec: InputSpec, *, fps: float = 30.0, seconds: float = 10.0,
    target: Target = _LOCAL, connection: Connection | None = None, queue: int = 1, drop: bool = True,
    deadline_ms: float | None = None, pipelined: bool = False, on_progress: OnProgress | None = None,
    wait_s: float = 3600,
) -> Stream:  # fmt: skip
    """Run a file on the frames of `source` for `seconds`, in a fresh process on the target.

    source: a folder or .zip of images, an image or a video file here, or camera:0. On a board, images and videos of
    here are sent there; 'board:SOURCE' is one that is there (from the home folder on), and so are cameras. queue:
    frames that may wait; drop=False lets all of them wait. deadline_ms: 1000 / fps where it is None. pipelined: a
    second thread decodes, resizes and normalizes. A KeyboardInterrupt gives the frames until then, if there are any.
    Raises InputError, DataError (an image, video or camera that cannot be read), ModelRefused, TransportError, or
    JobFailed where the runtime crashes.
    """
    deadline_ms = 1000 / fps if deadline_ms is None and fps else deadline_ms
    for name, value, most in (("fps", fps, 10_000), ("seconds", seconds, 86_400), ("deadline_ms", deadline_ms, 1e9)):
        if value is None or not 0 < value <= most:
            raise InputError(f"{name} is out of range", received=value, allowed=f"above 0, up to {most:,.0f}")
    if not 1 <= queue <= 10_000:
        raise InputError("queue is out of range", received=queue, allowed="1 to 10000")
    if fps * seconds > MOST_FRAMES:
        raise InputError("That is too many frames", received=f"{fps * seconds:,.0f}", allowed=f"up to {MOST_FRAMES:,}")
    if target.accelerator != "cpu":
        raise InputError("Streams run on the CPU", received=target.accelerator, next_step="Leave --accelerator out")
    if target.transport == "adb":
        raise InputError(
            "A stream needs Python on the device, and a phone has none", received=target.name,
            allowed="local, or a board by ssh",
            next_step=f"Time the model alone: mobile-bench run --target adb:{target.address}",
        )  # fmt: skip
    check_is_tflite(tflite)
    there = source.startswith(BOARD) or (target.transport != "local" and source.startswith(("camera:", "/dev/video")))
    if source.startswith(BOARD) and target.transport == "local":
        raise InputError("There is no board", received=source, next_step="Name it: --target ssh://user@host")
    kind = "" if there else frames.kind_of(source)
    asked = {
        "source": source, "fps": fps, "seconds": seconds, "deadline_ms": deadline_ms,
        "queue": queue if drop else None, "pipelined": pipelined,
    }  # fmt: skip
    job = {**asked, "source": source.removeprefix(BOARD), "threads": target.threads, "runtime": target.runtime}
    job |= {"spec": spec.to_dict(), "requires": _requires(job["source"], kind), "from_home": there}
    transport = transport_for(target, connection)
    with (
        one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress),
        _sent(source, kind if target.transport != "local" else "", fps, seconds, on_progress) as sent,
        transport,
    ):
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            found = transport.run(
                "mobile_bench.stream_worker", job, files={"tflite": Path(tflite), **sent}, on_progress=on_progress,
                timeout_s=2 * seconds + 900, finish_s=_FINISH_S,
            )  # fmt: skip
        except Interrupted as interrupt:
            found = {**interrupt.kept, "interrupted": True}
    facts = {"sha256": sha256_of(tflite), "target": target, "labels": spec.labels, "started_at": started_at}
    return Stream(**facts, **{**asked, **found})


def _requires(source: str, kind: str) -> dict[str, str]:
    """What decodes the frames: Pillow, and PyAV for all but images."""
    plain = kind == "images" or not (kind or source.startswith(("camera:", "/dev/video")) or _is_video(source))
    return {"PIL": "Pillow>=10"} | ({} if plain else {"av": "av>=18,<19"})


def _is_video(source: str) -> bool:
    return Path(source).suffix.lower() in frames.VIDEOS


@contextlib.contextmanager
def _sent(source: str, kind: str, fps: float, seconds: float, on_progress: OnProgress | None) -> Iterator[dict]:
    """The files that carry the frames of here to another machine, by their keys of the job; {} where none must."""
    if not kind:
        yield {}
    elif kind == "video":
        size = Path(source).stat().st_size
        if size > MOST_VIDEO_BYTES:
            raise InputError(
                "The video is too large to be sent to a board", received=f"{source}, {size / 1e6:,.0f} MB",
                allowed=f"up to {MOST_VIDEO_BYTES / 1e6:,.0f} MB",
                next_step=f"Cut it, or copy it there and name it with --source {BOARD}PATH",
            )  # fmt: skip
        _say_sent(source, size, on_progress)
        yield {"source": Path(source)}
    else:
        with tempfile.TemporaryDirectory(prefix="mobile-bench-") as folder:
            packed = Path(folder) / f"frames{frames.PACKED}"
            images = frames.Images(source, max(1, math.ceil(fps * seconds)))
            images.pack(packed)
            _say_sent(images.about, packed.stat().st_size, on_progress)
            yield {"source": packed}


def _say_sent(what: str, size_bytes: int, on_progress: OnProgress | None) -> None:
    if on_progress:
        on_progress({"kind": "log", "text": f"sending {what}, {size_bytes / 1e6:.1f} MB"})


def summarize_stream(found: Stream) -> StreamSummary:
    """The numbers of a Stream."""
    done, arrived = np.array(found.done_ms), np.array(found.arrived_ms)
    latency = done - arrived
    stages = np.array([found.stages_ms[name] for name in STAGES])
    means = stages.mean(axis=1)
    total = max(float(means.sum()), 1e-9)
    # Where none is dropped, no frame pays for another.
    data, rest = means[:DATA_STAGES].sum() - np.mean(found.skipped_ms), means[DATA_STAGES:].sum()
    service = max(data, rest) if found.pipelined else data + rest
    late, processed = int((latency > found.deadline_ms).sum()), len(done)
    median, p90, p99 = percentiles(latency, (50, 90, 99))
    off = np.diff(done) - 1000 / found.fps
    dropped = found.arrived - processed - found.waiting
    came = found.arrived / found.seconds
    return StreamSummary(
        processed=processed, dropped=dropped, waiting=found.waiting, late=late,
        missed=late + dropped + found.waiting, achieved_fps=processed / max(found.seconds, float(done[-1]) / 1000),
        sustainable_fps=1000 / max(float(service), 1e-9), median_ms=median, p90_ms=p90, p99_ms=p99,
        max_ms=float(latency.max()), wait_ms=float(np.median(latency - stages.sum(axis=0))),
        jitter_std_ms=float(off.std()) if len(off) else None,
        jitter_p99_ms=percentiles(np.abs(off), (99,))[0] if len(off) else None,
        stages=tuple(
            Stage(name, *percentiles(values, (50, 99)), float(mean) / total)
            for name, values, mean in zip(STAGES, stages, means)
        ),
        bottleneck=STAGES[int(means.argmax())],
        bound_by="data" if means[:DATA_STAGES].sum() > means[STAGES.index("inference")] else "inference",
        encoded_rate=found.encoded_bytes / (found.number[-1] + 1) * came,
        decoded_rate=found.decoded_bytes / found.seconds, input_rate=found.input_bytes * processed / found.seconds,
    )  # fmt: skip
