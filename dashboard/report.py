"""The whole study as one HTML file that opens without a network, and the README's table.

The page's charts read and print in light and dark: their axes take the color of the page's text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

import pandas as pd

from dashboard import advice, charts, frames, story, text
from mobile_bench import stats
from mobile_bench.files import write_bytes
from mobile_bench.store import Entry, Study, read_study

_ASSETS = Path(__file__).with_name("assets")
#: Nothing may be loaded from anywhere; 'unsafe-eval' is how Vega compiles its expressions.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
_CHART_CONFIG = {
    "background": "transparent",
    "view": {"stroke": None},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "currentColor", "titleColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.12,
        "domainColor": "currentColor", "domainOpacity": 0.4, "tickColor": "currentColor", "tickOpacity": 0.4,
        "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12,
    },
    "legend": {
        "labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal",
        "labelLimit": 220, "labelFontSize": 12,
    },
}  # fmt: skip


def write_report(study_folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a study: STUDY/report.html by default. Gives its path.

    Raises InputError where the folder is no study, or the file cannot be written.
    """
    study = read_study(study_folder)
    out = Path(out) if out else study.folder / "report.html"
    write_bytes(out, html(study).encode())
    return out


def markdown_table(study: Study | str | Path) -> str:
    """The table of a README: what was made, how accurate, how large, how fast, on the first of places()."""
    study = study if isinstance(study, Study) else read_study(study)
    frame, deadline_ms = frames.variants(study), study.record.deadline_ms
    head = ("model", "variant", "top-1 [95%]", "size", "median", "frames/s", f"meets {deadline_ms:.0f} ms", "on front")
    lines = ["| " + " | ".join(head) + " |", "|:--|:--|--:|--:|--:|--:|:-:|:-:|"]
    for row in frame.itertuples():
        cells = [_pipe(row.model), _pipe(row.variant)]
        if row.status != "ok":
            cells += [f"{row.status}: {_pipe(row.reason)}", "", "", "", "", ""]
        else:
            in_time = "" if pd.isna(row.meets) else "yes" if row.meets else "no"
            cells += [
                _top1(row), text.size(row.size_bytes), text.ms(row.median_ms), text.fps(row.fps), in_time,
                "●" if row.on_front else "",
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def html(study: Study) -> str:
    """The page. Everything that comes from a record goes through html.escape, or through _json."""
    place = next(iter(frames.places(study)), None)
    deadline_ms = study.record.deadline_ms
    frame = frames.variants(study, place, deadline_ms)
    advised = advice.recommend(frame, deadline_ms)
    chart = charts.trade_off(frame, deadline_ms, height=420)
    sections = [_variant(study, key, row, place, deadline_ms) for key, row in frame.iterrows()]
    body = [
        _header(study, frame, place),
        f'<section><h2>What to ship</h2><p class="advice">{advised.html}</p>'
        + (f'<p class="quiet">{escape(advised.caution)}</p>' if advised.caution else "")
        + "</section>",
        f"<section><h2>All variants</h2>{_table(frame, advised, deadline_ms)}</section>",
        f"<section><h2>Trade-off</h2>{_figure(chart, 'container', 'trade-off')}"
        f'<p class="quiet">{escape(charts.HOW_TO_READ)}</p></section>'
        if chart
        else "",
        f'<section class="stories"><h2>Variant by variant</h2>{"".join(sections)}</section>',
        _problems(study),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(frames.study_name(study))}</title>\n<style>{_asset('report.css')}</style></head>\n<body><main>"
        + "\n".join(body)
        + f'</main>\n<script type="application/json" id="config">{_json(_CHART_CONFIG)}</script>\n'
        + f"<script>{_bundle()}</script>\n<script>{_asset('report.js')}</script></body></html>\n"
    )


