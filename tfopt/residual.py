"""What of an 'int8' file still computes in float, tensor by tensor, with the layer that it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mobile_bench.flatbuffer import read_model
from mobile_bench.profile import layers_of

FLOAT = ("float16", "float32", "float64")


@dataclass(frozen=True)
class FloatTensor:
    """A tensor in floating point. op: the operation that makes it, or that reads it where it is a constant."""

    tensor: str
    op: str
    layer: str
    constant: bool = False


def float_tensors(tflite: str | Path | bytes, sources: Mapping[str, str] | None = None) -> tuple[FloatTensor, ...]:
    """Every float tensor between a file's inputs and outputs; () where it computes in whole numbers throughout.

    Not counted: inputs and outputs that are float by choice, which only the QUANTIZE and DEQUANTIZE at the ends touch.
    sources: names of layers in the file -> the user's. Raises what `read_model` raises.
    """
    model = read_model(tflite)
    main, ends = model.main, {*model.main.inputs, *model.main.outputs}
    found, seen = [], set()
    for operator, layer in zip(main.operators, layers_of(model)):
        for place in (*operator.outputs, *operator.inputs):
            constant = place in operator.inputs
            if place < 0 or place in seen or place in ends or main.tensors[place].dtype not in FLOAT:
                continue
            if constant and not main.tensors[place].constant_bytes:
                continue  # listed where it was made
            seen.add(place)
            found.append(FloatTensor(main.tensors[place].name, operator.op, source(layer, sources), constant))
    return tuple(found)


def layers(tensors: tuple[FloatTensor, ...]) -> tuple[str, ...]:
    """The layers of float tensors, each once, in order; 'no layer' where a tensor names none."""
    return tuple(dict.fromkeys(tensor.layer or "no layer" for tensor in tensors))


def source(layer: str, sources: Mapping[str, str] | None) -> str:
    """The layer by the user's name: the fake-quantized model calls it quant_NAME."""
    if sources is None:
        return layer
    for part in reversed(layer.split("/")):
        for name in (part, part.removeprefix("quant_")):
            if name in sources:
                return sources[name]
    return layer
