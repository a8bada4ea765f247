"""Which of several files is faster on one target, and whether that can be told at all.

Each round is a fresh process that times all files in turns (mobile_bench.interleave). A round gives one
number a file: the median over its turns of the logarithm of the ratio of the block medians, file over first
file. The rounds are the independent sample: memory layout and placement differ between processes and not
within one, and so only rounds are resampled.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench import trust
from mobile_bench.errors import InputError
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import check_is_tflite
from mobile_bench.jobs import OnProgress
from mobile_bench.lock import one_at_a_time
from mobile_bench.measure import accelerator_job, check_can_run
from mobile_bench.records import Connection, Delegate, Target
from mobile_bench.stats import ratio_interval
from mobile_bench.transports import transport_for

LEVEL = 0.02
#: Smaller differences come and go with the memory layout, and nobody ships or rejects a file for them.
RESOLUTION = 0.002
MIN_ROUNDS, ROUNDS = 6, 12
_MIN_ROUND_S = 0.2
_LOCAL = Target()


@dataclass(frozen=True)
class Verdict:
    """How one file stands to the first: ratio of latencies (1.03: 3% slower) with its interval.

    verdict: 'faster' or 'slower' where the whole interval says so by more than RESOLUTION, else 'cannot tell'.
    median_ms, reference_ms: of the file and of the first one, over all rounds. round_ratios: one a round, the
    sample that the interval rests on.
    """

    sha256: str
    ratio: float
    low: float
    high: float
    confidence: float
    verdict: str
    median_ms: float
    reference_ms: float
    round_ratios: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """All files against the first. blocks: round -> turn -> file -> latencies in milliseconds, all of them."""

    target: Target
    verdicts: tuple[Verdict, ...]
    rounds: int
    turns: int
    seconds: float
    device: dict
    load_average: float | None
    warnings: tuple[str, ...]
    blocks: tuple


def compare(
    tflites: Sequence[str | Path], target: Target = _LOCAL, *, connection: Connection | None = None,
    seconds: float = 20.0, rounds: int = ROUNDS, level: float = LEVEL, batch: int = 1,
    specs: Sequence[InputSpec | None] | None = None, seed: int = 0, delegate: Delegate | None = None,
    references: Sequence[str | Path] | None = None, on_progress: OnProgress | None = None, wait_s: float = 3600,
) -> Comparison:  # fmt: skip
    """Time files against the first of them, interleaved, in several processes.

    seconds: of wall clock for the whole comparison, process starts included; a slow file may take more, since
    each round makes at least three turns. references: for an accelerator, one for each file, whose answers on the
    CPU count as right: what is compiled for the Edge TPU has none of its own there. level: the chance of a verdict
    where there is no difference, shared out over the files (Bonferroni), so that it holds for the whole comparison.
    Raises InputError for what makes no sense to try, ModelRefused where a file cannot run, DelegateError where an
    accelerator's answers are wrong, JobFailed where a round crashed.
    """
    files = [Path(tflite) for tflite in tflites]
    _check(files, seconds, rounds, level, batch, seed)
    check_can_run(target)
    hashes = [sha256_of(file) for file in files]
    specs = list(specs or [None] * len(files))
    job = {
        "tflites": len(files), "specs": [spec.to_dict() if spec else None for spec in specs], "batch": batch,
        "threads": target.threads, "runtime": target.runtime, "seed": seed,
    }  # fmt: skip
    paths = {f"tflite_{index}": file for index, file in enumerate(files)}
    if accelerator_job(job, target, delegate):
        raise InputError(
            "A comparison takes a reference for each file, and not one for all", received=delegate.reference,
            next_step="Give them as `references`",
        )  # fmt: skip
    paths |= reference_files(references or (), files, target)
    order, found = secrets.randbits(32), []
    transport = transport_for(target, connection)
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress), transport:
        started, overhead_s = time.perf_counter(), 0.8
        for number in range(rounds):
            begun = time.perf_counter()
            share_s = (seconds - (begun - started)) / (rounds - number)
            timing_s = max(_MIN_ROUND_S, share_s - overhead_s)
            if on_progress:
                on_progress({"kind": "progress", "stage": "round", "done": number, "total": rounds})
            answer = transport.run(
                "mobile_bench.interleave", {**job, "order_seed": order + number, "seconds": timing_s}, files=paths,
                timeout_s=900 + seconds,
            )  # fmt: skip
            found.append(answer)
            overhead_s = max(0.0, time.perf_counter() - begun - timing_s)
        passed_s = time.perf_counter() - started
    trust.check_same_machine([answer["device"] for answer in found])
    return Comparison(
        target, verdicts_of([answer["blocks"] for answer in found], hashes, level), rounds,
        sum(len(answer["blocks"]) for answer in found), passed_s, found[0]["device"],
        max((a["load_average"] for a in found if a["load_average"] is not None), default=None),
        trust.of_processes([answer["warnings"] for answer in found]),
        tuple(answer["blocks"] for answer in found),
    )  # fmt: skip


def verdicts_of(rounds: Sequence, hashes: Sequence[str], level: float = LEVEL) -> tuple[Verdict, ...]:
    """Each file but the first against the first, from the blocks of all rounds."""
    confidence = 1 - level / (len(hashes) - 1)
    medians = [np.array([[np.median(block) for block in turn] for turn in turns]) for turns in rounds]
    whole = np.median(np.concatenate(medians), axis=0)
    made = []
    for index in range(1, len(hashes)):
        logs = [float(np.median(np.log(turns[:, index] / turns[:, 0]))) for turns in medians]
        low, high = ratio_interval(logs, confidence)
        verdict = "slower" if low > 1 + RESOLUTION else "faster" if high < 1 - RESOLUTION else "cannot tell"
        made.append(
            Verdict(
                hashes[index], math.exp(float(np.mean(logs))), low, high, confidence, verdict, float(whole[index]),
                float(whole[0]), tuple(math.exp(value) for value in logs),
            )
        )  # fmt: skip
    return tuple(made)


def reference_files(references: Sequence, files: Sequence, target: Target) -> dict[str, Path]:
    """What a comparison's job gets beside the files that are timed; InputError where that makes no sense."""
    if not references:
        return {}
    shown = ", ".join(map(str, references))
    if target.accelerator == "cpu" or target.transport == "adb":
        raise InputError(
            "Reference files are for an accelerator here or on a board by ssh", received=shown,
            next_step="Leave --reference out",
        )  # fmt: skip
    if len(references) != len(files):
        raise InputError(
            "Each file needs a reference of its own", received=f"{len(references)} for {len(files)} files: {shown}",
            next_step="Give --reference once for each file, in their order",
        )  # fmt: skip
    for reference in references:
        check_is_tflite(reference)
    return {f"reference_{index}": Path(reference) for index, reference in enumerate(references)}


def _check(files: list[Path], seconds: float, rounds: int, level: float, batch: int, seed: int) -> None:
    if not 2 <= len(files) <= 8:
        raise InputError(
            "A comparison needs two files or more", received=f"{len(files)} file(s)", allowed="2 to 8 files"
        )
    for name, value, least, most in (
        ("seconds", seconds, 1, 36_000), ("rounds", rounds, MIN_ROUNDS, 1000), ("level", level, 1e-4, 0.5),
        ("batch", batch, 1, 4096), ("seed", seed, 0, 2**32 - 1),
    ):  # fmt: skip
        if not least <= value <= most:
            raise InputError(f"{name} is out of range", received=value, allowed=f"{least} to {most}")
