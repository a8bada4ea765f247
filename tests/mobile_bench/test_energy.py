"""Energy from trees like /sys and from logs of meters: right to the joule, or a reason why not."""

import os
import stat
import time

import pytest

from mobile_bench import energy
from mobile_bench.energy import Energy, Reading, find_source
from mobile_bench.errors import InputError

START = 1_700_000_000.0


def zone(root, name, label, microjoules, limit=262_143_328_850):
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


def battery(root, name="BAT0", **values):
    folder = root / "sys/class/power_supply" / name
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in {"type": "Battery", "status": "Discharging", **values}.items():
        (folder / key).write_text(f"{value}\n")
    return folder


def over(source, values, step_s=1.0):
    return source.joules_between([Reading(n * step_s, START + n * step_s, (v,)) for n, v in enumerate(values)])


def meter(tmp_path, text, name="meter.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_rapl_adds_packages_and_memory_and_counts_nothing_twice(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 500_000)
    for name, label in (("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path, name, label, 0)
    source = find_source("auto", tmp_path)
    assert source.name == "RAPL package-0 + dram"
    before = source.read()
    first.write_text("4000000\n")
    memory.write_text("750000\n")
    for path in (tmp_path / "sys/class/powercap").glob("*/energy_uj"):
        if path not in (first, memory):
            path.write_text("9000000\n")
    assert source.joules_between([before, source.read()]) == pytest.approx(3.25)


def test_a_rapl_counter_that_starts_again_is_followed_each_time(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0, limit=10_000_000)
    source = find_source("rapl", tmp_path)
    assert over(source, [9_000_000, 1_000_000, 8_000_000, 2_000_000]) == pytest.approx(2 + 7 + 4)


def test_counters_for_the_superuser_only_are_said_to_be_with_what_to_do(tmp_path, monkeypatch):
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads it all the same
        read = type(path).read_text

        def refuse(self, *args, **options):
            if not stat.S_IMODE(self.stat().st_mode):
                raise PermissionError(13, "Permission denied", str(self))
            return read(self, *args, **options)

        monkeypatch.setattr(type(path), "read_text", refuse)
    with pytest.raises(InputError, match=r"superuser only.*chmod a\+r"):
        find_source("rapl", tmp_path)
    assert find_source("auto", tmp_path) is None
    (said,) = energy.closed_sources(tmp_path)
    assert "chmod a+r" in said and str(path) in said


def test_nothing_to_read_is_not_measured(tmp_path):
    assert find_source("auto", tmp_path) is None and energy.closed_sources(tmp_path) == []
    assert find_source("none", tmp_path) is None
    assert energy.fields_of(None) == {"energy_mj": None, "energy_source": "not measured"}
    for choice, word in (("rapl", "no energy counters"), ("battery", "no battery"), ("meter", "no such source")):
        with pytest.raises(InputError, match=word):
            find_source(choice, tmp_path)


def test_a_counter_that_is_no_number_is_refused(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", "garbage")
    with pytest.raises(InputError, match=r"cannot be read.*energy_uj"):
        find_source("rapl", tmp_path)


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_battery_is_current_times_voltage_whatever_the_sign(tmp_path, sign):
    folder = battery(tmp_path, current_now=f"{sign}500000", voltage_now="4000000")
    source = find_source("auto", tmp_path)
    assert source.name == "battery BAT0" and source.read().values == pytest.approx((2.0,))
    (folder / "current_now").write_text("1000000")
    assert source.read().values == pytest.approx((4.0,))
    assert over(source, [2.0, 4.0, 4.0], step_s=10) == pytest.approx(30 + 40)


def test_a_gauge_without_power_gives_the_fall_of_what_is_left(tmp_path):
    battery(tmp_path, charge_counter="1000000", voltage_now="4000000")
    source = find_source("battery", tmp_path)
    before = source.read()
    battery(tmp_path, charge_counter="999000", voltage_now="4000000")
    assert source.joules_between([before, source.read()]) == pytest.approx(0.001 * 4 * 3600)
    battery(tmp_path, energy_now="50000000")
    assert find_source("battery", tmp_path).read().values == pytest.approx((50 * 3600,))


def test_a_battery_counts_only_while_it_discharges(tmp_path):
    folder = battery(tmp_path, status="Charging", current_now="500000", voltage_now="4000000")
    with pytest.raises(InputError, match=r"discharges.*BAT0: Charging.*Unplug"):
        find_source("battery", tmp_path)
    assert find_source("auto", tmp_path) is None
    (folder / "status").write_text("Discharging")
    source = find_source("battery", tmp_path)
    (folder / "status").write_text("Charging")
    with pytest.raises(InputError, match="discharges"):
        source.read()


def test_a_gauge_that_says_nothing_of_use_is_refused(tmp_path):
    battery(tmp_path, capacity="80")
    with pytest.raises(InputError, match="does not say what it gives"):
        find_source("battery", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "time,power\n{0},2\n{1},2\n{2},6\n{3},6\n",
        "Time (s);Note;Power [W]\n{0};a;2\n{1};b;2\n{2};c;6\n\n{3};d;6\n",
        "amps,timestamp,volts\n0.5,{0},4\n0.5,{1},4\n1.5,{2},4\n1.5,{3},4\n",
    ],
)
def test_a_meter_is_integrated_over_the_run_by_trapezoids(tmp_path, text):
    path = meter(tmp_path, text.format(*(START + s for s in (0, 1, 2, 3))))
    source = find_source(str(path))
    assert source.name == "meter meter.csv"
    # From 0.5 to 2.5 s: half a second at 2 W, a ramp from 2 to 6 W, half a second at 6 W.
    run = [Reading(100.0, START + 0.5), Reading(102.0, START + 2.5)]
    assert source.joules_between(run) == pytest.approx(1 + 4 + 3)


def test_a_wall_clock_that_is_set_back_does_not_move_the_end(tmp_path):
    path = meter(tmp_path, f"time,power\n{START},3\n{START + 1},3\n{START + 2},3\n{START + 3},3\n")
    run = [Reading(100.0, START), Reading(102.0, START - 3600)]
    assert find_source(str(path)).joules_between(run) == pytest.approx(6)


def test_times_may_be_iso_8601(tmp_path):
    path = meter(
        tmp_path, "time,power\n2023-11-14T22:13:20+00:00,5\n2023-11-14T22:13:21Z,5\n2023-11-14T23:13:22+01:00,5\n"
    )
    assert find_source(str(path)).joules_between([Reading(0, START), Reading(2, START + 2)]) == pytest.approx(10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1"),
        ("seconds,milliwatts\n1,2\n", "seconds,milliwatts"),
        ("time,power (mW)\n1,2\n", "columns"),
        ("time,volts\n1,2\n", "volts and amps"),
        ("time,power\n1,2\n2,watt\n", "'watt' in line 3"),
        ("time,power\n1,-2\n", "'-2' in line 2"),
        ("time,power\n1,nan\n", "'nan' in line 2"),
        ("time,power\nyesterday,2\n", "'yesterday' in line 2"),
        ("time,power\n1700000000000,2\n", "'1700000000000' in line 2"),
        ("time,power\n1,2\n3\n", r"cut short.*line 3"),
        ("time,power\n5,2\n4,2\n", "'4' in line 3"),
        ("time,power\n5,2\n5,2\n", "later than 5"),
        ('time,power\n1,"2\n', "not CSV"),
    ],
)
def test_a_wrong_log_is_refused_with_its_line(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        find_source(str(meter(tmp_path, text)))


def test_a_log_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    for name in ("none.csv", "binary.csv"):
        with pytest.raises(InputError, match="cannot be read"):
            find_source(str(tmp_path / name))


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    path = meter(tmp_path, f"time,power\n{START},2\n{START + 1},2\n{START + 2},2")
    run = [Reading(0, START), Reading(1, START + 1)]
    assert find_source(str(path)).joules_between(run) == pytest.approx(2)
    with pytest.raises(InputError, match="does not span"):
        find_source(str(path)).joules_between([Reading(0, START), Reading(2, START + 2)])


def test_a_log_must_span_the_run_without_gaps(tmp_path):
    path = meter(tmp_path, f"time,power\n{START},2\n{START + 1},2\n{START + 30},2\n{START + 31},2\n")
    source = find_source(str(path))
    for first, last in ((-5, 1), (20, 40), (100, 110), (-20, -10)):
        with pytest.raises(InputError, match=r"does not span the run.*2023-11-14T22:13:20Z"):
            source.joules_between([Reading(0, START + first), Reading(last - first, START + last)])
    with pytest.raises(InputError, match=r"gap.*29\.0 s"):
        source.joules_between([Reading(0, START), Reading(31, START + 31)])


def test_a_log_that_is_being_written_is_waited_for(tmp_path):
    import threading

    now = time.time()
    path = meter(tmp_path, f"time,power\n{now - 2},2\n{now - 1},2\n")

    def write():
        time.sleep(0.4)
        path.write_text(f"time,power\n{now - 2},2\n{now - 1},2\n{now + 1},2\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert find_source(str(path)).joules_between([Reading(0, now - 2), Reading(2, now)]) == pytest.approx(4)
    writer.join()


def test_one_reading_is_no_energy(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    source = find_source("rapl", tmp_path)
    with pytest.raises(InputError, match="at the start and one at the end"):
        source.joules_between([source.read()])


def test_gross_and_net_are_both_given():
    used = Energy("RAPL package-0", seconds=10.0, inferences=500, gross_j=100.0, idle_w=4.0)
    assert (used.gross_mj, used.net_j, used.net_mj) == pytest.approx((200.0, 60.0, 120.0))
    assert energy.fields_of(used) == {"energy_mj": pytest.approx(200.0), "energy_source": "RAPL package-0"}
    unknown = Energy("meter m.csv", 10.0, 500, 100.0)
    assert unknown.net_j is None and unknown.net_mj is None
