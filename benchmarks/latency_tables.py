"""Does a table of layers' times foresee how fast a narrower network is, and is it a better guide than MACs?

    python benchmarks/latency_tables.py --out build/latency.json
    python benchmarks/latency_tables.py saved_models/baselines/resnet8-fashion/model.keras --scheme int8

The layers of each model are timed at several widths. Then channels are removed until half of the kernels' time is left,
by the table and by MACs (as many as lose the same importance), untrained, and the files are timed in one interleaved
comparison with the whole network. `foreseen` is the table's ratio for the kernels, `measured` that of the whole file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

MODELS = [
    ROOT / "saved_models" / "baselines" / name / "model.keras" for name in ("resnet8-fashion", "mobilenet-fashion")
]


def main() -> None:
    from mobile_bench.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, default=MODELS)
    parser.add_argument("--scheme", nargs="*", default=["float32", "int8"])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.7, 0.5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "latency-tables.json")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for scheme in options.scheme:
            rows += measured(model, scheme, options.shares, options.threads)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.out, rows)
    print("| model | scheme | asked | guide | MACs | foreseen | measured | 98% interval |")
    print("|:--|:--|--:|:--|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['model']} | {row['scheme']} | {row['share']:.0%} | {row['guide']} | {row['macs']:.0%} | "
            f"{row['foreseen']:.3f} | {row['measured']:.3f} | {row['low']:.3f} to {row['high']:.3f} |"
        )


def measured(path: Path, scheme: str, shares: list[float], threads: int) -> list[dict]:
    from mobile_bench.compare import compare
    from mobile_bench.records import Target
    from tfopt import graph, models
    from tfopt.channels import choose, cut, dependencies, importance
    from tfopt.channels.latency import to_latency
    from tfopt.errors import ModelRefused
    from tfopt.latency import micro, table

    model = models.load(str(path)).model
    found = dependencies.analyze(model)
    scores = importance.scores(found, "l1")
    values = importance.comparable(found, scores, "l1")
    lost = lambda removed: float(sum(values[unit] for unit in removed))
    say = lambda done, total, what: print(
        f"\r{path.parent.name} {scheme}: {what} {done}/{total}", end="", file=sys.stderr
    )
    with tempfile.TemporaryDirectory() as folder:
        made = table.measure(found, micro.Place(scheme=scheme, threads=threads), Path(folder), say)
        predictor = table.Predictor(found, made)
        left = lambda gone: [len(g) - sum(unit in gone for unit in g.units.tolist()) for g in found.groups]
        whole_ms, whole_macs = predictor.ms(left(set())), graph.count_macs(model)
        rows, networks = [], {"whole": model}
        for share in shares:
            try:
                by_time = to_latency(found, scores, share * whole_ms, made)
            except ModelRefused as refusal:
                print(f"\n{path.parent.name} {scheme} {share:.0%}: {refusal}", file=sys.stderr)
                continue
            by_macs = _as_dear(found, scores, lost(by_time), lost, choose)
            for guide, removed in (("time", by_time), ("MACs", by_macs)):
                smaller = cut.cut(found, removed)
                networks[guide, share] = smaller
                rows.append({
                    "model": path.parent.name, "scheme": scheme, "share": share, "guide": guide,
                    "macs": graph.count_macs(smaller) / whole_macs, "lost": lost(removed),
                    "foreseen": predictor.ms(left(set(removed))) / whole_ms,
                })  # fmt: skip
        if not rows:
            return []
        files = micro.convert(networks, scheme, Path(folder) / "whole")
        verdicts = compare(list(files.values()), Target(threads=threads), seconds=40.0).verdicts
        for row, verdict in zip(rows, verdicts):
            row |= {"measured": verdict.ratio, "low": verdict.low, "high": verdict.high, "ms": verdict.median_ms}
    return rows


def _as_dear(found, scores, budget: float, lost, choose) -> list[int]:
    """Channels by MACs, as many as lose no more importance than `budget`."""
    low, high, best = 0.02, 0.999, []
    for _ in range(12):
        middle = (low + high) / 2
        removed = choose.to_macs(found, scores, middle, scope="global")
        if lost(removed) <= budget:
            best, high = removed, middle
        else:
            low = middle
    return best


if __name__ == "__main__":
    main()
