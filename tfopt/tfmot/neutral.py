"""A model as plain data, which either Keras can read: a JSON graph and named arrays.

A node is one tf_keras layer, a call is one use of it. Tensors are numbered, the inputs first.
A weight is named after the user's own layer: 'stem:0' is the first array of get_weights() of layer
'stem'; 'rescaling:kernel' belongs to no layer of the user's and never goes back.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mobile_bench.files import atomic_path
from tfopt.errors import InputError

SCHEMA_VERSION = 2
_GRAPH = "graph"
#: Two orders of the same sums differ in how far they are off, but not by more than this factor.
_ROUNDING = 8
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Node:
    """One tf_keras layer. source: the name of the user's layer that it stands for, or for a part of. rank: of its
    first input, the batch included."""

    name: str
    kind: str
    config: dict
    weights: tuple[str, ...] = ()
    source: str = ""
    trainable: bool = True
    rank: int = 4


@dataclass(frozen=True)
class Call:
    """One use of a node: from numbered tensors to one."""

    node: str
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Graph:
    """A model: inputs of `shapes` (height, width, channels), the first of which is tensor 0, and tensors `outputs` out.

    dropped: the user's layers that act in training only and were left out. floats: nodes that are not trained for
    int8 and compute in float.
    """

    name: str
    shapes: tuple[tuple[int | None, ...], ...]
    nodes: tuple[Node, ...]
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]
    dropped: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of the one input, or the first."""
        return self.shapes[0]

    @property
    def output(self) -> int:
        return self.outputs[0]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Graph:
        values = json.loads(text)
        version = values.pop("schema_version", None)
        if version == 1:  # one image in, one tensor out
            values["shapes"], values["outputs"] = [values.pop("shape")], [values.pop("output")]
            version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise InputError("The model was written by another version", received=version, allowed=SCHEMA_VERSION)
        for name, kind in (("nodes", Node), ("calls", Call)):
            values[name] = tuple(kind(**{k: _frozen(v) for k, v in item.items()}) for item in values[name])
        return cls(**{k: _frozen(v) for k, v in values.items()})


def save(path: Path, graph: Graph, arrays: Weights) -> None:
    """One .npz of the graph and its arrays."""
    save_arrays(path, {_GRAPH: np.frombuffer(graph.to_json().encode(), np.uint8), **arrays})


def load(path: Path) -> tuple[Graph, Weights]:
    """What `save` wrote; raises InputError for anything else."""
    arrays = load_arrays(path)
    try:
        return Graph.from_json(arrays.pop(_GRAPH).tobytes().decode()), arrays
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("The file holds no model", received=f"{path} ({error})") from error


def save_arrays(path: Path, arrays: Weights) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_arrays(path: Path) -> Weights:
    """All arrays of an .npz; raises InputError if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError("A model's arrays cannot be read", received=f"{path} ({error})") from error


def beyond_rounding(one: np.ndarray, other: np.ndarray, exact: np.ndarray) -> float:
    """How far two float32 answers are apart beyond what float32 costs them: 0 where neither is much further from
    `exact`, the answer in float64, than the nearer one is."""
    off = sorted(float(np.max(np.abs(answer - exact))) for answer in (one, other))
    return 0.0 if off[1] <= _ROUNDING * off[0] else off[1]


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
