"""streamlit run dashboard/app.py -- STUDY_OR_PARENT"""

import sys
from pathlib import Path

import streamlit as st

# `streamlit run` puts this folder on the path, not the one that holds the packages.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from dashboard import shell
from dashboard.views import leaderboard, trade_off, variant, xray

st.set_page_config(page_title="tfopt", page_icon=str(Path(__file__).with_name("assets") / "icon.svg"), layout="wide")

view = shell.open_view()
pages = {
    name: st.Page(
        lambda show=show: view and show(view), title=title, icon=icon, url_path=name, default=name == "leaderboard"
    )
    for name, show, title, icon in (
        ("leaderboard", leaderboard.show, "Leaderboard", ":material/leaderboard:"),
        ("trade-off", trade_off.show, "Trade-off", ":material/scatter_plot:"),
        ("variant", variant.show, "One variant", ":material/description:"),
        ("xray", xray.show, "What runs where", ":material/account_tree:"),
    )
}
if view:
    view.pages = pages
st.navigation(list(pages.values()), position="top").run()
