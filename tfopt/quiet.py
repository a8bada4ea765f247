"""Keep the chatter of native libraries out of a person's terminal."""

from __future__ import annotations

import logging
import os
import sys
import tempfile


def native_chatter_to_log() -> None:
    """Send what C++ code writes to file descriptor 2 into a temporary file; Python's stderr stays.

    TensorFlow announces its CPU features and missing GPUs before any setting of its own is read, in
    the middle of a progress bar, and advises whoever traces several models. TFOPT_VERBOSE=1 shows it all.
    """
    if os.environ.get("TFOPT_VERBOSE"):
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="replace")
