"""Where data sets, decoded images and finished steps are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The user's cache folder for tfopt; the environment variable TFOPT_CACHE moves it."""
    return Path(os.environ.get("TFOPT_CACHE") or platformdirs.user_cache_dir("tfopt"))
