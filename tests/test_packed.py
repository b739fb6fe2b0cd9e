"""Packed checkpoints: the models loaded from them, their size and bytes, plain timm's reading; files refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

import models
from config import UserError, load_config
from models import create_model, load_packed, save_packed
from models.packed import pack_model, save_dequantized
from record.packed import KEY, Trained, is_packed, read_info

SMALL = "{name: deit_tiny_patch16_224, img_size: 32, kwargs: {embed_dim: 64, depth: 2, num_heads: 2}}"
SWIN = "{name: swin_tiny_patch4_window7_224, img_size: 56, kwargs: {embed_dim: 24, depths: [1, 2, 1, 1]}}"
DISTILLED = "{name: deit_tiny_distilled_patch16_224, img_size: 32, kwargs: {embed_dim: 64, depth: 1, num_heads: 2}}"
CLASSES = ("a", "b", "c")


def trained_model(model: str = SMALL, *overrides: str, classes: int = 3) -> tuple[nn.Module, Any]:
    """A model in MXFP4 as training would leave it, with shadows that change most roundings."""
    cfg = load_config(None, [f"model={model}", "quant={scheme: mx}", *overrides])
    torch.manual_seed(0)
    net = create_model(cfg, classes)
    for module in net.modules():
        if hasattr(module, "shadow"):
            module.shadow = module.weight.detach() * (1 + 0.2 * torch.randn(module.weight.shape))
    return net.eval(), cfg


def packed_file(path: Path, net: nn.Module, cfg: Any, dtype: str | None = None) -> Path:
    trained = Trained(commit="abc", top1=12.5, data_set="digits", val_split=None)
    save_packed(pack_model(net, cfg, CLASSES, 3, trained), path, dtype)
    return path


def images_for(cfg: Any, count: int = 2) -> Tensor:
    return torch.randn(count, 3, cfg.model.img_size, cfg.model.img_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_file(tmp_path_factory.mktemp("packed") / "small.safetensors", *trained_model())


@pytest.mark.parametrize("model", [SMALL, SWIN, DISTILLED], ids=["deit", "swin", "distilled"])
@torch.no_grad()
def test_a_loaded_model_computes_the_bits_of_the_trained_one(model: str, tmp_path: Path) -> None:
    net, cfg = trained_model(model)
    x = images_for(cfg)
    expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_bf16 = net(x)
    path = packed_file(tmp_path / "file.safetensors", net, cfg)
    state = torch.get_rng_state()
    loaded = load_packed(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(x), expected) and not loaded.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loaded(x), expected_bf16)
    assert not torch.equal(load_packed(path, activations="plain")(x), expected)  # the control
    save_packed(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("carrier", ["bf16", "fp8"])
@torch.no_grad()
def test_it_does_on_a_gpu(carrier: str, tmp_path: Path) -> None:
    net, cfg = trained_model(SMALL, f"quant.carrier={carrier}")
    x = images_for(cfg, 16).cuda()
    path = packed_file(tmp_path / "file.safetensors", copy.deepcopy(net), cfg)
    net, loaded = net.cuda(), load_packed(path, device="cuda")
    assert torch.equal(loaded(x), net(x))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(loaded(x), net(x))


@torch.no_grad()
def test_the_rest_in_bfloat16_is_the_trained_model_with_that_rest_rounded(tmp_path: Path) -> None:
    net, cfg = trained_model()
    x = images_for(cfg)
    quantized = {f"{name}.weight" for name, m in net.named_modules() if hasattr(m, "shadow")}
    rounded, exact = trained_model()[0], net(x)
    for name, value in rounded.named_parameters():
        if name not in quantized:
            value.copy_(value.bfloat16())
    path = packed_file(tmp_path / "file.safetensors", net, cfg, "bfloat16")
    loaded = load_packed(path)
    assert torch.equal(loaded(x), rounded(x)) and not torch.equal(loaded(x), exact)
    save_packed(loaded, tmp_path / "again.safetensors")  # stays bfloat16
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_file_says_what_it_holds(small: Path) -> None:
    info = read_info(small)
    assert info.model.name == "deit_tiny_patch16_224" and info.model.num_classes == 3 and info.classes == list(CLASSES)
    assert info.images.mean == [0.485, 0.456, 0.406] and info.images.crop_ratio == 0.875
    assert (info.trained.commit, info.trained.top1, info.trained.data_set) == ("abc", 12.5, "digits")
    assert len(info.layers) == 8 and len(info.recipes) == 1 and info.quant["scheme"] == "mx"
    assert is_packed(small) and not is_packed(small.with_suffix(".pt")) and not is_packed(small.parent)


def test_timm_makes_the_model_of_a_file(small: Path) -> None:
    x = images_for(load_config(None, [f"model={SMALL}"]))
    with torch.no_grad():
        made = timm.create_model("mxfp4_deit_tiny_patch16_224", packed=small, num_classes=3)
        assert torch.equal(made(x), load_packed(small)(x))
    with pytest.raises(UserError, match="holds deit_tiny_patch16_224, and mxfp4_deit_small_patch16_224 was asked for"):
        timm.create_model("mxfp4_deit_small_patch16_224", packed=small)
    with pytest.raises(UserError, match="was made with num_classes 3, and 10 was asked for"):
        timm.create_model("mxfp4_deit_tiny_patch16_224", packed=small, num_classes=10)


@torch.no_grad()
def test_plain_timm_loads_the_dequantized_file(small: Path, tmp_path: Path) -> None:
    arguments = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    plain = load_packed(small, activations="plain")
    x = images_for(load_config(None, [f"model={SMALL}"]), 8)
    for dtype in ("float32", "bfloat16"):
        save_dequantized(plain, tmp_path / f"{dtype}.safetensors", dtype)
    nets = {
        dtype: timm.create_model(
            "deit_tiny_patch16_224", checkpoint_path=str(tmp_path / f"{dtype}.safetensors"), **arguments
        ).eval()
        for dtype in ("float32", "bfloat16")
    }
    assert torch.equal(nets["float32"](x), plain(x))
    # bfloat16 rounds biases, norms, embeddings and head, each by a part in 256 at most; weights in MXFP4 not at all.
    error = (nets["bfloat16"](x) - plain(x)).abs().max() / plain(x).abs().max()
    assert 0 < error < 2**-6
    exported = torch.export.export(nets["float32"], (x,)).module()
    assert torch.equal(exported(x), plain(x))


@torch.no_grad()
def test_torch_export_carries_a_packed_model(small: Path) -> None:
    net, x = load_packed(small), images_for(load_config(None, [f"model={SMALL}"]))
    program = torch.export.export(net, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"mxfp4.expand.default", "mxfp4.prepare.default"} <= called
    assert torch.equal(program.module()(x), net(x))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deit_t_has_at_most_4_4_bits_a_quantized_weight(dtype: str, tmp_path: Path) -> None:
    """All that a file has because of its quantized layers: codes, scales, biases, their places in the header."""
    net, cfg = trained_model("{name: deit_tiny_patch16_224}", classes=1000)
    weights = {name: m.weight.numel() for name, m in net.named_modules() if hasattr(m, "shadow")}
    full = 4 * sum(p.numel() for p in net.parameters())
    path, names = tmp_path / "file.safetensors", tuple(f"n{n:08d}" for n in range(1000))
    save_packed(pack_model(net, cfg, names, 1000, Trained()), path, dtype)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    beside = sum(len(f'\\"{name}\\",') for name in names)
    for name, entry in header.items():
        if name.rpartition(".")[0] not in weights:
            start, end = entry["data_offsets"]
            beside += end - start + len(json.dumps({name: entry}, separators=(",", ":"))) - 1
    bits = 8 * (len(content) - beside) / sum(weights.values())
    assert 4.25 < bits <= 4.4
    assert full > 5 * len(content)


def test_deit_b_is_more_than_six_times_smaller_than_in_float32(tmp_path: Path) -> None:
    cfg = load_config(None, ["model={name: deit_base_patch16_224}", "quant={scheme: mx}"])
    with torch.device("meta"):
        net = create_model(cfg, 1000)
    parameters = dict(net.named_parameters())
    layers = {name for name, m in net.named_modules() if hasattr(m, "shadow")}
    full = sum(4 * p.numel() for p in parameters.values())
    packed = sum(p.numel() * (4.25 / 8 if n.rpartition(".")[0] in layers and p.dim() == 2 else 4) for n, p in
                 parameters.items())  # fmt: skip
    assert full / (packed + 2**16) > 6  # with a header of 64 KiB


@pytest.mark.slow
def test_a_file_of_deit_b_is(tmp_path: Path) -> None:
    net, cfg = trained_model("{name: deit_base_patch16_224}", classes=1000)
    full = sum(4 * p.numel() for p in net.parameters())
    path = tmp_path / "file.safetensors"
    save_packed(pack_model(net, cfg, (), 1000, Trained()), path)
    assert full / path.stat().st_size > 6


# ---------------------------------------------------------------------------------------------------------------------
# Broken and hostile files
# ---------------------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
LAYER = "blocks.0.attn.qkv"


def scale_255(tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    tensors[f"{LAYER}.scales"][1, 1] = 255


def huge(tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    tensors[f"{LAYER}.scales"][1] = 254
    tensors[f"{LAYER}.codes"][1] = 0x77


LIES: dict[str, tuple[Change, str]] = {
    "scale 255": (scale_255, f"{LAYER} has a block whose scale is NaN"),
    "beyond float32": (huge, f"{LAYER} has numbers beyond float32's largest"),
    "short codes": (lambda t, s: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"][:-1].clone()}), "codes is 191x32 in"),
    "scales missing": (lambda t, s: t.pop(f"{LAYER}.scales"), "scales is missing"),
    "more": (lambda t, s: t.update(extra=torch.zeros(1)), "extra has no place in"),
    "codes as numbers": (lambda t, s: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].float()}), "codes holds float32"),
    "signed codes": (lambda t, s: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].char()}), "codes holds int8"),
    "not finite": (lambda t, s: t["norm.weight"].fill_(torch.nan), "norm.weight holds values that are not finite"),
    "another dtype": (lambda t, s: t.update({"norm.weight": t["norm.weight"].half()}), "norm.weight is float16"),
    "another model": (
        lambda t, s: s["model"].update(name="deit_small_patch16_224", kwargs={}),
        "in deit_small_patch16_224",
    ),
    "another depth": (lambda t, s: s["model"]["kwargs"].update(depth=3), "blocks.2.norm1.weight is missing"),
    "no such model": (lambda t, s: s["model"].update(name="no_such_model"), "There is no model no_such_model"),
    "from the network": (
        lambda t, s: s["model"]["kwargs"].update(pretrained=True),
        "pretrained is no argument",
    ),
    "another file": (
        lambda t, s: s["model"]["kwargs"].update(checkpoint_path="/x.pth"),
        "checkpoint_path is no argument",
    ),
    "a million blocks": (
        lambda t, s: s["model"]["kwargs"].update(depth=10**6),
        "more blocks than the file has tensors",
    ),
    "a huge width": (lambda t, s: s["model"]["kwargs"].update(embed_dim=2**16), "in deit_tiny_patch16_224"),
    "an odd argument": (lambda t, s: s["model"]["kwargs"].update(no_such=1), "no_such"),
    "classes": (lambda t, s: s.update(classes=["a"]), "it names 1 classes for a model of 3"),
    "top-1": (lambda t, s: s["trained"].update(top1=1000.0), "trained.top1 is 1000.0"),
    "top-1 that is none": (lambda t, s: s["trained"].update(top1=float("nan")), "trained.top1 is nan"),
    "deviation of 0": (lambda t, s: s["images"].update(std=[0.0, 1.0, 1.0]), "images.std.0 is 0.0"),
    "a recipe": (lambda t, s: s["recipes"][0].update(q2="e9m9/floor/nearest_even/-1/32"), "element must be one of"),
    "a block size": (
        lambda t, s: s["recipes"][0].update(q1="e2m1/floor/nearest_even/-1/9999999"),
        "blocks of more than",
    ),
    "two stories": (lambda t, s: s["quant"].update(scale_rule="floor"), "is that of none of its layers"),
    "another scheme": (lambda t, s: s.update(quant={"scheme": "int4"}), "is that of none of its layers"),
    "no such scheme": (lambda t, s: s.update(quant={"scheme": "x"}), "what it says of itself is wrong"),
    "recipe 7": (lambda t, s: s["layers"].update({LAYER: 7}), f"layer {LAYER} has recipe 7, and there are 1"),
    "no such layer": (lambda t, s: s["layers"].update({"blocks.9.x": 0}), "has no linear layer blocks.9.x"),
    "a layer too few": (lambda t, s: s["layers"].pop(LAYER), f"{LAYER}.weight is missing"),
    "an unknown key": (lambda t, s: s.update(code="import os"), "code is 'import os'"),
    "a later format": (lambda t, s: s.update(format=2), "has the packed format 2, and this version reads up to 1"),
    "nothing said": (lambda t, s: s.clear(), "model is missing"),
}


def changed(source: Path, target: Path, change: Change) -> Path:
    """The file with tensors and metadata that somebody has changed."""
    with safe_open(source, framework="pt") as file:
        said = json.loads(file.metadata()[KEY])
    tensors = safetensors.torch.load_file(source)
    change(tensors, said)
    safetensors.torch.save_file(tensors, target, {KEY: json.dumps(said)})
    return target


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_gets_one_sentence(lie: str, small: Path, tmp_path: Path) -> None:
    change, said = LIES[lie]
    path = changed(small, tmp_path / "lie.safetensors", change)
    with pytest.raises(UserError) as caught:
        load_packed(path)
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and said in sentence and sentence.endswith(".") and "\n" not in sentence


def test_an_unchanged_file_is_none_of_these(small: Path, tmp_path: Path) -> None:
    load_packed(changed(small, tmp_path / "true.safetensors", lambda tensors, said: None))


def test_damage_gets_one_sentence(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "broken.safetensors"
    for broken in (
        b"",
        content[:5],
        content[:1000],
        content[:-1],
        content + b"x",
        (2**62).to_bytes(8, "little") + content[8:],
        b"\xff" * 200,
        b"PK\x03\x04" + content,
        content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="is truncated, damaged or not a packed checkpoint at all; expected a file"):
            load_packed(path)
    with pytest.raises(UserError, match="There is no packed checkpoint"):
        load_packed(tmp_path / "none.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is not a packed checkpoint; expected a file of main"):
        load_packed(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {KEY: "[" * 100_000})
    with pytest.raises(UserError, match="it is not valid JSON"):
        load_packed(path)


def test_only_safetensors_are_written(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give it a name that ends in \.safetensors"):
        save_packed(load_packed(small), tmp_path / "file.pt")
    with pytest.raises(UserError, match="its folder is no place for a file"):
        save_packed(load_packed(small), tmp_path / "none" / "file.safetensors")
    with pytest.raises(ValueError, match="activations must be one of quantized, plain"):
        load_packed(small, activations="other")
    assert "load_packed" in models.__all__
