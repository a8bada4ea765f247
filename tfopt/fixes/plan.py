"""What a fix is, and what it finds in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import keras

from mobile_bench.inputs import InputSpec
from tfopt.rebuild import Change, View


@dataclass
class Plan:
    """What a fix would do to one model.

    changes: id(node) -> Change. layers: the names of the layers that change. refused: (layer, reason) for each that
    the fix knows and cannot change. batch, spec: what becomes of the batch size and the InputSpec, None for no change.
    """

    changes: dict[int, Change] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    batch: int | None = None
    spec: InputSpec | None = None

    def change(self, node, build: Change) -> None:
        self.changes[id(node)] = build
        if node.operation.name not in self.layers:
            self.layers.append(node.operation.name)

    def refuse(self, node, reason: str) -> None:
        if (node.operation.name, reason) not in self.refused:
            self.refused.append((node.operation.name, reason))


@dataclass(frozen=True)
class Fix:
    """A rewrite that makes a model acceptable to a delegate, and leaves its answers as they are.

    helps: the delegates of mobile_bench.xray. removes, introduces: TFLite operations. plan: finds what to do; its
    second argument is how the model is fed, None where nobody says. in_all: whether 'all' means it too.
    """

    name: str
    description: str
    helps: tuple[str, ...]
    removes: tuple[str, ...]
    introduces: tuple[str, ...]
    plan: Callable[[View, InputSpec | None], Plan]
    in_all: bool = True

    def find(self, model: keras.Model, spec: InputSpec | None = None) -> list[str]:
        """The names of the layers that the fix would change."""
        return self.plan(View(model), spec).layers
