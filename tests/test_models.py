"""The models of the paper beside timm's, the mxfp4_ names in timm's registry, and the models of configurations."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from torch import Tensor, nn

from config import UserError, load_config
from models import ZOO, ZooModel, create_model, quantizer_table
from quantization import PRESETS, Int4Linear, QuantLinear, resolve

# The models of section 7.1: column in the tables, parameters, blocks; each block has four linear layers.
PAPER = {
    "deit_tiny_patch16_224": ("deit_tiny", 5_717_416, 12),
    "deit_small_patch16_224": ("deit_small", 22_050_664, 12),
    "deit_base_patch16_224": ("deit_base", 86_567_656, 12),
    "swin_tiny_patch4_window7_224": ("swin_tiny", 28_288_354, 12),
    "swin_small_patch4_window7_224": ("swin_small", 49_606_258, 24),
}
OF_A_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SMALL = {  # model: overrides that make it small, and the side of its images
    "deit_tiny_patch16_224": ({"embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    "deit_tiny_distilled_patch16_224": ({"embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    "swin_tiny_patch4_window7_224": ({"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}, 32),
}


def small(name: str, *overrides: str, num_classes: int = 5, seed: int = 0) -> nn.Module:
    kwargs, side = SMALL[name.removeprefix("mxfp4_")]
    given = [f"model.name={name}", f"model.img_size={side}", f"model.kwargs={kwargs}"]
    torch.manual_seed(seed)
    return create_model(load_config(overrides=[*given, *overrides]), num_classes)


def expected_names(model: nn.Module) -> list[str]:
    blocks = [name for name, _ in model.named_modules() if re.fullmatch(r"(.*\.)?blocks\.\d+", name)]
    return [f"{block}.{linear}" for block in blocks for linear in OF_A_BLOCK]


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# The zoo and timm's registry
# ---------------------------------------------------------------------------------------------------------------------


def test_the_zoo_holds_the_models_of_the_paper() -> None:
    assert {model.timm_name: model.column for model in ZOO[:5]} == {n: column for n, (column, *_) in PAPER.items()}
    # The others are the same with a distillation token.
    assert [(m.timm_name.replace("_distilled", ""), m.column) for m in ZOO[5:]] == [
        (m.timm_name, m.column) for m in ZOO[:3]
    ]


@pytest.mark.parametrize("record", ZOO, ids=lambda record: record.timm_name)
def test_a_twin_is_timms_model_but_for_the_linears_of_its_blocks(record: ZooModel) -> None:
    """At full size, without memory for the weights."""
    with torch.device("meta"):
        ours, theirs = timm.create_model(f"mxfp4_{record.timm_name}"), timm.create_model(record.timm_name)
    assert type(ours) is type(theirs)
    converted = quantized(ours)
    assert list(converted) == expected_names(theirs)
    assert len(converted) == 4 * PAPER[record.timm_name.replace("_distilled", "")][2]
    for name, module in theirs.named_modules():
        assert type(ours.get_submodule(name)) is (QuantLinear if name in converted else type(module)), name
    assert {k: (v.shape, v.dtype) for k, v in ours.named_parameters()} == {
        k: (v.shape, v.dtype) for k, v in theirs.named_parameters()
    }
    assert set(theirs.state_dict()) <= set(ours.state_dict())
    if record.timm_name in PAPER:
        assert sum(p.numel() for p in ours.parameters()) == PAPER[record.timm_name][1]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_what_is_not_quantized(name: str) -> None:
    """Patch embedding, Swin's patch merging, norms and head."""
    with torch.device("meta"):
        model = timm.create_model(f"mxfp4_{name}")
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} - quantized(model).keys()
    reductions = {f"layers.{i}.downsample.reduction" for i in (1, 2, 3)}
    assert linears == {"patch_embed.proj"} | ({"head"} if "deit" in name else {"head.fc", *reductions})


def test_timm_lists_the_names() -> None:
    names = {f"mxfp4_{model.timm_name}" for model in ZOO}
    assert set(timm.list_models("mxfp4_*")) == names
    assert all(timm.is_model(name) for name in names)
    assert not timm.is_model("mxfp4_resnet18")
    assert set(timm.list_models("*deit_tiny*")) >= {"deit_tiny_patch16_224", "mxfp4_deit_tiny_patch16_224"}
    for name in names:
        entrypoint = timm.models.model_entrypoint(name)
        assert entrypoint.__name__ == name and name.removeprefix("mxfp4_") in entrypoint.__doc__


