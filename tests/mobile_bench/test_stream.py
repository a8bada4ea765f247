"""Frames by the clock: which are dropped, what is late, where the time goes; and sources that are no good."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobile_bench import frames, stream_worker
from mobile_bench.errors import DataError, InputError, ModelRefused
from mobile_bench.inputs import InputSpec
from mobile_bench.records import Target
from mobile_bench.stream import STAGES, Stream, stream, summarize_stream
from mobile_bench.stream_worker import next_frame

SPEC = InputSpec(12, 12, 3)
ROOT = Path(__file__).parents[2]
COMMAND = """
import typer
from mobile_bench.cli_support import run_app
from mobile_bench.commands.stream import stream
app = typer.Typer()
app.command()(stream)
run_app(app)
"""


@pytest.fixture(scope="module", autouse=True)
def own_lock(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos(tiny, tmp_path_factory):
    """Twenty of the tiny models' images as PNG files, some in a folder below."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number, image in enumerate(tiny.images[:20]):
        Image.fromarray(image).save(folder / ("more" if number >= 15 else "") / f"{number:02}.png")
    (folder / "notes.txt").write_text("not a photo")
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Twenty gray frames, each 10 brighter than the one before, from 20 on."""
    av = pytest.importorskip("av", reason="needs pip install 'tfopt[stream]'")
    path = tmp_path_factory.mktemp("video") / "grays.mkv"
    with av.open(str(path), "w") as container:
        added = container.add_stream("mpeg4", rate=30)
        added.width, added.height, added.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            gray = np.full((48, 64, 3), 20 + 10 * number, np.uint8)
            container.mux(added.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(added.encode())
    return path


def gray_of(frame):
    """The number of a frame of `video`."""
    return round((float(np.asarray(frame.picture).mean()) - 20) / 10)


@pytest.mark.parametrize(
    ("untaken", "passed_s", "queue", "expected"),
    # The first is there at once; the next is still to come; of 1, 2 and 3 that came only the newest waits.
    [(0, 0.0, 1, 0), (1, 0.05, 1, 1), (1, 0.31, 1, 3), (1, 0.31, 2, 2), (1, 0.31, 3, 1), (1, 0.31, None, 1)],
)
def test_the_oldest_waiting_frame_is_dropped(untaken, passed_s, queue, expected):
    assert next_frame(untaken, passed_s, 10.0, queue) == expected


class Counting:
    """A source that counts, and what was done with its frames."""

    about = "counted"

    def __init__(self):
        self.given, self.skipped = 0, []

    def skip(self, count):
        self.given += count
        self.skipped.append(count)
        return 100 * count

    def read(self):
        self.given += 1
        return frames.Frame(self.given - 1, 100)

    close = None


class Clock:
    """Time that passes only by sleeping."""

    now_s = 1000.0

    def perf_counter(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture
def paced(monkeypatch):
    """Run a source of frames under a consumer that takes `cost_s`: (number, arrived, began, picture, bytes) each."""

    def run(cost_s, *, fps=10.0, seconds=2.0, queue=1):
        clock, source = Clock(), Counting()
        monkeypatch.setattr(stream_worker, "time", clock)
        arrivals = stream_worker._Paced(source, fps, seconds, queue)
        start, done = arrivals.start(), []
        while (taken := arrivals.take()) is not None:
            began, frame = clock.now_s, taken.load()
            done.append((taken.number, taken.arrived_s - start, began - start, frame.picture, frame.encoded_bytes))
            clock.now_s += cost_s
        return arrivals, done

    return run


def test_a_fast_consumer_gets_every_frame_when_it_arrives(paced):
    arrivals, done = paced(0.01)
    assert [number for number, *_ in done] == list(range(20))
    assert [arrived for _, arrived, *_ in done] == pytest.approx([n / 10 for n in range(20)])
    assert [began for _, _, began, *_ in done] == pytest.approx([n / 10 for n in range(20)])
    assert (arrivals.arrived, arrivals.waiting) == (20, 0)


def test_a_slow_consumer_gets_the_newest_and_latency_counts_from_arrival(paced):
    arrivals, done = paced(0.25)
    assert [number for number, *_ in done] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert all(picture == number for number, _, _, picture, _ in done), "passing over keeps the source in step"
    assert sum(encoded for *_, encoded in done) == 100 * (done[-1][0] + 1), "dropped frames came in all the same"
    waits = [began - arrived for _, arrived, began, *_ in done]
    assert waits == pytest.approx([0, 0.05] * 4)
    assert arrivals.arrived - len(done) - arrivals.waiting == 11 and arrivals.waiting == 1


def test_without_drops_the_queue_and_the_latency_grow(paced):
    arrivals, done = paced(0.25, queue=None)
    assert [number for number, *_ in done] == list(range(8))
    assert done[-1][2] - done[-1][1] == pytest.approx(7 * 0.15)
    assert arrivals.waiting == 12


def made(stages, *, arrived_ms, done_ms, **fields):
    values = {
        "sha256": "", "target": Target(), "source": "photos", "about": "", "fps": 10.0, "seconds": 1.0,
        "deadline_ms": 100.0, "queue": 1, "pipelined": False, "arrived": 10, "waiting": 1,
        "number": range(len(done_ms)), "arrived_ms": arrived_ms, "started_ms": arrived_ms, "done_ms": done_ms,
        "stages_ms": {name: [value] * len(done_ms) for name, value in zip(STAGES, stages)},
        "skipped_ms": [0.0] * len(done_ms), "classes": [0] * len(done_ms), "encoded_bytes": 400,
        "decoded_bytes": 3000, "input_bytes": 432, **fields,
    }  # fmt: skip
    return Stream(**values)


def test_the_summary_counts_what_was_late_and_what_was_lost():
    found = made([20, 10, 5, 40, 5], arrived_ms=[0, 100, 200, 400], done_ms=[80, 180, 330, 490])
    summary = summarize_stream(found)
    assert (summary.processed, summary.dropped, summary.waiting, summary.late, summary.missed) == (4, 5, 1, 1, 7)
    assert summary.median_ms == 85 and summary.max_ms == 130 and summary.wait_ms == pytest.approx(5)
    assert summary.sustainable_fps == pytest.approx(1000 / 80) and summary.achieved_fps == 4
    # Intervals 100, 150, 160 against 100.
    assert summary.jitter_std_ms == pytest.approx(np.std([0, 50, 60]))
    assert summary.jitter_p99_ms == pytest.approx(np.percentile([0, 50, 60], 99))
    assert [stage.share for stage in summary.stages] == pytest.approx([0.25, 0.125, 0.0625, 0.5, 0.0625])
    assert (summary.bottleneck, summary.bound_by) == ("inference", "inference")
    assert summary.encoded_rate == 1000 and summary.decoded_rate == 3000 and summary.input_rate == 4 * 432


def test_many_cheap_data_stages_bind_a_stream_though_inference_is_the_largest():
    times = {"arrived_ms": [0, 100], "done_ms": [80, 180]}
    summary = summarize_stream(made([20, 15, 10, 30, 5], **times))
    assert (summary.bottleneck, summary.bound_by) == ("inference", "data")
    pipelined = summarize_stream(made([20, 15, 10, 30, 5], **times, pipelined=True))
    assert pipelined.sustainable_fps == pytest.approx(1000 / 45)
    video = summarize_stream(made([60, 15, 10, 30, 5], **times, skipped_ms=[40, 40]))
    assert video.bottleneck == "decode" and video.sustainable_fps == pytest.approx(1000 / 80)
    assert summarize_stream(made([1] * 5, arrived_ms=[0], done_ms=[5])).jitter_std_ms is None


@pytest.mark.parametrize(("name", "pipelined"), [("float32", False), ("int8", False), ("float32", True)])
def test_a_real_stream_answers_as_the_model_does(tiny, photos, name, pipelined):
    found = stream(tiny.path(name), str(photos), SPEC, fps=50, seconds=0.8, drop=False, pipelined=pipelined)
    summary = summarize_stream(found)
    assert found.arrived == 40 == summary.processed + summary.waiting and summary.dropped == 0
    assert found.number == tuple(range(summary.processed)) and summary.processed >= 1
    assert found.arrived_ms == pytest.approx([20 * n for n in found.number])
    # Three frames are taken before the stream, to warm up.
    expected = tiny.keras["softmax"].argmax(axis=1)[[(n + 3) % 20 for n in found.number]]
    assert np.mean(np.array(found.classes) == expected) >= (1 if name == "float32" else 0.9)
    for arrived, started, done, *stages in zip(
        found.arrived_ms, found.started_ms, found.done_ms, *(found.stages_ms[stage] for stage in STAGES)
    ):
        assert arrived <= started < done and min(stages) > 0
        assert sum(stages) <= done - started + 1e-6
    assert found.input_bytes == 432 * (4 if name == "float32" else 1)
    assert found.device["runtime"] == "ai-edge-litert" and found.about == "20 images"


def test_too_many_frames_are_dropped_and_accounted_for(tiny, photos):
    found = stream(tiny.path("int8"), str(photos), SPEC, fps=10_000, seconds=0.3)
    summary = summarize_stream(found)
    assert summary.dropped > 0 and summary.processed + summary.dropped + summary.waiting == found.arrived == 3000
    assert all(a < b for a, b in zip(found.number, found.number[1:]))
    assert summary.missed >= summary.dropped + summary.waiting


def test_a_video_is_in_step_after_frames_passed_over_and_begins_again(video):
    source = frames.Video(video)
    seen = [gray_of(source.read()) for _ in range(3)]
    source.skip(4)
    seen += [gray_of(source.read())]
    source.skip(10)
    seen += [gray_of(source.read()) for _ in range(3)]
    assert seen == [0, 1, 2, 7, 18, 19, 0]
    assert "mpeg4 video of 64 x 48" in source.about
    source.close()


def test_a_video_counts_every_encoded_byte_once(video):
    import av

    with av.open(str(video)) as container:
        whole = sum(packet.size for packet in container.demux(video=0))
    one, other = frames.Video(video), frames.Video(video)
    assert sum(one.read().encoded_bytes for _ in range(20)) == pytest.approx(whole, rel=0.1)
    other.skip(19)
    assert other.read().encoded_bytes == pytest.approx(whole, rel=0.1)


def test_a_stream_of_a_video_runs(tiny, video):
    found = stream(tiny.path("int8"), str(video), SPEC, fps=30, seconds=0.5)
    assert found.arrived == 15
    assert found.decoded_bytes == 64 * 48 * 3 * len(found.classes)


@pytest.fixture
def camera():
    """FFmpeg's test picture at its own pace, in the place of a camera."""
    av = pytest.importorskip("av", reason="needs pip install 'tfopt[stream]'")
    if "lavfi" not in av.formats_available:
        pytest.skip("this PyAV has no lavfi to stand in for a camera")
    opened = []

    def make(queue=1, more=""):
        source = f"testsrc=size=64x48:rate=50{more},realtime"
        opened.append(frames.Camera(source, 50, queue, format="lavfi"))
        opened[-1].start()
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_a_camera_keeps_the_newest_frames(camera):
    live = camera(queue=2)
    first = live.take(math.inf)
    assert first.number == 0 and live.decode(first.packet).picture.size == (64, 48)
    while live.counts()[0] < 8:
        time.sleep(0.01)
    arrived, waiting = live.counts()
    taken = live.take(math.inf)
    assert waiting == 2 and taken.number >= arrived - 2 and taken.arrived_s > first.arrived_s
    assert taken.total_bytes > first.total_bytes
    assert live.take(time.perf_counter() - 1) is None
    live.forget()
    assert live.take(math.inf).number < arrived


