"""Quantizer specs, recipes and presets, and their way from a configuration."""

import dataclasses
import itertools
import typing

import pytest

from config import UserError, iter_keys, load_config
from quantization.formats import FORMATS, SCALE_FORMATS
from quantization.layers.int4 import Int4Recipe
from quantization.recipes import PRESETS, build_recipe, resolve
from quantization.spec import LinearRecipe, QuantizerSpec
from quantization.words import QUANTIZERS, SCALE_RULES

AXES = {"q1": -1, "q2": -1, "q3": -1, "q4": 0, "q5": 0, "q6": 0}  # of the stored tensor: SPEC, section 1


def spelled_out(names, forward, backward, scale_rule, operands, xw="e2m1", gradient="e2m1"):
    """A recipe written field by field, as sections 3.2 and 3.3 of the paper describe it."""
    specs = {}
    for name in names:
        specs[name] = QuantizerSpec(
            gradient if name in ("q3", "q5") else xw,
            scale_rule,
            forward if name in ("q1", "q2") else backward,
            AXES[name],
            32,
        )
    return LinearRecipe(**specs, backward_operands=operands)


def test_defaults_of_a_quantizer_are_those_of_the_public_interface():
    spec = QuantizerSpec()
    assert dataclasses.astuple(spec)[:5] == ("e2m1", "truncation_free", "nearest_even", -1, 32)
    assert spec.plain and spec.text == "e2m1/truncation_free/nearest_even/-1/32"


def test_preset_tetrajet_is_its_definition():
    expected = spelled_out(QUANTIZERS, "nearest_even", "stochastic", "truncation_free", "requantized")
    assert PRESETS["tetrajet"] == expected == build_recipe()


def test_preset_microscaling_is_its_definition():
    expected = spelled_out(QUANTIZERS, "nearest_even", "nearest_even", "floor", "original")
    assert PRESETS["microscaling"] == expected != PRESETS["tetrajet"]


def test_preset_full_precision_has_no_quantizer():
    recipe = PRESETS["full_precision"]
    assert recipe.active == ()
    assert [getattr(recipe, name) for name in QUANTIZERS] == [None] * 6


@pytest.mark.parametrize("name", QUANTIZERS)
def test_blocks_run_along_the_contracted_dimension(name):
    """With the stored shapes X (N, D), W (C, D), G (N, C): the dimension that both operands share."""
    shapes = {"X": ("N", "D"), "W": ("C", "D"), "G": ("N", "C")}
    products = {("q1", "q2"): ("X", "W"), ("q3", "q4"): ("G", "W"), ("q5", "q6"): ("G", "X")}
    (pair, operands), *_ = [(p, o) for p, o in products.items() if name in p]
    (contracted,) = set(shapes[operands[0]]) & set(shapes[operands[1]])
    own = shapes[operands[pair.index(name)]]
    axis = getattr(build_recipe(), name).axis
    assert own[axis] == contracted
    assert own[axis - 1] != contracted  # the control: the other dimension is not the contracted one


@pytest.mark.parametrize("active", [(), ("q1",), ("q6",), ("q2", "q4"), ("q6", "q1"), QUANTIZERS])
def test_quantizers_not_named_are_off(active):
    recipe = build_recipe(active)
    assert recipe.active == tuple(sorted(active))
    assert recipe == spelled_out(active, "nearest_even", "stochastic", "truncation_free", "requantized")


def test_specs_and_recipes_are_frozen_equal_by_value_and_hashable():
    spec, recipe = QuantizerSpec(axis=0), build_recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.axis = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.q1 = None
    assert len({spec, QuantizerSpec(axis=0), QuantizerSpec(axis=-1)}) == 2
    assert len({recipe, build_recipe(), build_recipe(("q1",))}) == 2


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"element": "e4m3"}, "element must be one of e2m1, e3m0, e1m2; got 'e4m3'"),
        (
            {"scale_rule": "ceil"},
            f"scale_rule must be one of {', '.join(SCALE_RULES)}; got 'ceil'",
        ),
        ({"rounding": "nearest"}, "rounding must be one of nearest_even, nearest_away, nearest_up, stochastic"),
        ({"axis": 0.0}, "axis must be a whole number from -64 to 63; got 0.0"),
        ({"axis": None}, "axis must be a whole number from -64 to 63; got None"),
        ({"block_size": 0}, "block_size must be a whole number from 1 to 2147483647; got 0"),
        ({"block_size": -32}, "block_size must be a whole number from 1 to 2147483647; got -32"),
        ({"block_size": 32.0}, "block_size must be a whole number from 1 to 2147483647; got 32.0"),
    ],
)
def test_a_wrong_value_of_a_quantizer_is_named_with_the_right_ones(kwargs, expected):
    with pytest.raises(ValueError, match="must be") as error:
        QuantizerSpec(**kwargs)
    assert expected in str(error.value)


