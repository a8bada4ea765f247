"""Which device is meant: URLs, inventories, and what is wrong with them."""

import pytest

from mobile_bench.errors import InputError
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