def _header(study: Study, frame: pd.DataFrame, place: frames.Place | None) -> str:
    record, data = study.record, study.record.data
    images = (data.get("images") or {}).get("test")
    facts = [
        ("Data", str(data.get("name", "unknown")) + (f", {images:,} test images" if images else "")),
        ("Source", str(data.get("source", ""))),
        ("Measured on", str(place) if place else "not measured"),
        ("Variants", frames.counted(frame)),
        ("Deadline", text.rate(record.deadline_ms)),
        ("System", str(record.machine.get("os", ""))),
        ("Made", record.created_at[:16].replace("T", " ") + (" UTC" if record.created_at else "")),
    ]
    note = (
        f'<p class="note"><strong>About the data:</strong> {escape(str(data["note"]))}</p>' if data.get("note") else ""
    )
    unfinished = (
        "" if record.finished_at else '<p class="note">The study was still being made when this was written.</p>'
    )
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts if value)
    return f"<header><h1>{escape(frames.study_name(study))}</h1>{note}{unfinished}<dl>{items}</dl></header>"


def _table(frame: pd.DataFrame, advised: advice.Advice, deadline_ms: float) -> str:
    columns = (
        ("Variant", "text"), ("Top-1", "number"), ("95% interval", "number"), ("Δ points", "number"),
        ("Size", "number"), ("Smaller", "number"), ("Median", "number"), ("p99", "number"), ("Frames/s", "number"),
        ("Frame budget", ""), ("Front", ""), ("Agrees", "number"), ("gzip", "number"),
    )  # fmt: skip
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button" data-column="{number}">{escape(name)}</button></th>'
        for number, (name, kind) in enumerate(columns)
    )
    rows = "".join(_row(key, row, advised, len(columns)) for key, row in frame.iterrows())
    says = (
        f"Frame budget: p90 as a share of {text.ms(deadline_ms)}, ✓ within it. Smaller and Δ: against the same model "
        "unoptimized."
    )
    return (
        f'<div class="scroll"><table id="variants"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="quiet">{escape(says)} ● on the Pareto front of accuracy, speed and size.</p>'
    )


def _row(key: str, row: pd.Series, advised: advice.Advice, columns: int) -> str:
    name = f'<a href="#{_anchor(key)}"><span class="model">{escape(row.model)}</span> {escape(row.variant)}</a>'
    if key in (advised.best, advised.smallest):
        name += f' <span class="badge">{"ship" if key == advised.best else "small"}</span>'
    if row.status != "ok":
        said = f'<td colspan="{columns - 1}" class="text">{escape(f"{row.status}: {row.reason}")}</td>'
        return f'<tr class="bad"><th scope="row">{name}</th>{said}</tr>'
    change = "" if row.is_baseline else text.points(row.delta_points)
    smaller = "" if row.is_baseline else text.times(row.times_smaller)
    cells = [
        _number(text.percent(row.top1), row.top1),
        _number(text.interval(row.top1_low, row.top1_high), row.top1_low),
        _number(change, row.delta_points),
        _number(text.size(row.size_bytes), row.size_bytes),
        _number(smaller, row.times_smaller),
    ]
    if pd.isna(row.median_ms):
        cells.append(f'<td colspan="4" class="text quiet">{escape(row.reason)}</td>')
    else:
        cells += [
            _number(text.ms(row.median_ms), row.median_ms),
            _number(text.ms(row.p99_ms), row.p99_ms),
            _number(text.fps(row.fps), row.fps),
            _budget(row),
        ]
    cells += [
        f'<td class="front" data-value="{int(row.on_front)}">{"●" if row.on_front else ""}</td>',
        _number(text.percent(row.agreement), row.agreement),
        _number(text.size(row.gzip_bytes), row.gzip_bytes),
    ]
    late = ' class="late"' if not pd.isna(row.meets) and not row.meets else ""
    return f'<tr{late}><th scope="row">{name}</th>{"".join(cells)}</tr>'


def _budget(row: pd.Series) -> str:
    """p90 as a share of the deadline, as a bar and in words."""
    share = row.p90_ms / row.deadline_ms
    said = f"✓ {100 * share:.2g}%" if row.meets else f"✗ {100 * share:.3g}%"
    return (
        f'<td data-value="{share:.6g}"><span class="bar"><i style="width:{min(100, 100 * share):.2f}%"></i></span>'
        f'<span class="word">{said}</span></td>'
    )


def _number(said: str, value: float) -> str:
    return f'<td class="number" data-value="{"" if pd.isna(value) else repr(float(value))}">{escape(said)}</td>'


