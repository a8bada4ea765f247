"""Which images an int8 model is calibrated on, how many, and which range each of its tensors gets.

| ranges     | clips                                                                      | source           |
|------------|----------------------------------------------------------------------------|------------------|
| minmax     | nothing: from the smallest to the largest value seen                       | the converter    |
| percentile | 0.01% of the values at each end                                            | arXiv:2004.09602 |
| mse        | where the squared error of rounding and clipping is least                  | arXiv:2106.08295 |
| entropy    | where the clipped distribution loses least information (Kullback-Leibler)  | Migacz, GTC 2017 |
| best       | as one of these: the one whose file agrees best with the float file on other images           |

`calibrate` runs TensorFlow's calibrator over a float .tflite, which notes every tensor's smallest and largest value
in the file; `with_ranges` replaces them by narrower ones, and the converter's quantizer then reads them. Of a tensor
into which an ADD writes its sum the calibrator notes the sum as well, so minmax is wider there than its values are;
the other ways look at the values themselves.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.evaluate import classes_of
from mobile_bench.interpreter import Model, open_model
from tfopt.errors import DataError, InputError, unknown_name

if TYPE_CHECKING:
    from mobile_bench.inputs import InputSpec
    from tfopt.data.splits import Split

WAYS = ("minmax", "percentile", "mse", "entropy")
BEST = "best"
AUTO = "auto"
FIRST_IMAGES, MOST_IMAGES = 16, 512
#: 'auto' stops when this share of the tensors has ranges that moved by less than this share of their width.
SETTLED_SHARE, SETTLED_CHANGE = 0.95, 0.02
#: A range that clips is found from a histogram of so many bins, as in Migacz's talk.
BINS = 2048
PERCENT_CLIPPED = 0.01
LEVELS = 256

Range = tuple[float, float]


@dataclass(frozen=True)
class Count:
    """How many images were used, of how many, and why as many."""

    used: int
    offered: int
    why: str


def check_options(images: int | str | None, ranges: str) -> None:
    """Raise InputError for a number of images or a way to find ranges that does not exist."""
    if images is not None and images != AUTO and not (type(images) is int and images >= 1):
        raise InputError(
            "The number of calibration images cannot be used", received=repr(images), allowed="auto, or 1 and above"
        )
    if ranges not in (*WAYS, BEST):
        raise unknown_name("way to find calibration ranges", str(ranges), (*WAYS, BEST))


def balanced_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Indices of all images, one of each class in turn, the same for the same seed: any prefix is class-balanced."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        turn[members] = np.arange(len(members))
    return np.lexsort((rng.permutation(len(labels)), turn))


def choose(given: Split | np.ndarray, spec: InputSpec, images: int | str | None = None, seed: int = 0) -> np.ndarray:
    """uint8 (count, height, width, channels) as `spec` wants them, class-balanced, in the order of use.

    given: a split, or uint8 images (count, any height, any width, 1 or 3), RGB. images: how many, 'auto' for all
    that it may look at, None for all. Raises DataError for images of another form, and for none.
    """
    if not hasattr(given, "pixels"):
        return spec.fit(_checked(given))[: _limit(images, len(given))]
    if not len(given):
        raise DataError("There is no image to calibrate on", received="0 images", next_step="Name another data set")
    if images is None:
        return given.pixels(spec)
    return given.pixels(spec, balanced_order(given.labels, seed)[: _limit(images, len(given))])


def _limit(images: int | str | None, offered: int) -> int:
    return offered if images is None else min(offered, MOST_IMAGES if images == AUTO else images)


def _checked(given) -> np.ndarray:
    """The array, if it is what a camera gives. Scaling is the input spec's: done twice, every range would be wrong."""
    array = np.asarray(given)
    form = f"{array.dtype} of shape {array.shape}"
    fitting = "uint8 of shape (count, height, width, 1 or 3), RGB, 0..255"
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise DataError("The calibration images have the wrong shape", received=form, allowed=fitting)
    if not array.size:
        raise DataError("There is no image to calibrate on", received=form, allowed=fitting)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(
            "The calibration images hold values that are not numbers", received=f"{form} with NaN or infinity",
            allowed=fitting, next_step="Look for a division by zero where they were made",
        )  # fmt: skip
    low, high = (float(f(array)) for f in (np.min, np.max)) if array.dtype.kind in "fiu" else (0.0, 0.0)
    scaled = array.dtype.kind == "f" and (low < 0 or high <= 1)
    raise DataError(
        "The calibration images are already scaled" if scaled else "The calibration images are not bytes",
        received=f"{form}, values from {low:g} to {high:g}", allowed=fitting,
        next_step="Give the images as they were before: the input spec scales them" if scaled
        else "Round them to 0..255 and say .astype('uint8')",
    )  # fmt: skip


