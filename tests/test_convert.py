"""What is converted is used; a class of its own is refused; what is shared is shared; what is left is named."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from helpers import exit_code, tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import SwinTransformer, VisionTransformer

import models  # noqa: F401  registers the mxfp4_ models
from quantization import PRESETS, Int4Linear, Int4Recipe, LinearRecipe, QuantLinear, convert_linears
from quantization.layers.clock import clock_of
from quantization.layers.convert import never_called, unquantized_in_blocks

VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
READS_ITS_WEIGHTS = {  # timm's models whose attention multiplies with self.qkv.weight itself
    "beit_base_patch16_224": VIT,
    "beitv2_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": {**VIT, "img_size": 28},
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}
CALLS_THEM = {
    "deit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "vit_small_patch16_dinov3": {"img_size": 32, "depth": 1},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
    }
    | {"num_heads": [2, 2]},
}
RECIPES = [PRESETS["tetrajet"], Int4Recipe()]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("name", READS_ITS_WEIGHTS)
def test_a_layer_that_the_model_never_calls_is_refused_by_name(name, recipe):
    model = timm.create_model(name, **READS_ITS_WEIGHTS[name])
    kept = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"never calls .*blocks\.0\.attn\.qkv"):
        convert_linears(model, recipe)
    assert {n: type(m) for n, m in model.named_modules()} == kept and clock_of(model) is None
    others = [n for n in unquantized_in_blocks(model) if n.endswith(("attn.proj", "mlp.fc1", "mlp.fc2"))]
    assert convert_linears(model, recipe, others) == others


@pytest.mark.parametrize("name", CALLS_THEM)
def test_models_that_call_their_layers_convert(name):
    model = timm.create_model(name, **CALLS_THEM[name])
    modes = [m.training for m in model.modules()]
    converted = convert_linears(model, "tetrajet")
    assert converted and never_called(model, converted) == [] and unquantized_in_blocks(model) == []
    assert [m.training for m in model.modules()] == modes
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_a_run_of_such_a_model_is_a_mistake_of_the_user(tmp_path: Path, capsys, in_this_process) -> None:
    argv = tiny(tmp_path / "run", "--model", "beit_base_patch16_224", "--quant.scheme", "mx")
    assert exit_code(argv) == 2
    assert "beit_base_patch16_224 cannot be quantized: Beit never calls blocks.0.attn.qkv" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert exit_code(tiny(tmp_path / "run", "--model", "beit_base_patch16_224", "--epochs", "1")) == 0  # the control


class Own(nn.Module):
    """A model of one's own that calls `used` and reads the weight of `read`."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.read.weight)


def test_a_model_of_one_s_own_is_asked_with_the_shape_of_its_input():
    assert never_called(Own(), ["used", "read"], (2, 8)) == ["read"]
    assert never_called(Own(), ["used", "read"]) == ["read"]  # guessed
    with pytest.raises(ValueError, match="Own never calls read"):
        convert_linears(Own(), "tetrajet", ["used", "read"])


class Attending(nn.Module):
    """torch's own attention, which gives the weights of its output projection to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x)[0])


ELSEWHERE = {  # models that timm has not made, and parts of models: what to convert, what is refused
    "torch's attention": (Attending, ["attention.out_proj", "fc"], "attention.out_proj"),
    "torchvision's DeiT": (
        lambda: VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=4),
        ["encoder.layers.encoder_layer_1.self_attention.out_proj", "encoder.layers.encoder_layer_0.mlp.0"],
        "encoder.layers.encoder_layer_1.self_attention.out_proj",
    ),
    "torchvision's Swin": (
        lambda: SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=4),
        ["features.1.0.attn.qkv", "features.1.0.mlp.0"],
        "features.1.0.attn.qkv",
    ),
    "within another model": (
        lambda: nn.Sequential(timm.create_model("beit_base_patch16_224", **VIT)),
        None,
        "0.blocks.0.attn.qkv, 0.blocks.1.attn.qkv",
    ),
    "a block alone": (
        lambda: timm.create_model("beit_base_patch16_224", embed_dim=32, depth=1, num_heads=2).blocks[0],
        ["attn.qkv", "attn.proj"],
        "attn.qkv",
    ),
}


@pytest.mark.parametrize(("make", "names", "refused"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_layer_whose_weights_are_read_is_found_in_other_models_and_parts(make, names, refused):
    with pytest.raises(ValueError, match=f"never calls {re.escape(refused)}: it reads"):
        convert_linears(make(), "tetrajet", names)
    if names is not None:
        others = [name for name in names if name != refused]
        assert convert_linears(make(), "tetrajet", others) == others


class Joined(nn.Module):
    """Two layers whose weights are put together for one product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.cat([self.q.weight, self.k.weight]))


