"""Packed checkpoints of every method, and of points of the design space: the same logits and the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import SWIN, images_for, packed_file, trained_model
from quick import some
from script_helpers import ROOT
from torch import nn

from models import load_packed, save_packed
from quantization.export import packed_layers

SMALL = "{name: deit_tiny_patch16_224, img_size: 32, kwargs: {embed_dim: 48, depth: 3, num_heads: 2}}"
PAPER = {"tetrajet": "deit_tiny_tetrajet", "microscaling": "deit_tiny_microscaling"}
METHODS = ("nvfp4", "quartet", "quartet_released", "tetrajet2", "fqt", "ue5m3", "amd_mxfp4")
E4M3 = ("block_size=16", "scale_format=e4m3")
POINTS = {
    "e8m3": ("block_size=16", "scale_format=e8m3"),
    "e8m3 up, another target": ("scale_format=e8m3", "scale_rounding=up", "target=4"),
    "e4m3 alone": E4M3,
    "ue5m3_61440": ("scale_format=ue5m3_61440", "outer=pow2"),
    "fp32 scales": ("scale_format=fp32",),
    "fp32 outer, te": (*E4M3, "outer=fp32", "arithmetic=te"),
    "fp32 outer, torchao": (*E4M3, "outer=fp32", "arithmetic=torchao"),
    "torchao": (*E4M3, "arithmetic=torchao"),
    "squares of 16": ("quantizers={q2: {block_rows: 16, block_size: 16}}",),
    "squares of 16 in e8m3": ("quantizers={q2: {block_rows: 16, block_size: 16, scale_format: e8m3}}",),
    "three quarters": ("scale_rule=three_quarter",),
    "overflow-aware": ("scale_rule=overflow_aware",),
    "a correction": ("quantizers={q2: {correction: 1.25}}",),
    "a corrected fp32 outer scale": (*E4M3, "outer=fp32", "arithmetic=te", "quantizers={q2: {correction: 1.25}}"),
    "rotated": ("rotation={output: {size: 16}}",),
    "rotated, fixed signs": (*E4M3, "outer=pow2", "rotation={output: {size: 32, signs: fixed}}"),
    "rotated in the backward pass": ("rotation={grad_weight: {signs: fresh}}",),
    "e1m2": ("element={activation_weight: e1m2}", "scale_format=e8m3"),
    "delayed": (*E4M3, "outer=pow2", "outer_delay=2", "target_scale=64"),
    "the first block left alone": ("policy={first: 1}",),
    "outputs left alone": ("policy={spare: {'blocks.1.mlp.*': [output]}}",),
    "a product left alone": ("policy={spare: {'*.fc2': [grad_weight]}}",),
    "weights alone": ("active=[q2]", "scale_format=e8m3"),
}


def made(case: str, model: str = SMALL) -> tuple[nn.Module, Any]:
    if case in POINTS:
        return trained_model(model, *(f"quant.{change}" for change in POINTS[case]))
    return trained_model(model, config=ROOT / "configs" / f"{PAPER.get(case, f'methods/deit_tiny_{case}')}.yaml")


@pytest.mark.parametrize("case", some([*PAPER, *METHODS, *POINTS], every=2))
def test_every_method_keeps_its_logits_and_its_bytes(case: str, tmp_path: Path) -> None:
    layers = assert_kept(*made(case), tmp_path)
    assert len(layers) == 12 - {"the first block left alone": 4, "outputs left alone": 2, "nvfp4": 8}.get(case, 0)


@pytest.mark.parametrize("case", ["nvfp4", "rotated, fixed signs"])
def test_so_it_does_in_a_swin(case: str, tmp_path: Path) -> None:
    layers = assert_kept(*made(case, SWIN), tmp_path)
    assert len(layers) == (12 if case == "nvfp4" else 20) and "layers.1.blocks.1.attn.qkv" in layers


@torch.no_grad()
def assert_kept(net: nn.Module, cfg: Any, folder: Path) -> set[str]:
    """That a model's packed file has its logits, and is written again the same. Returns the names of packed layers."""
    path, x = folder / "file.safetensors", images_for(cfg)
    expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_bf16 = net(x)
    packed_file(path, net, cfg)
    loaded = load_packed(path)
    assert torch.equal(loaded(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loaded(x), expected_bf16)
    save_packed(loaded, folder / "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == path.read_bytes()
    assert packed_layers(loaded).keys() == packed_layers(net).keys()
    return {*packed_layers(loaded)}