def test_a_wrong_value_of_a_recipe_is_named():
    with pytest.raises(ValueError, match="q3 must be a QuantizerSpec or None; got 'e2m1'"):
        LinearRecipe(q3="e2m1")
    with pytest.raises(ValueError, match="backward_operands must be one of requantized, original; got 'double'"):
        LinearRecipe(backward_operands="double")
    with pytest.raises(ValueError, match="carrier must be one of bf16, fp8; got 'fp4'"):
        LinearRecipe(carrier="fp4")
    with pytest.raises(ValueError, match=r"every entry of active must be one of q1, .*; got 'q7'"):
        build_recipe(("q1", "q7"))


def test_the_text_of_a_recipe_names_every_quantizer_once():
    text = str(build_recipe(gradient="e3m0"))
    assert all(text.count(name) == 1 for name in QUANTIZERS)
    assert "e3m0/truncation_free/stochastic" in text and text.endswith("requantized")
    assert str(PRESETS["full_precision"]) == "full_precision"
    assert "q2" not in str(build_recipe(("q1",)))
    assert str(build_recipe(carrier="fp8")) == f"{build_recipe()}, fp8"


def test_the_table_of_a_recipe_tells_different_recipes_apart():
    table = build_recipe(("q1", "q4")).table()
    assert table["q1"] == "e2m1/truncation_free/nearest_even axis -1 block 32"
    assert table["q4"] == "e2m1/truncation_free/stochastic axis 0 block 32"
    assert table["q2"] == "None" and table["backward_operands"] == "requantized"
    assert table["carrier"] == "bf16" and build_recipe(carrier="fp8").table()["carrier"] == "fp8"
    assert set(table) == {*QUANTIZERS, "backward_operands", "carrier"}


GRID = [
    {"scale_rule": rule, "backward_operands": operands, "rounding.forward": forward, "rounding.backward": backward}
    for rule, operands, forward, backward in itertools.product(
        ("truncation_free", "floor"),
        ("requantized", "original"),
        ("nearest_even", "nearest_away", "nearest_up", "stochastic"),
        ("nearest_even", "stochastic"),
    )
]


@pytest.mark.parametrize("keys", GRID, ids=lambda keys: "-".join(keys.values()))
def test_a_configuration_resolves_to_the_recipe_of_its_axes(keys):
    cfg = load_config(overrides=["quant.scheme=mx", *(f"quant.{key}={value}" for key, value in keys.items())])
    expected = spelled_out(
        QUANTIZERS,
        keys["rounding.forward"],
        keys["rounding.backward"],
        keys["scale_rule"],
        keys["backward_operands"],
    )
    assert resolve(cfg.quant) == expected
    assert expected == build_recipe(
        scale_rule=keys["scale_rule"],
        backward_operands=keys["backward_operands"],
        forward=keys["rounding.forward"],
        backward=keys["rounding.backward"],
    )


@pytest.mark.parametrize(("xw", "gradient"), list(itertools.product(("e2m1", "e3m0"), repeat=2)))
@pytest.mark.parametrize("active", [("q1", "q3"), QUANTIZERS], ids=len)
def test_a_configuration_resolves_its_elements_and_active_quantizers(xw, gradient, active):
    cfg = load_config(
        overrides=[
            "quant.scheme=mx",
            f"quant.active=[{','.join(active)}]",
            f"quant.element.activation_weight={xw}",
            f"quant.element.gradient={gradient}",
        ]
    )
    recipe = resolve(cfg.quant)
    assert recipe == build_recipe(active, activation_weight=xw, gradient=gradient)
    assert recipe == spelled_out(active, "nearest_even", "stochastic", "truncation_free", "requantized", xw, gradient)


def test_scheme_mx_without_further_keys_is_tetrajet_and_scheme_none_is_full_precision():
    assert resolve(load_config(overrides=["quant.scheme=mx"]).quant) == PRESETS["tetrajet"]
    assert resolve(load_config(overrides=["quant.scheme=none"]).quant) == PRESETS["full_precision"]
    assert resolve(load_config().quant) == PRESETS["full_precision"]


