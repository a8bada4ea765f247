"""What to ship, every variant in one table, and the trade-off at a glance."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from dashboard import advice, charts, text
from dashboard.shell import View
from dashboard.views.parts import download_button, plain_chart, points_delta

_MARKS = {True: "✓ in time", False: "✗ too slow"}


def show(view: View) -> None:
    frame = view.frame
    if frame.empty:
        st.info("The study holds no variant and promises none.", icon=":material/hourglass_empty:")
        return
    _what_to_ship(view)
    st.subheader("All variants", divider="gray")
    shown = _filtered(frame)
    if shown.empty:
        st.info("No variant is left with these filters.", icon=":material/filter_alt_off:")
    else:
        _table(view, shown)
    _failures(frame)
    chart = charts.trade_off(shown, view.deadline_ms, height=460)
    if chart is not None:
        st.subheader("Trade-off", divider="gray")
        plain_chart(chart)
        st.caption(charts.HOW_TO_READ)


def _what_to_ship(view: View) -> None:
    st.subheader("What to ship", divider="gray")
    advised = advice.recommend(view.frame, view.deadline_ms, view.points)
    st.html(f'<p style="font-size: 1.25rem; line-height: 1.45; margin: 0">{advised.html}</p>')
    if advised.caution:
        st.caption(advised.caution)
    keys = {"Most accurate in time": advised.best}
    if advised.smallest != advised.best:
        keys[f"Smallest within {advice.in_points(view.points)} of the baseline"] = advised.smallest
    cards = [(title, key) for title, key in keys.items() if key]
    if not cards:
        return
    for column, (title, key) in zip(st.columns(2), cards):
        with column, st.container(border=True):
            _card(view, title, key)


def _card(view: View, title: str, key: str) -> None:
    row = view.frame.loc[key]
    st.caption(title)
    st.markdown(f"#### {text.markdown(advice.name(key))}")
    smaller = f"{text.times(row.times_smaller)} smaller" if row.times_smaller >= 1.05 else None
    with st.container(horizontal=True, gap="medium"):
        st.metric(
            "Top-1", text.percent(row.top1), points_delta(row), width=130,
            help=f"95% interval {text.interval(row.top1_low, row.top1_high)}",
        )  # fmt: skip
        st.metric("Size", text.size(row.size_bytes), smaller, delta_arrow="off", width=130)
        st.metric(
            "Median", text.ms(row.median_ms), f"{text.fps(row.fps)} frames/s", delta_arrow="off", delta_color="off",
            width=140,
            help=f"95% interval {text.significant(row.median_low_ms)} to {text.ms(row.median_high_ms)}",
        )  # fmt: skip
    with st.container(horizontal=True):
        download_button(view, key, where=f"card {title[:4]}")
        _open_button(view, key, where=f"card {title[:4]}")


def _filtered(frame: pd.DataFrame) -> pd.DataFrame:
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        models = list(dict.fromkeys(frame["model"]))
        if len(models) > 1:
            wanted = st.pills("Models", models, selection_mode="multi", key="models", label_visibility="collapsed")
            frame = frame[frame["model"].isin(wanted)] if wanted else frame
        if st.toggle("Only those in time", key="in time"):
            frame = frame[frame["meets"].fillna(False).astype(bool)]
        if st.toggle(
            "Only the Pareto front", key="front", help="Nothing else is more accurate, faster and smaller at once."
        ):
            frame = frame[frame["on_front"]]
    return frame


def _table(view: View, shown: pd.DataFrame) -> None:
    shown = shown.assign(
        rank=shown["meets"].map({True: 0, False: 1}).fillna(2).astype(int)
        + shown["status"].map({"ok": 0, "missing": 2}).fillna(1).astype(int)
    ).sort_values(["rank", "top1"], ascending=[True, False])
    table = table_frame(shown, view.deadline_ms)
    grey = ~shown["meets"].fillna(False).astype(bool)
    styled = table.style.apply(lambda _: ["color: #8A9099" if dim else "" for dim in grey], axis=0)
    picked = st.dataframe(
        styled, hide_index=True, height=min(35 * (len(table) + 1) + 3, 900), on_select="rerun",
        selection_mode="single-row", key="table", placeholder="", column_config=_columns(table),
    )  # fmt: skip
    rows = picked.selection.rows
    if rows and rows[0] < len(shown):
        key = shown.index[rows[0]]
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{text.markdown(advice.name(key))}**", width="content")
            download_button(view, key, where="table")
            _open_button(view, key, where="table")
    else:
        st.caption("Pick a row to download its file or to see how it came to be. Click a heading to sort.")


def table_frame(shown: pd.DataFrame, deadline_ms: float) -> pd.DataFrame:
    """The columns of the table, in the units its headings name."""
    verdict = shown["meets"].map(_MARKS).astype(object)
    verdict = verdict.where(shown["meets"].notna(), shown["status"].replace({"ok": "not measured"}))
    return pd.DataFrame(
        {
            "variant": shown["variant"],
            "model": shown["model"],
            "top1": shown["top1"] * 100,
            "interval": [
                text.interval(low, high) if low == low else ""
                for low, high in zip(shown["top1_low"], shown["top1_high"])
            ],
            "delta": shown["delta_points"].mask(shown["is_baseline"]),
            "size": shown["size_bytes"] / 1e3,
            "times_smaller": shown["times_smaller"].mask(shown["is_baseline"]),
            "median": shown["median_ms"],
            "verdict": verdict,
            "budget": shown["p90_ms"] / deadline_ms * 100,
            "p99": shown["p99_ms"],
            "fps": shown["fps"],
            "front": shown["on_front"].map({True: "●", False: ""}),
            "agreement": shown["agreement"] * 100,
            "baseline_agreement": shown["baseline_agreement"] * 100,
            "gzip": shown["gzip_bytes"] / 1e3,
            "median_interval": [
                f"{text.significant(low)} – {text.significant(high)}" if low == low else ""
                for low, high in zip(shown["median_low_ms"], shown["median_high_ms"])
            ],
            "p90": shown["p90_ms"],
            "load": shown["load_ms"],
            "memory": shown["peak_rss_bytes"] / 1e6,
            "parameters": shown["parameters"],
            "macs": shown["macs"] / 1e6,
            "images": shown["images"],
            "reason": shown["reason"],
        }
    )


def _columns(table: pd.DataFrame) -> dict:
    number, words = st.column_config.NumberColumn, st.column_config.TextColumn
    return {
        "verdict": words("Deadline", width=100, help="In time: nine runs of ten (p90) end within one frame."),
        "model": words("Model", width=140),
        "variant": words("Variant", width=170, pinned=True, help="RECIPE-SCHEME"),
        "top1": number("Top-1 %", format="%.2f", help="Of the .tflite itself on the test split."),
        "interval": words("95% interval", help="Wilson interval of top-1 on these images."),
        "delta": number("Δ points", format="%+.2f", help="Top-1 less that of the same model unoptimized."),
        "size": number("Size kB", format="%.1f", help="1 kB = 1,000 bytes."),
        "times_smaller": number("Smaller", format="%.1f×", help="Than the same model unoptimized."),
        "median": number("Median ms", format="%.3f"),
        "budget": st.column_config.ProgressColumn(
            "Frame budget",
            format="%.1f%%",
            min_value=0,
            max_value=100,
            color="auto-inverse",
            help="p90 latency as a share of the deadline.",
        ),
        "p99": number("p99 ms", format="%.3f"),
        "fps": number("Frames/s", format="localized", step=1),
        "front": words("Front", help="● Nothing else is more accurate, faster and smaller at once."),
        "agreement": number(
            "Agrees %", format="%.2f", help="Images on which the file and its own Keras model name one class."
        ),
        "baseline_agreement": number("Agrees with baseline %", format="%.2f"),
        "gzip": number("gzip kB", format="%.1f"),
        "median_interval": words("Median 95%", help="Over the processes of one measurement; another day can differ."),
        "p90": number("p90 ms", format="%.3f"),
        "load": number("Load ms", format="%.2f"),
        "memory": number(
            "Peak memory MB", format="%.1f", help="The whole process at its largest, the runtime included."
        ),
        "parameters": number("Parameters", format="localized", step=1),
        "macs": number("MACs M", format="%.2f", help="Multiply-accumulates of one inference, in millions."),
        "images": number("Test images", format="localized", step=1),
        "reason": words("Reason", width="large"),
    }


def _failures(frame: pd.DataFrame) -> None:
    failed = frame[frame["status"].isin(["failed", "refused"])]
    if failed.empty:
        return
    with st.expander(
        f"{text.plural(len(failed), 'variant')} failed", icon=":material/error:", expanded=len(failed) <= 3
    ):
        for key, reason in failed["reason"].items():
            st.markdown(f"**{text.markdown(advice.name(key))}**  \n{text.markdown(reason)}")


def _open_button(view: View, key: str, where: str) -> None:
    if st.button("How it came to be", icon=":material/description:", key=f"open {where} {key}"):
        st.session_state["chosen"] = key
        st.switch_page(view.pages["variant"])
