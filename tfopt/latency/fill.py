"""Measure a latency table: files of single layers in turns with one yardstick, and the whole model beside it.

What is measured is kept in a file beside the table after every batch, and a second run takes up there. Each batch holds
the yardstick, one convolution that is the same for all tables: cells are ratios to it, so a machine that is slower for
a while does not bend the table.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from mobile_bench.files import write_bytes, write_json
from mobile_bench.turns import ROUNDS, Turns, time_in_turns
from tfopt.errors import ConversionError, InputError, JobFailed, ModelRefused
from tfopt.latency import grid, micro, widths
from tfopt.latency.anchor import Anchor, profiled
from tfopt.latency.parts import Anatomy, in_words, macs_of, ranges, spec_of
from tfopt.latency.table import MACHINE, Family, Setting, Table

YARDSTICK = micro.LayerSpec("Conv2D", (14, 14, 128), {"filters": 128, "kernel_size": 1})
#: As good as no work: what calling the runtime costs.
NOTHING = micro.LayerSpec("Conv2D", (1, 1, 1), {"filters": 1, "kernel_size": 1})
BATCH, SECONDS = 48, 2.0
#: The whole model and the yardstick are timed in so many processes.
WHOLE_ROUNDS = 6
#: (files, rounds) -> their times; the tests put their own here.
Timer = Callable[[Sequence[Path], int], Turns]
OnProgress = Callable[[int, int, dict], None]


@dataclass(frozen=True)
class Cell:
    """One file to be timed: a family's layer with so many channels in and out (0: as many as go in)."""

    family: str
    read: int
    made: int