def test_timm_makes_a_twin_with_arguments_of_timm(images: Tensor) -> None:
    model = timm.create_model(
        "mxfp4_deit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=7, depth=2, drop_path_rate=0.5
    )
    assert model(images).shape == (2, 7)
    assert model.patch_embed.grid_size == (4, 4) and model.blocks[1].drop_path1.drop_prob == 0.5
    assert {layer.recipe for layer in quantized(model).values()} == {PRESETS["tetrajet"]} and len(quantized(model)) == 8
    other = timm.create_model("mxfp4_deit_tiny_patch16_224", recipe=PRESETS["microscaling"], depth=1)
    assert {layer.recipe for layer in quantized(other).values()} == {PRESETS["microscaling"]}
    swin = timm.create_model("mxfp4_swin_tiny_patch4_window7_224", img_size=64, num_classes=3, depths=(1, 1))
    assert swin(torch.zeros(1, 3, 64, 64)).shape == (1, 3) and len(quantized(swin)) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Models of configurations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("prefix", ["", "mxfp4_"])
@pytest.mark.parametrize("quant", [["quant.scheme=none"], ["quant.scheme=mx"], ["quant.scheme=mx", "quant.active=[]"]])
def test_the_initial_weights_are_timms_at_the_same_seed(name: str, prefix: str, quant: list[str]) -> None:
    ours = small(prefix + name, *quant, seed=3)
    after = torch.rand(4)
    torch.manual_seed(3)
    kwargs, side = SMALL[name]
    theirs = timm.create_model(name, img_size=side, num_classes=5, drop_path_rate=0.1, **kwargs)
    assert torch.equal(torch.rand(4), after)  # and as many random numbers were drawn
    assert type(ours) is type(theirs)
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.named_parameters())
    assert any(not torch.equal(a, b) for a, b in zip(small(name, seed=4).parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_without_active_quantizers_the_outputs_are_timms(name: str, images: Tensor) -> None:
    reference = small(name).eval()
    expected = reference(images)
    for quant in (["quant.scheme=none"], ["quant.scheme=mx", "quant.active=[]"]):
        assert torch.equal(small(name, *quant).eval()(images), expected)
    assert not torch.equal(small(name, "quant.scheme=mx").eval()(images), expected)


@pytest.mark.parametrize("name", SMALL)
def test_everything_outside_the_blocks_is_untouched(name: str, images: Tensor) -> None:
    ours, theirs = small(name, "quant.scheme=mx").eval(), small(name).eval()
    assert torch.equal(ours.patch_embed(images), theirs.patch_embed(images))
    hidden = torch.randn(2, 4, 4, ours.num_features, generator=torch.Generator().manual_seed(1))
    hidden = hidden if "swin" in name else hidden.flatten(1, 2)
    assert torch.equal(ours.norm(hidden), theirs.norm(hidden))
    heads = [ours.forward_head(hidden), theirs.forward_head(hidden)]
    assert all(torch.equal(a, b) for a, b in zip(*[h if isinstance(h, tuple) else (h,) for h in heads], strict=True))
    block = hidden if "swin" in name else torch.randn(2, 5, ours.num_features)
    inner, outer = (m.get_submodule(expected_names(m)[-1].removesuffix(".mlp.fc2")) for m in (ours, theirs))
    assert not torch.equal(inner(block), outer(block))  # the control: inside the blocks it shows


@pytest.mark.parametrize(
    "quant",
    [
        ["quant.scheme=mx"],
        ["quant.scheme=mx", "quant.active=[q2, q5]", "quant.element.gradient=e3m0"],
        ["quant.scheme=mx", "quant.scale_rule=floor", "quant.backward_operands=original"],
    ],
)
def test_the_layers_have_the_recipe_of_the_configuration(quant: list[str]) -> None:
    model = small("swin_tiny_patch4_window7_224", *quant)
    assert list(quantized(model)) == expected_names(model) and len(quantized(model)) == 12
    assert {layer.recipe for layer in quantized(model).values()} == {resolve(load_config(overrides=quant).quant)}


@pytest.mark.parametrize(
    ("name", "overrides", "layers"),
    [
        ("deit_tiny_patch16_224", [], 0),
        ("deit_tiny_patch16_224", ["quant.scheme=mx"], 8),
        ("deit_tiny_patch16_224", ["quant.scheme=mx", "quant.active=[]"], 0),
        ("mxfp4_deit_tiny_patch16_224", [], 8),
        ("mxfp4_deit_tiny_patch16_224", ["quant.scheme=none"], 0),
    ],
)
def test_which_models_are_quantized(name: str, overrides: list[str], layers: int) -> None:
    model = small(name, *overrides)
    assert len(quantized(model)) == len(quantizer_table(model)) == layers


@pytest.mark.parametrize("name", SMALL)
def test_int4_takes_the_same_layers(name: str) -> None:
    model, mx = small(name, "quant.scheme=int4", "quant.sampling=false"), small(name, "quant.scheme=mx")
    recipe = resolve(load_config(overrides=["quant.scheme=int4", "quant.sampling=false"]).quant)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, Int4Linear)}
    assert list(layers) == list(quantized(mx)) == list(quantizer_table(model)) and not quantized(model)
    assert {layer.recipe for layer in layers.values()} == {recipe}
    assert all(torch.equal(model.get_parameter(key), value) for key, value in mx.named_parameters())


