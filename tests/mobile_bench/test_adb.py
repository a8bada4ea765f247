"""Measuring by adb: a real adbd in a network namespace, and a fake for what a real one cannot be made to do.

The tool on the device is a stand-in: see stand_in_benchmark_model.sh. adbd (34.0.5, Debian's bookworm-backports, with
android-libbase, -libcutils, -liblog, -libboringssl and libprotobuf32) is unpacked with `dpkg-deb -x` into the folder
that TFOPT_ADBD names, else into ~/.cache/tfopt-dev/adbd/root.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mobile_bench.benchmark_model import parse_op_profile
from mobile_bench.compare import verdicts_of
from mobile_bench.errors import InputError, JobFailed, TransportError
from mobile_bench.evaluate import predictions_only
from mobile_bench.inputs import InputSpec
from mobile_bench.measure import measure
from mobile_bench.profile import profile
from mobile_bench.records import Connection, Delegate, Measurement, Target, from_dict, to_dict
from mobile_bench.transports import adb as module
from mobile_bench.transports import android, transport_for

HERE = Path(__file__).parent
TOOL = HERE / "stand_in_benchmark_model.sh"
ADBD = Path(os.environ.get("TFOPT_ADBD", Path.home() / ".cache/tfopt-dev/adbd/root"))
SPEC, IMAGES = InputSpec(12, 12, 3), 5
RECORDED_PROFILE = """\
node type, first, avg_ms, %, cdf%, mem KB, times called, name
CONV_2D, 0.135, 0.128, 76.1%, 76.1%, 0, 1, [a/Relu6, a/add;b]:0
DEPTHWISE_CONV_2D, 0.05, 0.0402, 23.9%, 100%, 0, 2, [b]:1
"""
adbutils = pytest.importorskip("adbutils")


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """What each case of adb_driver.py gave; real.folder holds the predictions."""
    if not (ADBD / "usr/lib/android-sdk/platform-tools/adbd").is_file():
        pytest.skip(f"adbd is not unpacked in {ADBD}; set TFOPT_ADBD to where it is")
    if not shutil.which("unshare") or not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("a network namespace for adbd needs root, unshare and ip")
    isolated = ["unshare", "-n", "-m", "-p", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let us make a network namespace for adbd")
    folder = tmp_path_factory.mktemp("adb")
    np.savez(folder / "sample.npz", images=tiny.images[:IMAGES], labels=tiny.labels[:IMAGES])
    (folder / "spec.json").write_text(json.dumps(SPEC.to_dict()))
    (folder / "profile.csv").write_text(RECORDED_PROFILE)
    # Its own home and folder for logs: adb makes keys and a log there.
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(HERE.parents[1]), "TMPDIR": str(folder)}
    for name in ("ANDROID_SERIAL", "ANDROID_ADB_SERVER_PORT", "ANDROID_ADB_SERVER_HOST"):
        environment.pop(name, None)
    driver = [sys.executable, HERE / "adb_driver.py", folder, ADBD, "15555", tiny.path("int8").parent]
    done = subprocess.run([*isolated, *driver], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(cases=json.loads(done.stdout.splitlines()[-1]), folder=folder)


def gave(real, name):
    case = real.cases[name]
    assert "value" in case, case
    return case["value"]


def test_a_measurement_has_what_the_tool_and_the_device_say(real):
    value = gave(real, "good")
    assert value["latency_ms"] == [2.91, 2.92, 2.93]  # one sample an invocation
    assert (value["load_ms"], value["first_inference_ms"], value["warmup_ms"]) == (6.001, 2.761, [])
    assert value["peak_rss_bytes"] == round(13.1797 * 2**20)
    assert value["input_shape"] == [1, 12, 12, 3]
    assert value["device"]["runtime"] == "benchmark_model"
    assert len(value["device"]["runtime_version"]) == 12
    assert value["device"]["cores"] >= 1
    assert value["load_average"] >= 0
    assert value["place"] == "adb-127.0.0.1:15555"
    assert {"--num_threads=2", "--num_runs=10"} <= set(value["flags"])
    facts = {name: value[name] for name in value.keys() - {"flags", "place"}}
    target = Target("adb", address="127.0.0.1:15555")
    record = Measurement(run_id="1", kind="latency", sha256="0", target=target, status="ok", **facts)
    assert from_dict(Measurement, json.loads(json.dumps(to_dict(record)))) == record


@pytest.mark.parametrize("case", ["old format", "one run"])
def test_older_tools_give_the_same_samples(real, case):
    assert gave(real, case)["latency_ms"] == [2.91, 2.92, 2.93]


def test_a_batch_is_asked_for_by_the_inputs_name(real):
    flags = gave(real, "batch")["flags"]
    assert "--input_layer_shape=2,12,12,3" in flags
    assert any(flag.startswith("--input_layer=serving_default") for flag in flags)


def test_a_delegate_that_takes_all_is_a_measurement(real):
    assert gave(real, "gpu")["device"]["delegated"] == "full"
    assert "--require_full_delegation=true" in gave(real, "gpu")["flags"]


def test_a_fallback_is_a_measurement_only_where_it_is_allowed(real):
    value = gave(real, "gpu in part, allowed")
    assert (value["device"]["delegated"], value["device"]["delegate_kernels"]) == ("partial", 3)
    assert any("part of the model" in warning for warning in value["warnings"])


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("gpu in part", "DelegateError", "3 delegate kernels"),
        ("gpu not at all", "DelegateError", "nothing of the model"),
        ("no gpu in the tool", "DelegateError", "built without it"),
        ("crash", "JobFailed", "SIGSEGV"),
        ("abort", "JobFailed", "SIGABRT"),
        ("cut short", "JobFailed", "cut short"),
        ("refused", "ModelRefused", "Failed to load model"),
        ("clock backwards", "JobFailed", "backwards"),
        ("hangs", "JobFailed", "longer than its limit"),
        ("hangs without timeout", "JobFailed", "longer than its limit"),
        ("interrupted", "KeyboardInterrupt", ""),
        ("no such serial", "TransportError", "adb devices"),
        ("no such port", "TransportError", "is not there"),
        ("no such folder", "TransportError", "folder ="),
        ("no space", "TransportError", "not enough space"),
        ("another module", "InputError", "needs Python"),
        ("evaluate with an old tool", "JobFailed", "--output_filepath"),
        ("unplugged", "TransportError", "went away half-way"),
        ("unplugged", "TransportError", "when it is back, remove "),
    ],
)
def test_each_failure_has_its_kind_and_says_why(real, case, kind, words):
    assert real.cases[case].get("error") == kind, real.cases[case]
    assert words in real.cases[case]["text"]


def test_minutes_on_a_phone_with_what_its_battery_gave(real):
    value = gave(real, "minutes")
    windows, energy = value["windows"], value["energy"]
    assert value["status"] == "ok" and len(windows) >= 2 and not real.cases["minutes"]["left"]
    assert all(window["count"] == 1 and window["median_ms"] > 2.9 and window["p99_ms"] is None for window in windows)
    assert energy["source"] == "Android's charge counter"
    # 2 mAh at 3.85 V a window, but for the last one, whose fall comes after its reading.
    assert value["gross_j"] == pytest.approx(27.72 * (len(windows) - 1)) and energy["inferences"] == len(windows)
    assert any("loading and warming up" in warning for warning in value["warnings"])
    if not list(Path("/sys/class/thermal").glob("thermal_zone*")):
        assert windows[0]["temperature_c"] == 31.2 and any("battery's" in warning for warning in value["warnings"])
    stopped = gave(real, "minutes, interrupted")
    assert (stopped["status"], len(stopped["windows"])) == ("interrupted", 1)
    mains = gave(real, "minutes on mains")
    assert mains["energy"] is None and any("not discharging" in warning for warning in mains["warnings"])
    refused = real.cases["minutes on mains, by its battery"]
    assert refused["error"] == "InputError" and "adb tcpip" in refused["text"]


@pytest.mark.parametrize(
    ("lines", "name", "values", "why"),
    [
        ("voltage=3850|status=3|Charge counter=2500000", "Android's charge counter", (34_650.0,), ""),
        ("voltage=3850|status=3", "Android's battery current", (1.925,), ""),
        ("voltage=3850|status=3|Charge counter=0", "Android's battery current", (1.925,), ""),
        ("voltage=3850|status=2|Charge counter=2500000", None, (), "not discharging"),
        ("voltage=3850|Charge counter=2500000", None, (), "not discharging"),
        ("status=3|Charge counter=2500000", None, (), "voltage"),
        ("voltage=unknown|status=3|Charge counter=2500000", None, (), "voltage"),
    ],
)
def test_what_a_battery_tells(lines, name, values, why):
    """2500 mAh at 3.85 V are 34,650 J; half an ampere is 1.925 W."""
    said = "".join(f"battery {line}\n" for line in lines.split("|")) + "current=-500000\n"
    facts, found, reason = android.battery(said)
    assert (facts.get("name"), found) == (name, pytest.approx(values)) and why in reason and bool(why) == bool(reason)
    silent = android.battery("battery voltage=3850\nbattery status=3\n")
    assert silent[:2] == ({}, ()) and "neither its charge counter nor" in silent[2]


def test_files_take_turns_there(real):
    value = gave(real, "compare")
    assert value["pushed"] == ["tflite_0.tflite", "tflite_1.tflite"]
    rounds = [answer["blocks"] for answer in value["rounds"]]
    assert [[len(turn) for turn in turns] for turns in rounds] == [[2, 2, 2], [2, 2, 2]]
    (verdict,) = verdicts_of(rounds * 3, ["0", "1"])
    assert (verdict.verdict, round(verdict.ratio, 1)) == ("slower", 1.1)


def test_the_tools_profile_is_read(real):
    value = gave(real, "profile")
    assert [(op["node_type"], op["avg_ms"]) for op in value["ops"]] == [
        ("CONV_2D", 0.128),
        ("DEPTHWISE_CONV_2D", 0.0402),
    ]
    assert (value["unprofiled_median_ms"], value["profiled_median_ms"]) == (2.781, 2.781)


def test_a_profile_by_adb_has_shares(phone, tiny, monkeypatch):
    ops = [asdict(op) for op in parse_op_profile(RECORDED_PROFILE)]
    answer = {"ops": ops, "unprofiled_median_ms": 2.0, "profiled_median_ms": 2.1, "runtime": "benchmark_model x"}
    phone({"A1": "device"})
    monkeypatch.setattr(module.Adb, "run", lambda *_, **__: answer)
    found = profile(tiny.path("int8"), Target("adb", address="A1"), connection=Connection("A1", tool=str(TOOL)))
    assert [round(op.share, 3) for op in found.ops] == [0.761, 0.239]
    assert found.total_ms == pytest.approx(0.1682) and found.by_type[0].name == "CONV_2D"


@pytest.mark.parametrize("model", ["int8", "float32"])
def test_a_file_answers_there_as_here(real, tiny, model):
    here = predictions_only(tiny.path(model), tiny.images[:IMAGES], SPEC)
    assert np.load(real.folder / f"{model}.npy").tolist() == here.tolist()
    value = gave(real, f"evaluate {model}")
    assert value["correct"] == int(np.sum(here == tiny.labels[:IMAGES]))
    assert value["said"][-1] == {"kind": "progress", "done": IMAGES, "total": IMAGES}


def test_nothing_is_left_on_the_device_or_in_the_server(real):
    cases = {name: case for name, case in real.cases.items() if name not in ("gone", "unplugged")}
    assert {name: (case["left"], case["devices"], case["running"]) for name, case in cases.items()} == dict.fromkeys(
        cases, ([], [], 0)
    )


def test_no_name_is_run_by_a_shell(real):
    """The folder's name and a serial would have made files named 'gone'."""
    assert real.cases["gone"] == []


