"""What an exported file really answers: accuracy and agreement, by the .tflite itself.

The file is run in a child process without TensorFlow, under the runtime that will run it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_bench.files import atomic_path
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import run_job, serve
from mobile_bench.records import Quality, Tensor
from tfopt.data.splits import Split

TIMEOUT_S = 3600
PART = 512


@dataclass(frozen=True, eq=False)
class Answers:
    """predictions: int64 (count,), the class of each image; with what the file says about itself."""

    predictions: np.ndarray
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    runtime: str


def save_split(split: Split, spec: InputSpec, folder: Path) -> Path:
    """The split's pixels as `spec` wants them, on disk once for all files that see them: FOLDER/images.npy."""
    path = Path(folder) / "images.npy"
    if not path.exists():
        with atomic_path(path) as temporary:
            # Written part by part and mapped by the reader: a test split may be larger than memory.
            pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(split), *spec.shape))
            for start in range(0, len(split), PART):
                pixels[start : start + PART] = split.pixels(spec, slice(start, start + PART))
            pixels.flush()
    return path


def answers(
    tflite: Path, images: Path, spec: InputSpec, work: Path, *, progress: Callable[[int, int, dict], None] | None = None
) -> Answers:
    """Run a .tflite over images.npy (uint8 NHWC). Raises ModelRefused or JobFailed with the reason."""
    out = Path(work) / "predictions.npy"
    job = {
        "tflite": str(Path(tflite).resolve()), "images": str(Path(images).resolve()), "spec": spec.to_dict(),
        "out": str(out.resolve()),
    }  # fmt: skip
    relay = (lambda m: progress(m["done"], m["total"], {})) if progress else None
    result = run_job("tfopt.attest", job, work, on_progress=relay, timeout_s=TIMEOUT_S)
    tensors = {side: tuple(Tensor(**t) for t in result[side]) for side in ("inputs", "outputs")}
    return Answers(np.load(out, allow_pickle=False), **tensors, runtime=result["runtime"])


def quality(
    found: Answers, labels: np.ndarray, *, data: str, split: str, fingerprint: str, sha256: str,
    keras: np.ndarray | None = None, baseline: np.ndarray | None = None,
) -> Quality:  # fmt: skip
    """A Quality record from predictions; keras and baseline are the classes those models named."""
    share = lambda other: None if other is None else float(np.mean(found.predictions == other))
    return Quality(
        data=data,
        split=split,
        fingerprint=fingerprint,
        images=len(labels),
        correct=int(np.sum(found.predictions == labels)),
        agreement=share(keras),
        baseline_agreement=share(baseline),
        keras_top1=None if keras is None else float(np.mean(keras == labels)),
        runtime=found.runtime,
        sha256=sha256,
    )


def _child(job: dict, emit) -> dict:
    from mobile_bench.evaluate import evaluate
    from mobile_bench.records import to_dict

    images = np.load(job["images"], mmap_mode="r", allow_pickle=False)
    result = evaluate(
        Path(job["tflite"]), images, np.zeros(len(images), np.int32), InputSpec.from_dict(job["spec"]),
        progress=lambda done, total: emit("progress", done=done, total=total),
    )  # fmt: skip
    with atomic_path(job["out"]) as temporary, open(temporary, "wb") as file:
        np.save(file, np.asarray(result.predictions, np.int64))
    strip = lambda tensors: [{k: v for k, v in to_dict(t).items() if k != "schema_version"} for t in tensors]
    return {"inputs": strip(result.inputs), "outputs": strip(result.outputs), "runtime": result.runtime}


if __name__ == "__main__":
    serve(_child)
