"""How much memory the activations of a .tflite need: TFLite's tensor arena, planned from the file alone.

TFLite keeps all activations in one block, the arena, in which tensors that are never alive together lie on the
same bytes. Where each lies is decided once, before the first inference, by the greedy-by-size planner of Pisarchyk
and Lee 2020 (Efficient Memory Management for Deep Neural Net Inference, arXiv:2001.03288, section 5), as LiteRT's
arena_planner.cc and simple_memory_arena.cc use it: inputs first, for they are kept to the end, then by falling
size, each into the smallest gap that holds it, on 64-byte borders, and with some operations in place.

What the arena is good for: microcontrollers, runtimes without a delegate, and what crosses a delegate's borders.
On a CPU with XNNPACK, the default, the operations' tensors lie in a workspace of XNNPACK's own and its packed weights
beside it: there the peak memory of the process is what counts, which `mobile-bench run` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.flatbuffer import Operator, Subgraph, TensorInfo, TFLiteModel
from mobile_bench.tflite_ops import BITS

ALIGNMENT = 64
#: op -> the inputs whose memory its first output may take. The first set leaves the bytes as they are, so the input
#: may have other readers too; the second overwrites them.
_UNCHANGED = {op: (0,) for op in ("BITCAST", "EXPAND_DIMS", "RESHAPE", "SQUEEZE")}
_OVERWRITTEN = {
    **{op: (0, 1) for op in ("ADD", "DIV", "MUL", "SUB")},
    **{op: (0,) for op in ("DYNAMIC_UPDATE_SLICE", "LOG_SOFTMAX", "SOFTMAX")},
}
#: What is computed once, when tensors are allocated: always, or where all inputs are constants.
_KNOWN = frozenset(("RANK", "SHAPE"))
_KNOWN_OF_CONSTANTS = frozenset(
    ("BROADCAST_ARGS", "CONCATENATION", "GATHER", "MUL", "RANGE", "REDUCE_PROD", "RESHAPE", "STRIDED_SLICE", "TILE")
)
#: What is computed once into memory that is never reused, where its input is a constant.
_PERSISTENT = frozenset(("CAST", "DENSIFY", "DEQUANTIZE"))
_SMALLEST_SHARED = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies in the arena: `size` bytes from `offset` on.

    tensor: its index in the subgraph. first, last: the operators between which its memory is taken, both
    included; last is None for what stays to the end.
    """

    tensor: int
    offset: int
    size: int
    first: int
    last: int | None


@dataclass(frozen=True)
class Arena:
    """The memory of a file's activations.

    activation_bytes: the largest sum of tensors that are alive at once, below which no planner can get.
    arena_bytes: what TFLite's planner takes. persistent_bytes: constants that are unpacked once and stay, such as
    float16 weights made float32; they lie in a block of their own. places: by offset. Not in any of them, for
    the file does not tell: the kernels' own scratch tensors, such as an unrolled image. Tensors whose size the runtime
    learns only as it runs, behind a reshape to a computed shape, are counted as if it were known from the start; the
    runtime plans them late, or puts them outside the arena.
    """

    batch: int
    activation_bytes: int
    arena_bytes: int
    persistent_bytes: int
    places: tuple[Place, ...]

    @property
    def waste(self) -> float:
        """The share of the arena that the planner loses to gaps and borders at the fullest moment."""
        return 1 - self.activation_bytes / self.arena_bytes if self.arena_bytes else 0.0


def arena_of(model: TFLiteModel, batch: int = 1) -> Arena:
    """The arena of a file's main graph for `batch` images at once.

    Activations grow from the file's own batch to this one: those whose batch the file leaves open, or, in a file
    that leaves none open, those with a first dimension like the input's. Raises InputError for a batch below 1, and
    ModelRefused where a tensor leaves its size open or has one that depends on what the model reads (strings,
    resources).
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or not 1 <= batch <= 4096:
        raise InputError("batch is out of range", received=batch, allowed="1 to 4096")
    graph = model.main
    persistent, known = _computed_once(graph)
    constants = {tensor.index for tensor in graph.tensors if tensor.constant_bytes} | known
    growth = _growth(graph, batch)
    sizes: dict[int, int] = {}

    def size(index: int) -> int:
        if index not in sizes:
            tensor = graph.tensors[index]
            sizes[index] = _size(tensor, 1 if index in persistent else growth(tensor))
        return sizes[index]

    lives = _lifetimes(graph, constants | persistent, size)
    places = _plan(lives, size)
    return Arena(
        batch,
        _most_alive(places, len(graph.operators)),
        max((place.offset + place.size for place in places), default=0),
        _stacked(size(index) for index in sorted(persistent)),
        places,
    )


def _computed_once(graph: Subgraph) -> tuple[set[int], set[int]]:
    """Tensors in the persistent arena, and tensors that become constants outside any arena."""
    persistent: set[int] = set()
    known = {tensor.index for tensor in graph.tensors if tensor.constant_bytes}
    given = set(known)
    for operator in graph.operators:
        inputs = [index for index in operator.inputs if index >= 0]
        fixed = bool(inputs) and all(index in known for index in inputs)
        if operator.op in _KNOWN or (fixed and operator.op in _KNOWN_OF_CONSTANTS):
            known.update(operator.outputs)
        elif fixed and operator.op in _PERSISTENT:
            persistent.update(operator.outputs)
    return persistent, known - given


def _growth(graph: Subgraph, batch: int) -> Callable[[TensorInfo], Fraction]:
    """By how much a tensor is larger than the file says: `batch` over the file's own, for those that have a batch."""
    first = next((t for i in graph.inputs if i >= 0 and (t := graph.tensors[i]).shape), None)
    if first is None or first.shape[0] < 1:
        return lambda tensor: Fraction(1)
    own, is_open = first.shape[0], first.shape_signature[0] < 0

    def growth(tensor: TensorInfo) -> Fraction:
        grows = tensor.shape_signature[:1] == (-1,) if is_open else len(tensor.shape) > 1 and tensor.shape[0] == own
        return Fraction(batch, own) if grows else Fraction(1)

    return growth


