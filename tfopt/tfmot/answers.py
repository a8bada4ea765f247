"""Whether two forms of one model answer the same, up to rounding. For both sides of the worker."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TOLERANCE = 1e-5
#: How much more than one change of all pixels' last bits the rounding of a whole network may move its answers.
_ROUNDINGS = 16


def difference(answer: Callable[[np.ndarray], np.ndarray], images: np.ndarray, expected: np.ndarray) -> tuple:
    """(the largest difference from `expected`, the largest allowed), both absolute.

    answer: float32 images to outputs. Allowed is TOLERANCE of the largest output; more only for a network whose
    answers a change of the pixels' last bits moves by that much itself, as some of a few training steps are.
    """
    found = np.asarray(answer(images))
    nudged = np.asarray(answer(images * np.float32(1 + 2**-22)))
    rounding = _ROUNDINGS * float(np.max(np.abs(nudged - found)))
    allowed = max(TOLERANCE * max(1.0, float(np.max(np.abs(expected)))), rounding)
    return float(np.max(np.abs(found - expected))), allowed
