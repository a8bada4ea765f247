"""TFLite's benchmark_model for Android: fetched once, into a cache, with its checksum shown.

It comes from TensorFlow's own nightly builds, which change: the SHA-256 of what arrived is what tells two of them
apart, and `sha256` refuses another one.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import stat
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mobile_bench.errors import InputError, TransportError, unknown_name
from mobile_bench.files import atomic_path

#: Named at https://ai.google.dev/edge/litert/models/measurement (native benchmark binary).
URL = (
    "https://storage.googleapis.com/tensorflow-nightly-public/prod/tensorflow/release/lite/tools/nightly/latest/"
    "{build}_benchmark_model"
)
#: Build -> e_machine in its ELF header (System V ABI).
BUILDS = {"android_aarch64": 183, "android_arm": 40, "android_x86_64": 62, "linux_aarch64": 183, "linux_arm": 40}
DEFAULT_BUILD = "android_aarch64"
_ANSWER_S, _MOST_BYTES, _PART = 30, 256 << 20, 1 << 16


@dataclass(frozen=True)
class Tool:
    """A fetched binary. sha256 in hex."""

    path: Path
    sha256: str
    size_bytes: int
    url: str


def default_path(build: str = DEFAULT_BUILD) -> Path:
    """Where fetch puts it, and where a target by adb looks when its entry names no tool."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mobile-bench" / "tools" / f"{build}_benchmark_model"


def fetch_tool(
    build: str = DEFAULT_BUILD, *, url: str = "", out: str | Path | None = None, sha256: str = "",
    progress: Callable[[int, int | None], None] | None = None,
) -> Tool:  # fmt: skip
    """Download the binary, check that it is one for that processor, and put it in place, executable.

    url: another place to get it from, '{build}' is filled in. sha256: refuse any other content. progress(bytes
    so far, bytes in all or None). Raises InputError for what cannot be asked for or is not such a binary, and
    TransportError where it cannot be got; what was in place before then stays.
    """
    if build not in BUILDS:
        raise unknown_name("build", build, tuple(BUILDS))
    wanted = sha256.strip().lower()
    if wanted and (len(wanted) != 64 or set(wanted) - set("0123456789abcdef")):
        raise InputError("This is not a SHA-256", received=sha256, allowed="64 hexadecimal digits")
    source = (url or URL).replace("{build}", build)
    if not source.startswith(("https://", "http://")):
        raise InputError("The tool's address cannot be used", received=source, allowed="https://…")
    path = Path(out) if out else default_path(build)
    if path.is_dir():
        path /= f"{build}_benchmark_model"
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            found, size = _download(source, file, progress)
        _check(temporary, build, source)
        if wanted and found != wanted:
            raise InputError(
                "The tool is not the one that was asked for", received=f"SHA-256 {found}", allowed=wanted,
                next_step="Ask whoever gave you the checksum; the nightly builds change",
            )  # fmt: skip
        temporary.chmod(temporary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return Tool(path, found, size, source)


def _download(source: str, file, progress: Callable | None) -> tuple[str, int]:
    """The SHA-256 and the size of what was written."""
    digest, size = hashlib.sha256(), 0
    try:
        # urlopen keeps the proxies of its first call for the life of the process.
        with urllib.request.build_opener().open(source, timeout=_ANSWER_S) as answer:
            length = answer.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            while part := answer.read(_PART):
                size += len(part)
                if size > _MOST_BYTES:
                    raise InputError("The tool is too large to be one", received=source, allowed="up to 256 MiB")
                digest.update(part)
                file.write(part)
                if progress:
                    progress(size, total)
    except urllib.error.HTTPError as error:
        raise TransportError("The tool cannot be fetched", received=f"{source} (HTTP {error.code})") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise TransportError(
            "The tool cannot be fetched", received=f"{source} ({getattr(error, 'reason', error)})",
            next_step="Look at the network and the proxy, or fetch it by hand and name it as tool = \"…\"",
        ) from error  # fmt: skip
    if total is not None and size != total:
        raise TransportError("The download was cut short", received=f"{size} of {total} bytes of {source}")
    return digest.hexdigest(), size


def _check(path: Path, build: str, source: str) -> None:
    with open(path, "rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF":
        raise InputError("What was fetched is not a program", received=f"{source}, which starts with {head[:8]!r}")
    machine = int.from_bytes(head[18:20], "little")
    if machine != BUILDS[build]:
        raise InputError(
            "What was fetched is for another processor", received=f"ELF machine {machine}",
            allowed=f"{BUILDS[build]} for {build}",
        )  # fmt: skip
