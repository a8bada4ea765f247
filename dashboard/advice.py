"""What to ship, in one sentence. No streamlit here."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import pandas as pd

from dashboard import text


@dataclass(frozen=True)
class Advice:
    """best: key of the most accurate variant that meets the deadline. smallest: key of the smallest one
    that meets it within `points` of `reference`, the most accurate unoptimized model. None where there
    is no such variant. parts: the sentence, as (text, is a name) pairs. caution: what the numbers cannot
    settle, or ''.
    """

    best: str | None
    smallest: str | None
    reference: str | None
    parts: tuple[tuple[str, bool], ...]
    caution: str = ""

    @property
    def sentence(self) -> str:
        return "".join(part for part, _ in self.parts)

    @property
    def html(self) -> str:
        """The sentence with its names in bold, everything escaped."""
        return "".join(f"<strong>{escape(part)}</strong>" if name else escape(part) for part, name in self.parts)


def recommend(frame: pd.DataFrame, deadline_ms: float, points: float = 1.0) -> Advice:
    """Judge the rows of frames.variants made with this deadline. Of equally accurate ones the smaller is named."""
    measured = frame[frame["median_ms"].notna() & frame["top1"].notna()]
    if measured.empty:
        return _nothing(frame)
    in_time = measured[measured["meets"].fillna(False).astype(bool)]
    limit = text.rate(deadline_ms)
    if in_time.empty:
        fastest = measured["p90_ms"].idxmin()
        took = text.ms(measured.loc[fastest, "p90_ms"])
        return Advice(None, None, None, (
            (f"Nothing meets {limit}: the fastest is ", False), (name(fastest), True),
            (f", which needs {took} in nine runs of ten.", False),
        ))  # fmt: skip
    best = in_time.sort_values(["top1", "size_bytes"], ascending=[False, True]).index[0]
    row = measured.loc[best]
    bases = measured[measured["is_baseline"].astype(bool)]
    reference = bases["top1"].idxmax() if len(bases) else None
    smallest = None
    if reference is not None:
        near = in_time[in_time["top1"] >= bases.loc[reference, "top1"] - points / 100]
        smallest = near.sort_values(["size_bytes", "top1"], ascending=[True, False]).index[0] if len(near) else None
    among = f"the only one that meets {limit}" if len(in_time) == 1 else (
        f"the most accurate of the {len(in_time)} that meet {limit}"
    )  # fmt: skip
    parts = [("Ship ", False), (name(best), True), (f": {text.percent(row['top1'])}, {among}", False)]
    if smallest == best:
        parts.append((f", and the smallest within {in_points(points)} of the best unoptimized model.", False))
    elif smallest is not None:
        small = measured.loc[smallest]
        parts += [
            (". To save space, ", False), (name(smallest), True),
            (f": {text.size(small['size_bytes'])} instead of {text.size(row['size_bytes'])}, "
             f"{text.percent(small['top1'])}, within {in_points(points)} of the best unoptimized model.", False),
        ]  # fmt: skip
    elif reference is not None:
        parts.append(
            (f". None that meets the deadline is within {in_points(points)} of the best unoptimized model.", False)
        )
    else:
        parts.append((". The study holds no unoptimized model to compare with.", False))
    return Advice(best, smallest, reference, tuple(parts), _caution(in_time, best))


def name(key: str) -> str:
    """'resnet8/prune-int8' as it is said: 'resnet8 prune-int8'"""
    return key.replace("/", " ", 1)


def _caution(in_time: pd.DataFrame, best: str) -> str:
    inside = in_time[(in_time["top1"] >= in_time.loc[best, "top1_low"]) & (in_time.index != best)]
    if inside.empty:
        return ""
    images = text.plural(int(in_time.loc[best, "images"]), "test image")
    others = "1 other lies" if len(inside) == 1 else f"{len(inside)} others lie"
    return f"{others} inside its 95% interval: {images} cannot settle which is the more accurate, so size may decide."


def _nothing(frame: pd.DataFrame) -> Advice:
    made = int((frame["status"] == "ok").sum())
    if not made:
        failed = int(frame["status"].isin(["failed", "refused"]).sum())
        said = f"No variant is there: {failed} failed." if failed else "No variant is there yet."
    else:
        said = f"{text.plural(made, 'variant')} made, none of them measured yet, so nothing can be recommended."
    return Advice(None, None, None, ((said, False),))


def in_points(value: float) -> str:
    """'1 point', '0.5 points'"""
    return f"{value:g} point" + ("" if value == 1 else "s")
