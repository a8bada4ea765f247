"""The last rung: where no repair of the file is enough, the network is trained to live with int8.

It needs labels and time, and changes the weights; the file is judged on the same images as all other rungs, and kept
only where it is nearer to the float model than they are, or reaches the goal that they do not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.jobs import run_job
from tfopt.errors import JobFailed, Problem
from tfopt.rescue.ladder import Goal
from tfopt.rescue.score import Score

if TYPE_CHECKING:
    from tfopt.data import ImageData
    from tfopt.models import LoadedModel

NAME = "training for int8"


def train_and_judge(
    loaded: LoadedModel, data: ImageData, work: Path, job: dict, found: dict, steps: int, *, seed: int = 0,
    timeout_s: float | None = None, say: Callable[[dict], None] = lambda message: None,
) -> dict:  # fmt: skip
    """`found`, what the ladder gave, with one rung more; job['out'] holds the better of the two files.

    job: the ladder's. steps: of training, in batches. Where this model cannot be trained for int8, the rung says why
    and nothing else changes.
    """
    started = time.monotonic()
    say({"what": f"{NAME}: starting", "done": 0, "total": steps})
    try:
        candidate = _trained(loaded, data, work, steps, seed, say)
        judged = run_job(
            "tfopt.rescue.ladder", {**job, "operation": "judge", "candidate": str(candidate)}, work,
            on_progress=say, timeout_s=timeout_s,
        )  # fmt: skip
    except (Problem, JobFailed) as problem:
        return {**found, "training_refused": str(problem)}
    best = min((rung for rung in found["rungs"] if rung["kept"]), key=lambda rung: rung["score"]["divergence"])
    score, goal = Score(**judged["score"]), Goal(**job["goal"])
    reached = goal.enough(score, Score(**found["float"]))
    kept = reached or score.divergence < best["score"]["divergence"]
    rung = {
        "name": NAME, "kept": kept, "score": dataclasses.asdict(score), "size_bytes": candidate.stat().st_size,
        "seconds": round(time.monotonic() - started, 1), "note": f"{steps} steps",
    }  # fmt: skip
    say({"rung": rung})
    found = {**found, "rungs": [*found["rungs"], rung]}
    if not kept:
        return found
    candidate.replace(job["out"])
    return {**found, "reached": reached, "lifted": [], "test": judged["test"]}


def _trained(loaded, data, work: Path, steps: int, seed: int, say) -> Path:
    """An int8 .tflite of the model after `steps` of quantization-aware training."""
    from tfopt.technique import Context, OptimizedModel
    from tfopt.techniques.quantize import QuantizeAware
    from tfopt.tfmot.client import convert_quantized

    technique = QuantizeAware()
    technique = dataclasses.replace(technique, train=dataclasses.replace(technique.train, steps=steps, epochs=None))
    context = Context(
        data.decoded(loaded.spec), work / "training", teacher=loaded.model, seed=seed,
        progress=lambda done, total, facts: say({"what": NAME, "done": done, "total": total}),
    )  # fmt: skip
    trained, _ = technique.apply(OptimizedModel(loaded.model, loaded.spec), context)
    out = work / "trained.tflite"
    convert_quantized(trained.quantized, out, loaded.spec)
    return out
