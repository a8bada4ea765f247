"""What a scheme of conversion is: its types, its tool, and how far its file may be from the Keras model.

| scheme  | weights | activations | calibration | input and output | tool              |
|---------|---------|-------------|-------------|------------------|-------------------|
| float32 | float32 | float32     | no          | float32          | TFLiteConverter   |
| float16 | float16 | float32     | no          | float32          | TFLiteConverter   |
| dynamic | int8    | float32     | no          | float32          | TFLiteConverter   |
| weight8 | int8    | float32     | no          | float32          | litert-quantizer  |
| weight4 | int4    | float32     | no          | float32          | litert-quantizer  |
| int8    | int8    | int8        | yes         | int8             | TFLiteConverter   |
| int16x8 | int8    | int16       | yes         | int16            | TFLiteConverter   |

dynamic computes in int8 with scales found at run time; weight8 and weight4 turn the weights back into float32 and
compute in that. Modifiers follow the name: `int8_tensor` (one scale a weight tensor, not one a channel),
`int8_sparse`, `dynamic_sparse`, `float32_sparse` (zeros of a pruned model are not stored), `int8_uint8` (uint8 in
and out), `int8_floatio` and `int16x8_floatio` (float32 in and out); `int8_tensor_sparse_uint8` has all.
"""

from __future__ import annotations

from dataclasses import dataclass

from tfopt.errors import ConversionError, unknown_name

CONVERTER, QUANTIZER = "TFLiteConverter", "litert-quantizer"

#: Largest difference from Keras over the range of Keras's outputs (0 to 1 for probabilities), fixed before measuring.
#: 8 bits divide a range into 255 steps (Jacob et al. 2018, arXiv:1712.05877, eq. 1), so that one rounding costs up to
#: 0.2% of it and 50 layers of independent ones about 1.4%; a softmax between two near classes makes several times that
#: of it. Where only weights are rounded, or activations to 16 bits: 5%. Activations to 8 bits as well: the accuracy of
#: post-training int8 stays within 2% of float (Krishnamoorthi, arXiv:1806.08342, abstract) and close to it (Nagel et
#: al., arXiv:2106.08295, abstract), while single outputs move more: 10% and 20%. One scale a weight tensor, against
#: which Krishnamoorthi advises, and 4 bits with 17 times the step, which cost accuracy even where they are trained for
#: (2% to 10%, there): 40%. A file beyond these deserves a look; the agreement of classes says what it is worth.
_TOLERANCE = {
    "float32": 1e-5, "float16": 2e-3, "dynamic": 0.1, "weight8": 0.05, "weight4": 0.4, "int8": 0.2, "int16x8": 0.05,
}  # fmt: skip
_PER_TENSOR_TOLERANCE = 0.4
_SPARSE = ("float32", "dynamic", "int8")


@dataclass(frozen=True)
class Scheme:
    """One way to store a model; raises ConversionError for a combination that does not exist.

    base: a name of the table. per_tensor: one scale a weight tensor. sparse: zeros are not stored. io: 'uint8' or
    'float' input and output in place of the base's own, or ''.
    """

    base: str
    per_tensor: bool = False
    sparse: bool = False
    io: str = ""

    def __post_init__(self):
        if self.base not in _TOLERANCE:
            raise unknown_name("scheme", str(self.base), _TOLERANCE, error=ConversionError)
        ios = {"int8": ("", "uint8", "float"), "int16x8": ("", "float")}.get(self.base, ("",))
        wrong = (self.per_tensor and self.base != "int8") or (self.sparse and self.base not in _SPARSE)
        if wrong or self.io not in ios:
            raise ConversionError(f"There is no such scheme of {self.base}", received=self.text)

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        """As in file and folder names and in recipes: 'int8_tensor_floatio'."""
        io = {"uint8": "_uint8", "float": "_floatio"}.get(self.io, self.io)
        return self.base + "_tensor" * self.per_tensor + "_sparse" * self.sparse + io

    @property
    def tool(self) -> str:
        """'TFLiteConverter' or 'litert-quantizer'."""
        return QUANTIZER if self.base in ("weight8", "weight4") else CONVERTER

    @property
    def whole_numbers(self) -> bool:
        """Whether every operation computes in whole numbers, but for the two ends of an `io` of 'float'."""
        return self.base in ("int8", "int16x8")

    @property
    def needs_calibration(self) -> bool:
        return self.whole_numbers

    @property
    def tolerance(self) -> float:
        """Largest difference of an output from Keras, as a share of the range of Keras's outputs."""
        return _PER_TENSOR_TOLERANCE if self.per_tensor else _TOLERANCE[self.base]


def _all() -> dict[str, Scheme]:
    made = [Scheme(base, sparse=sparse) for base in _TOLERANCE for sparse in (False, True)[: 1 + (base in _SPARSE)]]
    for io in ("", "uint8", "float"):
        made += [Scheme("int8", tensor, sparse, io) for tensor in (False, True) for sparse in (False, True)]
    made.append(Scheme("int16x8", io="float"))
    return {scheme.text: scheme for scheme in made}


#: text -> Scheme, all that there are.
ALL = _all()


def parse(text: str) -> Scheme:
    """'int8_uint8' -> Scheme('int8', io='uint8'). Raises ConversionError with near misses for an unknown name."""
    if text not in ALL:
        raise unknown_name("scheme", str(text), ALL, error=ConversionError)
    return ALL[text]