class InTraining(nn.Module):
    """A layer that is called in evaluation, and in training has its weight read."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.q.weight) if self.training else self.q(x)


@pytest.mark.parametrize(("make", "refused"), [(Joined, "q, k"), (InTraining, "q")], ids=["joined", "in training"])
def test_weights_read_in_a_list_or_in_training_alone_are_found(make, refused):
    with pytest.raises(ValueError, match=f"never calls {refused}: it reads"):
        convert_linears(make(), "tetrajet", refused.split(", "))


class OfTwo(nn.Module):
    """A model of two arguments; `strict`: the second one can be no guess."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.q, self.strict = nn.Linear(32, 32), strict

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.strict and mask.dtype != torch.bool:
            raise TypeError("a mask is boolean")
        return nn.functional.linear(x, self.q.weight) * mask


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: OfTwo(strict=False), "q"),
        (lambda: nn.MultiheadAttention(32, 2, batch_first=True), "out_proj"),
        (lambda: nn.TransformerDecoderLayer(32, 2, 64, batch_first=True), "multihead_attn.out_proj"),
    ],
    ids=["own", "attention", "decoder"],
)
def test_a_model_of_several_arguments_is_asked_too(make, name):
    with pytest.raises(ValueError, match=f"never calls {name}: it reads"):
        convert_linears(make(), "tetrajet", [name])


def test_a_hybrid_and_a_model_that_is_quantized_already_are_asked():
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1)
    names = convert_linears(hybrid, "tetrajet")
    for recipe in RECIPES:  # a warning would say that it cannot be run
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert convert_linears(hybrid, recipe) == names
    own = Own()
    convert_linears(own, "tetrajet", ["used"])
    with pytest.raises(ValueError, match="Own never calls read"):
        convert_linears(own, "tetrajet", ["used", "read"])


def test_where_nobody_can_see_whether_layers_are_called_this_is_said():
    with pytest.warns(UserWarning, match="OfTwo cannot be run on shapes alone"):
        assert convert_linears(OfTwo(strict=True), "tetrajet", ["q"]) == ["q"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_s_encoder_layer_quantizes_in_evaluation_too(wrapped):
    """Its fast path, which it takes without gradients, reads the weights itself."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1) if wrapped else nn.Sequential(layer)
    place = "layers.0" if wrapped else "0"
    convert_linears(model, "tetrajet", [f"{place}.linear1", f"{place}.linear2"])
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), expected, atol=1e-6)
        if wrapped:
            padded = model(x, src_key_padding_mask=padding)
            assert torch.allclose(padded[0], expected[0], atol=1e-6)


def test_a_layer_that_a_guessed_pass_leaves_out_is_not_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, which: str = "a") -> Tensor:
            return getattr(self, which)(x)

    assert convert_linears(Two(), "tetrajet", ["a", "b"]) == ["a", "b"]


class Modulated(nn.LayerNorm):
    """A norm that calls a linear of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale(x)


class ByLength(nn.Module):
    """Takes tokens of its own length alone, and reads its weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.second.weight)


def test_what_the_pass_leaves_out_changes_nothing_of_what_it_finds():
    """A norm is passed over only where it has no layers; a product still refuses inputs of another length."""
    model = nn.Sequential(nn.Linear(32, 32), Modulated(32))
    assert never_called(model, ["0", "1.scale"], (2, 7, 32)) == []
    assert convert_linears(model, PRESETS["tetrajet"], ["0", "1.scale"]) == ["0", "1.scale"]
    assert never_called(ByLength(), ["first", "second"]) == ["second"]
    assert never_called(ByLength(), ["first", "second"], (2, 7, 31)) == []  # which it cannot be run with


def test_a_model_is_as_it_was_after_the_pass():
    """ConViT makes tables in its first pass, and keeps them; a user's hook has not seen anything."""
    small = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4, "local_up_to_layer": 1}
    model, seen = timm.create_model("convit_tiny", **small), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    assert convert_linears(model, "tetrajet", ["blocks.0.mlp.fc1"]) == ["blocks.0.mlp.fc1"] and seen == []
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert seen == [1] and model.blocks[0].mlp.fc1.weight.grad is not None


def test_a_layer_without_a_shape_or_with_a_forward_pass_of_its_own_is_refused():
    with pytest.raises(ValueError, match="0 has no shape yet; convert after a first pass"):
        convert_linears(nn.Sequential(nn.LazyLinear(8)), "tetrajet", ["0"])
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="0 is a Linear with a forward pass of its own"):
        convert_linears(model, "tetrajet", ["0"])


# Shared layers --------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(32, 32)
        self.a, self.b, self.c = nn.Sequential(shared), nn.Sequential(shared), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("names", [["a.0"], ["b.0"], ["a.0", "b.0"]], ids="+".join)
