"""A variant's records in words, as lists that a page or the report lays out. Plain text: escape it there."""

from __future__ import annotations

from dashboard import text
from mobile_bench.records import Measurement, StepReport, Variant
from mobile_bench.stats import Summary
from mobile_bench.store import Entry

SCHEMES = {
    "float32": "exported as it is, in float32",
    "float16": "exported with weights in float16, computed in float32",
    "dynamic": "exported with int8 weights, activations quantized while it runs",
    "int8": "exported in full int8",
}

#: properties of a step that its training says already
_SAID_ELSEWHERE = ("accuracy_before_training",)


def summary(variant: Variant) -> str:
    """'3 steps, then exported in full int8.' Names nothing that a record could have spoilt."""
    exported = SCHEMES.get(variant.scheme, "exported")
    if not variant.steps:
        return f"No training step: the model as it was, {exported}."
    return f"{text.plural(len(variant.steps), 'step')}, then {exported}."


def step_facts(report: StepReport) -> list[str]:
    """What one step did: validation before and after, training, what it touched, parameters, MACs."""
    training, facts = report.training or {}, []
    before, after = training.get("accuracy_before"), training.get("accuracy_after")
    if after is not None:
        facts.append(
            f"validation {text.percent(before)} → {text.percent(after)}"
            if before is not None
            else f"validation {text.percent(after)}"
        )
    if training.get("steps"):
        facts.append(f"{training['steps']:,} training steps on {training.get('images_seen', 0):,} images")
    if training.get("stopped_early"):
        facts.append("stopped early")
    facts.append(text.plural(len(report.touched), "layer") + " changed")
    for name, old, new in (
        ("parameters", report.parameters_before, report.parameters_after),
        ("MACs", report.macs_before, report.macs_after),
    ):  # fmt: skip
        facts.append(
            f"{name} {text.count(old)} → {text.count(new)}" if old != new else f"{name} {text.count(old)}, unchanged"
        )
    facts += [
        f"{name.replace('_', ' ')} {text.setting(value)}" for name, value in report.properties.items()
        if not isinstance(value, dict) and not _is_table(value) and name not in _SAID_ELSEWHERE
    ]  # fmt: skip
    facts.append(f"{report.seconds:,.1f} s")
    return facts


def by_layer(report: StepReport) -> list[dict[str, str]]:
    """One row for each layer that the step has figures of, such as its channels before and after; [] without any."""
    known = {*report.touched, *(skip.layer for skip in report.skipped)}
    columns = {
        name: values for name, values in report.properties.items()
        if isinstance(values, dict) and values and known.issuperset(values)
    }  # fmt: skip
    layers = list(dict.fromkeys(layer for values in columns.values() for layer in values))
    return [
        {"layer": layer, **{name.replace("_", " "): _cell(name, values.get(layer)) for name, values in columns.items()}}
        for layer in layers
    ]


def _cell(name: str, value: object) -> str:
    if name == "channels" and isinstance(value, (list, tuple)):
        return " → ".join(map(str, value))
    return "" if value is None else text.setting(value)


def _is_table(value: object) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(row, dict) for row in value)


def settings(report: StepReport) -> list[tuple[str, str]]:
    """The technique's hyper-parameters, those of its training last, as 'train.NAME'; unset ones are left out."""
    own = [(name, value) for name, value in report.settings.items() if name != "train"]
    train = report.settings.get("train") or {}
    pairs = own + [(f"train.{name}", value) for name, value in (train.items() if isinstance(train, dict) else ())]
    return [(name, text.setting(value)) for name, value in pairs if value not in (None, [], (), {}, "")]


def skipped(report: StepReport) -> list[tuple[str, list[str]]]:
    """(reason, layers with their details) in the order of the reasons' first layers."""
    groups: dict[str, list[str]] = {}
    for skip in report.skipped:
        groups.setdefault(skip.reason, []).append(skip.layer + (f" ({skip.detail})" if skip.detail else ""))
    return list(groups.items())


def latency_facts(measurement: Measurement, summary: Summary) -> list[tuple[str, str]]:
    """The six numbers of a measurement."""
    return [
        ("Median", text.ms(summary.median_ms)),
        ("p90", text.ms(summary.p90_ms)),
        ("p99", text.ms(summary.p99_ms)),
        ("Load", text.ms(measurement.load_ms)),
        ("First inference", text.ms(measurement.first_inference_ms)),
        ("Peak memory", text.size(measurement.peak_rss_bytes)),
    ]


def tensors(variant: Variant) -> list[dict[str, str]]:
    """One row an input or output: side, name, shape, type, quantization."""
    return [
        {
            "side": side, "name": tensor.name, "shape": " × ".join(map(str, tensor.shape)), "type": tensor.dtype,
            "quantization": f"scale {tensor.scale:.6g}, zero point {tensor.zero_point}" if tensor.scale else "none",
        }
        for side, group in (("input", variant.inputs), ("output", variant.outputs))
        for tensor in group
    ]  # fmt: skip


def float_tensors(variant: Variant) -> list[dict[str, str]]:
    """One row for each tensor of an int8 file that is float, with the layer that it comes from."""
    return [
        {"layer": tensor["layer"] or "none named", "operation": tensor["op"], "tensor": tensor["tensor"],
         "kind": "stored" if tensor["constant"] else "computed"}
        for tensor in variant.properties.get("float_tensors", ())
    ]  # fmt: skip


def origin(entry: Entry) -> list[tuple[str, str]]:
    """Where a file comes from: its hash, date, seed, how images enter it, tools."""
    variant, spec = entry.variant, entry.variant.spec
    pairs = [
        ("SHA-256", variant.sha256),
        ("Made", variant.created_at),
        ("Seed", str(variant.seed)),
        ("Folder", str(entry.folder)),
    ]
    if spec:
        pairs.append(
            (
                "Image",
                f"{spec.height} × {spec.width} × {spec.channels}, scaling {spec.scaling}, {spec.order}, {spec.resize}",
            )
        )
        pairs.append(("Head", spec.head))
    pairs += [(name, text.setting(value)) for name, value in variant.properties.items()
              if not isinstance(value, dict) and name != "float_tensors"]  # fmt: skip
    if "float_tensors" in variant.properties:
        pairs.append(("Float tensors", str(len(variant.properties["float_tensors"]))))
    weights = variant.properties.get("weights")
    if isinstance(weights, dict):
        pairs.append(("Zeros in the file's kernels", f"{weights.get('sparsity', 0):.2%}"))
        pairs.append(("Values of a kernel, at most", f"{weights.get('most_values', 0):,}"))
        pairs.append(("Values of one output channel, at most", f"{weights.get('most_channel_values', 0):,}"))
    pairs += [(name, str(version)) for name, version in variant.tools.items()]
    return [(name, value) for name, value in pairs if value]