class Channel:
    """A connection to the server: `answer` tells the parts of what comes for a command; an exception is raised."""

    def __init__(self, answer):
        self.answer, self.conn = answer, self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send_command(self, command):
        self.parts = list(self.answer(command))

    def check_okay(self):
        pass

    def read_string_block(self):
        return self.parts[0]

    def settimeout(self, seconds):
        pass

    def recv(self, size):
        part = self.parts.pop(0) if self.parts else b""
        if isinstance(part, Exception):
            raise part
        return part

    def close(self):
        pass


class Phone:
    """adbutils' client, device and sync in one. fails(command) gives the parts of an answer, or None for success."""

    def __init__(self, states, fails=lambda command: None, push_error=None):
        self.states, self.fails, self.push_error, self.commands, self.serials = states, fails, push_error, [], []
        self.sync = self

    def make_connection(self):
        return Channel(lambda command: ["".join(f"{serial}\t{state}\n" for serial, state in self.states.items())])

    def device(self, serial):
        self.serials.append(serial)
        return self

    def open_transport(self, timeout):
        return Channel(self.answer)

    def answer(self, command):
        self.commands.append(command)
        parts = self.fails(command)
        return [f"\n{command.split('echo ')[-1].partition(':')[0]}:0\n".encode()] if parts is None else parts

    def push(self, *_, check):
        if self.push_error:
            raise self.push_error


