"""Named data sets: which source answers, what is said when none does, and nothing half-written."""

from __future__ import annotations

import gzip
import resource
import socket
import subprocess
import sys

import numpy as np
import pytest

from tfopt import data
from tfopt.data import sources
from tfopt.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_download(monkeypatch):
    """What the download says on a machine without internet, recorded; the real one has its own test below."""

    def refuse(name):
        raise DataError(f"Exception: URL fetch failure on https://somewhere/{name}: None -- Name or service not known")

    monkeypatch.setattr(sources, "_keras", refuse)


@pytest.fixture
def debian_folder(tmp_path, monkeypatch):
    """The Debian package's four files in its idx format, with few images."""
    folder = tmp_path / "debian"
    folder.mkdir()
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 200), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
        arrays[part] = images, labels
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", folder)
    return folder, arrays


def test_the_debian_package_stands_in_for_a_download_and_is_cached(no_download, debian_folder, own_cache):
    _, arrays = debian_folder
    seen = []
    loaded = data.load("fashion_mnist", progress=lambda done, total, facts: seen.append(facts["what"]))
    assert loaded.source == "the Debian package dataset-fashion-mnist"
    assert seen == [
        "fetching fashion_mnist from Keras's download",
        "fetching fashion_mnist from the Debian package dataset-fashion-mnist",
    ]
    np.testing.assert_array_equal(loaded["test"].images[..., 0], arrays["t10k"][0])
    np.testing.assert_array_equal(loaded["test"].labels, arrays["t10k"][1])
    assert loaded.class_names[0] == "T-shirt"
    again = data.load("fashion_mnist")
    assert again.source == "the local cache" and again.fingerprint == loaded.fingerprint


def test_a_set_that_no_source_has_says_what_each_said(no_download):
    with pytest.raises(
        DataError,
        match=r"mnist cannot be had.*download: .*URL fetch.*Connect.*cache/data/mnist\.npz",
    ):
        data.load("mnist")


def test_digits_stand_in_and_say_so(no_download, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("PATH", "")  # no apt-get on this machine
    loaded = data.load_first(["fashion_mnist", "digits"])
    assert loaded.name == "digits" and loaded.image_shape == (8, 8, 1)
    assert loaded.note.startswith("digits stands in for fashion_mnist, so the figures are not those of fashion_mnist")
    assert "no apt-get" in loaded.note and "Keras's download" in loaded.note
    assert data.load_first(["digits", "fashion_mnist"]).note == ""
    with pytest.raises(DataError, match="fashion_mnist cannot be had"):
        data.load_first(["fashion_mnist"])


@pytest.mark.parametrize("content", [b"PK\x03\x04 half a file", b""])
def test_a_damaged_cache_is_fetched_again(debian_folder, no_download, own_cache, content):
    file = own_cache / "data" / "fashion_mnist.npz"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert data.load("fashion_mnist").source == "the Debian package dataset-fashion-mnist"
    assert data.load("fashion_mnist").source == "the local cache"


def test_a_full_disk_costs_the_cache_and_not_the_data(debian_folder, no_download, own_cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="fetched again next time.*Free some space"):
            loaded = data.load("fashion_mnist")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(loaded["test"]) == 20
    assert list((own_cache / "data").iterdir()) == []


@pytest.mark.parametrize("behaviour", ["nobody listens", "never answers"])
def test_the_real_download_gives_up_on_a_network_that_fails(monkeypatch, tmp_path, behaviour):
    """The real child and the real keras.datasets; every connection goes to a socket of this machine."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(sources, "SILENCE_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        if behaviour == "nobody listens":
            server.close()
        reason = "refused" if behaviour == "nobody listens" else r"(?i)timed out"
        with pytest.raises(DataError, match=rf"{reason}"):
            sources._keras("mnist")
    assert not list((tmp_path / "keras").rglob("*.npz"))


def test_a_download_that_takes_too_long_is_interrupted(monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(DataError, match=r"not finished in 0\.2 s"):
        sources._keras("mnist")


def test_every_named_set_has_its_classes():
    counts = {name: len(set(classes)) for name, classes in data.CLASSES.items()}
    assert counts == {"fashion_mnist": 10, "mnist": 10, "digits": 10, "cifar10": 10, "cifar100": 100}


def test_data_is_imported_without_tensorflow():
    code = "import sys, tfopt.data; print([name for name in ('tensorflow', 'keras') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