def test_the_keys_of_a_model_reach_timm(images: Tensor) -> None:
    model = small(
        "deit_tiny_patch16_224", "model.patch_size=8", "model.drop=0.25", "model.drop_path=0.5", num_classes=3
    )
    assert model.patch_embed.patch_size == (8, 8) and model.patch_embed.num_patches == 16
    assert model(images).shape == (2, 3)
    assert model.head_drop.p == 0.25
    assert model.blocks[1].drop_path1.drop_prob == 0.5 and isinstance(model.blocks[0].drop_path1, nn.Identity)
    assert small("deit_tiny_patch16_224").patch_embed.patch_size == (16, 16)  # the model's own
    assert small("swin_tiny_patch4_window7_224").patch_embed.patch_size == (4, 4)


def test_other_transformers_of_timm_are_quantized_too(images: Tensor) -> None:
    overrides = ["model.name=vit_tiny_patch16_224", "model.img_size=32", "model.kwargs={depth: 1}", "quant.scheme=mx"]
    model = create_model(load_config(overrides=overrides), 3)
    assert list(quantized(model)) == [f"blocks.0.{linear}" for linear in OF_A_BLOCK]
    assert model(images).shape == (2, 3)
    twin = create_model(load_config(overrides=["model.name=mxfp4_vit_tiny_patch16_224", *overrides[1:3]]), 3)
    assert len(quantized(twin)) == 4


def test_the_table_of_the_quantizers() -> None:
    model = small("deit_tiny_patch16_224", "quant.scheme=mx", "quant.active=[q1, q4]")
    table = quantizer_table(model)
    assert list(table) == [f"blocks.{block}.{linear}" for block in (0, 1) for linear in OF_A_BLOCK]
    assert all(
        entry
        == {
            "q1": "e2m1/truncation_free/nearest_even axis -1 block 32",
            "q4": "e2m1/truncation_free/stochastic axis 0 block 32",
            **dict.fromkeys(("q2", "q3", "q5", "q6"), "None"),
            "backward_operands": "requantized",
            "carrier": "bf16",
        }
        for entry in table.values()
    )
    assert json.loads(json.dumps(table)) == table
    assert quantizer_table(small("deit_tiny_patch16_224")) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

