"""What makes a measurement doubtful, read from recorded /proc and /sys trees and from this machine."""

import os
import subprocess
import sys
import time

import pytest

from mobile_bench import trust
from mobile_bench.errors import JobFailed
from mobile_bench.trust import State, between, read_state, warnings_of


@pytest.fixture
def board(tmp_path):
    """A Raspberry Pi's files, as far as they matter here."""
    files = {
        "proc/stat": "cpu  100 0 50 800 5 0 1 44 0 0\ncpu0 1 2 3",
        "proc/7/stat": "7 (a (b) c) S 1 7 7 0 -1 0 0 0 0 0 30 12 0 0 20 0 1 0 0 0 0",
        "proc/cut/stat": "",
        "proc/8/stat": "8 (short) S 1",
        "proc/cpuinfo": "processor : 0\nmodel name : ARMv8\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "61234",
        "sys/class/thermal/thermal_zone1/type": "charger",
        "sys/class/thermal/thermal_zone1/temp": "90000",
        "sys/class/power_supply/BAT0/status": "Discharging",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_state_of_a_board(board):
    state = read_state(board)
    assert (state.frequency_mhz, state.temperature_c, state.power) == (1500.0, 61.234, "battery")
    assert (state.steal_ticks, state.all_ticks) == (44, 1000)
    assert state.ticks == {7: ("a (b) c", 42)}
    (board / "sys/class/power_supply/AC").mkdir()
    (board / "sys/class/power_supply/AC/online").write_text("1")
    assert read_state(board).power == "mains"


def test_a_machine_that_says_nothing_has_no_state(tmp_path):
    state = read_state(tmp_path)
    assert (state.frequency_mhz, state.temperature_c, state.power, state.steal_ticks) == (None, None, "", None)
    assert state.ticks == {} and set(between(state, state)) == {"seconds", "busy", "busy_cores"}


def test_what_others_used_is_the_difference_of_two_readings():
    hertz = os.sysconf("SC_CLK_TCK")
    before = State(10.0, 2000.0, 50.0, "", 10, 1000, {1: ("init", 5), 2: ("build", 100), 3: ("worker", 0)})
    ticks = {1: ("init", 5), 2: ("build", 100 + hertz), 3: ("worker", 2 * hertz), 4: ("new", hertz // 2)}
    found = between(before, State(12.0, 1500.0, 70.0, "", 60, 2000, ticks), own=3)
    assert found["busy"] == [
        {"name": "build", "pid": 2, "cores": 0.5},
        {"name": "new", "pid": 4, "cores": 0.25},
    ]
    assert found["busy_cores"] == 0.75 and found["steal_share"] == 0.05
    assert found["frequency_mhz"] == [2000.0, 1500.0] and found["temperature_c"] == [50.0, 70.0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_busy_neighbour_is_named():
    before = read_state()
    loop = "import sys; print('on', flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE, text=True) as child:
        try:
            child.stdout.readline()
            time.sleep(0.5)
            found = between(before, read_state())
        finally:
            child.kill()
    assert child.pid in [process["pid"] for process in found["busy"]]
    assert os.getpid() not in [process["pid"] for process in found["busy"]]


QUIET = {"busy_cores": 0.02, "busy": [], "steal_share": 0.0, "frequency_mhz": [2000.0, 2000.0], "power": "mains"}


def warned(during=None, **changes):
    facts = {"cores": 4, "governor": changes.pop("governor", "performance")}
    given = {"load_average": 0.2, "threads": 1, "steady": True, "warmup_runs": 20, **changes}
    return warnings_of(facts, during={**QUIET, **(during or {})}, **given)


def test_a_quiet_machine_gives_no_warning():
    assert warned() == [] and warned({"temperature_c": [50.0, 60.0]}) == []
    assert warnings_of({}, None, 1, {}, True, 5) == []


@pytest.mark.parametrize(
    ("during", "changes", "words"),
    [
        ({}, {"load_average": 6.1}, "load average was 6.1"),
        ({}, {"threads": 8}, "--threads 4"),
        ({}, {"governor": "powersave"}, "cpupower"),
        ({}, {"steady": False}, "20 warm-up runs"),
        (
            {"busy_cores": 0.5, "busy": [{"name": "cc1", "pid": 9, "cores": 0.5}]},
            {},
            "cc1 (process 9: 0.50); end them",
        ),
        ({"steal_share": 0.07}, {}, "7.0% of the processor time (above 2%)"),
        ({"temperature_c": [70.0, 85.2]}, {}, "at 85 °C (from 80 on"),
        ({"frequency_mhz": [2000.0, 1200.0]}, {}, "fell from 2000 to 1200 MHz"),
        ({"power": "battery"}, {}, "plug it in"),
    ],
)
def test_a_warning_carries_the_number_and_what_to_do(during, changes, words):
    (text,) = warned(during, **changes) if "threads" not in changes else warned(during, **changes)[-1:]
    assert words in text


def test_a_measurement_says_what_happened_meanwhile(tiny, tmp_path, monkeypatch):
    from mobile_bench.measure import measure

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = measure(tiny.path("float32"), max_runs=50, rounds=2, seconds=0)
    during, _ = found.device["during"]
    assert during["seconds"] > 0 and during["busy_cores"] >= 0
    assert trust.BUSY_CORES < 1


def test_the_warnings_of_several_processes_are_each_said_once():
    hot = "the processor was at {} °C (from 80 on it may throttle)"
    found = trust.of_processes([[hot.format(81)], [], [hot.format(85), "it ran on its battery"]])
    assert found == (f"{hot.format(81)} (in 2 of 3 processes)", "it ran on its battery (in 1 of 3 processes)")
    assert trust.of_processes([[hot.format(81)]]) == (hot.format(81),)


def test_another_runtime_half_way_is_another_target():
    one = {"cpu": "A", "machine": "x86_64", "runtime": "r", "runtime_version": "1"}
    trust.check_same_machine([one, dict(one)])
    with pytest.raises(JobFailed, match="different machines or runtimes"):
        trust.check_same_machine([one, {**one, "runtime_version": "2"}])