def test_a_stream_of_a_camera_has_the_cameras_numbers(camera):
    one = camera(queue=1)
    one.start = lambda: None  # it has been
    live = stream_worker._Live(one, 1.0)
    for load in live.warm_up():
        assert load().picture.size == (64, 48)
    live.start()
    numbers = []
    while (taken := live.take()) is not None:
        numbers.append(taken.number)
        assert taken.load().encoded_bytes > 0
    assert numbers and numbers == sorted(set(numbers)) and live.arrived > numbers[-1]


def test_a_camera_that_goes_away_is_said_to(camera):
    live = camera(queue=None, more=":duration=0.1")
    with pytest.raises(DataError, match=r"no more frames.*it ended"):
        while live.take(time.perf_counter() + 60):
            pass


def test_without_pyav_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    for source in (lambda: frames.Video(tmp_path / "a.mp4"), lambda: frames.Camera("camera:0", 30, 1)):
        with pytest.raises(InputError, match=r"tfopt\[stream\]"):
            source()


def broken(tmp_path, name):
    """A source that cannot be used, by its name."""
    path = tmp_path / name
    if "." not in name:
        path.mkdir()
        path, name = path / "a.jpg", name
    if name == "empty":
        return path.parent
    if name == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        return path.parent
    path.write_text("hello")
    return path.parent if name == "text" else path


