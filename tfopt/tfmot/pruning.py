"""TFMOT's magnitude pruning around the kernels of a rebuilt model. Runs in the worker only.

TFMOT's wrapper takes any layer that names its prunable weights, so depthwise kernels, which its registry leaves out,
are pruned by the same code as the others. Two patterns are ours: blocks in convolutions (TFMOT: 2-D weights only), and
m of n along the input axis of a transposed convolution (TFMOT takes its output axis for it).
"""

from __future__ import annotations

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude

from tfopt.errors import ModelRefused
from tfopt.tfmot.neutral import Graph, Node, Weights
from tfopt.tfmot.rebuild import build, values


def schedule(settings: dict, steps: int, sparsity: float | None = None):
    """TFMOT's schedule in steps of this training, which always reaches its target within it.

    settings: sparsity, initial_sparsity, schedule ('polynomial' or 'constant'), power, begin and end (fractions of the
    training), frequency (steps). Zhu and Gupta 2017 (arXiv:1710.01878, equation 1) with power 3. Masks change only at
    begin + n · frequency, so begin moves to where the last change falls on end.
    """
    target = settings["sparsity"] if sparsity is None else sparsity
    if settings.get("schedule", "polynomial") == "constant":
        begin = min(max(1, round(settings["begin"] * steps)), steps)
        return tfmot.sparsity.keras.ConstantSparsity(target, begin, frequency=settings["frequency"])
    begin = min(round(settings["begin"] * steps), steps - 1)
    end = max(begin + 1, round(settings["end"] * steps))
    frequency = min(settings["frequency"], end - begin)
    begin = end - (end - begin) // frequency * frequency
    initial = min(settings["initial_sparsity"], target)
    return tfmot.sparsity.keras.PolynomialDecay(
        initial, target, begin, end, power=settings.get("power", 3), frequency=frequency
    )


class Pruner:
    """A model ready for pruning: `model`, and after training `weights()` with the zeros in them.

    settings: those of `schedule`, 'kernels' {weight: its sparsity}, 'm_by_n' and 'block', each a pair or None, 'pool'
    and 'policy'. settled: the training step from which the masks are final. policy: what TFMOT's policy says.
    """

    def __init__(self, graph: Graph, weights: Weights, settings: dict, steps: int):
        self._settings, self._steps = settings, steps
        self._wrappers: list[PruneLowMagnitude] = []
        self.settled = 1 if settings.get("m_by_n") else _last_change(schedule(settings, steps, 0.5))
        self.policy = _policy(graph, weights, settings["kernels"]) if settings.get("policy") else None
        self.model, self._variables = build(graph, weights, wrap=self._wrap)

    def callbacks(self) -> list:
        return [tfmot.sparsity.keras.UpdatePruningStep()]

    def weights(self) -> Weights:
        for wrapper in self._wrappers:
            wrapper.pruning_obj.weight_mask_op()  # the last step's update came after its masking
        return values(self._variables)

    def _wrap(self, node: Node, layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        wanted = {key: self._settings["kernels"].get(key) for key in node.weights}
        chosen = [weight for key, weight in zip(node.weights, layer.weights) if wanted[key]]
        if not chosen:
            return layer
        layer.get_prunable_weights = lambda: chosen
        sparsity = next(value for value in wanted.values() if value)
        wrapper = _Wrapper(layer, self._settings, schedule(self._settings, self._steps, sparsity), node.kind)
        self._wrappers.append(wrapper)
        return wrapper


class _Wrapper(PruneLowMagnitude):
    """TFMOT's wrapper with the patterns that it lacks."""

    def __init__(self, layer, settings: dict, ramp, kind: str):
        super().__init__(layer, pruning_schedule=ramp, sparsity_m_by_n=settings.get("m_by_n"))
        self._block, self._pool, self._kind = settings.get("block"), settings.get("pool", "AVG"), kind

    def build(self, input_shape):
        super().build(input_shape)
        self.pruning_obj = _Pruning(
            training_step_fn=lambda: self.pruning_step, pruning_vars=self.pruning_vars,
            pruning_schedule=self.pruning_schedule, block_size=(1, 1), block_pooling_type=self._pool,
            sparsity_m_by_n=self.sparsity_m_by_n,
        )  # fmt: skip
        self.pruning_obj.block, self.pruning_obj.kind = self._block, self._kind


class _Pruning(Pruning):
    block: tuple[int, int] | None = None
    kind = ""

    def _maybe_update_block_mask(self, weights):
        if self._sparsity_m_by_n and self.kind == "Conv2DTranspose":
            swap = lambda array: tf.transpose(array, (0, 1, 3, 2))
            threshold, mask = super()._maybe_update_block_mask(swap(weights))
            return threshold, swap(mask)
        if self._sparsity_m_by_n or not self.block:
            return super()._maybe_update_block_mask(weights)
        # (…, inputs, outputs): one matrix for each place in the window, so that no block spans two of them.
        *_, rows, columns = weights.shape
        height, width = self.block
        tall, wide = -(-rows // height), -(-columns // width)
        margin = ((0, 0), (0, tall * height - rows), (0, wide * width - columns))
        cut = lambda array: tf.reshape(tf.pad(array, margin), (-1, tall, height, wide, width))
        matrices = cut(tf.reshape(tf.abs(weights), (-1, rows, columns)))
        if self._block_pooling_type == "AVG":  # of what a block at the edge really holds
            pooled = tf.reduce_sum(matrices, (2, 4)) / tf.reduce_sum(cut(tf.ones((1, rows, columns))), (2, 4))
        else:
            pooled = tf.reduce_max(matrices, (2, 4))
        threshold, kept = self._update_mask(pooled)
        spread = tf.repeat(tf.repeat(kept, height, 1), width, 2)
        return threshold, tf.reshape(spread[:, :rows, :columns], weights.shape)


def _last_change(ramp) -> int:
    end = getattr(ramp, "end_step", -1)
    return int(ramp.begin_step if end == -1 else end)


def _policy(graph: Graph, weights: Weights, kernels: dict) -> str:
    """'' where TFMOT's PruneForLatencyOnXNNPack takes the whole model, else why it does not.

    Raises ModelRefused where a chosen kernel is none that the policy allows.
    """
    policy = tfmot.sparsity.keras.PruneForLatencyOnXNNPack()

    def check(node: Node, layer):
        if any(kernels.get(key) for key in node.weights) and not policy.allow_pruning(layer):
            raise ModelRefused(f"TFMOT's policy for XNNPACK prunes no {node.kind} such as {node.source}")
        return layer

    model, _ = build(graph, weights, wrap=check)
    try:
        policy.ensure_model_supports_pruning(model)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""