def calibrate(model: bytes, images: np.ndarray, spec: InputSpec, count: int | str | None) -> tuple[bytes, Count]:
    """A float .tflite with every tensor's range on as many of `images` as needed, and how many those were.

    images: what `choose` gave. count: 'auto' takes 16, 32, 64, ... until the ranges settle.
    """
    from tensorflow.lite.python.optimize.calibrator import Calibrator

    # Its public face takes all images at once; ranges are read between them here.
    calibrator = Calibrator(model)._calibrator
    calibrator.Prepare([[1, *spec.shape]])
    feed = lambda part: [calibrator.FeedTensor([spec.normalize(image[None])]) for image in part]
    offered = len(images)
    if count != AUTO:
        feed(images)
        why = "all that were given" if count is None else "as asked" if offered == count else "there are no more"
        return calibrator.Calibrate(), Count(offered, offered, why)
    used, before, moved = 0, None, ""
    while True:
        until = min(max(FIRST_IMAGES, 2 * used), offered)
        feed(images[used:until])
        content, earlier, used = calibrator.Calibrate(), used, until
        now = ranges_of(content)
        share = _settled(before, now) if before is not None else 0.0
        if before is not None:
            moved = (
                f"from {earlier} to {used} images {share:.0%} of {len(now)} tensors' ranges moved by less than "
                f"{SETTLED_CHANGE:.0%}"
            )
        if share >= SETTLED_SHARE:
            return content, Count(used, offered, moved)
        if used == offered:
            why = f"no more are looked at (at most {MOST_IMAGES})" if used == MOST_IMAGES else "there are no more"
            return content, Count(used, offered, f"{why}; {moved or 'too few to see the ranges settle'}")
        before = now


def _settled(before: dict[int, Range], now: dict[int, Range]) -> float:
    """The share of the tensors whose ends both moved by less than SETTLED_CHANGE of the range's width."""
    moved = [
        max(abs(before[i][0] - low), abs(before[i][1] - high)) / ((high - low) or 1.0)
        for i, (low, high) in now.items() if i in before
    ]  # fmt: skip
    return float(np.mean(np.array(moved) < SETTLED_CHANGE)) if moved else 1.0


def ranges_of(calibrated: bytes) -> dict[int, Range]:
    """Tensor -> (smallest, largest value) of what `calibrate` gave."""
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.Model.GetRootAs(calibrated, 0).Subgraphs(0)
    found = {}
    for index in range(graph.TensorsLength()):
        known = graph.Tensors(index).Quantization()
        if known is not None and known.MinLength() == 1 and known.MaxLength() == 1:
            found[index] = (float(known.Min(0)), float(known.Max(0)))
    return found


def with_ranges(calibrated: bytes, ranges: dict[int, Range]) -> bytes:
    """The same file with other ranges for these tensors."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(calibrated, 0)
    for index, (low, high) in ranges.items():
        known = model.subgraphs[0].tensors[index].quantization
        known.min, known.max = [low], [high]
    builder = flatbuffers.Builder(len(calibrated) + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def histograms(calibrated: bytes, images: np.ndarray, spec: InputSpec) -> dict[int, np.ndarray]:
    """Tensor -> how often its values fell into each of BINS equal parts of its range, over `images`.

    The graph's inputs are left out: pixels are bytes already, and keep their whole range.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # XNNPACK would keep the tensors between its operations to itself.
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(
        model_content=calibrated, experimental_preserve_all_tensors=True, experimental_op_resolver_type=plain
    )
    interpreter.allocate_tensors()
    (entry,) = (details["index"] for details in interpreter.get_input_details())
    ranges = {i: r for i, r in ranges_of(calibrated).items() if i != entry and r[1] > r[0]}
    counts = {index: np.zeros(BINS, np.int64) for index in ranges}
    for image in images:
        interpreter.set_tensor(entry, spec.normalize(image[None]))
        interpreter.invoke()
        for index, (low, high) in ranges.items():
            values = interpreter.get_tensor(index).reshape(-1)
            bins = ((values - low) * (BINS / (high - low))).astype(np.int32).clip(0, BINS - 1)
            counts[index] += np.bincount(bins, minlength=BINS)
    return counts


def narrowed(way: str, ranges: dict[int, Range], counts: dict[int, np.ndarray]) -> dict[int, Range]:
    """Tensor -> the range that `way` (percentile, mse or entropy) gives it. Zero is in each."""
    find = {"percentile": _percentile, "mse": _least_error, "entropy": _least_divergence}[way]
    return {index: find(count, *ranges[index]) for index, count in counts.items()}


