"""A real delegate, a real GPU runtime, a real sshd and a made-up /sys for the tests of this folder."""

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mobile_bench.records import Connection

from .ssh_board import serving


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    """The path of a delegate's library; skips where nothing compiles C."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler here to make a delegate with: apt install gcc libc6-dev")
    library = tmp_path_factory.mktemp("delegate") / "adder.so"
    source = Path(__file__).with_name("adder_delegate.c")
    made = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return library


@pytest.fixture(scope="session")
def swiftshader(tmp_path_factory):
    """The environment in which a process finds SwiftShader, a GPU in software; skips where it is not at hand.

    It is in Debian's chromium-common, the loader in libvulkan1 (tests/install_services.sh installs both). Without
    them installed, both libraries may lie in the folder that TFOPT_SWIFTSHADER names.
    """
    own = os.environ.get("TFOPT_SWIFTSHADER")
    folder = Path(own or "/usr/lib/chromium")
    driver = folder / "libvk_swiftshader.so"
    if not driver.is_file():
        pytest.skip(f"no GPU in software here: {driver} is not there; run tests/install_services.sh")
    if not (folder / "libvulkan.so.1").is_file() and not ctypes.util.find_library("vulkan"):
        pytest.skip("no Vulkan loader here: apt install libvulkan1")
    work = tmp_path_factory.mktemp("swiftshader")
    facts = {"library_path": str(driver), "api_version": "1.3.0"}
    (work / "icd.json").write_text(json.dumps({"file_format_version": "1.0.0", "ICD": facts}))
    known = [own, os.environ.get("LD_LIBRARY_PATH")]
    return {
        "VK_DRIVER_FILES": str(work / "icd.json"), "XDG_RUNTIME_DIR": str(work),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, known)),
    }  # fmt: skip


@pytest.fixture
def machine(tmp_path):
    """A tree like /sys and /proc with a thermal zone and an energy counter that rises by 2 J every 20 ms."""
    for path, text in (
        ("sys/class/thermal/thermal_zone0/temp", "61000"),
        ("sys/class/thermal/thermal_zone0/type", "cpu-thermal"),
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000"),
        ("sys/class/powercap/intel-rapl:0/name", "package-0"),
        ("sys/class/powercap/intel-rapl:0/energy_uj", "0"),
        ("sys/class/powercap/intel-rapl:0/max_energy_range_uj", "1000000000"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    counter, stop = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj", threading.Event()

    def rise():
        joules = 0
        while not stop.wait(0.02):
            joules += 2
            fresh = counter.with_name("fresh")
            fresh.write_text(f"{joules * 1_000_000}")
            os.replace(fresh, counter)

    thread = threading.Thread(target=rise)
    thread.start()
    yield tmp_path
    stop.set()
    thread.join()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def board(sshd, tmp_path, monkeypatch):
    """A connection to it that works, with a work folder of its own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    place = tmp_path / "board"
    place.mkdir()
    return Connection(
        f"{subprocess.check_output(['id', '-un'], text=True).strip()}@127.0.0.1", sshd.port, str(sshd.folder / "key"),
        str(sshd.folder / "known_hosts"), str(place), sys.executable,
    )  # fmt: skip
