"""What stands above every page: which study, judged by which deadline, measured where."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import streamlit as st

from dashboard import frames, text
from mobile_bench.errors import Problem
from mobile_bench.store import Study, find_studies, read_study

DEFAULT = Path("saved_models")
REFRESH_S = 5


@dataclass
class View:
    """What a page shows. points: how much top-1 a smaller file may cost. pages: the other pages by name."""

    study: Study
    frame: pd.DataFrame
    place: frames.Place | None
    deadline_ms: float
    points: float
    pages: dict = field(default_factory=dict)


def start_folder() -> Path:
    """The folder given behind `--` on the command line, saved_models/ otherwise."""
    given = [argument for argument in sys.argv[1:] if argument.strip()]
    return Path(given[0]).expanduser() if given else DEFAULT


def open_view() -> View | None:
    """Draw the top of the page. None where there is no study to show, which the page then says itself."""
    folder = start_folder()
    choices = [folder] if (folder / "study.json").is_file() else find_studies(folder)
    if not choices:
        _no_study(folder)
        return None
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        chosen = st.selectbox("Study", choices, format_func=lambda path: path.resolve().name, key="study", width=320)
        try:
            study = read_study(chosen)
        except Problem as problem:
            st.error(f"**This study cannot be read.** {text.markdown(problem)}", icon=":material/error:")
            return None
        deadline_fps = st.number_input(
            "Deadline (frames/s)", min_value=0.1, max_value=10_000.0, value=round(1000 / study.record.deadline_ms, 3),
            step=5.0, format="%g", key=f"deadline {chosen}", width=170,
            help="A variant is in time when nine runs of ten (p90) end within one frame: 30 frames/s leave 33.3 ms.",
        )  # fmt: skip
        points = st.number_input(
            "May lose (points)", 0.0, 100.0, value=1.0, step=0.5, format="%g", key="points", width=150,
            help="How much top-1 accuracy, in percentage points, a smaller file may cost against the baseline.",
        )  # fmt: skip
        places = frames.places(study)
        place = places[0] if places else None
        if len(places) > 1:
            place = st.selectbox(
                "Measured on", places, format_func=str, key=f"place {chosen}", width=420,
                help="Times of different machines, runtimes or thread counts are never mixed in one table.",
            )  # fmt: skip
    deadline_ms = 1000 / deadline_fps
    frame = frames.variants(study, place, deadline_ms)
    _facts(study, frame, place)
    _notices(study, frame)
    return View(study, frame, place, deadline_ms, points)


def _facts(study: Study, frame: pd.DataFrame, place: frames.Place | None) -> None:
    data = study.record.data
    if data.get("note"):
        st.warning(f"**About the data:** {text.markdown(data['note'])}", icon=":material/info:")
    images = (data.get("images") or {}).get("test")
    facts = [
        f":material/image: {text.markdown(data.get('name', 'unknown data'))}"
        + (f", {images:,} test images" if images else ""),
        f":material/memory: {text.markdown(place)}" if place else ":material/memory: not measured yet",
        f":material/inventory_2: {frames.counted(frame)}",
    ]
    st.caption("  ·  ".join(facts))


def _notices(study: Study, frame: pd.DataFrame) -> None:
    promised = len(study.record.expected) or len(frame)
    there = int((frame["status"] != "missing").sum())
    if not study.record.finished_at:
        st.info(
            f"This study is being made: {there} of {promised} variants are there. The page follows by itself.",
            icon=":material/hourglass_top:",
        )
        _follow(study)
    problems = study.damage
    if problems:
        verb = "is" if len(problems) == 1 else "are"
        with st.expander(f"{text.plural(len(problems), 'file')} {verb} missing or damaged", icon=":material/warning:"):
            for problem in problems:
                st.text(problem)


def _follow(study: Study) -> None:
    """Look at the folder every few seconds and draw the page again when something was added."""

    @st.fragment(run_every=REFRESH_S)
    def watch():
        try:
            now = read_study(study.folder)
        except Problem:
            return
        count = lambda seen: (
            len(seen.entries),
            sum(len(e.measurements) for e in seen.entries),
            seen.record.finished_at,
        )
        if count(now) != count(study):
            st.rerun(scope="app")

    watch()


def _no_study(folder: Path) -> None:
    where = text.markdown(folder.resolve())
    if not folder.exists():
        st.error(f"**There is no folder {where}.**", icon=":material/folder_off:")
    else:
        st.info(f"**There is no study in {where} yet.**", icon=":material/folder_open:")
    st.markdown("Make one, then open this page again:")
    st.code("make demo\nmake dashboard", language="bash")
    st.markdown("or show another folder: `python -m dashboard FOLDER`")
