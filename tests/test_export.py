"""Packed layers: the bits of the layers they are made of, their bytes in torchao's hands, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantization import PRESETS, Int4Recipe, LinearRecipe, QuantLinear, build_recipe, convert_linears, export
from quantization.export import (
    PackedLinear,
    dequantized_state,
    pack_linears,
    pack_weight,
    packed_state,
    stored,
    unpackable,
    weight_fault,
)
from quantization.policy import Policy
from quantization.rotation import Rotation
from quantization.spec import SCALE_RULES

RECIPES = {
    "tetrajet": build_recipe(),
    "microscaling": PRESETS["microscaling"],
    "e3m0": build_recipe(activation_weight="e3m0"),
    "fp8": build_recipe(carrier="fp8"),
    "weights alone": build_recipe(("q2",)),
    "ties away": build_recipe(forward="nearest_away"),
}
SHAPES = {"whole blocks": (48, 64), "odd": (7, 45)}


def layer_of(recipe: LinearRecipe, shape: tuple[int, int] = (48, 64), shadow: bool = False) -> QuantLinear:
    """A layer with weights over many octaves; with `shadow`, one that rounds most of them another way."""
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(shape[1], shape[0]), recipe).eval()
    with torch.no_grad():
        layer.weight.mul_(torch.exp2(torch.randint(-9, 9, (shape[0], 1))))
    if shadow:
        layer.shadow = layer.weight.detach() * (1 + 0.3 * torch.randn(shape))
    return layer


def input_of(columns: int) -> Tensor:
    return 3 * torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_packed_layer_computes_the_same_bits(recipe: LinearRecipe, shape: tuple[int, int], shadow: bool) -> None:
    layer = layer_of(recipe, shape, shadow)
    packed, x = PackedLinear.from_quantized(layer), input_of(shape[1])
    with torch.no_grad():
        assert torch.equal(packed.quantized_weight(), layer.quantized_weight())
        assert torch.equal(packed(x), layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(packed(x), layer(x)) and packed(x).dtype == torch.bfloat16
        if shadow:  # the control: without the shadow it is another weight
            layer.shadow = None
            assert not torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("shadow", [False, True])
def test_fp8_carries_a_packed_weight_by_the_power_of_two_that_the_weight_had(shadow: bool) -> None:
    """Blocks below the window, which fp8 rounds, and a largest number that rounds down to another octave."""
    layer = layer_of(RECIPES["fp8"], (64, 64), shadow)
    with torch.no_grad():
        layer.weight[0, 0] = 3.4 * 2.0**14  # 3 after rounding, which alone would call for half the scale
        layer.weight[1:9] *= 2.0**-20
    if shadow:
        layer.shadow = layer.weight.detach() * 1.1
    packed, x = PackedLinear.from_quantized(layer), input_of(64)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))
    carried = packed._operand(x.flatten(0, 1), torch.float32)
    rounded = carried.values.float() * carried.factor
    assert not torch.equal(rounded, layer.quantized_weight())  # the control: there is something to get wrong
    again, _ = pack_weight(layer.quantized_weight(), layer.recipe.q2)  # the other control: Q(w) has another scale
    assert int(packed.scales.max()) - 127 == 14 and (int(again.scales.max()) - 127 == 14) == shadow


def test_activations_can_be_left_alone() -> None:
    layer, x = layer_of(RECIPES["tetrajet"]), input_of(64)
    packed = PackedLinear.from_quantized(layer, quantize_activations=False)
    with torch.no_grad():
        assert torch.equal(packed(x), torch.nn.functional.linear(x, layer.quantized_weight(), layer.bias))
        assert not torch.equal(packed(x), layer(x))
    assert "activations left alone" in repr(packed) and "alone" not in repr(PackedLinear.from_quantized(layer))


def test_a_packed_weight_has_four_and_a_quarter_bits() -> None:
    packed = PackedLinear.from_quantized(layer_of(RECIPES["tetrajet"], (96, 128)))
    assert packed.codes.nbytes + packed.scales.nbytes == 96 * 128 * 4.25 / 8
    assert {name for name, _ in packed.named_buffers()} == {"codes", "scales"}
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


def test_no_gradient_passes_and_it_is_said() -> None:
    packed = PackedLinear.from_quantized(layer_of(RECIPES["tetrajet"]))
    assert not packed(input_of(64)).requires_grad
    with pytest.raises(RuntimeError, match="a packed layer has no backward pass"):
        packed(input_of(64).requires_grad_())


def with_q2(**changes: Any) -> LinearRecipe:
    recipe = build_recipe()
    return dataclasses.replace(recipe, q2=dataclasses.replace(recipe.q2, **changes))


REFUSED = {
    "q2 off": (build_recipe(("q1",)), "its weights are not quantized in the forward pass"),
    "stochastic": (build_recipe(forward="stochastic"), "rounds stochastically"),
    "stochastic scales": (with_q2(scale_format="e4m3", scale_rounding="stochastic"), "rounds stochastically"),
    "fresh signs": (
        dataclasses.replace(build_recipe(), rotate_output=Rotation(16, "fresh")),
        "rotated with fresh signs",
    ),
    "a rotation alone": (LinearRecipe(rotate_output=Rotation(16)), "its weights are not quantized"),
    "int4": (Int4Recipe(), "is an INT4 layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_packed_form_is_named(case: str) -> None:
    recipe, reason = REFUSED[case]
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert_linears(model, recipe, ["1"])
    with pytest.raises(ValueError, match=f"^1 .*{reason}"):
        pack_linears(model)
    with pytest.raises(ValueError, match="the model has no layer with a weight in MXFP4"):
        pack_linears(nn.Sequential(nn.Linear(32, 32)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_packed(value: float) -> None:
    layer = layer_of(RECIPES["tetrajet"])
    layer.weight.data[3, 4] = value
    with pytest.raises(ValueError, match="weights that are not finite"):
        PackedLinear.from_quantized(layer)


def test_scales_that_no_export_writes_are_named() -> None:
    q2 = RECIPES["tetrajet"].q2
    weight = pack_weight(layer_of(RECIPES["tetrajet"]).weight, q2)
    assert weight_fault(weight, q2) is None
    weight.packed.scales[0, 0] = 254
    assert weight_fault(weight, q2) == "has numbers beyond float32's largest"
    weight.packed.scales[0, 0] = 255
    assert weight_fault(weight, q2) == "has a block whose scale is no number of e8m0 (code 255)"


def test_a_layer_that_two_places_share_is_packed_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert_linears(model, "tetrajet", ["0"])
    x = input_of(32)
    with torch.no_grad():
        expected = model.eval()(x)
        assert pack_linears(model) == ["0", "2"] and model[0] is model[2]
        assert torch.equal(model(x), expected)


def test_the_states_of_a_packed_model() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64))
    convert_linears(model, "tetrajet", ["0"])
    weight = model[0].quantized_weight()
    pack_linears(model)
    state = packed_state(model, torch.bfloat16)
    assert {name: value.dtype for name, value in state.items()} == {
        "0.codes": torch.uint8,
        "0.scales": torch.uint8,
        **dict.fromkeys(("0.bias", "1.weight", "1.bias"), torch.bfloat16),
    }
    plain = dequantized_state(model, torch.bfloat16)
    assert sorted(plain) == sorted(["0.weight", "0.bias", "1.weight", "1.bias"])
    assert torch.equal(plain["0.weight"].float(), weight)  # bfloat16 holds what q2 makes


@pytest.mark.parametrize("rule", ["truncation_free", "floor"])
def test_torchao_reads_codes_and_scales_as_they_are(rule: str) -> None:
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    layer = layer_of(build_recipe(scale_rule=rule), shadow=True)
    packed = PackedLinear.from_quantized(layer)
    scales = packed.scales.view(torch.float8_e8m0fnu)

    def read(codes: Tensor) -> Tensor:
        element = torch.float4_e2m1fn_x2
        options = (element, 32, torch.float32, KernelPreference.EMULATED, None, False)
        return mx_tensor.MXTensor(codes, scales, *options).dequantize(torch.float32)

    assert torch.equal(read(packed.codes), layer.quantized_weight())
    swapped = (packed.codes << 4) | (packed.codes >> 4)  # the control: the other nibble first
    assert not torch.equal(read(swapped), layer.quantized_weight())


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_its_bits_or_quantizes_no_weight(name: str, shape: tuple[int, int], shadow: bool) -> None:
    recipe = PRESETS[name]
    if name in ("full_precision", "mxfp4_tseng"):
        assert unpackable(recipe) == "its weights are not quantized in the forward pass (q2 is off)"
    else:
        assert_same_bits(layer_of(recipe, shape, shadow))


@pytest.mark.parametrize("change", [{"scale_rule": rule} for rule in SCALE_RULES] + [{"correction": 1.25}])
@pytest.mark.parametrize("which", [("q1",), ("q2",), ("q1", "q2")])
def test_every_scale_rule_keeps_its_bits(change: dict, which: tuple[str, ...]) -> None:
    recipe = build_recipe()
    specs = {name: dataclasses.replace(getattr(recipe, name), **change) for name in which}
    assert_same_bits(layer_of(dataclasses.replace(recipe, **specs)))


def assert_same_bits(layer: QuantLinear) -> None:
    packed, x = PackedLinear.from_quantized(layer), input_of(layer.in_features)
    with torch.no_grad():
        assert torch.equal(packed.quantized_weight(), layer.quantized_weight())
        assert torch.equal(packed(x), layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(packed(x), layer(x))


def test_what_codes_and_scales_cannot_say_is_refused_and_not_written_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(PRESETS["nvfp4"])
    monkeypatch.setattr(export, "stored", lambda spec: dataclasses.replace(stored(spec), element="e1m2"))
    with pytest.raises(ValueError, match="do not give each bit of its quantized weights"):
        PackedLinear.from_quantized(layer)


@pytest.mark.parametrize("held", [0.0, 0.02])
def test_a_delayed_outer_scale_is_what_training_left(held: float) -> None:
    """Of the activations' too, which no weight shows; at whichever position an evaluation is."""
    layer = layer_of(PRESETS["ue5m3"])
    layer.held.view(torch.float32).fill_(held)
    packed, x = PackedLinear.from_quantized(layer), input_of(64)
    with torch.no_grad():
        for position in (0, 1, 49, 50):
            layer.noise.seek(position)
            assert torch.equal(packed(x), layer(x))
        layer.held.view(torch.float32)[0] = 1e-6
        assert torch.equal(packed(x), layer(x)) is False  # the control: it is heard


def test_layers_of_a_policy_are_linears_where_their_output_is_left_alone() -> None:
    recipe = dataclasses.replace(build_recipe(), policy=Policy(first=1, spare=(("*.fc2", ("output",)),)))
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"mlp": mlp()}) for _ in range(3))})
    convert_linears(model, recipe)
    x, fc2 = input_of(48), model["blocks"][1]["mlp"].fc2.eval()
    expected = fc2(x).detach()
    assert pack_linears(model) == ["blocks.1.mlp.fc1", "blocks.2.mlp.fc1"]
    linear = model["blocks"][1]["mlp"].fc2
    assert type(linear) is nn.Linear and linear.weight is fc2.weight and not linear.training
    assert torch.equal(linear(x), expected)


def mlp() -> nn.Module:
    module = nn.Module()
    module.fc1, module.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)
    return module


def test_a_model_whose_weights_are_quantized_backwards_alone_has_no_packed_form() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert_linears(model, "mxfp4_tseng", ["1"])
    with pytest.raises(ValueError, match="its layers quantize in the backward pass alone"):
        pack_linears(model)
