"""Packed files on a GPU: the logits of the models they are made of, bit for bit, launched kernel by kernel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import SMALL, SWIN, images_for, packed_file, trained_model
from script_helpers import ROOT
from torch import nn

from models import load_packed, save_packed

pytestmark = pytest.mark.gpu

DEIT = "{name: deit_tiny_patch16_224, img_size: 32, kwargs: {embed_dim: 64, depth: 3, num_heads: 2}}"
METHODS = ("nvfp4", "quartet", "quartet_released", "tetrajet2", "fqt", "ue5m3", "amd_mxfp4")
CHANGES = {
    "bf16": (),
    "fp8": ("carrier=fp8",),
    "e8m3, rotated": ("block_size=16", "scale_format=e8m3", "rotation={output: {size: 32, signs: fixed}}"),
    "fp32 scales": ("scale_format=fp32",),
    "fp32 outer": ("block_size=16", "scale_format=e4m3", "outer=fp32", "arithmetic=te"),
    "squares of 16": ("quantizers={q2: {block_rows: 16, block_size: 16}}",),
    "three quarters": ("scale_rule=three_quarter",),
    "weights alone": ("active=[q2]",),
    "outputs left alone": ("policy={spare: {'*.fc2': [output]}}",),
}


def made(case: str, model: str) -> tuple[nn.Module, Any]:
    if case in CHANGES:
        return trained_model(model, *(f"quant.{change}" for change in CHANGES[case]))
    return trained_model(model, config=ROOT / f"configs/methods/deit_tiny_{case}.yaml")


@pytest.mark.filterwarnings("ignore:some quantizers of this recipe have no kernel")
@pytest.mark.parametrize("model", [DEIT, SWIN], ids=["deit", "swin"])
@pytest.mark.parametrize("case", [*CHANGES, *METHODS])
@torch.no_grad()
def test_a_packed_file_keeps_the_logits(case: str, model: str, tmp_path: Path) -> None:
    net, cfg = made(case, model)
    x = images_for(cfg, 16).cuda()
    path = packed_file(tmp_path / "file.safetensors", copy.deepcopy(net), cfg)
    net, loaded = net.cuda(), load_packed(path, device="cuda")
    expected = net(x)
    assert torch.isfinite(expected).all() and expected.std() > 0
    assert torch.equal(loaded(x), expected)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(loaded(x), net(x))


@torch.no_grad()
def test_a_file_written_from_a_gpu_is_that_written_from_the_cpu(tmp_path: Path) -> None:
    for case in ("bf16", "ue5m3", "squares of 16"):
        net, cfg = made(case, SMALL)
        there = packed_file(tmp_path / "there.safetensors", copy.deepcopy(net).cuda(), cfg)
        here = packed_file(tmp_path / "here.safetensors", net, cfg)
        assert there.read_bytes() == here.read_bytes()
        save_packed(load_packed(here, device="cuda"), there)
        assert there.read_bytes() == here.read_bytes()
