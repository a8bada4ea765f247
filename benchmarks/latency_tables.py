"""Do latency tables tell what a smaller network takes, and is it faster than one chosen by MACs?

    python benchmarks/latency_tables.py                        the models below, float32 and int8
    python benchmarks/latency_tables.py --only resnet8 --schemes int8
    python benchmarks/latency_tables.py --table                what was measured so far, as Markdown
    python benchmarks/latency_tables.py --stairs               one convolution by its output channels

For each model a table is measured. Then, for each fraction of its latency, channels are chosen by the table; and by
multiply-accumulates with the same search, as few of them as lose no more importance (l1). Both smaller models are
converted and timed in turns with the whole one. `error` is what the table predicted over what was measured, by the
anchored table and by one scaled as a whole. One cell is one JSON line as soon as it is there, and a second run measures
what is missing; tables lie beside the results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BASELINES = ROOT / "saved_models" / "baselines"
MODELS = ("resnet8", "mobilenet", "resnet20-wide", "mobilenet-128")
FRACTIONS = (0.7, 0.5, 0.35)
ROUNDS, SECONDS, COMPARED_S = 8, 1.5, 20.0
_BISECTIONS = 9


def build(name: str):
    """A shipped baseline, or an untrained network of a size that phones run; a path of a .keras file."""
    import keras

    from mobile_bench.inputs import InputSpec
    from tfopt import builders, models

    if name in ("resnet8", "mobilenet"):
        return models.load(BASELINES / f"{name}-cifar10-jpeg" / "model.keras")
    if name not in MODELS:
        return models.load(name)
    keras.utils.set_random_seed(0)
    shape = (32, 32, 3) if name == "resnet20-wide" else (128, 128, 3)
    kind, width = ("resnet20", 4.0) if name == "resnet20-wide" else ("mobilenet", 1.0)
    return models.from_keras(builders.build(kind, shape, 10, width=width), stored_spec=InputSpec(*shape))


def measure(name: str, scheme: str, fractions: list[float], folder: Path, write) -> None:
    from tfopt.channels import cut, dependencies, importance
    from tfopt.errors import ModelRefused
    from tfopt.latency import channels, fill, micro, predict
    from tfopt.latency.table import Setting

    loaded = build(name)
    found = dependencies.analyze(loaded.model)
    first = channels.anatomy(found)
    path = folder / f"{Path(name).stem}-{scheme}.json"
    table = channels.is_current(path, first, Setting("local", scheme, 1)) or fill.measure(
        first, fill.file_of(loaded.model, loaded.spec, scheme), name, micro.Place("local", scheme), path,
        on_progress=lambda done, total, facts: say(f"{name} {scheme} {done}/{total} {facts['what']}"),
    )  # fmt: skip
    scores = importance.scores(found, "l1")
    time, plain = predict.Latency(found, table), predict.Latency(found, table, anchored=False)
    macs = predict.Macs(found)
    by_time, by_macs = channels.search(found, scores, time), channels.search(found, scores, macs)
    for fraction in fractions:
        try:
            chosen, reached = by_time.within(fraction * table.whole_ms), True
        except ModelRefused:
            chosen, reached = by_time.least(), False  # what there is then is measured all the same
        other = _as_dear(by_macs, macs.of(macs.groups), chosen.lost)
        with tempfile.TemporaryDirectory() as work:
            files = []
            for number, choice in enumerate((None, chosen, other)):
                model = found.model if choice is None else cut.cut(found, channels.removed(found, scores, choice))
                files.append(_file(model, loaded.spec, scheme, Path(work) / str(number)))
            facts = _timed(files)
        predicted = {key: [cost.of(c.counts) / table.whole_ms for c in (chosen, other)]
                     for key, cost in (("anchored", time), ("plain", plain))}  # fmt: skip
        write({
            "model": name, "scheme": scheme, "fraction": fraction, "reached": reached, "table_ratio": table.ratio,
            "whole_ms": table.whole_ms, "lost": [chosen.lost, other.lost], "predicted": predicted,
            "macs": [macs.of(c.counts) / macs.of(macs.groups) for c in (chosen, other)],
            "counts": [list(c.counts) for c in (chosen, other)], **facts,
        })  # fmt: skip


def stairs() -> str:
    """A 1x1 convolution of 128 channels on 28x28, microseconds by its output channels, as Markdown."""
    from tfopt.latency import micro

    counts = list(range(8, 136, 8))
    rows = ["| output channels | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    layers = {str(n): micro.LayerSpec("Conv2D", (28, 28, 128), {"filters": n, "kernel_size": 1}) for n in counts}
    for scheme in ("float32", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            files = micro.convert_layers(layers, scheme, Path(folder))
            found = micro.times(files, micro.Place(scheme=scheme), seconds=2)
        rows.append(f"| {scheme}, µs | " + " | ".join(f"{1000 * timing.ms:.0f}" for timing in found.values()) + " |")
    return "\n".join(rows)


def _as_dear(search, whole: float, lost: float):
    """The fewest MACs that lose no more."""
    from tfopt.errors import Problem

    low, high, best = search.least().cost / whole, 1.0, search.within(whole)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        try:
            found = search.within(middle * whole, unit=" MACs")
        except Problem:
            low = middle
            continue
        if found.lost <= lost:
            best, high = found, middle
        else:
            low = middle
    return best


def _file(model, spec, scheme: str, folder: Path) -> Path:
    from tfopt.latency import fill

    folder.mkdir()
    return fill.file_of(model, spec, scheme)(folder)


def _timed(files: list[Path]) -> dict:
    """Both smaller models' share of the whole one's latency, and the verdict between them."""
    from mobile_bench.compare import compare
    from mobile_bench.turns import time_in_turns

    turns = time_in_turns(files, seconds=SECONDS, rounds=ROUNDS)
    (verdict,) = compare([files[2], files[1]], seconds=COMPARED_S).verdicts
    return {
        "measured": [turns.timings[1].ratio, turns.timings[2].ratio], "now_ms": turns.timings[0].ms,
        "ratio": verdict.ratio, "low": verdict.low, "high": verdict.high, "verdict": verdict.verdict,
    }  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = [
        "| model | scheme | budget | importance lost, table / MACs | MACs left | latency left, predicted | measured | "
        "error | error unanchored | MACs choice: latency left | by table over by MACs [98%] | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own, other = row["measured"]
        error = lambda key, row=row, own=own: f"{row['predicted'][key][0] / own - 1:+.0%}"
        predicted = row["predicted"]["anchored"][0]
        budget = f"{row['fraction']:.0%}" + ("" if row.get("reached", True) else ", the least there is")
        lines.append(
            f"| {Path(row['model']).stem} | {row['scheme']} | {budget} | {row['lost'][0]:.4g} / "
            f"{row['lost'][1]:.4g} | {row['macs'][0]:.0%} / {row['macs'][1]:.0%} | {predicted:.0%} | "
            f"{own:.0%} | {error('anchored')} | {error('plain')} | {other:.0%} | {row['ratio']:.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}] | {row['verdict']} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="names of models, or paths of .keras files")
    parser.add_argument("--schemes", nargs="*", default=["float32", "int8"])
    parser.add_argument("--fractions", nargs="*", type=float, default=list(FRACTIONS))
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "latency_tables.jsonl")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--stairs", action="store_true", help="measure one convolution and nothing else")
    options = parser.parse_args()
    if options.stairs:
        print(stairs())
        return
    rows = _read(options.results)
    options.results.parent.mkdir(parents=True, exist_ok=True)

    def write(row: dict) -> None:
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows[row["model"], row["scheme"], row["fraction"]] = row

    for name in [] if options.table else options.only:
        for scheme in options.schemes:
            left = [fraction for fraction in options.fractions if (name, scheme, fraction) not in rows]
            if left:
                measure(name, scheme, left, options.results.parent, write)
    print(markdown(list(rows.values())))


def _read(path: Path) -> dict[tuple, dict]:
    rows = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that was cut off when the machine went down
        rows[row["model"], row["scheme"], row["fraction"]] = row
    return rows


if __name__ == "__main__":
    main()
