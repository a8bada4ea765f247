"""TFMOT's magnitude pruning around the kernel layers of a rebuilt model. Runs in the worker only."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.sparsity.keras.prune_registry import PruneRegistry
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude

from tfopt.errors import ModelRefused
from tfopt.tfmot.neutral import Graph, Node, Weights
from tfopt.tfmot.rebuild import build, values


def schedule(settings: dict, steps: int) -> tfmot.sparsity.keras.PolynomialDecay:
    """The cubic ramp of Zhu and Gupta 2017 (arXiv:1710.01878, equation 1) in steps of this training.

    settings: sparsity, initial_sparsity, begin and end (fractions of the training), frequency (steps).
    Masks change only at begin + n · frequency, so begin moves to where the last change falls on end.
    """
    begin = min(round(settings["begin"] * steps), steps - 1)
    end = max(begin + 1, round(settings["end"] * steps))
    frequency = min(settings["frequency"], end - begin)
    begin = end - (end - begin) // frequency * frequency
    return tfmot.sparsity.keras.PolynomialDecay(
        settings["initial_sparsity"], settings["sparsity"], begin, end, power=3, frequency=frequency
    )


class Pruner:
    """A model ready for pruning: `model`, and after training `weights()` with the zeros in them.

    pruned: the names of the weights that get zeros. skipped: (layer, reason, detail) of other layers
    that have weights, the reasons being those of mobile_bench.records.
    """

    def __init__(self, graph: Graph, weights: Weights, settings: dict, steps: int):
        self.pruned: list[str] = []
        self.skipped: list[tuple[str, str, str]] = []
        self._exclude: Sequence[str] = settings["exclude"]
        self._schedule = schedule(settings, steps)
        self._wrappers: list[PruneLowMagnitude] = []
        self.model, self._variables = build(graph, weights, wrap=self._wrap)
        if not self.pruned:
            raise ModelRefused(
                "No layer of the model can be pruned",
                received=f"{graph.name}, exclude {', '.join(self._exclude) or 'nothing'}",
                allowed="layers with a dense or convolution kernel",
            )

    def callbacks(self) -> list:
        return [tfmot.sparsity.keras.UpdatePruningStep()]

    def weights(self) -> Weights:
        for wrapper in self._wrappers:
            wrapper.pruning_obj.weight_mask_op()  # the last step's update came after its masking
        return values(self._variables)

    def _wrap(self, node: Node, layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        if not node.weights:
            return layer
        skip = self._why_not(node, layer)
        if skip:
            self.skipped.append((node.source, *skip))
            return layer
        wrapper = PruneLowMagnitude(layer, pruning_schedule=self._schedule)
        kernels = {id(kernel) for kernel in wrapper.layer.get_prunable_weights()}
        self.pruned += [key for key, weight in zip(node.weights, layer.weights) if id(weight) in kernels]
        self._wrappers.append(wrapper)
        return wrapper

    def _why_not(self, node: Node, layer: tf_keras.layers.Layer) -> tuple[str, str] | None:
        if not any(weight.shape.rank >= 2 for weight in layer.weights):
            return "not a kernel layer", node.kind
        if any(fnmatch.fnmatchcase(name, pattern) for name in (node.source, node.name) for pattern in self._exclude):
            return "excluded by the recipe", ""
        known = PruneRegistry.supports(layer) and PruneRegistry._weight_names(layer)
        if not known or not layer.trainable:
            return "not supported by the technique", node.kind if layer.trainable else "frozen"
        return None
