"""Pieces that more than one page draws."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from dashboard.shell import View


def download_button(view: View, key: str, where: str) -> None:
    """Offer the variant's .tflite, where it is there."""
    row = view.frame.loc[key]
    path = Path(row["tflite"]) if row["tflite"] else None
    if path is None or not path.is_file():
        return
    st.download_button(
        "Download .tflite", lambda: path.read_bytes(), file_name=f"{row['model']}-{row['variant']}.tflite",
        mime="application/octet-stream", icon=":material/download:", on_click="ignore", key=f"download {where} {key}",
    )  # fmt: skip


def plain_chart(chart: alt.Chart | alt.LayerChart) -> None:
    st.altair_chart(chart, width="stretch", theme="streamlit")


def points_delta(row: pd.Series) -> str | None:
    """The change of top-1 as st.metric wants it: with an ASCII sign, or it draws a loss as a gain."""
    return None if row.is_baseline or pd.isna(row.delta_points) else f"{row.delta_points:+.2f} points"
