"""What may be asked for, apart from the rest so that a recipe can be read without Keras."""

from __future__ import annotations

from tfopt.errors import InputError

IMPORTANCES = ("l1", "l2", "bn_scale", "fpgm", "taylor", "random")
SCOPES = ("uniform", "global")
DEFAULT_RATIO = 0.3
#: Where a latency may be asked for: how files are made, and at most so many threads.
SCHEMES, _MOST_THREADS = ("float32", "int8"), 256


def check_ratio(ratio: object, what: str = "ratio", *, allowed: str = "0 to below 1") -> None:
    """Raise InputError for what is no share of channels that can go."""
    if not (isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 <= ratio < 1):
        raise InputError(f"{what} is out of range", received=repr(ratio), allowed=allowed)


def check_latency(asked) -> None:
    """Raise InputError for a budget of time that makes no sense. asked: the settings of the technique `channels`."""
    budgets = {name: getattr(asked, name) for name in ("latency", "milliseconds") if getattr(asked, name) is not None}
    of_table = [name for name in ("table", "target", "scheme", "threads") if getattr(asked, name) not in ("", 0)]
    if not budgets:
        if of_table:
            raise InputError(
                f"{of_table[0]} says where latency is measured, and none is asked for", received=of_table[0],
                allowed="with latency or milliseconds", next_step="Add latency: 0.5, or leave it out",
            )  # fmt: skip
        return
    for name, value in budgets.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value < (1 if name == "latency" else 1e9)):
            allowed = "above 0, below 1" if name == "latency" else "above 0"
            raise InputError(f"{name} is out of range", received=repr(value), allowed=allowed)
    others = {"ratio": asked.ratio is not None, "macs": asked.macs is not None, "layers": bool(asked.layers)}
    others["scope global"] = asked.scope == "global"
    given = [*budgets, *(name for name, there in others.items() if there)]
    if len(given) > 1:
        raise InputError(
            "How many channels go is said in more than one way", received=" and ".join(given), allowed="one of them",
            next_step="Leave the others out",
        )  # fmt: skip
    for name in ("table", "target", "scheme"):
        if not isinstance(getattr(asked, name), str):
            raise InputError(f"{name} is no text", received=repr(getattr(asked, name)))
    if asked.scheme not in ("", *SCHEMES):
        raise InputError("There is no latency table of that scheme", received=asked.scheme, allowed=", ".join(SCHEMES))
    threads = asked.threads
    if not isinstance(threads, int) or isinstance(threads, bool) or not 0 <= threads <= _MOST_THREADS:
        raise InputError("threads is out of range", received=repr(threads), allowed=f"1 to {_MOST_THREADS}")