@pytest.fixture
def phone(monkeypatch):
    def make(*args, **options):
        made = Phone(*args, **options)
        monkeypatch.setattr(module, "_start_server", lambda adbutils: None)
        monkeypatch.setattr(module, "_SETTLE_S", 0.2)
        monkeypatch.setattr(adbutils, "AdbClient", lambda **_: made)
        return made

    return make


def connect(serial="A1", **changes):
    return transport_for(Target("adb", address=serial), Connection(serial, tool=str(TOOL), **changes))


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ("unauthorized", "Accept the dialog"),
        ("offline", "reconnect"),
        ("no permissions (user in plugdev group?)", "udev"),
        ("recovery", "adb devices"),
    ],
)
def test_a_device_that_does_not_let_us_in(phone, state, advice):
    phone({"A1": state})
    with pytest.raises(TransportError, match=advice), connect():
        pass


def test_another_device_is_never_taken_in_its_place(phone):
    made = phone({"B2": "device", "C3": "device"})
    with pytest.raises(TransportError, match=r"B2 \(device\), C3 \(device\)"), connect():
        pass
    assert made.serials == []


def test_a_server_that_is_gone(phone):
    made = phone({})
    made.make_connection = lambda: (_ for _ in ()).throw(adbutils.AdbError("connect to adb server failed"))
    with pytest.raises(TransportError, match="cannot be reached"), connect():
        pass


