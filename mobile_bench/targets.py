"""Which device is meant: a URL, or a name in an inventory.

local                     this machine
ssh://pi@raspberry.local  a board; :2222 behind it is the port
adb:SERIAL                a phone, by the serial that `adb devices` shows

# targets.toml
[targets.pi]
url = "ssh://pi@raspberry.local"
threads = 4
identity_file = "~/.ssh/id_ed25519"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mobile_bench.errors import InputError, Problem, unknown_name
from mobile_bench.records import Connection, Target

INVENTORY = "targets.toml"
_TARGET_KEYS = ("runtime", "accelerator", "threads")
_CONNECTION_KEYS = tuple(f.name for f in fields(Connection) if f.name not in ("address", "port"))
_PATHS = ("identity_file", "known_hosts", "tool")


@dataclass(frozen=True)
class Place:
    """A target with what it takes to get there. connection is None for this machine."""

    name: str
    target: Target
    connection: Connection | None = None


def find_places(wanted: list[str], inventory: str | Path | None = None) -> list[Place]:
    """The places that were asked for, each a URL or a name in the inventory, in that order, each once.

    inventory: its path; None reads targets.toml in the current folder where there is one. Raises InputError for
    what is neither, and for an inventory that cannot be read.
    """
    path = Path(inventory) if inventory else Path(INVENTORY)
    known = read_inventory(path) if inventory or path.is_file() else {}
    found = []
    for text in dict.fromkeys(wanted):
        if text in known:
            found.append(known[text])
        elif text == "local" or text.startswith(("ssh://", "adb:")):
            found.append(_place(text, text, {}))
        elif known:
            raise unknown_name("target", text, ("local", *known))
        else:
            raise InputError(
                "A target is unknown", received=repr(text), allowed="local, ssh://user@host, adb:SERIAL, or a name in "
                f"{INVENTORY}",
            )  # fmt: skip
    return found


def read_inventory(path: str | Path) -> dict[str, Place]:
    """All targets of a TOML file: name -> Place. Every entry is checked, also those not asked for."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("The inventory cannot be read", received=f"{path} ({error})") from error
    for name in content:
        if name != "targets":
            raise unknown_name("section of an inventory", name, ("targets",))
    entries = content.get("targets")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError("The inventory holds no targets", received=path, allowed="[targets.NAME] with a url")
    places = {}
    for name, entry in entries.items():
        if name == "local" or name.startswith(("ssh://", "adb:")):
            raise InputError(
                "A target's name in the inventory has a meaning already", received=f"[targets.{name}] in {path}",
                allowed="any name but local, ssh://… and adb:…", next_step="Call it something else, such as desk",
            )  # fmt: skip
        try:
            places[name] = _place(name, entry.get("url"), {k: v for k, v in entry.items() if k != "url"})
        except Problem as problem:
            raise InputError(f"{path}, target {name!r}: {problem}") from problem
    return places


def _place(name: str, url: object, settings: dict) -> Place:
    if not isinstance(url, str):
        raise InputError("A target has no url", received=repr(url), allowed="local, ssh://user@host or adb:SERIAL")
    allowed = _TARGET_KEYS if url == "local" else (*_TARGET_KEYS, *_CONNECTION_KEYS)
    for key, value in settings.items():
        if key not in allowed:
            raise unknown_name("setting of a target", key, allowed)
        if not isinstance(value, int if key == "threads" else str) or isinstance(value, bool):
            raise InputError(f"A target's {key} has the wrong type", received=repr(value))
    of_target = {key: settings[key] for key in _TARGET_KEYS if key in settings}
    if url == "local":
        return Place(name, Target(**of_target))
    transport, address, port = _parse(url)
    of_connection = {
        key: str(Path(settings[key]).expanduser()) if key in _PATHS and settings[key] else settings[key]
        for key in _CONNECTION_KEYS
        if key in settings
    }
    shown = address if port is None else f"{address}:{port}"
    return Place(name, Target(transport, address=shown, **of_target), Connection(address, port, **of_connection))


def _parse(url: str) -> tuple[str, str, int | None]:
    if url.startswith("adb:"):
        if serial := url.removeprefix("adb:"):
            return "adb", serial, None
    elif url.startswith("ssh://"):
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InputError("A target's url cannot be used", received=f"{url!r} ({error})") from error
        if host and parts.password is None and not (parts.path.strip("/") or parts.query or parts.fragment):
            user = f"{unquote(parts.username)}@" if parts.username else ""
            return "ssh", f"{user}{host}", port
        if parts.password is not None:
            raise InputError(
                "A password in a target's url would be stored with it", received=f"ssh://{host or ''}",
                next_step="Log in with a key: identity_file in the inventory, or the ssh agent",
            )  # fmt: skip
    raise InputError(
        "A target's url cannot be used", received=repr(url), allowed="local, ssh://user@host[:port] or adb:SERIAL"
    )
