"""Tables of a .tflite, each offset and length checked before it is followed.

A flatbuffer is a tree of tables. A table begins with an offset back to its list of fields (its vtable), which
says where each field lies; strings, vectors and further tables are reached by offsets that lead forward. None
of it can be trusted, and two offsets may lead to one place, so a small file can describe a huge model. All that
is built is therefore paid for: in tables, and in bytes of strings and vectors, of which no sound file has more
than its size.
"""

from __future__ import annotations

import struct
from typing import Any

from mobile_bench.errors import ModelRefused

IDENTIFIER = b"TFL3"
# What one file may make this reader build, whatever its size: the largest real models stay far below both.
_MOST_TABLES = 1_000_000
_MOST_BYTES = 64 << 20
# Tables for which one of these counts: what takes most memory here takes most bytes in a sound file, too.
_WEIGHTS = {"Operator": 4, "Tensor": 3}
# The names of fields in the order of the schema: a field's place in its list is its number.
_FIELDS = {
    "Model": "version operator_codes subgraphs description buffers metadata_buffer metadata signature_defs",
    "OperatorCode": "deprecated_builtin_code custom_code version builtin_code",
    "SubGraph": "tensors inputs outputs operators name",
    "Tensor": "shape type buffer name quantization is_variable sparsity shape_signature",
    "QuantizationParameters": "min max scale zero_point details_type details quantized_dimension",
    "Operator": "opcode_index inputs outputs builtin_options_type builtin_options custom_options custom_options_format "
    "mutating_variable_inputs intermediates large_custom_options_offset large_custom_options_size "
    "builtin_options_2_type builtin_options_2",
    "Buffer": "data offset size",
    "Metadata": "name buffer",
    "SignatureDef": "inputs outputs signature_key - subgraph_index",
    "TensorMap": "name tensor_index",
}
_NUMBERS = {kind: {name: n for n, name in enumerate(names.split())} for kind, names in _FIELDS.items()}


class Reader:
    """The bytes of a file, and how many more tables and bytes it may make us build."""

    def __init__(self, content: bytes, source: str):
        self.content, self.source = content, source
        # A table takes at least one offset to it and one to its list of fields.
        self.tables_left = min(len(content) // 8 + 64, _MOST_TABLES)
        self.bytes_left = min(len(content), _MOST_BYTES) + 65_536

    def root(self) -> Table:
        if len(self.content) < 8 or self.content[4:8] != IDENTIFIER:
            raise ModelRefused(
                "This is not a .tflite file",
                received=f"{self.source}, which begins with {self.content[:8]!r}",
                allowed="files with TFL3 at byte 4",
            )
        return self.follow(0, "Model", "Model")

    def unpack(self, form: str, place: int, what: str) -> Any:
        width = struct.calcsize(form)
        if place < 0 or place + width > len(self.content):
            raise self.refusal(f"{what} lies outside the file", place)
        return struct.unpack_from(form, self.content, place)[0]

    def follow(self, place: int, kind: str, what: str) -> Table:
        """The table to which the offset at `place` leads."""
        self.tables_left -= _WEIGHTS.get(kind, 1)
        if self.tables_left < 0:
            raise self.refusal(f"{what} is one table more than a file of this size can hold", place)
        return Table(self, self.target(place, what), kind)

    def target(self, place: int, what: str) -> int:
        offset = self.unpack("<I", place, what)
        if not 0 < offset <= len(self.content) - place - 4:
            raise self.refusal(f"{what} leads outside the file", place)
        return place + offset

    def spend(self, count: int, what: str, place: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise self.refusal(f"{what} and the fields before it name more bytes than the file has", place)

    def refusal(self, what: str, place: int) -> ModelRefused:
        return ModelRefused(
            f"The .tflite is damaged: {what} (byte {place} of {len(self.content)})",
            received=self.source,
            next_step="Convert or fetch the file again",
        )


class Table:
    """One table. Fields go by the schema's name, or by `number` where the table of options gives it."""

    __slots__ = ("kind", "length", "place", "reader", "vtable")

    def __init__(self, reader: Reader, place: int, kind: str):
        self.reader, self.place, self.kind = reader, place, kind
        self.vtable = place - reader.unpack("<i", place, kind)
        if not 0 <= self.vtable <= len(reader.content) - 4:
            raise reader.refusal(f"{kind}'s list of fields lies outside the file", place)
        self.length = reader.unpack("<H", self.vtable, kind)
        if self.length < 4 or self.vtable + self.length > len(reader.content):
            raise reader.refusal(f"{kind}'s list of fields has a length of {self.length}", self.vtable)

    def find(self, name: str, number: int | None = None) -> int:
        """Where a field lies; 0 where it is absent."""
        slot = 4 + 2 * (_NUMBERS[self.kind][name] if number is None else number)
        if slot + 2 > self.length:
            return 0
        offset = self.reader.unpack("<H", self.vtable + slot, self.kind)
        return self.place + offset if offset else 0

    def number(self, name: str, form: str, default: Any = 0, number: int | None = None) -> Any:
        place = self.find(name, number)
        return self.reader.unpack(f"<{form}", place, f"{self.kind}.{name}") if place else default

    def index(self, name: str, count: int, form: str = "I", number: int | None = None) -> int:
        value = self.number(name, form, 0, number)
        if not 0 <= value < count:
            raise self.reader.refusal(f"{self.kind}.{name} is {value}, but there are {count}", self.place)
        return value

    def indices(self, name: str, count: int, *, optional: bool = False) -> tuple[int, ...]:
        values = self.numbers(name, "i")
        wrong = next((v for v in values if not (-1 if optional else 0) <= v < count), None)
        if wrong is not None:
            raise self.reader.refusal(f"{self.kind}.{name} has {wrong}, but there are {count} tensors", self.place)
        return values

    def vector(self, name: str, width: int, number: int | None = None) -> tuple[int, int]:
        """(start, elements) of a vector that lies inside the file; (0, 0) where it is absent."""
        place, what = self.find(name, number), f"{self.kind}.{name}"
        if not place:
            return 0, 0
        start = self.reader.target(place, what)
        count = self.reader.unpack("<I", start, what)
        if count > (len(self.reader.content) - start - 4) // width:
            raise self.reader.refusal(f"{what} has {count} elements, which do not fit into the file", start)
        return start + 4, count

    def numbers(self, name: str, form: str, number: int | None = None) -> tuple:
        width = struct.calcsize(f"<{form}")
        start, count = self.vector(name, width, number)
        self.reader.spend(count * width, f"{self.kind}.{name}", start)
        return struct.unpack_from(f"<{count}{form}", self.reader.content, start)

    def text(self, name: str, number: int | None = None) -> str:
        start, count = self.vector(name, 1, number)
        self.reader.spend(count, f"{self.kind}.{name}", start)
        return self.reader.content[start : start + count].decode("utf-8", errors="replace")

    def table(self, name: str, kind: str) -> Table | None:
        place = self.find(name)
        return self.reader.follow(place, kind, f"{self.kind}.{name}") if place else None

    def tables(self, name: str, kind: str) -> list[Table]:
        start, count = self.vector(name, 4)
        what = f"{self.kind}.{name}"
        return [self.reader.follow(start + 4 * n, kind, f"{what}[{n}]") for n in range(count)]