@pytest.mark.parametrize("serial", ["a b", "it's", 'say "hi"', "x; reboot", "$(reboot)"])
def test_a_serial_reaches_the_server_as_it_is_and_no_shell(phone, serial):
    made = phone({serial: "device"})
    with connect(serial) as transport:
        assert transport.place == f"adb-{serial}"
    assert made.serials == [serial]
    assert not any(serial in command for command in made.commands)


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), EOFError("no more"), adbutils.AdbError("closed")])
def test_unplugged_while_the_tool_runs(phone, tiny, error):
    made = phone({"A1": "device"}, lambda command: [b"INFO: STA", error] if "--graph" in command else None)
    with pytest.raises(TransportError, match="cannot be reached") as caught, connect() as transport:
        made.fails = lambda command: [b"INFO: STA", error] if "--graph" in command or "rm -rf" in command else None
        job = {"threads": 1, "runs": 1, "max_runs": 1, "batch": 1, "spec": None}
        transport.run("mobile_bench.worker", job, files={"tflite": tiny.path("int8")})
    assert "running a command" in str(caught.value)
    assert any("rm -rf" in command for command in made.commands), "it was tried, and its failure hid nothing"


def test_unplugged_while_the_tool_is_sent(phone):
    phone({"A1": "device"}, push_error=BrokenPipeError("pipe"))
    with pytest.raises(TransportError, match="sending benchmark_model"), connect():
        pass


def test_a_measurement_on_a_device_that_went_away_is_a_record(phone, tiny):
    phone({"A1": "device"}, lambda command: [b"INFO: "] if "--graph" in command else None)
    found = measure(tiny.path("int8"), Target("adb", address="A1"), connection=Connection("A1", tool=str(TOOL)))
    assert (found.status, "went away" in found.reason) == ("failed", True)


def test_a_reference_that_nobody_would_look_at_is_refused(tiny):
    target, tool = Target("adb", "gpu", "A1"), Connection("A1", tool=str(TOOL))
    with pytest.raises(InputError, match="compares it with no other"):
        measure(tiny.path("int8"), target, connection=tool, delegate=Delegate(reference=str(tiny.path("float32"))))


def test_without_a_tool_or_adbutils_nothing_is_tried(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="benchmark_model"):
        transport_for(Target("adb", address="A1"), Connection("A1"))
    with pytest.raises(InputError, match="benchmark_model"):
        transport_for(Target("adb", address="A1"), Connection("A1", tool=str(tmp_path / "none")))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tfopt\[remote\]"):
        connect()


def test_the_time_limit_counts_before_the_tool_is_started(phone, tiny):
    phone({"A1": "device"})
    job = {"threads": 1, "runs": 1, "max_runs": 1, "batch": 1, "spec": None}
    with pytest.raises(JobFailed, match="limit"), connect() as transport:
        transport.run("mobile_bench.worker", job, files={"tflite": tiny.path("int8")}, timeout_s=1e-9)


def test_what_android_says_about_itself():
    said = """\
ro.product.model=Pixel 8
ro.soc.model=Tensor G3
ro.build.version.release=14
governor=sched_pixel
khz=1803000
zone BIG=41000
zone cpu-0=52500
zone battery=30100
battery USB powered=true
battery temperature=301
load=1.25 1.0 0.9 2/300 42
cores=9
memory=7700000 kB
machine=aarch64
"""
    state, facts = android.read(said)
    assert (state.temperature_c, state.power, state.frequency_mhz) == (52.5, "mains", 1803.0)
    assert facts["battery_temperature_c"] == 30.1
    assert {"board": "Pixel 8", "cpu": "Tensor G3", "os": "Android 14", "cores": 9}.items() <= facts.items()
    assert facts["load_average"] == 1.25
    assert android.read("")[1] == {}
    assert android.free_bytes("Filesystem 1K-blocks Used Available\n/dev/x 100 40 60 40% /data\n") == 61440
