"""Where the frames of a stream come from: a folder of images, a video file, or a camera.

A source gives frames in their order; `skip` passes over some of them. Images are independent, so a frame that is
passed over costs nothing; a video's frames are made of the ones before them, so it is decoded all the same.
"""

from __future__ import annotations

import io
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.errors import DataError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES, MOST_IMAGE_BYTES = (".jpg", ".jpeg", ".png"), 512 << 20
PACKED = ".zip"
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mjpeg", ".h264")
_CAMERA, _DEVICE = "camera:", "/dev/video"
_CAMERA_WAIT_S = 5.0


@dataclass(frozen=True)
class Frame:
    """A decoded frame: a PIL image, and the encoded bytes that had to be read for it, those passed over included.

    skipped_s: how long it took to pass over the frames before it.
    """

    picture: Image
    encoded_bytes: int
    skipped_s: float = 0.0


def kind_of(source: str) -> str:
    """'images', 'video' or 'camera'; InputError for what is none of them or is not there."""
    if source.startswith((_CAMERA, _DEVICE)):
        return "camera"
    path = Path(source)
    if (source.strip() and path.is_dir()) or (path.suffix.lower() in (*IMAGES, PACKED) and path.is_file()):
        return "images"
    if path.suffix.lower() in VIDEOS and path.is_file():
        return "video"
    raise InputError(
        "The source of frames cannot be used",
        received=f"{source or repr(source)} ({'not one of these' if path.exists() else 'no such file or folder'})",
        allowed=f"a folder or .zip of {', '.join(IMAGES)}; a video ({', '.join(VIDEOS)}); camera:0 or /dev/video0",
    )


@dataclass(frozen=True)
class Came:
    """A camera's frame as it arrived: when (perf_counter, seconds), and the bytes of all frames up to it."""

    number: int
    arrived_s: float
    packet: object
    total_bytes: int


class Images:
    """The images of a folder and of those in it, in the order of their paths, again and again.

    Up to `most` of them, and MOST_IMAGE_BYTES, are held in memory as they are encoded: the disk is no part of a
    stream. Each is decoded once here, so that a damaged one is refused before anything is timed. DataError names it.
    """

    def __init__(self, source: str | Path, most: int = 1000):
        self._files: list[tuple[Path, bytes]] = []
        count = held = 0
        for path, read in _images(Path(source)):
            count += 1
            if held > MOST_IMAGE_BYTES or len(self._files) >= most:
                continue
            try:
                content = read()
            except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                raise _unreadable(path, error) from error
            held += len(content)
            if self._files and held > MOST_IMAGE_BYTES:
                continue
            _decoded(path, content)
            self._files.append((path, content))
        if not self._files:
            raise DataError("The folder has no images", received=source, allowed=", ".join(IMAGES))
        self.about = f"{len(self._files)} images" + (f" of {count}" if len(self._files) < count else "")
        self._next = 0

    def skip(self, frames: int) -> int:
        """Pass over frames; gives their encoded bytes."""
        return sum(len(self._take()[1]) for _ in range(frames))

    def read(self) -> Frame:
        path, content = self._take()
        return Frame(_decoded(path, content), len(content))

    def close(self) -> None:
        """Nothing is open."""

    def pack(self, path: Path) -> None:
        """Write what is held into a .zip, which gives the same frames in the same order."""
        with zipfile.ZipFile(path, "w") as archive:
            for number, (file, content) in enumerate(self._files):
                archive.writestr(f"{number:06}{file.suffix}", content)

    def _take(self) -> tuple[Path, bytes]:
        self._next += 1
        return self._files[(self._next - 1) % len(self._files)]


class Video:
    """The frames of a video file in the order they are shown, again and again, decoded in one thread."""

    def __init__(self, path: str | Path):
        self._path = path
        self._container = _open(str(path))
        stream = _video_stream(self._container, path)
        self._frames, self._bytes = self._decoded(stream), 0
        context = stream.codec_context
        self.about = f"{context.name} video of {context.width} x {context.height}"

    def skip(self, frames: int) -> int:
        """Pass over frames, decoding them: those that follow are made of them. Their bytes count with the next."""
        for _ in range(frames):
            self._next()
        return 0

    def read(self) -> Frame:
        picture = self._next().to_image()
        encoded_bytes, self._bytes = self._bytes, 0
        return Frame(picture, encoded_bytes)

    def close(self) -> None:
        self._container.close()

    def _next(self):
        import av

        try:
            return next(self._frames)
        except (av.FFmpegError, OSError) as error:
            raise _damaged_video(self._path, error) from error

    def _decoded(self, stream) -> Iterator:
        """Frames without end; DataError where a whole pass over the file gives none."""
        while True:
            found = 0
            for packet in self._container.demux(stream):
                self._bytes += packet.size
                for frame in packet.decode():
                    found += 1
                    yield frame
            if not found:
                raise _damaged_video(self._path, "not one frame can be decoded")
            self._container.seek(0)


