"""Is what mobile-bench measures the model's time, how soon is it there, and what do several targets cost?

    python benchmarks/measuring.py overhead    against a bare loop around invoke, on a fast and a slow model
    python benchmarks/measuring.py tool        against litert-benchmark, the tool in the runtime's own wheel
    python benchmarks/measuring.py start       from the command line to the record, and of that the imports
    python benchmarks/measuring.py targets     two targets at once, one of them paced, against the slower alone

Each is a ratio within one run, the two sides interleaved in random order; --out FILE keeps the raw values.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mobile_bench.files import write_json  # noqa: E402
from mobile_bench.stats import ratio_interval  # noqa: E402

MODELS = ROOT / "build" / "measuring"
#: name -> (input edge, channels, convolutions): about 50 microseconds, 2 ms and 50 ms on one core of a server.
CHAINS = {"fast": (12, 16, 7), "middle": (32, 32, 8), "slow": (96, 64, 6)}
_MAKE = """
import json, sys, keras, tensorflow as tf
keras.utils.set_random_seed(0)
for name, (edge, channels, layers) in json.loads(sys.argv[2]).items():
    x = inputs = keras.Input((edge, edge, channels), batch_size=1)
    for _ in range(layers):
        x = keras.layers.Conv2D(channels, 3, padding="same", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    content = tf.lite.TFLiteConverter.from_keras_model(keras.Model(inputs, x)).convert()
    open(f"{sys.argv[1]}/{name}.tflite", "wb").write(content)
"""


def chain(name: str) -> Path:
    MODELS.mkdir(parents=True, exist_ok=True)
    if not all((MODELS / f"{name}.tflite").is_file() for name in CHAINS):
        command = [sys.executable, "-c", _MAKE, str(MODELS), json.dumps(CHAINS)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return MODELS / f"{name}.tflite"


def said(name: str, ratios: list[float], detail: str, limit: str) -> dict:
    low, high = ratio_interval([math.log(ratio) for ratio in ratios])
    middle = statistics.median(ratios)
    print(
        f"{name}: {middle:.4f} (mean's 95% interval {low:.4f} to {high:.4f}, {len(ratios)} rounds); {detail}; {limit}"
    )
    return {"name": name, "ratios": ratios, "median": middle, "low": low, "high": high, "detail": detail}


def overhead(rounds: int) -> list[dict]:
    """One process a round: blocks of our timing and of the bare loop in turns, a ratio of medians each turn."""
    return [_overhead(name, rounds) for name in ("fast", "slow")]


def _overhead(name: str, rounds: int) -> dict:
    path, found = chain(name), []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-P", __file__, "_blocks", str(path)], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    detail = f"bare loop {statistics.median(bare for _, bare in found):.4f} ms"
    return said(f"overhead, {name} model, ours / bare", [ratio for ratio, _ in found], detail, "asked: within 1%")


def blocks(path: str) -> None:
    from ai_edge_litert.interpreter import Interpreter

    from mobile_bench.interpreter import open_model
    from mobile_bench.worker import random_inputs, time_runs, warm_up

    model = open_model(path)
    values = random_inputs(model, None, 0)
    model.set_inputs(*values)
    bare = Interpreter(model_path=path, num_threads=1)
    bare.allocate_tensors()
    bare.set_tensor(bare.get_input_details()[0]["index"], values[0])
    typical_ms = statistics.median(warm_up(model)[0][-5:])
    runs = max(1, round(20 / typical_ms))
    cold = int(typical_ms < 10)  # the first run of a block finds the caches full of the other's weights

    def loop() -> list[float]:
        times = []
        for _ in range(cold + runs):
            started = time.perf_counter()
            bare.invoke()
            times.append(1000 * (time.perf_counter() - started))
        return times

    ratios, bare_ms = [], []
    loop()
    for _ in range(max(15, round(1500 / (runs * typical_ms)))):
        turn = [("ours", lambda: time_runs(model, cold + runs)), ("bare", loop)]
        random.shuffle(turn)
        medians = {name: statistics.median(way()[cold:]) for name, way in turn}
        ratios.append(medians["ours"] / medians["bare"])
        bare_ms.append(medians["bare"])
    print(json.dumps([statistics.median(ratios), statistics.median(bare_ms)]))


def tool(rounds: int) -> list[dict]:
    """A process of each a round: same file, threads, warm-up, runs and kind of input; medians of the processes."""
    return [_tool(name, rounds) for name in ("middle", "slow")]


def _tool(name: str, rounds: int) -> dict:
    path, runs, warm = chain(name), {"middle": 300, "slow": 30}[name], {"middle": 100, "slow": 10}[name]
    ours, theirs = [], []
    for _ in range(rounds):
        turn = [(ours, _ours), (theirs, _litert_benchmark)]
        random.shuffle(turn)
        for into, way in turn:
            into.append(way(path, warm, runs))
    ratios = [a / b for a, b in zip(ours, theirs)]
    whole = statistics.median(ours) / statistics.median(theirs)
    detail = f"litert-benchmark {statistics.median(theirs):.2f} ms, ratio of the medians over processes {whole:.4f}"
    return said(f"tool, {name} model, ours / litert-benchmark", ratios, detail, "asked: within 3%")


def _ours(path: Path, warm: int, runs: int) -> float:
    code = (
        "import statistics, sys; from mobile_bench.interpreter import open_model\n"
        "from mobile_bench.worker import random_inputs, time_runs\n"
        "model = open_model(sys.argv[1]); model.set_inputs(*random_inputs(model, None, 0))\n"
        "time_runs(model, int(sys.argv[2])); print(statistics.median(time_runs(model, int(sys.argv[3]))))"
    )
    command = [sys.executable, "-P", "-c", code, str(path), str(warm), str(runs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def _litert_benchmark(path: Path, warm: int, runs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [Path(sys.executable).with_name("litert-benchmark"), "--model", path, "--num_threads", "1"]
        command += ["--num_runs", str(runs), "--warmup_runs", str(warm), "--result_json", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())["latency"]["median_ms"]


def start(rounds: int) -> list[dict]:
    """The whole command, and what the worker's imports take of it."""
    command = [Path(sys.executable).with_name("mobile-bench"), "run", chain("fast"), "--no-save", "--json"]
    imports = "import mobile_bench.worker; from mobile_bench.interpreter import load_runtime; load_runtime()"
    whole, bare, loaded = [], [], []
    ways = [(whole, command), (bare, [sys.executable, "-c", "pass"]), (loaded, [sys.executable, "-c", imports])]
    for _ in range(rounds):
        random.shuffle(ways)
        for into, way in ways:
            begun = time.perf_counter()
            subprocess.run(way, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            into.append(time.perf_counter() - begun)
    importing = statistics.median(a - b for a, b in zip(loaded, bare))
    print(
        f"start to record: {statistics.median(whole):.2f} s (largest {max(whole):.2f}, {rounds} runs); asked: under 3\n"
        f"imports of a worker: {importing:.3f} s beyond Python's own start; asked: under 0.3"
    )
    return [{"name": "start", "whole_s": whole, "python_s": bare, "with_imports_s": loaded}]


class _Paced:
    """A target that takes as long as a slow board would, without using this machine's processor."""

    place = "paced"

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, module, job, **_):
        time.sleep(self._seconds)
        return {"load_ms": 1.0, "first_inference_ms": 1.0, "warmup_ms": [], "latency_ms": [1.0] * job["runs"],
                "input_shape": (), "peak_rss_bytes": None, "base_rss_bytes": None, "load_average": None,
                "device": {"runtime": "paced", "runtime_version": "0", "during": {}}, "warnings": []}  # fmt: skip


def targets(rounds: int) -> list[dict]:
    """This machine and a paced stand-in at once, both with fixed counts, against the slower of them alone."""
    from mobile_bench import measure as module
    from mobile_bench.records import Connection, Target
    from mobile_bench.targets import Place
    from mobile_bench.transports.local import Local

    path, paced_s, found = chain("middle"), 1.0, []
    here, there = Place("here", Target()), Place("there", Target("ssh", address="paced"), Connection("paced"))
    measuring = sys.modules["mobile_bench.measure"]
    measuring.transport_for = lambda target, _=None: Local() if target.transport == "local" else _Paced(paced_s)

    def timed(places) -> float:
        begun = time.perf_counter()
        answers = module.measure_on(places, path, runs=300, max_runs=300, seconds=0)
        assert {answer.status for answer in answers} == {"ok"}, answers
        return time.perf_counter() - begun

    for _ in range(rounds):
        ways = {"both": [here, there], "here": [here], "there": [there]}
        order = random.sample(list(ways), len(ways))
        times = {name: timed(ways[name]) for name in order}
        found.append(times)
    ratios = [times["both"] / max(times["here"], times["there"]) for times in found]
    detail = ", ".join(f"{n} {statistics.median(t[n] for t in found):.2f} s" for n in ("both", "here", "there"))
    return [said("two targets at once / the slower alone", ratios, detail, "asked: at most 1.2")]


def main() -> None:
    if sys.argv[1:2] == ["_blocks"]:
        blocks(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"overhead": overhead, "tool": tool, "start": start, "targets": targets}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = parts[arguments.part](arguments.rounds)
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
