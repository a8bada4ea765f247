"""Adb against a real adbd, inside a network namespace of its own: python adb_driver.py WORK ADBD PORT MODELS.

adbd listens on every address and lets anyone in, so it never runs outside of one. Prints one JSON object: what each
case gave, and what it left on the device. WORK: an empty folder. ADBD: where its packages were unpacked. MODELS:
holds int8.tflite, float32.tflite and text.tflite.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from mobile_bench.errors import Problem
from mobile_bench.records import Connection, Target
from mobile_bench.sustained import sustain
from mobile_bench.transports.adb import Adb

WORK, ADBD, PORT, MODELS = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
SERIAL = f"127.0.0.1:{PORT}"
TOOL = Path(__file__).with_name("stand_in_benchmark_model.sh")
PHONE = WORK / 'a phone\'s "folder"; touch gone $(touch gone) `touch gone`'
JOB = {
    "threads": 2, "runtime": "auto", "batch": 1, "runs": 3, "max_runs": 30, "seed": 0, "spec": None,
}  # fmt: skip
ANSWER = f"""#!{sys.executable}
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
model = Interpreter(sys.argv[1])
model.allocate_tensors()
details = model.get_input_details()[0]
model.set_tensor(details["index"], np.fromfile(sys.argv[2], details["dtype"]).reshape(details["shape"]))
model.invoke()
model.get_tensor(model.get_output_details()[0]["index"]).tofile(sys.argv[3])
"""


RECORDED_PROFILE = (WORK / "profile.csv").read_text()


def start_adbd():
    libraries = [str(ADBD / "usr/lib/x86_64-linux-gnu" / name) for name in ("android", "")]
    programs = WORK / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "dumpsys").write_text(f"#!/bin/sh\ncat '{WORK}/battery'\n")
    (programs / "dumpsys").chmod(0o755)
    environment = {
        **os.environ, "ADBD_PORT": str(PORT), "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }  # fmt: skip
    program = ADBD / "usr/lib/android-sdk/platform-tools/adbd"
    with open(WORK / "adbd.log", "ab") as log:
        return subprocess.Popen([program], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def connection(**changes):
    return Connection(**{"address": SERIAL, "tool": str(TOOL), "folder": str(PHONE), **changes})


def measure(
    mode="", *, job=None, model="int8", accelerator="cpu", timeout_s=60.0, meanwhile=None, bare=False, **changes
):
    with Adb(connection(**changes), Target("adb", accelerator, SERIAL)) as adb:
        (Path(adb.folder) / "mode").write_text(mode)
        adb._can_time_out &= not bare  # as on a device without `timeout`
        if meanwhile:
            threading.Thread(target=meanwhile, args=(Path(adb.folder),), daemon=True).start()
        value = adb.run(
            "mobile_bench.worker", {**JOB, **(job or {})}, files={"tflite": MODELS / f"{model}.tflite"},
            timeout_s=timeout_s,
        )  # fmt: skip
        flags = Path(adb.folder, "flags").read_text().splitlines()
        return {**value, "flags": flags, "place": adb.place}


def evaluate(model, mode="", module="mobile_bench.evaluate"):
    spec = json.loads((WORK / "spec.json").read_text())
    job = {"spec": spec, "workers": None, "runtime": "auto"}
    said = []
    with Adb(connection(), Target("adb", address=SERIAL)) as adb:
        (Path(adb.folder) / "mode").write_text(mode)
        answer = Path(adb.folder) / "answer"
        answer.write_text(ANSWER)
        answer.chmod(0o755)
        value = adb.run(
            module, job, files={"tflite": MODELS / f"{model}.tflite", "sample": WORK / "sample.npz"},
            outputs={"out": WORK / f"{model}.npy"}, on_progress=said.append, timeout_s=60,
        )  # fmt: skip
    return {**value, "said": said}


def compare():
    """The second file is made 10% slower by the stand-in."""
    job = {"tflites": 2, "specs": [None, None], "threads": 1, "runtime": "auto", "batch": 1, "seed": 0}
    files = {"tflite_0": MODELS / "int8.tflite", "tflite_1": MODELS / "float32.tflite"}
    with Adb(connection(), Target("adb", address=SERIAL)) as adb:
        (Path(adb.folder) / "slow-tflite_1.tflite").touch()
        rounds = [
            adb.run("mobile_bench.interleave", {**job, "order_seed": n, "seconds": 0.0}, files=files) for n in (0, 1)
        ]
        pushed = sorted(path.name for path in Path(adb.folder).glob("*.tflite") if path.name[0] != "s")
    return {"rounds": rounds, "pushed": pushed}


#: What `dumpsys battery` prints on a phone that runs on its battery.
BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  Max charging current: 0
  Charge counter: {charge}
  status: {status}
  health: 2
  present: true
  level: 71
  scale: 100
  voltage: 3850
  temperature: 312
  technology: Li-ion
"""


def drain(message):
    """The battery gives 2 mAh a window: 27.72 J."""
    if message.get("window"):
        drain.charge -= 2000
        (WORK / "battery").write_text(BATTERY.format(charge=drain.charge, status=3))


def stop(message):
    """Ctrl-C after the first window."""
    if message.get("window"):
        raise KeyboardInterrupt


