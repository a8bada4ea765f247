"""How near a quantized file is to the float one, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.rescue.graph import Graph
from tfopt.rescue.moments import Tap

#: Probabilities below this count as this: int8 has no smaller ones.
FLOOR = 1 / 512


@dataclass(frozen=True)
class Score:
    """agreement: share of images with the float file's class. top1: share of right answers, None without labels.
    divergence: mean Kullback-Leibler divergence of the float probabilities from the file's, in nats."""

    agreement: float
    top1: float | None
    divergence: float


class Judge:
    """Scores files against one float file. images: uint8 (count, height, width, channels); labels: (count,)."""

    def __init__(self, floats: Graph, images: np.ndarray, labels: np.ndarray | None, spec: InputSpec):
        self._images, self._labels, self._spec = images, labels, spec
        self.float_answers = self.answers(floats)
        right = None if labels is None else float(np.mean(self.float_answers.argmax(1) == labels))
        self.reference = Score(1.0, right, 0.0)

    def answers(self, graph: Graph, only: Sequence[int] | None = None) -> np.ndarray:
        """(images, classes) float32: what the file answers, on the deployed kernels."""
        tap = Tap(graph, len(graph.main.operators), [int(graph.main.outputs[0])], self._spec)
        chosen = self._images if only is None else self._images[list(only)]
        return np.concatenate([tap(image)[0].reshape(1, -1) for image in chosen])

    def score(self, graph: Graph) -> Score:
        found = self.answers(graph)
        right = None if self._labels is None else float(np.mean(found.argmax(1) == self._labels))
        return Score(
            float(np.mean(found.argmax(1) == self.float_answers.argmax(1))), right,
            self._divergence(self.float_answers, found),
        )  # fmt: skip

    def divergence(self, graph: Graph, only: Sequence[int]) -> float:
        """On some of the images: their numbers."""
        return self._divergence(self.float_answers[list(only)], self.answers(graph, only))

    def _divergence(self, true: np.ndarray, found: np.ndarray) -> float:
        p, q = (_probabilities(values, self._spec.head) for values in (true, found))
        return float(np.mean(np.sum(p * np.log(p / q), axis=1)))


def layer_errors(
    floats: Graph, quantized: Graph, images: np.ndarray, spec: InputSpec, progress: Callable | None = None
) -> list[float]:  # fmt: skip
    """For each layer in order, how far its answer in the file is from the float one's: signal to quantization noise in
    decibels, 10 log10(E[y^2] / E[(y - y')^2]), with all that the layers before it have lost."""
    one, other = floats.layers(), quantized.layers()
    there = Tap(floats, len(floats.main.operators), [layer.output for layer in one], spec)
    here = Tap(quantized, len(quantized.main.operators), [layer.output for layer in other], spec)
    signal, noise = np.zeros(len(one)), np.zeros(len(one))
    for number, image in enumerate(images):
        for place, (true, seen) in enumerate(zip(there(image), here(image))):
            signal[place] += np.square(true, dtype=np.float64).sum()
            noise[place] += np.square(true - seen, dtype=np.float64).sum()
        if progress:
            progress(number + 1, len(images))
    return [float(10 * np.log10(max(s, 1e-30) / max(n, 1e-30))) for s, n in zip(signal, noise)]


def _probabilities(values: np.ndarray, head: str) -> np.ndarray:
    values = values.astype(np.float64)
    if head == "logits":
        values = np.exp(values - values.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
    elif values.shape[1] == 1:
        values = np.concatenate([1 - values, values], axis=1)
    values = np.maximum(values, FLOOR)
    return values / values.sum(axis=1, keepdims=True)
