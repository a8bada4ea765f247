"""Accuracy against latency, size or work, and what lies on the front."""

from __future__ import annotations

import streamlit as st

from dashboard import advice, charts, text
from dashboard.shell import View
from dashboard.views.parts import plain_chart

_AXES = {"Latency": "median_ms", "File size": "size_bytes", "Gzip size": "gzip_bytes", "Multiply-accumulates": "macs"}


def show(view: View) -> None:
    st.subheader("Trade-off", divider="gray")
    frame = view.frame
    if not frame["top1"].notna().any():
        st.info("No variant has an accuracy yet, so there is nothing to compare.", icon=":material/hourglass_empty:")
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        axis = st.segmented_control("Top-1 against", list(_AXES), default="Latency", required=True, key="axis")
        for label, column in (("Models", "model"), ("Recipes", "recipe"), ("Schemes", "scheme")):
            choices = list(dict.fromkeys(view.frame[column]))
            wanted = st.multiselect(label, choices, key=f"only {column}", placeholder="all", width=220)
            frame = frame[frame[column].isin(wanted)] if wanted else frame
        whole = axis == "Latency" and st.checkbox("The whole way to the deadline", key="whole")
    chart = charts.trade_off(frame, view.deadline_ms, _AXES[axis], whole=whole, height=520)
    if chart is None:
        st.info(f"None of these variants has both an accuracy and a value for: {axis.lower()}.", icon=":material/help:")
        return
    plain_chart(chart)
    st.caption(charts.HOW_TO_READ)
    _front(view)


def _front(view: View) -> None:
    front = view.frame[view.frame["on_front"]].sort_values("median_ms")
    if front.empty:
        return
    st.subheader("On the front", divider="gray")
    st.caption("Nothing in the study is at least as accurate, fast and small, and better in one of the three.")
    lines = [
        f"| {text.markdown(advice.name(key))} | {text.percent(row.top1)} | {text.size(row.size_bytes)} "
        f"| {text.ms(row.median_ms)} | {text.fps(row.fps)} | {'✓' if row.meets else '✗'} |"
        for key, row in front.iterrows()
    ]
    limit = text.rate(view.deadline_ms)
    head = f"| Variant, fastest first | Top-1 | Size | Median | Frames/s | {limit} |\n|:--|--:|--:|--:|--:|:-:|\n"
    st.markdown(head + "\n".join(lines))
