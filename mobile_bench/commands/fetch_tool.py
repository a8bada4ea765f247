"""`mobile-bench fetch-tool`: the binary that measures on phones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from mobile_bench.commands.shared import Json, bar, print_json, table


def fetch_tool(
    build: Annotated[
        str, typer.Option(help="android_aarch64, android_arm, android_x86_64, linux_aarch64 or linux_arm")
    ] = "android_aarch64",
    sha256: Annotated[str, typer.Option(help="Refuse a binary with another checksum", show_default=False)] = "",
    url: Annotated[
        str, typer.Option(help="Where to get it [default: TensorFlow's nightly builds]", show_default=False)
    ] = "",
    out: Annotated[
        Optional[Path],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(help="Where to put it [default: the cache, where adb targets find it]", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch TFLite's benchmark_model for a phone, and show its checksum.

        mobile-bench fetch-tool

    Exit code 0: it is in place; 1: it cannot be fetched; 2: an option cannot be used, or it is another binary.
    """
    from mobile_bench import tool

    with bar("fetching") as progress:
        found = tool.fetch_tool(build, url=url, out=out, sha256=sha256, progress=progress)
    facts = {
        "path": str(found.path), "sha256": found.sha256, "size_bytes": found.size_bytes, "url": found.url,
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    rows = {
        "SHA-256": found.sha256,
        "Size": f"{found.size_bytes:,} bytes",
        "From": found.url,
        "Next time": f"mobile-bench fetch-tool --build {build} --sha256 {found.sha256}",
    }
    Console().print(table(str(found.path), rows))
