"""Fetching benchmark_model, from a server on loopback."""

import hashlib
import http.server
import json
import os
import sys
import threading

import pytest

from mobile_bench import tool
from mobile_bench.cli import main
from mobile_bench.errors import InputError, TransportError
from mobile_bench.records import Connection
from mobile_bench.targets import find_places
from mobile_bench.transports import transport_for

BINARY = b"\x7fELF\x02\x01\x01" + bytes(11) + (183).to_bytes(2, "little") + bytes(range(256)) * 700


@pytest.fixture
def server(monkeypatch, tmp_path):
    """server.url('name') serves server.files['name']; a name that is not there is 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path.strip("/"))
            self.send_response(200 if content is not None else 404)
            length = len(content or b"") + (1000 if "short" in self.path else 0)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    files = {
        "android_aarch64_good": BINARY,
        "short": BINARY,
        "page": b"<html>",
        "arm": BINARY.replace(b"\xb7", b"\x28", 1),
    }
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_it_is_put_in_place_executable_with_its_checksum(server):
    seen = []
    found = tool.fetch_tool(url=server + "/{build}_good", progress=lambda *at: seen.append(at))
    assert found.path == tool.default_path() and found.path.read_bytes() == BINARY
    assert os.access(found.path, os.X_OK)
    assert found.sha256 == hashlib.sha256(BINARY).hexdigest() and found.size_bytes == len(BINARY)
    assert seen[-1] == (len(BINARY), len(BINARY))
    (place,) = find_places(["adb:A1"])
    assert transport_for(place.target, place.connection).tool == found.path
    assert list(found.path.parent.iterdir()) == [found.path]


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("none", {}, TransportError, "HTTP 404"),
        ("short", {}, TransportError, "cut short"),
        ("page", {}, InputError, "not a program"),
        ("arm", {}, InputError, "another processor"),
        ("android_aarch64_good", {"sha256": "0" * 64}, InputError, "not the one"),
        ("android_aarch64_good", {"sha256": "abc"}, InputError, "64 hexadecimal"),
        ("android_aarch64_good", {"build": "android_mips"}, InputError, "android_arm"),
    ],
)
def test_what_was_there_stays_when_another_cannot_be_had(server, name, options, error, words):
    before = tool.fetch_tool(url=server + "/android_aarch64_good").path
    with pytest.raises(error, match=words):
        tool.fetch_tool(url=f"{server}/{name}", **options)
    assert before.read_bytes() == BINARY and list(before.parent.iterdir()) == [before]


def test_a_server_that_is_not_there_and_a_strange_address():
    with pytest.raises(TransportError, match="cannot be fetched"):
        tool.fetch_tool(url="http://127.0.0.1:1/x")
    with pytest.raises(InputError, match="https"):
        tool.fetch_tool(url="file:///etc/passwd")


def test_the_command_shows_the_checksum(server, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["mobile-bench", "fetch-tool", "--url", server + "/android_aarch64_good", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and said["sha256"] == hashlib.sha256(BINARY).hexdigest()


def test_without_it_a_phone_says_how_to_get_it(monkeypatch, tmp_path):
    pytest.importorskip("adbutils")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="mobile-bench fetch-tool"):
        transport_for(find_places(["adb:A1"])[0].target, Connection("A1"))
