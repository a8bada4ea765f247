"""Which device is meant: URLs, inventories, and what is wrong with them."""

import json
import signal
import sys
import threading

import pytest

from mobile_bench.errors import InputError, Interrupted
from mobile_bench.measure import measure_on
from mobile_bench.records import Connection, Target
from mobile_bench.targets import Place, find_places, read_inventory


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def inventory(tmp_path, text):
    path = tmp_path / "boards.toml"
    path.write_text(text)
    return path


def test_urls_need_no_inventory():
    assert find_places(["local", "ssh://pi@board:2222", "adb:R58M 1;2", "local"]) == [
        Place("local", Target()),
        Place("ssh://pi@board:2222", Target("ssh", address="pi@board:2222"), Connection("pi@board", 2222)),
        Place("adb:R58M 1;2", Target("adb", address="R58M 1;2"), Connection("R58M 1;2")),
    ]
    (place,) = find_places(["ssh://[fe80::1]:22"])
    assert place.connection == Connection("fe80::1", 22)


def test_an_inventory_names_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = inventory(
        tmp_path,
        """
        [targets.pi]
        url = "ssh://pi@raspberry"
        threads = 4
        runtime = "tflite-runtime"
        identity_file = "~/key"
        [targets.phone]
        url = "adb:R58"
        accelerator = "gpu"
        tool = "/opt/benchmark_model"
        [targets.here]
        url = "local"
        threads = 2
        """,
    )
    phone, pi, here = find_places(["phone", "pi", "here"], path)
    assert phone.target == Target("adb", "gpu", "R58") and phone.connection.tool == "/opt/benchmark_model"
    assert pi.target == Target("ssh", address="pi@raspberry", threads=4, runtime="tflite-runtime")
    assert pi.connection == Connection("pi@raspberry", identity_file="/home/me/key")
    assert here == Place("here", Target(threads=2))
    path.rename(tmp_path / "targets.toml")
    assert find_places(["here"]) == [here], "targets.toml in the current folder is read unasked"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[targets.a]", "no url"),
        ("[targets.a]\nurl = 'http://x'", "ssh://user@host"),
        ("[targets.a]\nurl = 'ssh://'", "cannot be used"),
        ("[targets.a]\nurl = 'ssh://me:secret@x'", "password"),
        ("[targets.a]\nurl = 'ssh://x:99999'", "cannot be used"),
        ("[targets.a]\nurl = 'ssh://-oProxyCommand=x'", "cannot be used"),
        ("[targets.a]\nurl = 'adb:'", "cannot be used"),
        ("[targets.a]\nurl = 'local'\nthreads = 0", "1 to 256"),
        ("[targets.a]\nurl = 'local'\nthreads = '2'", "wrong type"),
        ("[targets.a]\nurl = 'local'\ntool = 'x'", "tool"),
        ("[targets.a]\nurl = 'local'\nthread = 2", "Did you mean threads"),
        ("[target.a]\nurl = 'local'", "Did you mean targets"),
        ("[targets.local]\nurl = 'local'\nthreads = 2", "has a meaning already"),
        ("targets = 3", "no targets"),
        ("[targets", "cannot be read"),
    ],
)
def test_what_is_wrong_with_an_inventory_is_said(tmp_path, text, words):
    with pytest.raises(InputError) as caught:
        read_inventory(inventory(tmp_path, text))
    assert words in str(caught.value) and "secret" not in str(caught.value)


def test_an_unknown_name_shows_what_exists(tmp_path):
    path = inventory(tmp_path, "[targets.raspberry]\nurl = 'ssh://pi@x'")
    with pytest.raises(InputError, match="Did you mean raspberry"):
        find_places(["rasberry"], path)
    with pytest.raises(InputError, match="adb:SERIAL"):
        find_places(["rasberry"])
    with pytest.raises(InputError, match="cannot be read"):
        find_places(["x"], tmp_path / "none.toml")


def test_one_place_that_fails_does_not_stop_the_others(tiny, tmp_path, monkeypatch):
    """A transport that cannot be reached beside this machine: two records, one with a reason."""
    from mobile_bench import measure as measuring
    from mobile_bench.errors import TransportError

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Unplugged:
        place = "adb-gone"

        def __enter__(self):
            raise TransportError("The device went away")

        def __exit__(self, *_): ...

    real = measuring.transport_for
    monkeypatch.setattr(
        measuring, "transport_for", lambda target, c: Unplugged() if target.transport == "adb" else real(target, c)
    )
    said = []
    found = measuring.measure_on(
        find_places(["adb:gone", "local"]), tiny.path("float32"), max_runs=50,
        on_progress=lambda place, message: said.append(place.name),
    )  # fmt: skip
    assert [m.status for m in found] == ["failed", "ok"] and "went away" in found[0].reason
    assert set(said) == {"local"} and found[0].target.address == "gone"


def test_a_phone_without_its_tool_is_a_record_and_the_others_go_on(tiny, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    found = measure_on(find_places(["adb:A1", "local"]), tiny.path("float32"), max_runs=50)
    assert [m.status for m in found] == ["refused", "ok"] and "benchmark_model" in found[0].reason
    assert found[0].target.address == "A1" and found[0].sha256 == found[1].sha256
    with pytest.raises(InputError, match="1 to"):
        measure_on(find_places(["adb:A1", "local"]), tiny.path("float32"), runs=0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_interrupt_keeps_what_each_place_has_measured(tiny, tmp_path, monkeypatch):
    """Both are this machine, so that the second waits for the first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = inventory(tmp_path, "[targets.a]\nurl = 'local'\n[targets.b]\nurl = 'local'")
    heard = []

    def interrupt(place, message):
        heard.append(place.name)
        if message.get("done") == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(Interrupted) as caught:
            measure_on(find_places(["a", "b"], path), tiny.path("float32"), rounds=50, on_progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    by_place = [found for found in caught.value.kept if found]
    assert len(by_place) == 1 and len(caught.value.kept) == 2 and 2 <= len(by_place[0].rounds) < 50


def test_the_command_measures_where_the_inventory_says(run_python, tiny, tmp_path):
    path = inventory(tmp_path, "[targets.two]\nurl = 'local'\nthreads = 2")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ("-m", "mobile_bench", "run", tiny.path("int8"), "--inventory", path)
    done = run_python(*command, "--target", "two", "--target", "local", "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measurements"]
    assert [m["measurement"]["target"]["threads"] for m in found] == [2, 1]
    done = run_python(*command, "--target", "tow", environment=environment)
    assert done.returncode == 2 and "Did you mean two" in done.stderr
