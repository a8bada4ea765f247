"""Data sets by name: from the local cache, Keras's own download, or a Debian package."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mobile_bench.files import write_bytes
from tfopt.data.cache import cache_folder
from tfopt.errors import DataError, InputError

_MEMBERS = ("x_train", "y_train", "x_test", "y_test")
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
DOWNLOAD_SECONDS = 600
#: a source that says nothing for so long is given up.
SILENCE_SECONDS = 20
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGIT_CLASSES = tuple(str(digit) for digit in range(10))
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_CIFAR100.split())
CLASSES = {
    "fashion_mnist": FASHION_CLASSES,
    "mnist": DIGIT_CLASSES,
    "digits": DIGIT_CLASSES,
    "cifar10": CIFAR10_CLASSES,
    "cifar100": CIFAR100_CLASSES,
}


def load_arrays(name: str, progress: Callable[[int, int, dict], None] | None = None) -> tuple[Arrays, str]:
    """((train images, train labels, test images, test labels), where they came from).

    Raises DataError with what each source said where none has it.
    """
    if name == "digits":
        return _digits(), "scikit-learn"
    cached = cache_folder() / "data" / f"{name}.npz"
    attempts: list[tuple[str, Callable[[], Arrays]]] = [("Keras's download", lambda: _keras(name))]
    if name == "fashion_mnist":
        attempts.append((f"the Debian package {DEBIAN_PACKAGE}", _debian_fashion_mnist))
    reasons = []
    if cached.exists():
        try:
            return _read_cache(cached), "the local cache"
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reasons.append(f"{cached}: {_short(error)}")
    for done, (source, attempt) in enumerate(attempts):
        if progress:
            progress(done, len(attempts), {"what": f"fetching {name} from {source}"})
        try:
            arrays = attempt()
        except Exception as error:  # noqa: BLE001 - any failure of a source means: ask the next one
            reasons.append(f"{source}: {_short(error)}")
            continue
        try:
            packed = io.BytesIO()
            np.savez_compressed(packed, **dict(zip(_MEMBERS, arrays)))
            write_bytes(cached, packed.getvalue())
        except InputError as problem:
            warnings.warn(f"{name} will be fetched again next time. {problem}", RuntimeWarning, stacklevel=3)
        return arrays, source
    raise DataError(
        f"The data set {name} cannot be had from anywhere",
        received="; ".join(reasons),
        next_step=f"Connect to the internet once, or put {name}.npz ({', '.join(_MEMBERS)}) at {cached}",
    )


def _read_cache(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return tuple(file[member] for member in _MEMBERS)


def _keras(name: str) -> Arrays:
    """Keras downloads without a time limit, so it runs in a child that can be ended."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "data.npz")
        code = (
            "import keras, numpy, socket, sys\n"
            f"socket.setdefaulttimeout({SILENCE_SECONDS})\n"
            f"(a, b), (c, d) = keras.datasets.{name}.load_data()\n"
            "numpy.savez(sys.argv[1], a=a, b=b, c=c, d=d)\n"
        )
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(target)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        try:
            _, said = child.communicate(timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired as error:
            # Interrupted, Keras removes what it has; killed, it would take the half file for whole next time.
            child.send_signal(signal.SIGINT)
            try:
                child.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
            raise DataError(f"not finished in {DOWNLOAD_SECONDS} s") from error
        if child.returncode:
            raise DataError((said.strip().splitlines() or ["no message"])[-1])
        with np.load(target, allow_pickle=False) as file:
            images_train, labels_train, images_test, labels_test = (file[key] for key in "abcd")
    return _channels(images_train), labels_train.ravel(), _channels(images_test), labels_test.ravel()


def _debian_fashion_mnist() -> Arrays:
    if DEBIAN_FOLDER.is_dir():
        return _read_idx_folder(DEBIAN_FOLDER)
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DataError("this machine has no apt-get")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # apt downloads as another user
        patience = ["-o", f"Acquire::http::Timeout={SILENCE_SECONDS}", "-o", "Acquire::Retries=1"]
        for verbs in (["download", DEBIAN_PACKAGE], ["update"], ["download", DEBIAN_PACKAGE]):
            command = ["apt-get", *patience, *verbs]
            subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            packages = list(Path(folder).glob("*.deb"))
            if packages:
                break
        else:
            raise DataError("apt-get could not download it")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), folder], check=True, capture_output=True)
        return _read_idx_folder(Path(folder, *DEBIAN_FOLDER.parts[1:]))


def _read_idx_folder(folder: Path) -> Arrays:
    read = lambda name: _read_idx(folder / f"{name}.gz")
    return (
        _channels(read("train-images-idx3-ubyte")), read("train-labels-idx1-ubyte"),
        _channels(read("t10k-images-idx3-ubyte")), read("t10k-labels-idx1-ubyte"),
    )  # fmt: skip


def _read_idx(path: Path) -> np.ndarray:
    """The idx format of MNIST: two zero bytes, type 8 (uint8), the rank, big-endian sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise DataError("not an idx file of bytes", received=path)
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, 4)
    return np.frombuffer(content, np.uint8, int(np.prod(shape)), 4 + 4 * rank).reshape(shape)


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = _channels(np.round(digits.images * (255 / 16)).astype(np.uint8))
    labels = digits.target
    # The order of the file is by writer; the last fifth is other people's handwriting, as its authors meant.
    edge = len(labels) * 4 // 5
    return images[:edge], labels[:edge], images[edge:], labels[edge:]


def _channels(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