def _variant(study: Study, key: str, row: pd.Series, place: frames.Place | None, deadline_ms: float) -> str:
    entry = frames.entry_of(study, key)
    tail = (
        row.status
        if row.status != "ok"
        else f"{text.percent(row.top1)} · {text.size(row.size_bytes)} · {text.ms(row.median_ms)}"
    )
    title = f"<summary><span>{escape(advice.name(key))}</span> <span class='quiet'>{escape(tail)}</span></summary>"
    if entry is None or entry.variant.status != "ok":
        inside = f'<p class="note">{escape(row.reason)}</p>'
    else:
        inside = _how(entry) + _latency(entry, row, place, deadline_ms) + _file(entry)
    return f'<details id="{_anchor(key)}">{title}<div>{inside}</div></details>'


def _how(entry: Entry) -> str:
    parts = [f"<h3>How it came to be</h3><p>{escape(story.summary(entry.variant))}</p>"]
    for warning in entry.variant.warnings:
        parts.append(f'<p class="note">{escape(warning)}</p>')
    for number, report in enumerate(entry.variant.steps, 1):
        parts.append(
            f"<h4>{number}. {escape(report.technique)}</h4><p>{escape(' · '.join(story.step_facts(report)))}</p>"
        )
        parts.append("".join(f'<p class="quiet">{escape(note)}</p>' for note in report.notes))
        parts.append(_pairs(story.settings(report)))
        if rows := story.by_layer(report):
            parts.append(f"<details><summary>Layer by layer</summary><div>{_rows(rows)}</div></details>")
        skipped = story.skipped(report)
        if skipped:
            said = [f"<li>{escape(reason)}: {escape(', '.join(layers))}</li>" for reason, layers in skipped]
            parts.append(f"<p>Layers left alone:</p><ul>{''.join(said)}</ul>")
    history = charts.history(frames.history_frame(entry), height=150)
    if history is not None:
        parts.append(_figure(history))
    return "".join(parts)


def _latency(entry: Entry, row: pd.Series, place: frames.Place | None, deadline_ms: float) -> str:
    measurement = frames.measurement_of(entry, place)
    if measurement is None:
        return f'<h3>Latency</h3><p class="note">{escape(row.reason)}</p>'
    summary = stats.summarize(measurement)
    pairs = [
        *story.latency_facts(measurement, summary),
        ("Timed runs", f"{summary.samples:,}"),
        ("At", measurement.started_at),
    ]
    warnings = "".join(f'<p class="note">{escape(warning)}</p>' for warning in measurement.warnings)
    picture = _figure(charts.latency(measurement, deadline_ms, height=150))
    return f"<h3>Latency</h3>{_pairs(pairs)}{warnings}{picture}"


def _file(entry: Entry) -> str:
    origin = [(name, value) for name, value in story.origin(entry) if name != "Folder"]
    floats = _rows(story.float_tensors(entry.variant))
    floats = f"<h4>Float tensors</h4>{floats}" if floats else ""
    return f"<h3>The file</h3>{_rows(story.tensors(entry.variant))}{floats}{_pairs(origin)}"


def _rows(rows: list[dict[str, str]]) -> str:
    """A table of rows with the same keys; '' for none."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    cells = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>'
    )


def _problems(study: Study) -> str:
    problems = study.damage
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f"<section><h2>Missing or damaged files</h2><ul>{items}</ul></section>"


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{items}</dl>"


def _figure(chart, width: int | str = 560, name: str = "") -> str:
    """A place for a chart, with its specification inside; report.js draws it."""
    spec = chart.properties(width=width).to_dict(validate=False)
    return f'<figure id="{name}"><script type="application/json">{_json(spec)}</script></figure>'


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and vegaEmbed as one script that sets window.vegaEmbed."""
    import vl_convert

    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _anchor(key: str) -> str:
    return "v-" + key.encode().hex()


def _pipe(value: str) -> str:
    """Text that stays in its cell of a Markdown table, as it is."""
    return escape(" ".join(value.split()), quote=False).replace("|", "\\|").replace("*", "\\*").replace("`", "\\`")


def _top1(row) -> str:
    if pd.isna(row.top1):
        return text.NONE
    return f"{text.percent(row.top1)} [{100 * row.top1_low:.2f}, {100 * row.top1_high:.2f}]"