def test_a_configuration_resolves_its_carrier():
    for carrier in ("bf16", "fp8"):
        cfg = load_config(overrides=["quant.scheme=mx", f"quant.carrier={carrier}"])
        assert resolve(cfg.quant) == build_recipe(carrier=carrier)
    assert build_recipe(carrier="fp8") != PRESETS["tetrajet"] == build_recipe(carrier="bf16")


def test_int4_resolves_to_its_switches():
    quant = load_config(overrides=["quant.scheme=int4", "quant.sampling=false"]).quant
    assert resolve(quant) == Int4Recipe(hadamard=True, sampling=False, learned_step=True)


def test_a_configuration_refuses_what_a_spec_refuses():
    with pytest.raises(UserError, match="scale_rule"):
        load_config(overrides=["quant.scheme=mx", "quant.scale_rule=ceil"])


# ---------------------------------------------------------------------------------------------------------------------
# The configuration, which imports no torch, writes the same choices down again
# ---------------------------------------------------------------------------------------------------------------------


def taken_by(cls, name, values):
    """Those of `values` that a field of a spec or a recipe takes."""
    taken = set()
    for value in values:
        try:
            cls(**{name: value})
        except ValueError:
            continue
        taken.add(value)
    return taken


@pytest.mark.parametrize(
    ("key", "cls", "name"),
    [
        ("quant.element.activation_weight", QuantizerSpec, "element"),
        ("quant.element.gradient", QuantizerSpec, "element"),
        ("quant.rounding.forward", QuantizerSpec, "rounding"),
        ("quant.rounding.backward", QuantizerSpec, "rounding"),
        ("quant.scale_rule", QuantizerSpec, "scale_rule"),
        ("quant.backward_operands", LinearRecipe, "backward_operands"),
        ("quant.carrier", LinearRecipe, "carrier"),
        ("quant.weight_operand", LinearRecipe, "weight_operand"),
        ("quant.activation_operand", LinearRecipe, "activation_operand"),
        ("quant.scale_rounding", QuantizerSpec, "scale_rounding"),
        ("quant.outer", QuantizerSpec, "outer"),
        ("quant.arithmetic", QuantizerSpec, "arithmetic"),
        ("quant.scale_format", QuantizerSpec, "scale_format"),
    ],
)
def test_a_key_has_the_choices_of_its_quantizer(key, cls, name):
    choices = set(typing.get_args(dict(iter_keys())[key].annotation))
    hint = typing.get_type_hints(cls)[name]
    known = {"element": set(FORMATS), "scale_format": set(SCALE_FORMATS)}.get(name) or set(typing.get_args(hint))
    assert choices == known
    alone = {"scale_rounding": {"nearest"}, "outer": {"none"}, "arithmetic": {"exact"}}  # the rest needs other scales
    assert taken_by(cls, name, choices | known | {"another", ""}) == alone.get(name, known)


def test_the_quantizers_that_a_configuration_can_name_are_those_of_a_recipe():
    (quantizer, _) = typing.get_args(dict(iter_keys())["quant.active"].annotation)
    named = typing.get_args(quantizer)
    assert named == QUANTIZERS == tuple(f.name for f in dataclasses.fields(LinearRecipe) if f.name.startswith("q"))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_a_recipe_gives_its_quantizers_the_axes_of_their_places(axis):
    specs = {name: QuantizerSpec("e3m0", "floor", "stochastic", axis, 16) for name in QUANTIZERS}
    recipe = LinearRecipe(**specs)
    assert [getattr(recipe, name).axis for name in QUANTIZERS] == [-1, -1, -1, 0, 0, 0]
    assert {dataclasses.replace(getattr(recipe, name), axis=axis) for name in QUANTIZERS} == {specs["q1"]}
    assert dataclasses.replace(recipe, q6=QuantizerSpec()).q6.axis == 0
    assert LinearRecipe(q6=QuantizerSpec()) == LinearRecipe(q6=QuantizerSpec(axis=0))


def test_a_recipe_written_by_hand_trains_as_the_one_that_is_built():
    by_hand = LinearRecipe(
        **{
            name: QuantizerSpec(rounding="nearest_even" if name in ("q1", "q2") else "stochastic")
            for name in QUANTIZERS
        }
    )
    assert by_hand == PRESETS["tetrajet"] and hash(by_hand) == hash(PRESETS["tetrajet"])
