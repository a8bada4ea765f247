"""One variant: how it came to be, how fast it is, what is in the file."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from dashboard import advice, charts, frames, story, text
from dashboard.shell import View
from dashboard.views.parts import download_button, plain_chart, points_delta
from mobile_bench import stats
from mobile_bench.store import Entry


def show(view: View) -> None:
    frame = view.frame
    if frame.empty:
        st.info("The study holds no variant yet.", icon=":material/hourglass_empty:")
        return
    key = _choose(view)
    row, entry = frame.loc[key], frames.entry_of(view.study, key)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader(text.markdown(advice.name(key)), width="content")
        label, color, icon = _badge(row)
        st.badge(label, color=color, icon=icon)
        if row.on_front:
            st.badge("on the Pareto front", color="violet", icon=":material/trending_up:")
        st.space("stretch")
        download_button(view, key, where="variant")
    if entry is None:
        st.info(f"This variant is not there: {row.reason}.", icon=":material/hourglass_empty:")
        return
    if entry.variant.status != "ok":
        st.error(f"**There is no file.** {text.markdown(entry.variant.reason)}", icon=":material/error:")
    else:
        _numbers(view, row)
    for warning in entry.variant.warnings:
        st.warning(text.markdown(warning), icon=":material/warning:")
    if entry.variant.status == "ok" or entry.variant.steps:
        _how(entry)
    if entry.variant.status == "ok":
        _latency(view, entry, row)
        _file(entry)


def _choose(view: View) -> str:
    keys = list(view.frame.index)
    wanted = st.session_state.get("chosen")
    if wanted not in keys:
        wanted = advice.recommend(view.frame, view.deadline_ms, view.points).best or keys[0]
    chosen = st.selectbox("Variant", keys, index=keys.index(wanted), format_func=advice.name, width=420)
    st.session_state["chosen"] = chosen
    return chosen


def _badge(row: pd.Series) -> tuple[str, str, str]:
    if row.status == "missing":
        return "not there", "gray", ":material/hourglass_empty:"
    if row.status != "ok":
        return row.status, "red", ":material/error:"
    if pd.isna(row.meets):
        return "not measured", "gray", ":material/timer_off:"
    return ("in time", "green", ":material/check:") if row.meets else ("too slow", "orange", ":material/timer:")


def _numbers(view: View, row: pd.Series) -> None:
    cells = st.columns(5)
    cells[0].metric("Top-1 on test", text.percent(row.top1), points_delta(row))
    cells[0].caption(f"95%: {text.interval(row.top1_low, row.top1_high)}")
    cells[1].metric("Size", text.size(row.size_bytes), _ratio(row.times_smaller, "smaller"), delta_arrow="off")
    cells[1].caption(f"gzip: {text.size(row.gzip_bytes)}")
    cells[2].metric("Median latency", text.ms(row.median_ms), _ratio(row.times_faster, "faster"), delta_arrow="off")
    cells[2].caption(f"{text.fps(row.fps)} frames/s")
    cells[3].metric("Agrees with its Keras model", text.percent(row.agreement))
    cells[3].caption(f"with the baseline: {text.percent(row.baseline_agreement)}")
    cells[4].metric("Parameters", text.count(row.parameters))
    cells[4].caption(f"{text.count(row.macs)} multiply-accumulates")


def _ratio(value: float, word: str) -> str | None:
    return f"{text.times(value)} {word}" if value == value and value >= 1.05 else None


def _how(entry: Entry) -> None:
    st.subheader("How it came to be", divider="gray")
    st.markdown(story.summary(entry.variant))
    chart = charts.history(frames.history_frame(entry))
    if chart is not None:
        plain_chart(chart)
    for number, report in enumerate(entry.variant.steps, 1):
        with st.container(border=True):
            st.markdown(f"##### {number}\\. {text.markdown(report.technique)}")
            st.markdown(" · ".join(text.markdown(fact) for fact in story.step_facts(report)))
            for note in report.notes:
                st.caption(text.markdown(note))
            with st.expander("Settings", icon=":material/tune:"):
                st.dataframe(_pairs(story.settings(report)), hide_index=True, height="content")
            if rows := story.by_layer(report):
                with st.expander("Layer by layer", icon=":material/table_rows:"):
                    st.dataframe(pd.DataFrame(rows), hide_index=True, height="content")
            skipped = story.skipped(report)
            if skipped:
                total = sum(len(layers) for _, layers in skipped)
                with st.expander(f"{text.plural(total, 'layer')} left alone, and why", icon=":material/skip_next:"):
                    for reason, layers in skipped:
                        st.markdown(f"**{text.markdown(reason)}**: {text.markdown(', '.join(layers))}")


def _latency(view: View, entry: Entry, row: pd.Series) -> None:
    st.subheader("Latency", divider="gray")
    measurement = frames.measurement_of(entry, view.place)
    if measurement is None:
        st.info(f"No time to show: {text.markdown(row.reason)}.", icon=":material/timer_off:")
        return
    summary = stats.summarize(measurement)
    cells = st.columns(6)
    for cell, (name, value) in zip(cells, story.latency_facts(measurement, summary)):
        cell.metric(name, value)
    st.caption(f"{text.plural(summary.samples, 'timed run')} on {text.markdown(view.place)}, {measurement.started_at}")
    for warning in measurement.warnings:
        st.warning(text.markdown(warning), icon=":material/warning:")
    plain_chart(charts.latency(measurement, view.deadline_ms, height=300))
    plain_chart(charts.runs(frames.samples_frame(measurement)))


def _file(entry: Entry) -> None:
    st.subheader("The file", divider="gray")
    st.dataframe(pd.DataFrame(story.tensors(entry.variant)), hide_index=True, height="content")
    if floats := story.float_tensors(entry.variant):
        with st.expander(f"{len(floats)} float tensors", icon=":material/decimal_increase:"):
            st.dataframe(pd.DataFrame(floats), hide_index=True, height="content")
    with st.expander("Where it comes from", icon=":material/fingerprint:"):
        st.dataframe(_pairs(story.origin(entry)), hide_index=True, height="content")


def _pairs(pairs: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["what", "value"])
