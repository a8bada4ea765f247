"""What a rule sees of an operation, and what it answers.

A rule is a function from a Node to None (it has nothing against it) or a Verdict. Rules of one delegate are
tables from an operation's name to its rules; what stands in no table is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mobile_bench.flatbuffer import Operator, Subgraph, TensorInfo, TFLiteModel


@dataclass(frozen=True)
class Verdict:
    """Why an operation does not run on a delegate.

    reason: a sentence with the value found. fix: what the owner of the model can change; '' where nothing.
    source: the document or source file, and the place in it, where the rule stands.
    """

    reason: str
    fix: str
    source: str


@dataclass(frozen=True)
class Node:
    """One operator with its tensors at hand: what a rule sees."""

    model: TFLiteModel
    graph: Subgraph
    operator: Operator

    @property
    def op(self) -> str:
        return self.operator.op

    @property
    def options(self) -> dict:
        return self.operator.options

    @property
    def inputs(self) -> tuple[TensorInfo | None, ...]:
        """None for an optional input that is left out."""
        return tuple(self.graph.tensors[i] if i >= 0 else None for i in self.operator.inputs)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return tuple(self.graph.tensors[i] for i in self.operator.outputs)

    @property
    def activations(self) -> tuple[TensorInfo, ...]:
        """The inputs that are computed or given at run time, not stored in the file."""
        return tuple(t for t in self.inputs if t is not None and not t.constant_bytes)

    def input(self, number: int) -> TensorInfo | None:
        """Input `number`, None where the operator has none there."""
        return self.inputs[number] if number < len(self.operator.inputs) else None

    def constant(self, number: int):
        """The value of input `number` as an array, None where it is no constant that NumPy can hold."""
        tensor = self.input(number)
        return None if tensor is None else self.model.constant(tensor)


Rule = Callable[[Node], Verdict | None]


def nodes(model: TFLiteModel) -> tuple[Node, ...]:
    """The operators of the main graph, in the order in which they run."""
    return tuple(Node(model, model.main, operator) for operator in model.main.operators)


def first_objection(node: Node, table: Mapping[str, Sequence[Rule]], otherwise: Verdict) -> Verdict | None:
    """What the first objecting rule for this operator says; `otherwise` where the table does not know it."""
    if node.op not in table:
        return otherwise
    return next((verdict for rule in table[node.op] if (verdict := rule(node)) is not None), None)
