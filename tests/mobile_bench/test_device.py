"""Facts about a machine, from a copy of the files that a Raspberry Pi shows."""

from mobile_bench.device import describe, peak_rss_bytes, usable_cores

PI = {
    "proc/cpuinfo": "processor\t: 0\n\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
    "proc/meminfo": "MemTotal:        3884352 kB\nMemFree:  100 kB\n",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian"\n',
}


def lay_out(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_raspberry_pi(tmp_path):
    facts = describe(lay_out(tmp_path, PI))
    assert facts["cpu"] == "BCM2835" and facts["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert facts["governor"] == "ondemand" and facts["frequency_mhz"] == 1500.0
    assert facts["memory_bytes"] == 3884352 * 1024
    assert facts["os"] == "Debian GNU/Linux 12 (bookworm)"


def test_what_cannot_be_read_is_absent(tmp_path):
    facts = describe(tmp_path)
    assert "governor" not in facts and "frequency_mhz" not in facts and "memory_bytes" not in facts
    assert facts["python"] and facts["machine"] and facts["cores"] >= 1


def test_a_containers_quota_limits_the_cores(tmp_path):
    free = usable_cores(tmp_path)
    assert usable_cores(lay_out(tmp_path, {"sys/fs/cgroup/cpu.max": "max 100000\n"})) == free
    assert usable_cores(lay_out(tmp_path, {"sys/fs/cgroup/cpu.max": "50000 100000\n"})) == 1
    assert usable_cores(lay_out(tmp_path, {"sys/fs/cgroup/cpu.max": "100000 100000\n"})) == 1


def test_this_machine():
    assert describe()["cores"] >= 1
    assert peak_rss_bytes() > 1 << 20
