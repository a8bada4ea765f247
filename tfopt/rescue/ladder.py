"""The ladder: dearer and dearer repairs of one full-int8 file, each kept only if it is nearer to the float file.

`climb` runs in this process; `python -m tfopt.rescue.ladder job.json` is the same in a child. The last rung,
training for int8, is tfopt.rescue.training's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mobile_bench.files import write_bytes
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import serve
from tfopt.convert import embed_spec
from tfopt.errors import unknown_name
from tfopt.rescue.equalize import equalize
from tfopt.rescue.graph import Graph
from tfopt.rescue.lift import KINDS
from tfopt.rescue.mixed import Choice, Lifted
from tfopt.rescue.refit import refit
from tfopt.rescue.score import Judge, Score, layer_errors

#: Images on which the layers' signal to noise is taken.
_ERROR_IMAGES = 32
RUNGS = ("as converted", "equalization", "bias correction", "rounding", "mixed precision", "bias again")


@dataclass(frozen=True)
class Goal:
    """When to stop: at most `max_drop` (share of images) lost in top-1, where there are labels, and at least
    `min_agreement` with the float file. mixed: whether layers may compute in float; then the file grows to at most
    `max_size` times its int8 size, and `spend` says what a layer's price is: bytes, ms or both. keep: layers that
    compute in float in any case, name -> kind of tfopt.rescue.lift."""

    max_drop: float = 0.005
    min_agreement: float = 0.98
    mixed: bool = True
    max_size: float = 1.25
    spend: str = "both"
    keep: dict[str, str] = field(default_factory=dict)

    def enough(self, score: Score, reference: Score) -> bool:
        lost = 0.0 if score.top1 is None else reference.top1 - score.top1
        return score.agreement >= self.min_agreement and lost <= self.max_drop + 1e-9


@dataclass(frozen=True)
class Rung:
    name: str
    kept: bool
    score: Score
    size_bytes: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Climb:
    """graph: the best file. sqnr_db and alone: for each layer's name, its error in the best full-int8 file, and the
    divergence it alone takes away in float (empty where no mixed precision was tried)."""

    graph: Graph
    reached: bool
    reference: Score
    rungs: tuple[Rung, ...]
    lifted: tuple[Lifted, ...]
    sqnr_db: dict[str, float]
    alone: dict[str, float]


def climb(
    floats: Graph, quantized: Graph, images: np.ndarray, judge: Judge, spec: InputSpec, goal: Goal, *,
    extra_ms: dict[str, float] | None = None, progress: Callable[[str, int, int], None] = lambda *_: None,
    on_rung: Callable[[Rung], None] = lambda rung: None,
) -> Climb:  # fmt: skip
    """Climb until the goal is reached or the ladder ends.

    floats, quantized: two files of one model. images: uint8 (count, height, width, channels), what layers are fitted
    on; no labels. judge: decides on other images. extra_ms: see tfopt.rescue.mixed.Choice.
    """
    _check_names(goal.keep, quantized)
    rungs: list[Rung] = []
    lifted, alone = (), {}

    def reached() -> bool:
        return goal.enough(best, judge.reference)

    def offer(
        name: str, made: tuple[Graph, Graph], started: float, score: Score | None = None, note: str = "",
        forced: bool = False,
    ) -> None:  # fmt: skip
        nonlocal floats, current, best
        score = score or judge.score(made[1])
        kept = not rungs or forced or score.divergence < best.divergence
        rungs.append(Rung(name, kept, score, len(made[1].pack()), round(time.monotonic() - started, 1), note))
        on_rung(rungs[-1])
        if kept:
            (floats, current), best = made, score

    current, best = quantized, None
    offer(RUNGS[0], (floats, quantized), time.monotonic())
    for name in RUNGS[1:4]:
        if reached():
            break
        started, note = time.monotonic(), ""
        other = Graph(floats.pack()), Graph(current.pack())
        step = lambda done, total, name=name: progress(name, done, total)
        if name == "equalization":
            scaled = equalize(*other, images, spec)
            note = f"{scaled} channels scaled"
            if not scaled:
                continue
        else:
            refit(*other, images, spec, rounding=name == "rounding", progress=step)
        offer(name, other, started, note=note)
    errors = layer_errors(floats, current, images[:_ERROR_IMAGES], spec, lambda *at: progress("layers", *at))
    sqnr = {layer.name: error for layer, error in zip(current.layers(), errors)}
    if goal.keep or (goal.mixed and not reached()):
        started = time.monotonic()
        choice = Choice(
            floats, current, judge, spend=goal.spend, extra_ms=extra_ms or {},
            most_bytes=int(goal.max_size * len(quantized.pack())), keep=goal.keep,
        )  # fmt: skip
        made, score, lifted, alone = choice.run(
            lambda score: not goal.mixed or goal.enough(score, judge.reference), lambda *at: progress(RUNGS[4], *at)
        )
        offer(RUNGS[4], (floats, made), started, score, f"{len(lifted)} layers in float", forced=bool(goal.keep))
        if not rungs[-1].kept:
            lifted = ()
        elif lifted and not reached():
            # The layers that stay in int8 now get better inputs than those that they were fitted to.
            started, other = time.monotonic(), Graph(made.pack())
            refit(floats, other, images, spec, rounding=False, progress=lambda *at: progress(RUNGS[5], *at))
            offer(RUNGS[5], (floats, other), started)
    return Climb(current, reached(), judge.reference, tuple(rungs), lifted, sqnr, alone)


def _check_names(keep: dict[str, str], quantized: Graph) -> None:
    names = [layer.name for layer in quantized.layers()]
    for name, kind in keep.items():
        if name not in names:
            raise unknown_name("layer with weights", name, names)
        if kind not in KINDS:
            raise unknown_name("precision of a layer", kind, KINDS)


def _child(job: dict, emit) -> dict:
    return {"climb": _climb, "judge": _judge}[job["operation"]](job, emit)


def _climb(job: dict, emit) -> dict:
    spec = InputSpec.from_dict(job["spec"])
    floats, quantized = (Graph(Path(job[name]).read_bytes()) for name in ("float32", "int8"))
    found = climb(
        floats, quantized, _array(job, "images"), _judge_of(job, "choices", "choice_labels"), spec,
        Goal(**job["goal"]), extra_ms=job["extra_ms"],
        progress=lambda what, done, total: emit("progress", what=what, done=done, total=total),
        on_rung=lambda rung: emit("progress", rung=dataclasses.asdict(rung)),
    )  # fmt: skip
    write_bytes(job["out"], embed_spec(found.graph.pack(), spec))
    result = {
        "reached": found.reached,
        "float": dataclasses.asdict(found.reference),
        "rungs": [dataclasses.asdict(rung) for rung in found.rungs],
        "lifted": [dataclasses.asdict(one) for one in found.lifted],
        "layers": [
            {"layer": name, "sqnr_db": round(error, 2), "gain_in_float": found.alone.get(name)}
            for name, error in found.sqnr_db.items()
        ],
    }
    emit("progress", what="test images", done=0, total=1)
    last = _judge_of(job, "test", "test_labels")
    for name, graph in (("test", found.graph), ("test_as_converted", quantized)):
        result[name] = _counts(last, graph, _array(job, "test_labels"))
    return result


def _judge(job: dict, emit) -> dict:
    """Score another file of the same model, job['candidate'], on the images for choices; and its answers to the test
    images, which nobody looks at unless the file is kept."""
    graph = Graph(Path(job["candidate"]).read_bytes())
    return {
        "score": dataclasses.asdict(_judge_of(job, "choices", "choice_labels").score(graph)),
        "test": _counts(_judge_of(job, "test", "test_labels"), graph, _array(job, "test_labels")),
    }


def _judge_of(job: dict, images: str, labels: str) -> Judge:
    floats, spec = Graph(Path(job["float32"]).read_bytes()), InputSpec.from_dict(job["spec"])
    return Judge(floats, _array(job, images), _array(job, labels), spec)


def _array(job: dict, name: str) -> np.ndarray:
    return np.load(job[name], mmap_mode="r", allow_pickle=False)


def _counts(judge: Judge, graph: Graph, labels: np.ndarray) -> dict:
    named, true = judge.answers(graph).argmax(1), judge.float_answers.argmax(1)
    return {
        "images": len(named),
        "agree": int(np.sum(named == true)),
        "correct": int(np.sum(named == labels)),
        "float_correct": int(np.sum(true == labels)),
        "only_float_correct": int(np.sum((true == labels) & (named != labels))),
        "only_file_correct": int(np.sum((true != labels) & (named == labels))),
    }


if __name__ == "__main__":
    serve(_child)
