"""A latency table: milliseconds of each kind of layer on one target by its numbers of channels.

Each family (tfopt.latency.parts) is measured at a few numbers of channels in and out, and at many along the two edges,
where the other number is the largest. In between it is bilinear, times what the edges say of the steps: kernels work
on so many channels at once (16, 32 or 64), and time rises in stairs.

    t(i, o) = bilinear(i, o) · in_edge(i) / in_line(i) · out_edge(o) / out_line(o)

where a line joins the few numbers along the edge. Such tables guide NetAdapt (Yang et al. 2018, arXiv:1804.03230,
section 3.4) and HALP (Shen et al. 2022, arXiv:2110.10811).
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from mobile_bench.files import check_is_file, write_json
from tfopt.errors import InputError

SCHEMA_VERSION = 1
#: The file says what it is.
FORMAT = "tfopt latency table"
#: Facts about a machine that make it another one.
MACHINE = ("cpu", "machine", "board", "model", "runtime", "runtime_version")
AGAIN = "tfopt latency MODEL --target … --scheme … --threads …"
_LEAST_MS = 1e-6


@dataclass(frozen=True)
class Setting:
    """What a table holds for: mobile_bench's target (its URL or name, threads) and the scheme of the files."""

    target: str
    scheme: str
    threads: int


@dataclass
class Family:
    """Cells of one family: (channels in, channels out or 0) -> milliseconds. points: the few numbers on each axis."""

    points: tuple[tuple[int, ...], tuple[int, ...]]
    cells: dict[tuple[int, int], float] = field(default_factory=dict)

    def ms(self, read: int, made: int | None) -> float:
        """Milliseconds at these numbers of channels, by the formula above; below the smallest a straight line."""
        key = (read, made or 0)
        if key in self.cells:
            return max(self.cells[key], _LEAST_MS)
        rows, columns = self.points
        if not made:
            return max(_line(self._in_edge, read), _LEAST_MS)
        value = _line([(row, _line([(c, self.cells[row, c]) for c in columns], made)) for row in rows], read)
        value *= _stair(self._in_edge, rows, read) * _stair(self._out_edge, columns, made)
        return max(value, _LEAST_MS)

    @cached_property
    def _in_edge(self) -> list[tuple[int, float]]:
        last = self.points[1][-1] if self.points[1] else 0
        return sorted((row, ms) for (row, column), ms in self.cells.items() if column == last)

    @cached_property
    def _out_edge(self) -> list[tuple[int, float]]:
        return sorted((column, ms) for (row, column), ms in self.cells.items() if row == self.points[0][-1])