MODEL = "model.name="
MISTAKES = {
    "misspelt": (
        [f"{MODEL}deit_tinny_patch16_224"],
        "There is no model deit_tinny_patch16_224; did you mean deit_tiny_patch16_224?",
    ),
    "misspelt, quantized": (
        [f"{MODEL}mxfp4_deit_tinny_patch16_224"],
        "There is no model mxfp4_deit_tinny_patch16_224; did you mean mxfp4_deit_tiny_patch16_224?",
    ),
    "unlike any": ([f"{MODEL}qqqq"], "There is no model qqqq; timm.list_models() names those there are."),
    "not downloaded": (
        [f"{MODEL}hf_hub:a/b"],
        "There is no model hf_hub:a/b; timm.list_models() names those there are.",
    ),
    "no blocks": (
        [f"{MODEL}mixer_s32_224", "quant.scheme=mx"],
        "mixer_s32_224 cannot be quantized: MlpMixer has no transformer blocks with qkv, proj, fc1 and fc2",
    ),
    "argument": (
        ["model.kwargs={width: 3}"],
        "timm cannot make deit_tiny_patch16_224 with img_size=224, width=3: TypeError: VisionTransformer.__init__() "
        "got an unexpected keyword argument 'width'.",
    ),
    "heads": (
        ["model.kwargs={embed_dim: 33, num_heads: 2}"],
        "timm cannot make deit_tiny_patch16_224 with img_size=224, embed_dim=33, num_heads=2: AssertionError: dim "
        "should be divisible by num_heads.",
    ),
    "no heads": (["model.kwargs={num_heads: 0}"], "img_size=224, num_heads=0: ZeroDivisionError: "),
    "activation": (["model.kwargs={act_layer: foo}"], "img_size=224, act_layer=foo: KeyError: 'foo'."),
    "type": (["model.kwargs={depth: x}"], "with img_size=224, depth=x: TypeError: "),
    "a file that is not there": (["model.kwargs={checkpoint_path: a.pt}"], "checkpoint_path=a.pt: FileNotFoundError."),
    "no patch": (
        ["model.img_size=8"],
        "model.img_size of 8 is smaller than one patch of deit_tiny_patch16_224; see model.patch_size.",
    ),
    "channels that images have not": (
        ["model.kwargs={in_chans: 1}"],
        "model.kwargs.in_chans is 1, and images come with 3 channels, grey ones too; leave it out.",
    ),
    "less than no heads": (
        ["model.kwargs={num_heads: -1}"],
        "model.kwargs.num_heads is -1, and a block has one head at least.",
    ),
    "less than no heads in a stage": (
        ["model={name: swin_tiny_patch4_window7_224, kwargs: {num_heads: [3, 6, -12, 24]}}"],
        "model.kwargs.num_heads is [3, 6, -12, 24], and",
    ),
    "no pooling": (
        ["model.kwargs={global_pool: '', depth: 1}"],
        "deit_tiny_patch16_224 gives 1x197x5 for an image, and a score for each of 5 classes was expected; see "
        "model.kwargs.",
    ),
    "no pooling of a grid": (
        ["model.name=swin_tiny_patch4_window7_224", "model.kwargs={global_pool: ''}"],
        "swin_tiny_patch4_window7_224 gives 1x7x7x5 for an image",
    ),
    "device": (["model.kwargs={device: meta}"], "model.kwargs.device is set by run.device; use that key."),
    **{
        f"{argument} twice": (
            [f"model.kwargs={{{argument}: 8}}"],
            f"model.kwargs.{argument} is set by model.{key}; use that key.",
        )
        for argument, key in {
            "img_size": "img_size",
            "patch_size": "patch_size",
            "num_classes": "num_classes",
            "drop_rate": "drop",
            "drop_path_rate": "drop_path",
        }.items()
    },
}


@pytest.mark.parametrize(
    ("overrides", "sentence"), MISTAKES.values(), ids=[name.replace(" ", "_") for name in MISTAKES]
)
def test_a_mistake_is_named(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        create_model(load_config(overrides=overrides), 5)
    error = caught.value
    assert sentence in str(error) and str(error).endswith((".", "?")) and "\n" not in str(error)
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


def test_a_model_for_images_of_any_size_is_made_without_one() -> None:
    """It has no transformer blocks either, so in MXFP4 it is refused for that."""
    model = create_model(load_config(overrides=["model.name=resnet18"]), 5)
    assert model(torch.zeros(2, 3, 40, 40)).shape == (2, 5)
    with pytest.raises(UserError, match="resnet18 cannot be quantized: ResNet has no transformer blocks"):
        create_model(load_config(overrides=["model.name=resnet18", "quant.scheme=mx"]), 5)
