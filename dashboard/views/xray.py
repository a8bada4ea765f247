"""What runs where: the operations of one file on one delegate, and why the others are left to the CPU."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from dashboard import advice, charts, frames, text
from dashboard.shell import View
from dashboard.views.parts import plain_chart
from mobile_bench.errors import Problem
from mobile_bench.store import Entry
from mobile_bench.xray import BACKENDS, DELEGATES, XrayReport, xray
from mobile_bench.xray.report import PLACES

_BACKEND_NAMES = {"webgpu": "WebGPU", "opencl": "OpenCL", "opengl": "OpenGL"}


def show(view: View) -> None:
    st.subheader("What runs where", divider="gray")
    entries = {f"{e.variant.model}/{e.variant.name}": e for e in view.study.entries if e.variant.status == "ok"}
    if not entries:
        st.info("The study holds no file yet.", icon=":material/hourglass_empty:")
        return
    entry, delegate, backend = _choose(entries)
    if not entry.tflite.is_file():
        st.info("The file itself is not there: run the study again, which makes it anew.", icon=":material/help:")
        return
    report = entry.xray(delegate)
    if report is not None and report.backend != backend:
        report = None
    if report is None and delegate == "cpu":
        # What XNNPACK takes is seen by running the file, and the dashboard runs nothing.
        st.info("What XNNPACK takes is seen by running the file once. Do that, then open this page again:")
        st.code(f"mobile-bench xray '{entry.tflite}' --delegate cpu --save", language="bash")
        return
    try:
        report = report or _by_rules(entry.tflite, entry.tflite.stat().st_mtime_ns, delegate, backend)
    except Problem as problem:
        st.error(f"**This file cannot be looked at.** {text.markdown(problem)}", icon=":material/error:")
        return
    _numbers(report)
    frame = frames.operations_frame(report)
    if len(frame):
        plain_chart(charts.operations(frame, PLACES[delegate]))
    _left(report, frame)
    for sentence in report.disagreements:
        st.warning(text.markdown(sentence), icon=":material/warning:")
    for note in report.notes:
        st.caption(text.markdown(note))


def _choose(entries: dict[str, Entry]) -> tuple[Entry, str, str]:
    keys = list(entries)
    wanted = st.session_state.get("chosen")
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        chosen = st.selectbox(
            "Variant", keys, index=keys.index(wanted) if wanted in keys else 0, format_func=advice.name, width=420
        )
        delegate = st.segmented_control(
            "Delegate", DELEGATES, default=DELEGATES[0], required=True, key="delegate",
            format_func=lambda name: PLACES[name][0],
        )  # fmt: skip
        backend = BACKENDS[delegate][0]
        if len(BACKENDS[delegate]) > 1:
            backend = st.selectbox(
                "Backend", BACKENDS[delegate], format_func=lambda name: _BACKEND_NAMES.get(name, name), width=160
            )
    st.session_state["chosen"] = chosen
    return entries[chosen], delegate, backend


@st.cache_data(max_entries=64, show_spinner="Reading the file")
def _by_rules(path: Path, changed: int, delegate: str, backend: str) -> XrayReport:
    """The file is only read. `changed` makes a file that was replaced another one."""
    return xray(path, delegate, backend=backend)


def _numbers(report: XrayReport) -> None:
    there, here = PLACES[report.delegate]
    cells = st.columns(4)
    cells[0].metric(f"On {there}", f"{report.delegated} of {len(report.ops)}", help="Operations of the main graph")
    cells[1].metric(f"Left to the {here.replace('plain ', '')}", report.fallback)
    cells[2].metric("Pieces", report.partitions, help="Between two pieces, values cross from one side to the other")
    cells[3].metric("Weights there", text.size(report.weights_bytes))
    cells[3].caption(f"activations of the whole file: {text.size(report.activation_bytes)}")
    asked = f"as reported by {report.asked}" if report.asked else "by the delegate's published rules, nothing was run"
    st.caption(text.markdown(asked[0].upper() + asked[1:]))


def _left(report: XrayReport, frame: pd.DataFrame) -> None:
    there, here = PLACES[report.delegate]
    left = frame[frame["place"] == here]
    if left.empty:
        st.success(f"Every operation runs on {there}.", icon=":material/check:")
        return
    st.markdown(f"**{text.plural(len(left), 'operation')} left to the CPU, and why**")
    lines = [
        f"| {len(same)} × {text.markdown(op)} | {_cell(reason)} | {_cell(fix)} |"
        for (op, reason, fix), same in left.groupby(["op", "reason", "fix"], sort=False)
    ]
    st.markdown("| Operations | Why | What would help |\n|:--|:--|:--|\n" + "\n".join(lines))
    with st.expander("Each of them, its layer, and where the rule stands", icon=":material/list:"):
        _each(left)


def _cell(sentence: str) -> str:
    return text.markdown(sentence) or "–"


def _each(left: pd.DataFrame) -> None:
    st.dataframe(
        left[["index", "op", "layer", "reason", "fix", "source"]], hide_index=True, height="content",
        column_config={
            "index": st.column_config.NumberColumn("#", width="small"),
            "op": "Operation", "layer": "Layer",
            "reason": st.column_config.TextColumn("Why", width="large"),
            "fix": st.column_config.TextColumn("What would help", width="large"),
            "source": st.column_config.TextColumn("Where the rule stands", width="medium"),
        },
    )  # fmt: skip
