"""Minutes and streams of frames by SSH, against a real sshd on loopback."""

import os
import pwd
import re
import signal
import time

import numpy as np
import pytest

from mobile_bench import stream as streams
from mobile_bench.errors import DataError, InputError
from mobile_bench.stream import stream
from mobile_bench.sustained import sustain

from .ssh_board import SPEC, TARGET, emptied, needs_sshd, sessions_of, worker_in

pytestmark = needs_sshd


def test_minutes_there_with_the_energy_and_the_heat_of_there(board, tiny, machine):
    options = {"target": TARGET, "connection": board, "root": machine}
    found = sustain(tiny.path("float32"), seconds=2.2, idle_s=0.2, **options)
    assert (found.status, len(found.windows)) == ("ok", 2) and sum(w.count for w in found.windows) > 100
    assert found.energy.source == "RAPL package-0" and found.energy.gross_mj > 0 and found.energy.idle_w > 0
    assert found.windows[0].temperature_c == 61.0 and found.device["runtime"] == "ai-edge-litert"
    with pytest.raises(InputError, match="no battery"):
        sustain(tiny.path("float32"), seconds=2, energy="battery", **options)
    assert emptied(board)


def test_minutes_there_whose_process_is_killed_keep_what_was_measured(board, tiny):
    def kill(message):
        if message.get("window"):
            os.kill(worker_in(board, b"mobile_bench.sustained_worker"), signal.SIGKILL)

    found = sustain(tiny.path("float32"), seconds=60, target=TARGET, connection=board, energy="none", on_progress=kill)
    assert found.status == "failed" and "SIGKILL" in found.reason and 1 <= len(found.windows) < 30
    assert emptied(board)


def test_minutes_there_whose_connection_is_cut_keep_what_was_measured(board, sshd, tiny):
    def cut(message):
        if message.get("window"):
            for pid in sessions_of(sshd.pid):
                os.kill(pid, signal.SIGKILL)

    found = sustain(tiny.path("float32"), seconds=60, target=TARGET, connection=board, energy="none", on_progress=cut)
    assert found.status == "failed" and "was lost" in found.reason and 1 <= len(found.windows) < 30
    assert emptied(board)


def test_minutes_there_that_are_interrupted_keep_what_was_measured(board, tiny):
    def stop(message):
        if message.get("window"):
            raise KeyboardInterrupt

    found = sustain(tiny.path("float32"), seconds=60, target=TARGET, connection=board, energy="none", on_progress=stop)
    assert (found.status, len(found.windows), found.energy) == ("interrupted", 1, None)
    assert emptied(board)


@pytest.fixture
def photos(tiny, tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, image in enumerate(tiny.images[:6]):
        Image.fromarray(image).save(folder / ("more" if number > 3 else "") / f"{number}.png")
    return folder


def test_frames_of_here_are_sent_there_and_answered_alike(board, tiny, photos):
    said, options = [], {"fps": 40.0, "seconds": 0.5, "drop": False}
    here = stream(tiny.path("int8"), str(photos), SPEC, **options)
    there = stream(
        tiny.path("int8"), str(photos), SPEC, target=TARGET, connection=board, on_progress=said.append, **options
    )
    # A busy machine may end before the last of the twenty frames is begun.
    alike = lambda one, other: len(one) > 2 and one[: len(other)] == other[: len(one)]
    assert alike(there.number, tuple(range(20))) and alike(there.classes, here.classes) and there.about == "6 images"
    assert any("sending 6 images" in message.get("text", "") for message in said)
    there = stream(tiny.path("int8"), f"board:{photos}", SPEC, target=TARGET, connection=board, **options)
    assert alike(there.classes, here.classes)
    home = pwd.getpwuid(os.getuid()).pw_dir
    for source in ("board:no/such", "board:~/no/such"):
        with pytest.raises(InputError, match=rf"{re.escape(home)}/no/such \(no such file or folder"):
            stream(tiny.path("int8"), source, SPEC, target=TARGET, connection=board, **options)
    with pytest.raises(InputError, match="--target ssh"):
        stream(tiny.path("int8"), f"board:{photos}", SPEC, **options)
    assert emptied(board)


def test_videos_are_sent_and_cameras_are_the_boards(board, tiny, tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="needs pip install 'tfopt[stream]'")
    clip, said = tmp_path / "my clip.mkv", []
    with av.open(str(clip), "w") as container:
        added = container.add_stream("mpeg4", rate=30)
        added.width, added.height, added.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            gray = np.full((48, 64, 3), 20 * number, np.uint8)
            container.mux(added.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(added.encode())
    there = lambda source: stream(
        tiny.path("int8"), source, SPEC, seconds=0.5, target=TARGET, connection=board, on_progress=said.append
    )
    found = there(str(clip))
    assert found.number[0] == 0 and found.about.endswith("video of 64 x 48")
    assert any(message.get("text", "").startswith(f"sending {clip}, 0.0 MB") for message in said)
    for source in ("camera:93", "board:/dev/video93", "/dev/video93"):
        with pytest.raises(DataError, match=r"camera cannot be opened.*/dev/video93"):
            there(source)
    monkeypatch.setattr(streams, "MOST_VIDEO_BYTES", 100)
    with pytest.raises(InputError, match=r"too large to be sent.*--source board:"):
        there(str(clip))
    assert emptied(board)


def test_a_stream_there_that_is_interrupted_keeps_its_frames(board, tiny, photos):
    def stop(message):
        if "frames a second from" in message.get("text", ""):
            time.sleep(0.3)
            raise KeyboardInterrupt

    found = stream(tiny.path("int8"), str(photos), SPEC, seconds=60, target=TARGET, connection=board, on_progress=stop)
    assert found.interrupted and len(found.number) >= 1 and found.seconds < 30
    assert emptied(board)
