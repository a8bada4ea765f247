"""A study as the suite writes it, with everything that can be awkward about one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mobile_bench import store
from mobile_bench.inputs import InputSpec
from mobile_bench.records import Measurement, Quality, Skip, StepReport, StudyRecord, Target, Tensor, Variant

ODD = 'modèle <img src=x onerror=alert(1)>&"x"'  # a name that HTML, Markdown and ASCII-only code would each spoil
MACHINE = {
    "cpu": "AMD EPYC 7B13",
    "cores": 2,
    "machine": "x86_64",
    "os": "Debian GNU/Linux 12 (bookworm)",
    "python": "3.11.7",
}
DEVICE = {**MACHINE, "runtime": "ai-edge-litert", "runtime_version": "2.3.0"}
NOTE = "CIFAR-10 (JPEG): re-encoded images; never compare with published CIFAR-10 figures <script>alert(1)</script>"
FAILURE = "The converter refused the model. Received: op <CUMSUM> in layer 'tête'. Use float32."

#: recipe, scheme, correct of 10,000, size, median latency, technique of its steps
PLAN = (
    ("baseline", "float32", 8431, 318_000, 0.92, ()),
    ("baseline", "float16", 8431, 166_000, 0.93, ()),
    ("baseline", "dynamic", 8420, 97_000, 0.99, ()),
    ("baseline", "int8", 8398, 98_500, 0.71, ()),
    ("prune", "float32", 8372, 318_000, 0.91, ("prune",)),
    ("prune", "int8", 8365, 98_500, 0.70, ("prune",)),
    ("qat", "int8", 8442, 99_100, 0.72, ("qat",)),
    ("lowrank", "float32", 8310, 201_000, 0.81, ("factorize",)),
    ("lowrank", "int8", 8290, 66_000, 0.77, ("factorize",)),
    ("distill", "float32", 8055, 84_000, 0.34, ("distill",)),
    ("distill", "int8", 8021, 31_000, 0.29, ("distill",)),
    ("distill_prune_qat", "int8", 8090, 31_200, 0.29, ("distill", "prune", "qat")),
)


def step(technique: str, before: float, after: float) -> StepReport:
    history = tuple(
        {"step": n * 50, "loss": 1.1 - n * 0.1, "accuracy": before, "val_accuracy": before + (after - before) * n / 4}
        for n in range(1, 5)
    )
    training = {
        "steps": 200, "images_seen": 12_800, "seconds": 14.2, "loss": history[-1]["loss"], "accuracy_before": before,
        "accuracy_after": after, "history": history, "stopped_early": False,
    }  # fmt: skip
    settings = {
        "sparsity": 0.5,
        "exclude": [],
        "train": {"epochs": None, "steps": 200, "learning_rate": 1e-3, "optimizer": "adam"},
    }
    skips = (
        Skip("conv1", "first or last layer"), Skip("dense", "first or last layer"),
        Skip("shortcut<1>", "too small to gain", "48 weights"),
    )  # fmt: skip
    return StepReport(
        technique, settings, ("conv2", "conv3", "conv4"), skips, 78_000, 78_000, 12_500_000, 12_500_000, 15.9,
        training=training, properties={"sparsity": 0.5}, notes=("3 layers start from the <teacher>",),
    )  # fmt: skip


def latencies(median_ms: float, seed: int, runs: int = 400) -> tuple[float, ...]:
    random = np.random.default_rng(seed)
    values = median_ms * (1 + 0.03 * random.standard_gamma(1.5, runs) - 0.03)
    values[random.integers(0, runs, 3)] *= 6
    return tuple(float(v) for v in values)


def add_variant(
    study: Path, model: str, recipe: str, scheme: str, correct: int, size: int, median_ms: float | None, techniques=(),
    *, device=DEVICE, target: Target | None = None, seed: int = 0,
) -> Path:  # fmt: skip
    """One finished variant with its quality and (unless median_ms is None) one measurement."""
    name = f"{recipe}-{scheme}"
    folder = store.variant_folder(study, model, name)
    folder.mkdir(parents=True)
    (folder / "model.tflite").write_bytes(b"TFL3" + bytes(size - 4))
    sha = f"{model}{name}".encode().hex()
    whole = scheme == "int8"
    tensor = Tensor(
        "image", (1, 32, 32, 3), "int8" if whole else "float32", 0.0078 if whole else 0.0, -1 if whole else 0
    )
    accuracy = correct / 10_000
    variant = Variant(
        name, model, recipe, scheme, sha256=sha, size_bytes=size, gzip_bytes=int(size * 0.87), parameters=78_000,
        macs=12_500_000, spec=InputSpec(32, 32, 3, labels=("cat", "dög")), inputs=(tensor,),
        outputs=(Tensor("class", (1, 10), tensor.dtype, 0.0039 if whole else 0.0, -128 if whole else 0),),
        steps=tuple(step(t, accuracy - 0.03, accuracy + 0.002) for t in techniques),
        tools={"tensorflow": "2.21.0", "keras": "3.12.0"}, seed=seed, created_at="2026-11-23T07:00:00+00:00",
    )  # fmt: skip
    store.write_variant(folder, variant)
    store.write_quality(
        folder,
        Quality("cifar10", "test", "f00d", 10_000, correct, 0.9987, 0.9312, accuracy, "ai-edge-litert 2.3.0", sha),
    )
    if median_ms:
        store.write_measurement(folder, measurement(sha, median_ms, seed, device, target or Target()))
    return folder


def measurement(sha: str, median_ms: float, seed: int = 0, device=DEVICE, target: Target | None = None) -> Measurement:
    return Measurement(
        f"run{seed:04d}", "latency", sha, target or Target(), "ok", input_shape=(1, 32, 32, 3), load_ms=2.31,
        first_inference_ms=median_ms * 1.8, warmup_ms=latencies(median_ms * 1.2, seed + 1, 30),
        latency_ms=latencies(median_ms, seed), peak_rss_bytes=61_000_000, device=device, load_average=0.4,
        warnings=("the load average was 3.2 with 1 thread(s) on 2 cores",),
        started_at=f"2026-11-23T07:01:{seed % 60:02d}+00:00",
    )  # fmt: skip


def write_record(study: Path, expected, *, finished=True, **changes) -> None:
    facts = {
        "name": "demo-cifar10",
        "data": {
            "name": "cifar10", "source": "class folders", "fingerprint": "f00d", "note": NOTE,
            "classes": ["cat", "dög"],
            "images": {"train": 45_000, "validation": 5_000, "test": 10_000, "calibration": 512},
        },
        "models": {"resnet8": {"source": "resnet8.keras"}}, "recipes": ("baseline", "qat"), "expected": tuple(expected),
        "machine": MACHINE, "tools": {"tensorflow": "2.21.0"}, "created_at": "2026-11-23T06:50:00+00:00",
        "finished_at": "2026-11-23T07:10:00+00:00" if finished else "",
    }  # fmt: skip
    store.write_study(study, StudyRecord(**{**facts, **changes}))


def build_study(folder: Path) -> Path:
    """Two models by twelve variants; then one that failed, one unmeasured, one refused, one missing."""
    expected, seed = [], 0
    for model, lost, smaller, faster in (("resnet8", 0, 1.0, 1.0), ("mobilenet-w0.25", 190, 1.6, 3.1)):
        for recipe, scheme, correct, size, median_ms, techniques in PLAN:
            seed += 1
            expected.append(f"{model}/{recipe}-{scheme}")
            add_variant(
                folder,
                model,
                recipe,
                scheme,
                correct - lost,
                int(size / smaller),
                median_ms / faster,
                techniques,
                seed=seed,
            )
    failed = store.variant_folder(folder, ODD, "qat-int8")
    store.write_variant(failed, Variant("qat-int8", ODD, "qat", "int8", status="failed", reason=FAILURE))
    add_variant(folder, ODD, "baseline", "float32", 8200, 120_000, 48.0, seed=91)
    add_variant(folder, ODD, "baseline", "int8", 8190, 40_000, None)
    refused = add_variant(folder, ODD, "prune", "int8", 8100, 40_000, None, ("prune",))
    sha = store.read_entry(refused).variant.sha256
    store.write_measurement(
        refused,
        Measurement("r1", "latency", sha, Target(), "refused", reason="unresolved custom op: <odd>", started_at="2026"),
    )
    names = ("baseline-float32", "baseline-int8", "prune-int8", "qat-int8", "lowrank-float32")
    write_record(folder, [*expected, *(f"{ODD}/{name}" for name in names)])
    return folder


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """Read only; tests that change a study take `own_study`."""
    return build_study(tmp_path_factory.mktemp("studies") / "demo-cifar10")


@pytest.fixture
def own_study(study, tmp_path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "own"))


@pytest.fixture
def at_study(monkeypatch):
    """Make the pages look at a folder, as `streamlit run app.py -- FOLDER` does."""

    def look(folder: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["app.py", str(folder)])

    return look


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, driven by Playwright. In CI a missing browser is a failure."""
    place = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if place is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is not installed, and CI must look at the pages: apt-get install chromium")
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
    ]  # fmt: skip
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=place, args=flags)
        yield chromium
        chromium.close()
