"""What quantization-aware training will end in, layer by layer, before any training: the untrained model, converted.

Which operations a file has does not depend on what its weights have learned. So the model is fake-quantized with ranges
from random images and given to the converter; what the file then computes in whole numbers it will compute so after
the training, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras

from mobile_bench.flatbuffer import read_model
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import run_job
from mobile_bench.profile import layers_of
from tfopt.errors import ModelRefused
from tfopt.residual import FLOAT, FloatTensor, float_tensors, source
from tfopt.tfmot import bridge, client, kernels, neutral


@dataclass(frozen=True)
class Outlook:
    """One layer of the user's.

    becomes: 'int8', 'float', 'fused' (into a neighbour: no operation of its own) or 'dropped' (it acts in training
    only). ops: its operations in the file. why: what a reader should know.
    """

    layer: str
    kind: str
    becomes: str
    ops: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Foresight:
    """layers: in the model's order. floats: the float tensors that the file would have."""

    layers: tuple[Outlook, ...]
    floats: tuple[FloatTensor, ...]

    @property
    def whole(self) -> bool:
        return not self.floats


def foresee(model: keras.Model, spec: InputSpec, exclude: Sequence[str] = ()) -> Foresight:
    """Convert the untrained model and look. Raises ModelRefused where it cannot cross to TFMOT, InputError for a key of
    `exclude` that fits no layer with a kernel, ConversionError where the converter refuses."""
    left_out = kernels.left_out(model, exclude) if exclude else ()
    with client.exchange(Path(tempfile.gettempdir())) as folder:
        graph, quantized = client.hand_over(folder / "model.npz", model, spec), folder / "quantized.npz"
        job = {
            "operation": "foresee", "model": str(folder / "model.npz"), "quantized": str(quantized),
            "spec": spec.to_dict(), "exclude": list(left_out),
        }  # fmt: skip
        found = run_job(client.WORKER, job, folder, environment=client.ENVIRONMENT)
        client.export_quantized(quantized, spec, out=folder / "int8.tflite")
        content, sources = (folder / "int8.tflite").read_bytes(), client.sources(quantized)
    floats = float_tensors(content, sources)
    return Foresight(tuple(_outlooks(model, graph, content, sources, left_out, found["norms"])), floats)


def check(found: Foresight, exclude: Sequence[str] = ()) -> None:
    """Raise ModelRefused where a layer that was not left out by choice would compute in float."""
    floats = [one for one in found.layers if one.becomes == "float" and one.why != _BY_CHOICE]
    if floats and not exclude:
        names = ", ".join(f"{one.layer} ({one.kind})" for one in floats)
        raise ModelRefused(
            "Some layers would compute in float after quantization-aware training", received=names,
            next_step="Replace them, leave strict out, or see them with: tfopt precheck",
        )  # fmt: skip


_BY_CHOICE = "left out by choice"
_BORDERS = ("QUANTIZE", "DEQUANTIZE")


def _outlooks(model, graph: neutral.Graph, content: bytes, sources: dict, left_out, norms) -> Iterator[Outlook]:
    read = read_model(content)
    ops: dict[str, list[str]] = {}
    in_float = set()
    for operator, name in zip(read.main.operators, layers_of(read)):
        layer = source(name, sources)
        if operator.op in _BORDERS:
            continue
        ops.setdefault(layer, []).append(operator.op)
        if any(read.main.tensors[place].dtype in FLOAT for place in operator.outputs):
            in_float.add(layer)
    by_choice = {node.source for node in graph.nodes if node.name in left_out}
    own_kinds = {layer.name: type(layer).__name__ for _, layer in bridge.named_layers(model)}
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        kinds.setdefault(node.source, own_kinds.get(node.source, node.kind))
    for layer, kind in kinds.items():
        own = tuple(ops.get(layer, ()))
        becomes = "float" if layer in in_float else "int8" if own else "fused"
        why = ""
        if layer in by_choice:
            why = _BY_CHOICE
        elif becomes == "float":
            why = (
                "behind a layer that was left out" if by_choice else "the converter has no whole-number form of it here"
            )
        elif layer in norms:
            why = "trained as a 1x1 depthwise convolution: no convolution before it takes it in"
        yield Outlook(layer, kind, becomes, own, why)
    yield from (Outlook(layer, "", "dropped", (), "acts in training only") for layer in graph.dropped)