def test_a_layer_that_two_places_share_is_converted_in_both(names, recipe):
    model = Shared()
    assert convert_linears(model, recipe, names) == ["a.0", "b.0"]
    assert isinstance(model.a[0], QuantLinear | Int4Linear) and model.a[0] is model.b[0]
    assert type(model.c) is nn.Linear
    model(torch.randn(4, 32)).sum().backward()
    assert model.a[0].weight.grad is not None


# Classes of their own -------------------------------------------------------------------------------------------------


class LoRA(nn.Linear):
    def __init__(self, *sides: int) -> None:
        super().__init__(*sides)
        self.down, self.up = nn.Parameter(torch.ones(2, sides[0])), nn.Parameter(torch.ones(sides[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that changes nothing."""


def with_buffer() -> nn.Linear:
    linear = nn.Linear(32, 32)
    linear.register_buffer("mask", torch.ones(32, 32))
    return linear


OWN = {
    "LoRA": lambda: LoRA(32, 32),
    "forward": lambda: Doubled(32, 32),
    "buffer": with_buffer,
    "parametrization": lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(32, 32)),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("kind", OWN)
def test_a_linear_with_something_of_its_own_is_refused(kind, recipe):
    model = nn.Sequential(nn.Linear(32, 32), OWN[kind]())
    with pytest.raises(ValueError, match=r"^1 is a \w+ with .* of its own, which a quantized layer would not have"):
        convert_linears(model, recipe, ["0", "1"])
    assert type(model[0]) is nn.Linear


def test_a_subclass_that_changes_nothing_is_converted_and_hooks_come_along():
    model, seen = nn.Sequential(Named(32, 32)), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    convert_linears(model, "tetrajet", ["0"])
    model(torch.randn(4, 32)).sum().backward()
    assert seen == ["forward", "backward"]


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_model_s_own_attribute_noise_stays_its_own():
    class Noisy(Own):
        noise = 0.1

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) * (1 + self.noise)

    model = Noisy()
    convert_linears(model, "tetrajet", ["used"])
    assert model.noise == 0.1 and clock_of(model) is model.used.noise
    found = []
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(4, 8)).square().sum().backward()
        found.append(clock_of(model).state.tolist())
    assert found[0] != found[1]
    other = Own()
    convert_linears(other, "tetrajet", ["used"])
    assert other.noise is clock_of(other)


def test_block_linears_that_are_left_alone_are_named():
    model = timm.create_model("pvt_v2_b0")
    convert_linears(model, "tetrajet")
    left = unquantized_in_blocks(model)
    assert {name.rsplit(".", 1)[1] for name in left} == {"q", "kv"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_name_is_a_recipe(name):
    model = Own()
    convert_linears(model, name, ["used"])
    assert model.used.recipe == PRESETS[name]
    assert QuantLinear.from_linear(nn.Linear(8, 8), name).recipe == PRESETS[name]
    made = timm.create_model("mxfp4_deit_tiny_patch16_224", recipe=name, **{**VIT, "depth": 3})
    assert made.blocks[0].attn.qkv.recipe == PRESETS[name]


def test_the_preset_of_the_other_layer_has_a_name_too():
    model = Own()
    convert_linears(model, "int4", ["used"])
    assert isinstance(model.used, Int4Linear) and model.used.recipe == Int4Recipe()
    assert Int4Linear.from_linear(nn.Linear(8, 8), "int4").recipe == Int4Recipe()
    made = timm.create_model("mxfp4_deit_tiny_patch16_224", recipe="int4", **VIT)
    assert isinstance(made.blocks[0].attn.qkv, Int4Linear)


@pytest.mark.parametrize("given", ["tetra_jet", None, 4, {"q1": None}], ids=str)
def test_what_is_no_recipe_is_refused_with_what_was_expected(given):
    for call in (
        lambda: convert_linears(Own(), given, ["used"]),
        lambda: QuantLinear.from_linear(nn.Linear(8, 8), given),
        lambda: Int4Linear.from_linear(nn.Linear(8, 8), given),
        lambda: timm.models.model_entrypoint("mxfp4_deit_tiny_patch16_224")(recipe=given, **VIT),
    ):
        with pytest.raises((TypeError, ValueError), match=r"recipe .*full_precision, tetrajet, microscaling"):
            call()


def test_the_other_layer_s_recipe_is_refused():
    with pytest.raises(TypeError, match="use Int4Linear"):
        QuantLinear.from_linear(nn.Linear(8, 8), Int4Recipe())
    with pytest.raises(TypeError, match="use QuantLinear"):
        Int4Linear.from_linear(nn.Linear(8, 8), "tetrajet")
    assert LinearRecipe() == PRESETS["full_precision"]