@pytest.mark.parametrize(
    ("name", "word"),
    [("empty", "no images"), ("text", "a.jpg"), ("truncated", "a.jpg"), ("cut.mp4", "cut.mp4"), ("a.txt", "a.txt")],
)
def test_a_source_that_is_no_good_is_refused_before_it_is_timed(tiny, tmp_path, name, word):
    if name.endswith("mp4"):
        pytest.importorskip("av", reason="needs pip install 'tfopt[stream]'")
    with pytest.raises((DataError, InputError), match=word):
        stream(tiny.path("int8"), str(broken(tmp_path, name)), SPEC)


def test_a_camera_or_folder_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        stream(tiny.path("int8"), str(tmp_path / "none"), SPEC)
    pytest.importorskip("av", reason="needs pip install 'tfopt[stream]'")
    with pytest.raises(DataError, match=r"camera cannot be opened.*/dev/video93"):
        frames.Camera("camera:93", 30, 1)
    with pytest.raises(InputError, match="named by its number"):
        frames.Camera("camera:front", 30, 1)


def test_a_video_cut_short_is_refused_or_plays_what_is_left(video, tmp_path):
    content = video.read_bytes()
    cut = tmp_path / "cut.mkv"
    for size in range(0, len(content), len(content) // 12):
        cut.write_bytes(content[:size])
        try:
            source = frames.Video(cut)
            seen = [gray_of(source.read()) for _ in range(25)]
        except DataError as error:
            assert "cut.mkv" in str(error)
        else:
            assert seen[0] == 0 and max(seen) < 20


def test_a_model_or_option_that_is_no_good_is_refused(tiny, photos):
    nan = float("nan")
    for options in (
        {"fps": 0}, {"fps": -1}, {"fps": nan}, {"fps": math.inf}, {"seconds": 0}, {"seconds": nan}, {"queue": 0},
        {"deadline_ms": 0}, {"deadline_ms": nan}, {"deadline_ms": -5},
    ):  # fmt: skip
        with pytest.raises(InputError, match="out of range"):
            stream(tiny.path("int8"), str(photos), SPEC, **options)
    with pytest.raises(InputError, match="too many frames"):
        stream(tiny.path("int8"), str(photos), SPEC, fps=1000, seconds=3600)
    with pytest.raises(InputError, match=r"needs Python on the device.*mobile-bench run --target adb:A1"):
        stream(tiny.path("int8"), str(photos), SPEC, target=Target("adb", address="A1"))
    with pytest.raises(ModelRefused, match="made-up-op"):
        stream(tiny.path("custom_op"), str(photos), SPEC)
    with pytest.raises(InputError, match="does not take the images"):
        stream(tiny.path("int8"), str(photos), InputSpec(16, 16, 3))


def test_the_command_shows_it_and_writes_every_frame(run_python, tiny, photos, tmp_path):
    out = tmp_path / "frames.json"
    options = ("--source", photos, "--fps", 20, "--seconds", 0.5, "--input-spec", "scaling=signed")
    done = run_python("-c", COMMAND, tiny.path("int8"), *options, "--out", out)
    assert done.returncode == 0, done.stderr
    for word in ("arrived", "Missed", "Jitter", "Bottleneck", "Sustainable", *STAGES):
        assert word in done.stdout
    whole = json.loads(out.read_text())
    assert set(whole) == {"schema_version", "stream", "summary"}
    assert summarize_stream(Stream(**whole["stream"])).processed == len(whole["stream"]["done_ms"])
    done = run_python("-c", COMMAND, tiny.path("int8"), *options, "--json")
    brief = json.loads(done.stdout)
    assert brief["summary"]["processed"] >= 1 and "done_ms" not in brief["stream"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("pipelined", [False, True])
def test_an_interrupted_stream_keeps_its_frames(tiny, photos, tmp_path, pipelined):
    options = ["--source", photos, "--input-spec", "scaling=signed", "--seconds", "600", "--out", tmp_path / "out.json"]
    command = [sys.executable, "-m", "mobile_bench", "stream", tiny.path("int8"), *options]
    with subprocess.Popen(
        [*map(str, command), *(["--pipelined"] if pipelined else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT,
    ) as child:  # fmt: skip
        while "600 s at 30" not in (line := child.stderr.readline()):
            assert line, "it ended by itself"
        time.sleep(0.7)
        child.terminate()
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "interrupted after" in err and "From arrival to answer" in out, err
    whole = json.loads((tmp_path / "out.json").read_text())
    found = Stream(**whole["stream"])
    assert found.interrupted and 0 < found.seconds < 60 and summarize_stream(found).dropped >= 0
    assert len(found.number) + found.waiting <= found.arrived <= found.fps * found.seconds + 1


def test_the_command_refuses_in_a_sentence(run_python, tiny, photos, tmp_path):
    for options, word in (
        (("--source", tmp_path), "no images"),
        (("--source", photos, "--fps", "nan"), "fps is out of range"),
    ):
        done = run_python("-c", COMMAND, tiny.path("int8"), "--input-spec", "scaling=signed", *options)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr and not done.stdout
    done = run_python("-c", COMMAND, tiny.path("two_inputs"), "--source", photos, "--input-spec", "scaling=signed")
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