def _size(tensor: TensorInfo, growth: Fraction | int) -> int:
    open_size = any(n < 0 for n in tensor.shape) or any(n < 0 for n in tensor.shape_signature[1:])
    if open_size or tensor.dtype not in BITS:
        raise ModelRefused(
            "The arena cannot be planned: the file does not fix a tensor's size",
            received=f"{tensor.name!r} of shape {tensor.shape_signature} and type {tensor.dtype}",
            next_step="Convert the model with a fixed input size",
        )
    return math.ceil(math.prod(tensor.shape) * growth * BITS[tensor.dtype] * Fraction(1, 8))


def _lifetimes(graph: Subgraph, fixed: set[int], size) -> list[tuple[int, int, int | None]]:
    """(tensor, first, last operator) of every tensor that has memory of its own in the arena."""
    kept = {index for index in (*graph.inputs, *graph.outputs) if index >= 0}
    kept |= {tensor.index for tensor in graph.tensors if tensor.is_variable}
    readers = _readers(graph, kept)
    owner = _owners(graph, fixed, readers, size)
    first = {index: 0 for index in kept if index in graph.inputs or graph.tensors[index].is_variable}
    last: dict[int, int] = {}
    for operator in graph.operators:
        for index in operator.outputs:
            first.setdefault(index, operator.index)
        for index in operator.inputs:
            if index >= 0:
                last[owner.get(index, index)] = operator.index
    # A tensor that nobody reads is never given back.
    return [
        (index, begin, None if index in kept else last.get(index))
        for index, begin in first.items()
        if index not in fixed and index not in owner
    ]


def _readers(graph: Subgraph, kept: set[int]) -> dict[int, int]:
    """How often each tensor is needed: by operators, and by the caller."""
    counts = {index: (index in graph.inputs) + (index in graph.outputs) for index in kept}
    for index in kept:
        counts[index] += graph.tensors[index].is_variable
    for operator in graph.operators:
        for index in operator.inputs:
            counts[index] = counts.get(index, 0) + 1
    return counts


def _owners(graph: Subgraph, fixed: set[int], readers: dict[int, int], size) -> dict[int, int]:
    """tensor -> the tensor whose memory it takes, for outputs of operations that work in place."""
    owner: dict[int, int] = {}

    def shares(operator: Operator, source: int, unchanged: bool) -> bool:
        """The graph's own inputs and outputs never share."""
        output = operator.outputs[0] if operator.outputs else -1
        if output < 0 or {output, source} & fixed or source in graph.inputs or output in graph.outputs:
            return False
        return unchanged or (size(source) == size(output) > _SMALLEST_SHARED and readers.get(source, 0) <= 1)

    for operator in graph.operators:
        unchanged = operator.op in _UNCHANGED
        places = (_UNCHANGED if unchanged else _OVERWRITTEN).get(operator.op, ())
        source = next((i for i in _inputs(operator, places) if shares(operator, i, unchanged)), None)
        if source is None:
            continue
        root = owner.get(source, source)
        output = operator.outputs[0]
        if (unchanged or readers.get(root, 0) <= 1) and root not in fixed and size(root) == size(output):
            owner[output] = root
    return owner


def _inputs(operator: Operator, places: tuple[int, ...]) -> list[int]:
    return [operator.inputs[n] for n in places if n < len(operator.inputs) and operator.inputs[n] >= 0]


def _plan(lives: list[tuple[int, int, int | None]], size) -> tuple[Place, ...]:
    """Greedy by size: algorithm 3 of the paper, with the runtime's order and its choice of the best gap."""

    def order(life: tuple[int, int, int | None]) -> tuple:
        index, first, last = life
        return (0, index) if first == 0 and last is None else (1, -size(index), first, index)

    placed: list[Place] = []  # by offset
    for index, first, last in sorted(lives, key=order):
        if not size(index):
            continue
        best, smallest, end = None, math.inf, 0
        for other in placed:
            if _end(other.last) < first or other.first > _end(last):
                continue
            start = _aligned(end)
            if start + size(index) <= other.offset and other.offset - start < smallest:
                best, smallest = start, other.offset - end
            end = max(end, other.offset + other.size)
            if smallest == 0:
                break
        place = Place(index, _aligned(end) if best is None else best, size(index), first, last)
        at = next((n for n, other in enumerate(placed) if other.offset > place.offset), len(placed))
        placed.insert(at, place)
    return tuple(placed)


def _most_alive(places: tuple[Place, ...], operators: int) -> int:
    moments = range(max(operators, 1))
    return max((sum(p.size for p in places if p.first <= at <= _end(p.last)) for at in moments), default=0)


def _stacked(sizes) -> int:
    total = 0
    for size in sizes:
        total = _aligned(total) + size
    return total


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _end(last: int | None) -> float:
    return math.inf if last is None else last