def model_key(found: Anatomy) -> str:
    """A name for a model's layers and channels, whatever its weights are."""
    rows = [
        (part.layer, part.family, part.read.of(found.groups), part.made and part.made.of(found.groups))
        for part in found.parts
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def plan(found: Anatomy, points: int = grid.POINTS) -> dict[str, tuple[tuple, list[Cell]]]:
    """family -> (the few numbers on each axis, all cells)."""
    made = {}
    for family, (reads, mades) in ranges(found.parts, found.groups).items():
        groups = json.loads(family).get("groups", 1)
        rows = grid.axis(*reads, points, groups)
        columns = grid.axis(*mades, points, groups) if mades else None
        cells = [Cell(family, *pair) for pair in grid.cells(rows, columns)]
        made[family] = (rows[0], columns[0] if columns else ()), cells
    return made


def measure(
    found: Anatomy, whole: Callable[[Path], Path], name: str, place: micro.Place, out: Path, *,
    points: int = grid.POINTS, seconds: float = SECONDS, on_progress: OnProgress | None = None,
    timer: Timer | None = None, profiler: Callable[[Path], Anchor] | None = None,
) -> Table:  # fmt: skip
    """Measure what is missing and write the table to `out`.

    whole: makes the .tflite of the whole model in a folder, and is called only when it is needed. seconds: of timing
    in each of three processes a batch. on_progress(done, total, facts) with facts['what'] and facts['seconds_left'].
    timer, profiler: by default mobile_bench's turns and profile on `place`. An interrupt loses the running batch alone.
    """
    if not found.parts:
        raise InputError("The model has no layer with a kernel that could be measured", received=name)
    target, connection = place.found()
    timer = timer or (
        lambda files, rounds: time_in_turns(files, target, connection=connection, seconds=seconds, rounds=rounds)
    )
    setting = Setting(place.target, place.scheme, place.threads)
    wanted = plan(found, points)
    notes = _Notes(out, {"setting": asdict(setting), "model_key": model_key(found), "points": points})
    folder = out.with_name(f".{out.name}.files")
    left = sorted(
        (cell for _, cells in wanted.values() for cell in cells if cell not in notes.ratios),
        key=lambda cell: macs_of(cell.family, cell.read, cell.made),
    )
    batches = [left[start : start + BATCH] for start in range(0, len(left), BATCH)]
    clock = _Clock(len(batches) + 2, on_progress)
    clock.tell(f"converting layers for {len(left)} of {sum(len(cells) for _, cells in wanted.values())} cells")
    files = _Files({family: max(cells, key=_size) for family, (_, cells) in wanted.items()}, place.scheme, folder, left)
    for batch in batches:
        clock.next(f"timing {len(batch)} files, such as {in_words(batch[-1].family)}")
        for cells, turns in _timed(batch, files, timer):
            notes.add(cells, turns)
        files.drop()
    clock.next("timing the whole model")
    path = whole(folder)
    found_whole = timer([files.yardstick, path], WHOLE_ROUNDS)
    notes.check(found_whole.device)
    clock.next("profiling the whole model")
    anchor = profiler(path) if profiler else profiled(path, target, connection)
    table = _table(found, wanted, notes, found_whole, anchor, setting, name)
    table.save(out)
    notes.path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return table


def _timed(cells: list[Cell], files: _Files, timer: Timer) -> Iterator[tuple[list[Cell], Turns]]:
    """The times of a batch; where it fails, of its halves, so that what the runtime cannot run is found and named."""
    try:
        yield cells, timer([files.yardstick, files.nothing, *map(files.cell, cells)], ROUNDS)
    except (JobFailed, ModelRefused) as failure:
        if len(cells) == 1:
            (cell,) = cells
            channels = f"{cell.read} channels in, {cell.made or cell.read} out"
            raise ModelRefused(
                "A layer of the model cannot be timed on the target",
                received=f"{in_words(cell.family)}, {channels}: {failure.what}",
                next_step="What is measured is kept; run it again, or look at the target",
            ) from failure
        middle = len(cells) // 2
        yield from _timed(cells[:middle], files, timer)
        yield from _timed(cells[middle:], files, timer)


def _table(
    found: Anatomy, wanted: Mapping, notes: _Notes, whole: Turns, anchor: Anchor, setting: Setting, name: str
) -> Table:
    yardstick_ms = statistics.median(notes.yardsticks)
    # What calling the runtime costs is in every file once, and in the whole model once.
    overhead = statistics.median(notes.overheads)
    families = {
        family: Family(
            points, {(c.read, c.made): max(notes.ratios[c] - overhead, 1e-6) * yardstick_ms for c in cells}
        )
        for family, (points, cells) in wanted.items()
    }  # fmt: skip
    timing = whole.timings[1]
    per_ms = timing.ratio * yardstick_ms / timing.ms
    parts_ms = sum(
        families[p.family].ms(p.read.of(found.groups), p.made and p.made.of(found.groups)) for p in found.parts
    )
    first = {}
    for part in found.parts:
        first.setdefault(part.family, part.layer)
    return Table(
        setting, families, timing.ms * per_ms, timing.low_ms * per_ms, timing.high_ms * per_ms, anchor.share, parts_ms,
        {key: notes.device[key] for key in notes.device if key != "during"}, name, model_key(found),
        datetime.now(UTC).isoformat(timespec="seconds"), first, anchor.layers,
    )  # fmt: skip


class _Notes:
    """What is measured so far, in a file beside the table."""

    def __init__(self, out: Path, key: dict):
        self.path, self._key = out.with_name(f"{out.name}.partial"), key
        self.ratios: dict[Cell, float] = {}
        self.yardsticks: list[float] = []
        self.overheads: list[float] = []
        self.device: dict = {}
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            if known["key"] == key:
                self.ratios = {Cell(family, read, made): ratio for family, read, made, ratio in known["ratios"]}
                self.yardsticks, self.overheads = known["yardsticks"], known["overheads"]
                self.device = known["device"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing there, or cut off by a crash: measure anew

    def add(self, cells: Sequence[Cell], turns: Turns) -> None:
        self.check(turns.device)
        yardstick, nothing, *timings = turns.timings
        self.yardsticks.append(yardstick.ms)
        self.overheads.append(nothing.ratio)
        self.ratios.update((cell, timing.ratio) for cell, timing in zip(cells, timings, strict=True))
        rows = [[cell.family, cell.read, cell.made, ratio] for cell, ratio in self.ratios.items()]
        write_json(self.path, {
            "key": self._key, "ratios": rows, "yardsticks": self.yardsticks, "overheads": self.overheads,
            "device": self.device,
        })  # fmt: skip

    def check(self, device: dict) -> None:
        """Cells of two machines make no table."""
        for name in MACHINE if self.device else ():
            if self.device.get(name) != device.get(name):
                raise InputError(
                    "What was measured before is of another machine or runtime",
                    received=f"{name} {self.device.get(name)} in {self.path}", allowed=f"{name} {device.get(name)}",
                    next_step=f"Delete {self.path} to measure anew",
                )  # fmt: skip
        self.device = dict(device)


class _Clock:
    """Which of how many steps is running, and how long the rest will take by those before."""

    def __init__(self, total: int, on_progress: OnProgress | None):
        self._done, self._total, self._on_progress = -1, total, on_progress
        self._started = time.monotonic()

    def tell(self, what: str) -> None:
        left = None
        if self._done > 0:
            left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        if self._on_progress:
            self._on_progress(max(self._done, 0), self._total, {"what": what, "seconds_left": left})

    def next(self, what: str) -> None:
        self._done += 1
        if self._done == 0:
            self._started = time.monotonic()
        self.tell(what)


class _Files:
    """The .tflite of each cell: from the converter's file of its family, where that can be widened, else by itself."""

    def __init__(self, widest: Mapping[str, Cell], scheme: str, folder: Path, left: Sequence[Cell]):
        self._folder, self._scheme = folder, scheme
        self._made: list[Path] = []
        self._changes: dict[str, Callable[[Cell], dict[int, int]]] = {}
        specs = {"yardstick": YARDSTICK, "nothing": NOTHING}
        keys = {family: hashlib.sha256(family.encode()).hexdigest()[:12] for family in widest}
        templates = {}
        for family in dict.fromkeys(cell.family for cell in left):
            cell = widest[family]
            specs[f"{keys[family]}-{cell.read}-{cell.made}"] = spec_of(family, cell.read, cell.made or None)
            if template := _template(family, cell):
                templates[family], self._changes[family] = template
                specs[f"{keys[family]}-template"] = spec_of(family, *template[0])
        paths = micro.convert_layers(specs, scheme, folder)
        self.yardstick, self.nothing, self._keys = paths["yardstick"], paths["nothing"], keys
        self._templates = {}
        for family in templates:
            cell, content = widest[family], paths[f"{keys[family]}-template"].read_bytes()
            whole = paths[f"{keys[family]}-{cell.read}-{cell.made}"].read_bytes()
            if widths.same_form(widths.widened(content, self._changes[family](cell)), whole):
                self._templates[family] = content
        plain = {
            self._name(cell): spec_of(cell.family, cell.read, cell.made or None)
            for cell in left if cell.family not in self._templates
        }  # fmt: skip
        micro.convert_layers(plain, scheme, folder)

    def _name(self, cell: Cell) -> str:
        return f"{self._keys[cell.family]}-{cell.read}-{cell.made}"

    def cell(self, cell: Cell) -> Path:
        path = self._folder / f"{self._name(cell)}.tflite"
        if cell.family in self._templates and not path.is_file():
            write_bytes(path, widths.widened(self._templates[cell.family], self._changes[cell.family](cell)))
            self._made.append(path)
        return path

    def drop(self) -> None:
        """Remove the files that were made for the last batch."""
        for path in self._made:
            path.unlink(missing_ok=True)
        self._made = []


def _template(family: str, widest: Cell) -> tuple[tuple[int, int | None], Callable[[Cell], dict[int, int]]] | None:
    """Numbers of channels for a family's template, and what becomes of them for a cell; None where there are none."""
    settings = json.loads(family)
    groups, each = settings.get("groups", 1), settings.get("depth_multiplier", 1)
    sizes = settings["size"]
    taken = {1, groups, each, *sizes, *settings.get("kernel_size", []), math.prod(sizes or [1])}
    try:
        read, made = widths.free_numbers(taken, 2)
    except ValueError:
        return None

    def changes(cell: Cell) -> dict[int, int]:
        found = {read * groups: cell.read, read * each: cell.read * each, read: cell.read // groups}
        return {**found, made * groups: cell.made} if cell.made else found

    return (read * groups, made * groups if widest.made else None), changes


def _size(cell: Cell) -> tuple[int, int]:
    return cell.read, cell.made


def file_of(model, spec, scheme: str) -> Callable[[Path], Path]:
    """Makes the whole model's .tflite; int8 with ranges of noise, which times do not depend on."""

    def make(folder: Path) -> Path:
        from tfopt import convert, models
        from tfopt.xray import random_images

        models.save(model, folder / "whole.keras", spec)
        (made,) = convert.convert(
            folder / "whole.keras", spec, [scheme], folder / "whole", calibration=random_images(spec), work=folder,
            hybrid=True, trust=True,
        )  # fmt: skip
        if made.path is None:
            raise ConversionError(f"The model cannot be exported as {scheme}", received=made.reason)
        return made.path

    return make
