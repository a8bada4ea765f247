"""Latencies of many files on one target, timed in turns: which costs how much, where `compare` asks which is faster.

Each round is a fresh process that times all files in turns (mobile_bench.interleave). In a round every file has one
number, the lower quartile of its runs, since what else the machine does only adds. The first file is the yardstick:
what slows the machine for a while slows all, and so ratios to it hold where milliseconds drift.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench import trust
from mobile_bench.errors import InputError
from mobile_bench.interpreter import check_is_tflite
from mobile_bench.jobs import OnProgress
from mobile_bench.lock import one_at_a_time
from mobile_bench.measure import check_can_run
from mobile_bench.records import Connection, Target
from mobile_bench.stats import student_quantile
from mobile_bench.transports import transport_for

#: More at once would mostly wait for their turn, and a crash would lose more.
MOST_FILES = 64
ROUNDS = 3
CONFIDENCE = 0.95
#: The percentile of a file's runs that stands for it in a round.
LEVEL = 25
_LOCAL = Target()


@dataclass(frozen=True)
class Timing:
    """One file. ms: the lower quartile of its runs, median over the rounds, with the 95% interval over them.

    ratio: to the first file, in the same turns.
    """

    ms: float
    low_ms: float
    high_ms: float
    ratio: float


@dataclass(frozen=True)
class Turns:
    """timings: one a file, in their order. device: of the target, with runtime and runtime_version."""

    timings: tuple[Timing, ...]
    rounds: int
    device: dict
    warnings: tuple[str, ...]


def time_in_turns(
    tflites: Sequence[str | Path], target: Target = _LOCAL, *, connection: Connection | None = None,
    seconds: float = 1.0, rounds: int = ROUNDS, seed: int = 0, on_progress: OnProgress | None = None,
    timeout_s: float = 900, wait_s: float = 3600,
) -> Turns:  # fmt: skip
    """Time files beside each other. seconds: of timing in each round, process starts not counted.

    Raises InputError for what makes no sense to try, ModelRefused where a file cannot run, JobFailed where a round
    crashed, TransportError where the target cannot be reached.
    """
    files = [Path(tflite) for tflite in tflites]
    for name, value, least, most in (
        ("the number of files", len(files), 1, MOST_FILES), ("seconds", seconds, 0, 3600), ("rounds", rounds, 2, 100),
    ):  # fmt: skip
        if not least <= value <= most:
            raise InputError(f"{name} is out of range", received=value, allowed=f"{least} to {most}")
    check_can_run(target)
    for file in files:
        check_is_tflite(file)
    job = {
        "tflites": len(files), "specs": [None] * len(files), "batch": 1, "threads": target.threads,
        "runtime": target.runtime, "seed": seed, "seconds": seconds,
    }  # fmt: skip
    paths = {f"tflite_{index}": file for index, file in enumerate(files)}
    order, found = secrets.randbits(31), []
    transport = transport_for(target, connection)
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress), transport:
        for number in range(rounds):
            found.append(
                transport.run(
                    "mobile_bench.interleave", {**job, "order_seed": order + number}, files=paths,
                    timeout_s=timeout_s + seconds,
                )
            )  # fmt: skip
            if on_progress:
                on_progress({"kind": "progress", "stage": "turns", "done": number + 1, "total": rounds})
    trust.check_same_machine([answer["device"] for answer in found])
    return Turns(
        timings_of([answer["blocks"] for answer in found]), rounds, found[0]["device"],
        trust.of_processes([answer["warnings"] for answer in found]),
    )  # fmt: skip


def timings_of(rounds: Sequence) -> tuple[Timing, ...]:
    """One Timing a file from the blocks of all rounds: round -> turn -> file -> latencies in milliseconds.

    The interval is Student's over the rounds' logarithms, since samples within a process are not independent.
    """
    levels = np.array([[np.percentile(np.concatenate(own), LEVEL) for own in zip(*turns)] for turns in rounds])
    logs = np.log(np.maximum(levels, 1e-9))
    yardstick = float(np.median(logs[:, 0]))
    made = []
    for index, own in enumerate(logs.T):
        # The yardstick's ratio to itself says nothing of how it varies.
        sample = own - logs[:, 0] if index else own - yardstick
        ratio = float(np.median(sample))
        spread = float(sample.std(ddof=1)) / math.sqrt(len(sample))
        half = student_quantile((1 + CONFIDENCE) / 2, len(sample) - 1) * spread
        ends = [math.exp(yardstick + ratio + sign * half) for sign in (0, -1, 1)]
        made.append(Timing(*ends, math.exp(ratio)))
    return tuple(made)