class Camera:
    """A live source: a thread reads its packets as they come, and notes when each did.

    The newest `queue` packets wait; without `drop`, all of them do. device: such as /dev/video0, opened by FFmpeg's
    v4l2 (Linux). A frame is decoded when its turn comes; where its format builds frames on those before (H.264),
    a dropped one spoils the next, so ask the camera for MJPEG or raw frames, which is what they give by themselves.
    """

    def __init__(self, device: str, fps: float, queue: int | None, *, format: str = "v4l2"):
        if device.startswith(_CAMERA):
            number = device.removeprefix(_CAMERA)
            if not number.isdecimal():
                raise InputError("A camera is named by its number", received=device, allowed="camera:0, /dev/video0")
            device = f"{_DEVICE}{number}"
        self._device = device
        options = {"framerate": f"{fps:g}"} if format == "v4l2" else {}
        self._container = _open(device, format=format, options=options)
        stream = _video_stream(self._container, device)
        self.about = f"camera {device}, {stream.codec_context.width} x {stream.codec_context.height}"
        self._waiting: deque[Came] = deque(maxlen=queue)
        self._changed, self._stopped, self._failure = threading.Condition(), False, None
        self._arrived = self._bytes = 0
        self._thread = threading.Thread(target=self._capture, args=(stream,), daemon=True)

    def start(self) -> None:
        """From now on frames arrive."""
        self._thread.start()

    def forget(self) -> None:
        """Drop the frames that wait, and count from 0 again."""
        with self._changed:
            self._waiting.clear()
            self._arrived = self._bytes = 0

    def counts(self) -> tuple[int, int]:
        """Frames that have arrived, and those of them that wait."""
        with self._changed:
            return self._arrived, len(self._waiting)

    def take(self, until_s: float) -> Came | None:
        """The frame that has waited longest, as soon as there is one; None from until_s (by perf_counter) on.

        Raises DataError where the camera has gone or gives nothing for 5 s.
        """
        with self._changed:
            limit_s = min(max(0.0, until_s - time.perf_counter()), _CAMERA_WAIT_S)
            ready = self._changed.wait_for(lambda: self._waiting or self._failure, limit_s)
            if time.perf_counter() >= until_s:
                return None
            if self._waiting:
                return self._waiting.popleft()
            if self._failure or (not ready and limit_s == _CAMERA_WAIT_S):
                raise DataError(
                    "The camera gives no more frames",
                    received=f"{self._device} ({self._failure or f'none for {_CAMERA_WAIT_S:g} s'})",
                )
            return None

    def decode(self, packet) -> Frame:
        import av

        try:
            return Frame(packet.decode()[0].to_image(), packet.size)
        except (av.FFmpegError, OSError, IndexError) as error:
            raise DataError("A camera's frame cannot be decoded", received=f"{self._device} ({error})") from error

    def close(self) -> None:
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join(2.0)
        if not self._thread.is_alive():
            self._container.close()

    def _capture(self, stream) -> None:
        import av

        failure: object = "it ended"
        try:
            for packet in self._container.demux(stream):
                now_s = time.perf_counter()
                if self._stopped:
                    return
                if not packet.size:
                    continue
                with self._changed:
                    self._bytes += packet.size
                    self._waiting.append(Came(self._arrived, now_s, packet, self._bytes))
                    self._arrived += 1
                    self._changed.notify()
        except (av.FFmpegError, OSError) as error:
            failure = error
        with self._changed:
            self._failure = failure
            self._changed.notify()


def _images(source: Path) -> Iterator[tuple[Path, Callable[[], bytes]]]:
    """The images of a folder, a .zip or a file, in the order of their paths: each with what reads it."""
    if source.suffix.lower() == PACKED and source.is_file():
        try:
            archive = zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError("The .zip of images cannot be read", received=f"{source} ({error})") from error
        with archive:
            for name in sorted(n for n in archive.namelist() if Path(n).suffix.lower() in IMAGES):
                yield source / name, lambda name=name: archive.read(name)
        return
    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGES)
    for path in paths:
        yield path, path.read_bytes


def _decoded(path: Path, content: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
        return picture
    except UnidentifiedImageError as error:
        raise DataError("A file is not an image", received=path, next_step="Remove it or replace it") from error
    except Exception as error:
        # Pillow's decoders raise a dozen kinds of errors for damaged files.
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: object) -> DataError:
    return DataError("An image cannot be read", received=f"{path} ({error})", next_step="Remove it or replace it")


def _open(url: str, **options):
    try:
        import av
    except ImportError as error:
        raise InputError(
            "Videos and cameras need a library that is not installed", received=error,
            next_step="pip install 'tfopt[stream]', or give a folder of images",
        ) from error  # fmt: skip
    av.logging.set_level(None)
    what = "The camera cannot be opened" if options else "The video cannot be opened"
    try:
        return av.open(url, **options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(what, received=f"{url} ({getattr(error, 'strerror', None) or error})") from error


def _video_stream(container, path: str | Path):
    if not container.streams.video:
        raise DataError("The file has no video in it", received=path)
    stream = container.streams.video[0]
    # Threads would decode ahead and hide the cost of a frame.
    stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def _damaged_video(path: str | Path, error: object) -> DataError:
    return DataError("The video is damaged", received=f"{path} ({error})", next_step="Encode it again or use another")
