"""What a .tflite says about how to feed it: the InputSpec that conversion put into its metadata."""

from __future__ import annotations

import json
from pathlib import Path

from mobile_bench.errors import InputError, Problem
from mobile_bench.files import is_special
from mobile_bench.flatbuffer import read_metadata, read_model
from mobile_bench.inputs import InputSpec, override

METADATA_KEY = "tfopt"


def find_spec(tflite: str | Path, text: str = "", *, shape: tuple[int, int, int] | None = None) -> InputSpec:
    """How to feed a file: from variant.json beside it, else from its own metadata, else from `text`.

    text: what the user wrote behind --input-spec; it changes what was found. shape: (height, width,
    channels) to start from where nothing is known, and then `text` must say the scaling. Raises
    InputError where nothing does, because a guessed scaling costs accuracy without a word.
    """
    known = recorded_spec(tflite)
    if known is None and text.endswith(".json") and shape:
        return override(InputSpec(*shape), text)
    if known is None:
        says_scaling = any(part.strip().startswith(("scaling=", "mean=")) for part in text.split(","))
        if shape is None or not says_scaling:
            read_model(tflite)  # a file that is cut short says nothing, and that is then the reason
            raise InputError(
                "The file does not say how its images are scaled",
                received=tflite,
                allowed="raw (0..255), unit (0..1), signed (-1..1), torch, caffe",
                next_step="Say it with --input-spec scaling=signed (add head=logits where it has no softmax)",
            )
        known = InputSpec(*shape)
    return override(known, text) if text else known


def recorded_spec(tflite: str | Path) -> InputSpec | None:
    """The spec in variant.json beside a file, or in the file itself, or None."""
    record = Path(tflite).parent / "variant.json"
    try:
        spec = json.loads(record.read_text(encoding="utf-8")).get("spec") if record.is_file() else None
        if spec:
            return InputSpec.from_dict(spec)
        return None if is_special(tflite) else embedded_spec(Path(tflite).read_bytes())
    except (OSError, ValueError, AttributeError, Problem):
        return None


def embedded_spec(content: bytes) -> InputSpec | None:
    """The spec in a .tflite's metadata under the key 'tfopt'; None where it is absent or damaged."""
    try:
        data = read_metadata(content).get(METADATA_KEY)
        return InputSpec.from_dict(json.loads(data)) if data is not None else None
    except (ValueError, RecursionError, Problem):  # json.loads gives up on deep nesting by the second
        return None
