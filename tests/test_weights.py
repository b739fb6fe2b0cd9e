"""Weights read from files of every kind and fitted to a model, or refused in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from record_helpers import DISTILLED, refused, same, small_swin, small_vit, snapshot
from torch import nn

from record.checkpoint import save_checkpoint
from record.weights import finetune_from, load_weights, restore_model

# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("layout", ["ours", "model", "state_dict", "bare", "safetensors", "deit_script"])
def test_load_weights_reads_every_layout(tmp_path: Path, layout: str, prefix: str) -> None:
    weights = {"blocks.0.norm1.weight": torch.randn(3), "modules.x": torch.randn(2)}
    named = {prefix + name: value for name, value in weights.items()}
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pt")
    if layout == "ours":
        save_checkpoint(path, {"model": named, "optimizer": {"state": {}}})
    elif layout == "safetensors":
        safetensors.torch.save_file(named, path)
    elif layout == "deit_script":  # DeiT's script saves its flags as a Namespace
        torch.save({"model": named, "epoch": 1, "args": argparse.Namespace(lr=1e-3, output_dir="")}, path)
    else:
        torch.save({layout: named} if layout != "bare" else named, path)
    assert same(load_weights(path), weights)
    assert same(load_weights(str(path)), weights)


# Fitting weights to a model -------------------------------------------------------------------------------------------


def test_restore_model_is_exact_and_strict(tmp_path: Path) -> None:
    source, target = small_vit(seed=1), small_vit(seed=2)
    assert not same(source.state_dict(), target.state_dict())
    restore_model(target, source.state_dict(), tmp_path / "a.pt")
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"embed_dim": 64}, "cls_token is 1x1x32 here and 1x1x64 in the file"),
        ({"num_classes": 7}, "head.weight is 5x32 here and 7x32 in the file"),
        ({"depth": 1}, "blocks.1.norm1.weight is not in the file"),
        ({"depth": 3}, "blocks.2.norm1.weight is only in the file"),
    ],
)
def test_restore_model_names_the_first_difference(tmp_path: Path, change: dict[str, int], difference: str) -> None:
    model, path = small_vit(), tmp_path / "other.pt"
    before = snapshot(model)
    message = refused(lambda: restore_model(model, small_vit(seed=9, **change).state_dict(), path))
    assert f"{path} is the checkpoint of another model: {difference}; check --model" in message
    assert "--finetune" in message
    assert same(before, model.state_dict())


VIT_RESIZED = {"img_size": 64, "patch_size": 16, "num_classes": 3}


@pytest.mark.parametrize("layout", ["bare.pth", "w.safetensors"])
@pytest.mark.parametrize("change", [{}, {"img_size": 48}, {"patch_size": 4}, {"num_classes": 3}, VIT_RESIZED])
def test_finetune_vit(tmp_path: Path, layout: str, change: dict[str, int]) -> None:
    source, target = small_vit(seed=1), small_vit(seed=2, **change)
    path = tmp_path / layout
    if layout == "bare.pth":
        torch.save(source.state_dict(), path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    before, given = snapshot(target), source.state_dict()
    left = finetune_from(target, load_weights(path), path)
    after = target.state_dict()
    assert left == (["head.weight", "head.bias"] if "num_classes" in change else [])
    for name in left:
        assert torch.equal(after[name], before[name])
    resampled = set()
    for name in after.keys() - set(left):
        if after[name].shape == given[name].shape:
            assert torch.equal(after[name], given[name]), name
        else:
            resampled.add(name)
            assert not torch.equal(after[name], before[name])
    tokens_change = target.pos_embed.shape != source.pos_embed.shape
    changed = {"pos_embed": tokens_change, "patch_embed.proj.weight": "patch_size" in change}
    assert resampled == {name for name in changed if changed[name]}
    if tokens_change:  # the class token's position is not part of the grid
        assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    assert target(torch.randn(1, 3, target.patch_embed.img_size[0], target.patch_embed.img_size[0])).isfinite().all()


def test_finetune_distilled_vit(tmp_path: Path) -> None:
    source, target = small_vit(DISTILLED, seed=1), small_vit(DISTILLED, seed=2, img_size=64, num_classes=3)
    left = finetune_from(target, source.state_dict(), tmp_path / "a.pt")
    assert left == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert torch.equal(target.pos_embed[:, :2], source.pos_embed[:, :2])
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_finetune_swin(tmp_path: Path) -> None:
    source, target = small_swin(seed=1), small_swin(seed=2, img_size=64, window_size=8, num_classes=3)
    before = snapshot(target)
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert source.state_dict()[table].shape != before[table].shape
    torch.save({"model": source.state_dict()}, tmp_path / "swin.pth")
    left = finetune_from(target, load_weights(tmp_path / "swin.pth"), tmp_path / "swin.pth")
    assert left == ["head.fc.weight", "head.fc.bias"]
    after = target.state_dict()
    assert not torch.equal(after[table], before[table])
    for name, value in source.state_dict().items():
        if value.shape == after[name].shape:
            assert torch.equal(after[name], value), name
    assert target(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_finetune_drops_no_classifier_of_the_same_size(tmp_path: Path) -> None:
    source, target = small_swin(seed=1), small_swin(seed=2)
    assert finetune_from(target, source.state_dict(), tmp_path / "a.pt") == []
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize(
    ("make_source", "make_target", "difference"),
    [
        (lambda: small_vit(embed_dim=64), small_vit, "cls_token is 1x1x32 here and 1x1x64 in the file"),
        (lambda: small_vit(depth=1), small_vit, "blocks.1.norm1.weight is not in the file"),
        (lambda: small_vit(depth=3), small_vit, "blocks.2.norm1.weight is only in the file"),
        (lambda: small_vit(qkv_bias=False), small_vit, "blocks.0.attn.qkv.bias is not in the file"),
        (small_vit, lambda: small_vit(qkv_bias=False), "blocks.0.attn.qkv.bias is only in the file"),
        (lambda: small_vit(init_values=0.1), small_vit, "blocks.0.ls1.gamma is only in the file"),
        (lambda: small_vit(DISTILLED), small_vit, "pos_embed is 1x17x32 here and 1x18x32 in the file"),
        (small_vit, lambda: small_vit(DISTILLED), "dist_token is not in the file"),
        (small_swin, small_vit, "cls_token is not in the file"),
        (small_vit, lambda: small_swin(embed_dim=32), "patch_embed.norm.weight is not in the file"),
        (lambda: small_swin(depths=(1, 2)), small_swin, "layers.1.blocks.1.norm1.weight is only in the file"),
    ],
)
def test_finetune_refuses_another_model(
    tmp_path: Path, make_source: Callable[[], nn.Module], make_target: Callable[[], nn.Module], difference: str
) -> None:
    source, target = make_source(), make_target()
    before = snapshot(target)
    message = refused(lambda: finetune_from(target, source.state_dict(), tmp_path / "{a}.pt"))
    assert f"do not fit the model: {difference}" in message and "--model" in message
    assert same(before, target.state_dict())


def test_finetune_passes_over_state_that_one_side_keeps_beside_a_weight(tmp_path: Path) -> None:
    """Shadows and learned steps of quantized layers come and go with the method; the weights still fit."""
    plain, with_shadow = small_vit(seed=1), small_vit(seed=2)
    with_shadow.blocks[0].attn.qkv.register_buffer("shadow", torch.ones(96, 32))
    name = "blocks.0.attn.qkv.shadow"
    assert finetune_from(plain, with_shadow.state_dict(), tmp_path / "a.pt") == [name]
    assert finetune_from(with_shadow, small_vit(seed=3).state_dict(), tmp_path / "a.pt") == [name]
    assert torch.equal(with_shadow.blocks[0].attn.qkv.shadow, torch.ones(96, 32))