def _edges(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, BINS + 1)


def _percentile(count: np.ndarray, low: float, high: float) -> Range:
    """What 99.99% of the values do not fall below, and do not exceed."""
    share = np.cumsum(count) / max(1, count.sum())
    edges, part = _edges(low, high), PERCENT_CLIPPED / 100
    bottom = edges[np.searchsorted(share, part, side="right")]
    top = edges[min(BINS, np.searchsorted(share, 1 - part) + 1)]
    return min(float(bottom), 0.0), max(float(top), 0.0)


def _least_error(count: np.ndarray, low: float, high: float, steps: int = 40) -> Range:
    """Ends drawn in by up to 97.5% each, one after the other, to the least squared error of 256 levels."""
    used = np.flatnonzero(count)
    edges, weight = _edges(low, high), count[used].astype(np.float64)
    values = ((edges[:-1] + edges[1:]) / 2)[used]
    low, high = min(low, 0.0), max(high, 0.0)

    def error(ends: Range) -> float:
        scale = (ends[1] - ends[0]) / (LEVELS - 1)
        if scale <= 0:
            return float("inf")
        zero = np.rint(-ends[0] / scale)
        level = np.clip(np.rint(values / scale) + zero, 0, LEVELS - 1)
        return float(np.dot(weight, ((level - zero) * scale - values) ** 2))

    shares = np.linspace(1, 1 / steps, steps)
    best = (low, high)
    for _ in range(2):
        best = min(((best[0], high * share) for share in shares), key=error)
        best = min(((low * share, best[1]) for share in shares), key=error)
    return best


def _least_divergence(count: np.ndarray, low: float, high: float) -> Range:
    """Migacz's threshold on the absolute values: 128 levels where values have both signs, 256 where they have one."""
    both = low < 0 < high
    largest = max(-low, high)
    centers = np.abs((_edges(low, high)[:-1] + _edges(low, high)[1:]) / 2)
    bins = np.minimum((centers * (BINS / largest)).astype(np.int64), BINS - 1)
    folded = np.bincount(bins, weights=count, minlength=BINS)
    levels = LEVELS // 2 if both else LEVELS
    found = [(_divergence(folded, kept, levels), -kept) for kept in range(levels, BINS + 1, levels // 8)]
    threshold = -min(found)[1] * largest / BINS
    return max(min(low, 0.0), -threshold), min(max(high, 0.0), threshold)


def _divergence(folded: np.ndarray, kept: int, levels: int) -> float:
    """KL(P || Q): P the first `kept` bins with all others added to the last, Q those bins in `levels` levels."""
    inside = folded[:kept]
    clipped = inside.copy()
    clipped[-1] += folded[kept:].sum()
    level = np.arange(kept) * levels // kept
    filled = inside > 0
    total, places = (np.bincount(level, weights=w, minlength=levels) for w in (inside, filled))
    spread = np.where(filled, (total / np.maximum(places, 1))[level], 0.0)
    if not spread.any():
        return float("inf")
    # Where Q has nothing and P has the outliers, the divergence is infinite: a floor keeps it comparable.
    p, q = clipped / clipped.sum(), np.maximum(spread / spread.sum(), 1e-9)
    real = p > 0
    return float(np.sum(p[real] * np.log(p[real] / q[real])))


def best_of(made: dict[str, bytes], float32: bytes, images: np.ndarray, spec: InputSpec) -> tuple[str, dict]:
    """The way whose file agrees with the float one on most images, of equals the one nearest to it; all their scores.

    made: way -> .tflite. images: uint8 (count, height, width, channels), none of which the ranges were found on.
    """
    expected = answers(_opened(float32), images, spec)
    scores = {}
    for way, content in made.items():
        found = answers(_opened(content), images, spec)
        same = classes_of(found, spec.head) == classes_of(expected, spec.head)
        scores[way] = {"agreement": float(np.mean(same)), "mse": float(np.mean((found - expected) ** 2))}
    return min(scores, key=lambda way: (-scores[way]["agreement"], scores[way]["mse"])), scores


def answers(model: Model, images: np.ndarray, spec: InputSpec) -> np.ndarray:
    """float32 (count, outputs): what a .tflite answers to uint8 images, one at a time."""
    return np.concatenate([model.invoke(spec.normalize(image[None]))[0].reshape(1, -1) for image in images])


def _opened(content: bytes) -> Model:
    with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
        file.write(content)
        file.flush()
        return open_model(file.name)