@dataclass(frozen=True)
class Table:
    """A finished table.

    families: family -> its cells. whole_ms: the whole model's latency with its 95% interval (whole_low_ms,
    whole_high_ms), in the same unit of the machine's speed as the cells. kernel_share: the share of its time that
    kernels take by the runtime's own profile; None where it cannot be profiled. profiled: layer -> milliseconds of its
    kernel in that profile, where it names it. parts_ms: what the table says of the model's kernels together. device:
    of mobile_bench. warnings: of the whole model's timing. model_key: of the layers' names, families and channels.
    """

    setting: Setting
    families: Mapping[str, Family]
    whole_ms: float
    whole_low_ms: float
    whole_high_ms: float
    kernel_share: float | None
    parts_ms: float
    device: dict
    model: str
    model_key: str
    created_at: str
    layers: Mapping[str, str] = field(default_factory=dict)
    profiled: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """The table's sum over what the kernels take in the whole model: 1 where they cost the same alone."""
        return self.parts_ms / (self.whole_ms * (1.0 if self.kernel_share is None else self.kernel_share))

    @property
    def scale(self) -> float:
        """What the table's milliseconds are multiplied by, so that those of the whole model are the measured ones."""
        if self.kernel_share is None:
            return min(1.0, self.whole_ms / self.parts_ms)
        return 1 / self.ratio

    @property
    def rest_ms(self) -> float:
        """Of the whole model, what is not in its kernels."""
        return max(0.0, self.whole_ms - self.scale * self.parts_ms)

    def check(self, families: Iterable[str], setting: Setting | None = None, device: Mapping | None = None) -> None:
        """Raise InputError where the table is of another target, scheme or threads, machine or model.

        families: of the model at hand. setting: what is asked for; device: the machine's facts, where it is this one.
        """
        for name in ("target", "scheme", "threads") if setting else ():
            known, wanted = getattr(self.setting, name), getattr(setting, name)
            if known != wanted:
                raise InputError(
                    f"The latency table holds for another {'number of threads' if name == 'threads' else name}",
                    received=wanted, allowed=known, next_step=f"Ask for {known}, or measure another table: {AGAIN}",
                )  # fmt: skip
        for name in MACHINE if device else ():
            known, now = self.device.get(name), device.get(name)
            if known and now and known != now:
                raise InputError(
                    "The latency table is of another machine or runtime", received=f"{name} {known}",
                    allowed=f"{name} {now}", next_step=f"Measure one here: {AGAIN}",
                )  # fmt: skip
        lacking = [family for family in dict.fromkeys(families) if family not in self.families]
        if lacking:
            shown = "; ".join(lacking[:2]) + ("; …" if len(lacking) > 2 else "")
            raise InputError(
                f"The latency table is of another model, {self.model}, without some kinds of layers", received=shown,
                next_step=f"Measure this one: {AGAIN}",
            )  # fmt: skip

    def to_dict(self) -> dict:
        families = [
            {
                "family": json.loads(name), "layer": self.layers.get(name, ""),
                "points": list(map(list, family.points)),
                "cells": [[read, made, round(ms, 7)] for (read, made), ms in sorted(family.cells.items())],
            }
            for name, family in self.families.items()
        ]  # fmt: skip
        facts = {
            name: getattr(self, name) for name in (
                "whole_ms", "whole_low_ms", "whole_high_ms", "kernel_share", "parts_ms", "ratio", "device", "model",
                "model_key", "created_at", "profiled", "warnings",
            )
        }  # fmt: skip
        return {
            "schema_version": SCHEMA_VERSION, "format": FORMAT, "setting": asdict(self.setting), **facts,
            "unit": "cells are [channels in, channels out or 0, milliseconds]", "families": families,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())


def load(path: str | Path) -> Table:
    """Raises InputError for what is no finished latency table."""
    check_is_file(path)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "The latency table cannot be read",
            received=f"{path} ({error})",
            next_step=f"Measure one: tfopt latency MODEL --out {path}",
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError("The file is no latency table", received=path, next_step="Measure one: tfopt latency MODEL")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            "The latency table has another version", received=values.get("schema_version"), allowed=SCHEMA_VERSION
        )
    try:
        return _from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("The latency table is damaged", received=f"{path} ({error!r})") from error


def _from_dict(values: dict) -> Table:
    families, layers = {}, {}
    for one in values["families"]:
        name = json.dumps(one["family"], sort_keys=True)
        cells = {(int(read), int(made)): float(ms) for read, made, ms in one["cells"]}
        rows, columns = (tuple(map(int, axis)) for axis in one["points"])
        if not rows or any((row, column) not in cells for row in rows for column in columns or (0,)):
            raise ValueError(f"cells of {one.get('layer')} are missing")
        families[name], layers[name] = Family((rows, columns), cells), one.get("layer", "")
    facts = {name: values[name] for name in (
        "whole_ms", "whole_low_ms", "whole_high_ms", "kernel_share", "parts_ms", "device", "model", "model_key",
        "created_at", "profiled",
    )}  # fmt: skip
    if not facts["whole_ms"] > 0 or not facts["parts_ms"] > 0:
        raise ValueError("its times are not above 0")
    warnings = tuple(values.get("warnings", ()))
    return Table(Setting(**values["setting"]), families, layers=layers, warnings=warnings, **facts)


def _line(points: list[tuple[int, float]], at: float) -> float:
    """Piecewise linear through (number, value), the outer pieces going on."""
    if len(points) == 1:
        return points[0][1]
    place = min(max(bisect.bisect_left([x for x, _ in points], at), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _stair(edge: list[tuple[int, float]], few: tuple[int, ...], at: int) -> float:
    """The edge over the line through its few points: what a line does not know of the steps."""
    known = dict(edge)
    line = _line([(x, known[x]) for x in few], at)
    return _line(edge, at) / line if line > _LEAST_MS and few[0] <= at <= few[-1] else 1.0
