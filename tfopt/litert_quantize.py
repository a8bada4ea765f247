"""Weight-only int8 and int4 by litert-quantizer, from a float .tflite.

Weights are stored as whole numbers with a scale for each output channel, symmetric, and an explicit DEQUANTIZE turns
them back into float32 before they are used. For activations TFLiteConverter is the tool: the static int8 of
litert-quantizer 0.11 lets the biases of channels without weights overflow.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tfopt.errors import ConversionError


def weight_only(content: bytes, bits: int) -> bytes:
    """A float .tflite's content with the weights of all operations that allow it in `bits` (8 or 4).

    Raises ConversionError where litert-quantizer is not installed or the model has no weights it can store so.
    """
    try:
        from litert_quantizer import quantizer, recipe
    except ImportError as error:
        raise ConversionError(
            f"weight{bits} needs litert-quantizer", received=error,
            next_step="Install it: pip install 'litert-quantizer>=0.11,<0.12'",
        ) from error  # fmt: skip
    rules = {8: recipe.weight_only_wi8_afp32, 4: recipe.weight_only_wi4_afp32}[bits]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32.tflite"
        path.write_bytes(content)
        try:
            return bytes(quantizer.Quantizer(str(path), rules).quantize().quantized_model)
        except (ValueError, RuntimeError) as error:
            raise ConversionError(
                "litert-quantizer refused the model",
                received=" ".join(str(error).split())[:400],
                next_step="Choose dynamic or float16",
            ) from error
