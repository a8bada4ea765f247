"""Fixtures for all tests: tiny real .tflite files, and where third-party models lie."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent

# A shell has Ctrl-C ignored in what it starts in the background, and so would every child that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(request):
    """Tiny models, made once and kept in pytest's cache.

    tiny.path(name): a .tflite (float32, float16, int8, uint8, int16, sigmoid, logits, open_size,
    two_inputs, two_outputs; truncated, text, empty, self_calling, custom_op, not_a_number). tiny.images:
    uint8 (300, 12, 12, 3). tiny.labels: int32 (300,). tiny.keras['softmax']: what Keras answers.
    tiny.sample: the .npz of both. Their scaling is 'signed'.
    """
    script = HERE / "make_tiny_models.py"
    key = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    folder = request.config.cache.mkdir("tiny-models") / key
    if not (folder / "keras.npz").exists():
        work = folder.with_name(f"{key}-{os.getpid()}")
        work.mkdir()
        made = subprocess.run([sys.executable, str(script), str(work)], capture_output=True, text=True, timeout=600)
        assert made.returncode == 0, made.stderr[-3000:]
        work.rename(folder)
    sample, answers = np.load(folder / "sample.npz"), np.load(folder / "keras.npz")
    return SimpleNamespace(
        path=lambda name: folder / f"{name}.tflite",
        sample=folder / "sample.npz",
        images=sample["images"],
        labels=sample["labels"],
        keras={name: answers[name] for name in answers.files},
    )


@pytest.fixture(scope="session")
def shared_model():
    """The path of a third-party .tflite by its name; skips where these files are not at hand."""
    data = Path(os.environ.get("TFOPT_SHARED_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = data / "models" / name
        if not path.is_file():
            pytest.skip(f"third-party model {name} is not here; set TFOPT_SHARED_DATA to the folder above models/")
        return path

    return find


@pytest.fixture
def run_python():
    """Run `python ARGS` from the checkout in a fresh process: run_python('-c', 'print(1)').stdout == '1\\n'."""

    def run(*args: object, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        known = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, known)), "COLUMNS": "120"}
        environment.update(options.pop("environment", {}))
        return subprocess.run(
            [sys.executable, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            **options,
        )

    return run