def minutes(status=3, energy="auto", seconds=1.5, tell=drain):
    drain.charge = 2_500_000
    (WORK / "battery").write_text(BATTERY.format(charge=drain.charge, status=status))
    found = sustain(
        MODELS / "int8.tflite", seconds=seconds, target=Target("adb", address=SERIAL), connection=connection(),
        energy=energy, idle_s=0.1, on_progress=tell if status == 3 else None,
    )  # fmt: skip
    return {**asdict(found), "gross_j": found.energy and found.energy.gross_j}


def profile():
    job = {"threads": 1, "runtime": "ai-edge-litert", "runs": 5, "seed": 0, "spec": None}
    with Adb(connection(), Target("adb", address=SERIAL)) as adb:
        (Path(adb.folder) / "profile.recorded").write_text(RECORDED_PROFILE)
        return adb.run("mobile_bench.profile", job, files={"tflite": MODELS / "int8.tflite"})


def unplug(folder):
    """adbd dies while the tool runs; what it had started lives on, as on a phone."""
    while not (folder / "pid").exists():
        time.sleep(0.02)
    adbd.kill()


def interrupt(folder):
    """Once the tool hangs; to the main thread, which waits for it and would not wake for another's signal."""
    while not running("sleep 300"):
        time.sleep(0.05)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def full(folder):
    """A tiny file system in place of the device's storage."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    return str(folder)


def big_tool():
    path = WORK / "big"
    path.write_bytes(TOOL.read_bytes() + b"#" * (1 << 20))
    return str(path)


def running(name):
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
    return sum(name in line and "python" not in line for line in lines)


adbd = None
#: At once, by a connection that is there already; what they left is looked at when all have ended.
TOGETHER = {
    "old format": lambda: measure("plain"),
    "one run": lambda: measure("one"),
    "batch": lambda: measure(job={"batch": 2}),
    "gpu": lambda: measure(accelerator="gpu"),
    "gpu in part": lambda: measure("partial", accelerator="gpu"),
    "gpu in part, allowed": lambda: measure("partial", accelerator="gpu", job={"allow_fallback": True}),
    "gpu not at all": lambda: measure("none", accelerator="gpu"),
    "no gpu in the tool": lambda: measure("nogpu", accelerator="gpu"),
    "abort": lambda: measure("abort"),
    "cut short": lambda: measure("cut"),
    "refused": lambda: measure(model="text"),
    "clock backwards": lambda: measure("backwards"),
    "hangs": lambda: measure("hang", timeout_s=3.0),
    "hangs without timeout": lambda: measure("hang", timeout_s=3.0, bare=True),
    "no such folder": lambda: measure(folder=str(WORK / "none" / "such")),
    "no space": lambda: measure(folder=full(WORK / "full"), tool=big_tool()),
    "another module": lambda: evaluate("int8", module="mobile_bench.stream"),
    "evaluate int8": lambda: evaluate("int8"),
    "evaluate float32": lambda: evaluate("float32"),
    "evaluate with an old tool": lambda: evaluate("int8", "old"),
    "compare": compare,
    "profile": profile,
}
#: Not all at once, so that on a busy machine no command waits longer for its turn than the 30 s it has.
TOGETHER_AT_MOST = 6
#: One after the other, each with a connection of its own, which it ends.
ALONE = {
    "good": measure,
    "minutes": minutes,
    "minutes, interrupted": lambda: minutes(seconds=600, tell=stop),
    "minutes on mains": lambda: minutes(status=2),
    "minutes on mains, by its battery": lambda: minutes(status=2, energy="battery"),
    "crash": lambda: measure("crash"),
    "interrupted": lambda: measure("hang", meanwhile=interrupt, timeout_s=150.0),
    "no such serial": lambda: measure(address="it's; touch gone $(touch gone)"),
    "no such port": lambda: measure(address="127.0.0.1:9"),
    "unplugged": lambda: measure("hang", meanwhile=unplug),
}


def outcome(case):
    try:
        return {"value": case()}
    except Problem as problem:
        return {"error": type(problem).__name__, "text": str(problem)}
    except KeyboardInterrupt:
        return {"error": "KeyboardInterrupt", "text": ""}


def left_behind(adbutils):
    return {
        "left": [str(path) for path in WORK.rglob("mobile-bench-*")],
        "devices": [info.serial for info in adbutils.adb.list()],
        "running": running("sleep 300"),
    }


def main():
    global adbd
    import adbutils

    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    PHONE.mkdir()
    os.chdir(WORK)
    adbd = start_adbd()
    until = time.monotonic() + 10
    while "connected" not in (said := adbutils.adb.connect(SERIAL)) or "failed" in said:
        assert time.monotonic() < until and adbd.poll() is None, (WORK / "adbd.log").read_text()
        time.sleep(0.1)
    with ThreadPoolExecutor(TOGETHER_AT_MOST) as pool:
        found = dict(zip(TOGETHER, pool.map(outcome, TOGETHER.values())))
    adbutils.adb.disconnect(SERIAL)
    after = left_behind(adbutils)
    found = {name: {**facts, **after} for name, facts in found.items()}
    for name, case in ALONE.items():
        found[name] = {**outcome(case), **left_behind(adbutils)}
    found["gone"] = [str(path) for path in (*WORK.rglob("gone"), *Path("/").glob("gone"))]
    print(json.dumps(found))
    adbutils.adb.server_kill()
    adbd.kill()


main()
