"""A real delegate for the tests of this folder."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    """The path of a delegate's library; skips where nothing compiles C."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler here to make a delegate with: apt install gcc libc6-dev")
    library = tmp_path_factory.mktemp("delegate") / "adder.so"
    source = Path(__file__).with_name("adder_delegate.c")
    made = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return library
