"""What may be asked for, apart from the rest so that a recipe can be read without Keras."""

from __future__ import annotations

from tfopt.errors import InputError

IMPORTANCES = ("l1", "l2", "bn_scale", "fpgm", "taylor", "random")
SCOPES = ("uniform", "global")


def check_ratio(ratio: object, what: str = "ratio") -> None:
    """Raise InputError for what is no share of channels that can go."""
    if not (isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 <= ratio < 1):
        raise InputError(f"{what} is out of range", received=repr(ratio), allowed="0 to below 1")
