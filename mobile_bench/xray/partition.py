"""How a runtime groups the operations that a delegate takes into partitions.

The rule of TFLite (tflite/graph_info.cc, PartitionGraphIntoIndependentNodeSubsets): operations of one kind
(taken or left) are gathered as long as all that they need is known; then the kind changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from mobile_bench.flatbuffer import Subgraph


def partitions(graph: Subgraph, taken: Sequence[bool]) -> tuple[tuple[int, ...], ...]:
    """The partitions that the delegate gets, each as indices of operators.

    taken[n]: whether the delegate supports operator n.
    """
    produced = {tensor for operator in graph.operators for tensor in operator.outputs}
    ready = {tensor for tensor in range(len(graph.tensors)) if tensor not in produced}
    left = list(range(len(graph.operators)))
    found: list[tuple[int, ...]] = []
    while left:
        kind: bool | None = None  # the first operation that can run decides what the group is
        group: list[int] = []
        size = -1
        while len(group) > size:
            size = len(group)
            for number in list(left):
                operator = graph.operators[number]
                able = all(tensor < 0 or tensor in ready for tensor in operator.inputs)
                if able and kind in (None, taken[number]):
                    kind = taken[number]
                    group.append(number)
                    left.remove(number)
                    ready.update(operator.outputs)
        if not group:
            break  # a damaged graph: what is left needs what nothing makes
        if kind:
            found.append(tuple(sorted(group)))
    return tuple(found)
