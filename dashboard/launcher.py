"""Start the pages with Streamlit, as `python -m dashboard` and `make dashboard` do."""

from __future__ import annotations

from pathlib import Path

from mobile_bench.errors import InputError

APP = Path(__file__).with_name("app.py")


def launch(study: str | Path = "saved_models", port: int | None = None, headless: bool = False) -> None:
    """Serve a study, or all studies of a folder, in this process until it is interrupted.

    port: 8501 or the next free one by default. headless: open no browser. Raises InputError when the
    folder does not exist, the port cannot be used or Streamlit is not installed.
    """
    study = Path(study).expanduser()
    if not study.is_dir():
        raise InputError(
            "There is no such folder to show", received=study, allowed="a study, or a folder of studies",
            next_step="Make one with: make demo",
        )  # fmt: skip
    if port is not None and not 1 <= port <= 65535:
        raise InputError("The port is out of range", received=port, allowed="1 to 65535")
    try:
        from streamlit.web import cli
    except ImportError as error:
        raise InputError(
            "The dashboard needs Streamlit", received=error, next_step="Install it: pip install 'tfopt[dashboard]'"
        ) from error
    cli.main(arguments(study, port, headless), prog_name="streamlit", standalone_mode=False)


def arguments(study: Path, port: int | None = None, headless: bool = False) -> list[str]:
    """What `streamlit` is told: local only, no usage statistics, no watching of source files."""
    options = {
        "browser.gatherUsageStats": "false",
        "server.fileWatcherType": "none",
        "server.showEmailPrompt": "false",
        "server.headless": str(headless).lower(),
        "server.address": "localhost",
        "client.toolbarMode": "viewer",
        **({"server.port": str(port)} if port else {}),
    }
    return ["run", str(APP), *(f"--{name}={value}" for name, value in options.items()), "--", str(study)]
