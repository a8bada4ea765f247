"""The names of schemes: what they say, what they allow, and that recipes take them."""

from __future__ import annotations

import pytest

from tfopt import convert, schemes
from tfopt.errors import ConversionError
from tfopt.recipe import Recipe
from tfopt.schemes import Scheme, parse


def test_every_name_is_read_back_and_fits_a_folder():
    assert {"float32", "float16", "dynamic", "weight8", "weight4", "int8", "int16x8"} <= set(schemes.ALL)
    for text, scheme in schemes.ALL.items():
        assert parse(text) == scheme and str(scheme) == text
        assert text.replace("_", "").isalnum() and text == text.lower()
    assert set(convert.SCHEMES) <= set(schemes.ALL)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8_uint8", Scheme("int8", io="uint8")), ("int8_floatio", Scheme("int8", io="float")),
        ("int8_tensor", Scheme("int8", per_tensor=True)), ("float32_sparse", Scheme("float32", sparse=True)),
        ("int8_tensor_sparse_uint8", Scheme("int8", per_tensor=True, sparse=True, io="uint8")),
        ("int16x8_floatio", Scheme("int16x8", io="float")), ("dynamic_sparse", Scheme("dynamic", sparse=True)),
    ],
)  # fmt: skip
def test_modifiers_follow_the_name(text, scheme):
    assert parse(text) == scheme


@pytest.mark.parametrize(
    ("text", "hint"),
    [("int88", "int8"), ("float23", "float32"), ("int8_unit8", "int8_uint8"), ("weight_8", "weight8"),
     ("int8_uint8_tensor", "int8_tensor_uint8"), ("float16_sparse", "float32_sparse")],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_near_ones(text, hint):
    with pytest.raises(ConversionError, match=f"no scheme of that name.*Did you mean.*{hint}"):
        convert.check_schemes(["float32", text])


@pytest.mark.parametrize(
    "wrong", [{"base": "float16", "sparse": True}, {"base": "dynamic", "per_tensor": True}, {"base": "int4"},
              {"base": "float32", "io": "uint8"}, {"base": "int16x8", "io": "uint8"}, {"base": "int8", "io": "int4"}],
)  # fmt: skip
def test_what_no_tool_makes_is_no_scheme(wrong):
    with pytest.raises(ConversionError):
        Scheme(**wrong)


def test_a_scheme_knows_its_tool_and_what_it_needs():
    assert {text for text, scheme in schemes.ALL.items() if scheme.tool == "litert-quantizer"} == {"weight8", "weight4"}
    needing = {text for text, scheme in schemes.ALL.items() if scheme.needs_calibration}
    assert needing == {text for text in schemes.ALL if text.startswith("int")}
    order = ("float32", "float16", "weight8", "dynamic", "int8", "weight4")
    tolerances = [parse(text).tolerance for text in order]
    assert tolerances == sorted(tolerances) and tolerances[:2] == [1e-5, 2e-3] and tolerances[-1] < 1


def test_a_recipe_exports_any_of_them():
    recipe = Recipe("mine", schemes=("weight8", "int8_uint8"))
    assert recipe.variants() == ("mine-weight8", "mine-int8_uint8")
    with pytest.raises(ConversionError, match="Did you mean int8_uint8"):
        Recipe("mine", schemes=("int8_unit8",))
