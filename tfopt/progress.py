"""What a person sees while a study runs: one line for each finished thing, one bar for the present one."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tfopt.plan import Event

_DOING = {"evaluate": "evaluating", "convert": "converting", "measure": "measuring"}


class StudyProgress:
    """Use as a context manager; `on_event` is what tfopt.study.run wants."""

    def __init__(self, console: Console):
        self.console = console
        self.bars = Progress(
            TextColumn("[bold]{task.description}", justify="left"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._variants = self.bars.add_task("variants", total=None, facts="")
        self._lanes: dict[str, tuple] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def on_event(self, event: Event) -> None:
        with self._lock:
            self._show(event)

    def _show(self, event: Event) -> None:
        if event.kind == "plan":
            self.bars.update(self._variants, total=event.total)
        elif event.kind == "variant":
            mark = "[red]x[/]" if event.facts.get("failed") else "[green]+[/]"
            self._say(f"{mark} {event.model}/{event.name}  ", event.text)
            self.bars.advance(self._variants)
        elif event.kind == "note":
            self._say("[dim]  ", " ".join(filter(None, (event.model, event.name, event.text))))
        else:
            self._bar(event)

    def _bar(self, event: Event) -> None:
        """One bar for what is trained and one for what is exported meanwhile."""
        lane = "train" if event.kind == "step" else "export"
        label = " ".join(filter(None, (event.model, event.name, _DOING.get(event.kind))))
        task, shown = self._lanes.get(lane, (None, ""))
        if label != shown and (event.kind != "measure" or task is None):
            if task is not None:
                self.bars.remove_task(task)
            task = self.bars.add_task(label, total=event.total or None, facts="")
        self._lanes[lane] = task, label
        self.bars.update(
            task, description=label, completed=event.done, total=event.total or None, facts=_facts(event.facts)
        )

    def _say(self, markup: str, text: str) -> None:
        from rich.markup import escape

        self.console.print(f"{markup}{escape(text)}", highlight=False, soft_wrap=True)


def _facts(facts: dict) -> str:
    parts = []
    if "loss" in facts:
        parts.append(f"loss {facts['loss']:.3f}")
    if "validation" in facts:
        parts.append(f"validation {facts['validation']:.1%}")
    return "  ".join(parts)
