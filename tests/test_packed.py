"""Packed checkpoints: the models loaded from them, their size and bytes, plain timm's reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from packed_models import CLASSES, DISTILLED, SMALL, SWIN, images_for, packed_file, trained_model
from script_helpers import ROOT

from config import UserError, load_config
from models import create_model, load_packed, save_packed
from models.packed import pack_model, save_dequantized, stacks_of
from quantization import PRESETS
from quantization.export import packed_layers
from record.packed import Trained, is_packed, read_info


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
    assert len(packed_layers(load_packed(small))) == 8 and info.quant["scheme"] == "mx"
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


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own exporter
@torch.no_grad()
def test_the_dequantized_model_runs_as_onnx(small: Path, tmp_path: Path) -> None:
    """By ONNX's own reference, which sums in another order."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    arguments = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    plain = load_packed(small, activations="plain")
    save_dequantized(plain, tmp_path / "plain.safetensors", "float32")
    net = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(tmp_path / "plain.safetensors"), **arguments)
    x = images_for(load_config(None, [f"model={SMALL}"]), 2)
    torch.onnx.export(net.eval(), (x,), dynamo=True, verbose=False).save(str(tmp_path / "net.onnx"))
    written = onnx.load(str(tmp_path / "net.onnx"))
    onnx.checker.check_model(written)
    session = onnx.reference.ReferenceEvaluator(written)
    [logits] = session.run(None, {session.input_names[0]: x.numpy()})
    assert torch.allclose(torch.from_numpy(logits), plain(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(load_packed(small)(x), plain(x), rtol=1e-3, atol=1e-3)  # the control: other logits


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch's own reader
@pytest.mark.parametrize("config", [None, ROOT / "configs/methods/deit_tiny_ue5m3.yaml"], ids=["tetrajet", "ue5m3"])
@torch.no_grad()
def test_torch_export_carries_a_packed_model(config: Path | None, tmp_path: Path) -> None:
    """A program that is written and read again, where this package is imported for its operators."""
    net, cfg = trained_model(DISTILLED, config=config)
    net, x = load_packed(packed_file(tmp_path / "file.safetensors", net, cfg)), images_for(cfg)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"mxfp4.expand.default", "mxfp4.prepare.default"} <= called
    assert torch.equal(program.module()(x), net(x))
    assert {value.dtype for name, value in program.state_dict.items() if name.endswith("codes")} == {torch.uint8}


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deit_t_has_at_most_4_4_bits_a_quantized_weight(dtype: str, tmp_path: Path) -> None:
    """The whole file but for the numbers of other tensors; and with the quantized layers' biases, but for the names."""
    net, cfg = trained_model("{name: deit_tiny_patch16_224}", classes=1000)
    weights = {name: m.weight.numel() for name, m in net.named_modules() if hasattr(m, "shadow")}
    full = 4 * sum(p.numel() for p in net.parameters())
    path, names = tmp_path / "file.safetensors", tuple(f"n{n:08d}" for n in range(1000))
    save_packed(
        pack_model(net, cfg, names, 1000, Trained(commit="0" * 40, top1=60.0, data_set="imagenet")), path, dtype
    )
    tensors = safetensors.torch.load_file(path)
    packed = {name for name in tensors if name.endswith((".codes", ".scales"))}
    assert len(packed) == 8
    plain = sum(value.nbytes for name, value in tensors.items() if name not in packed)
    biases = sum(tensors[f"{name}.bias"].nbytes for name in weights)
    of_names = sum(len(f'\\"{name}\\",') for name in names)
    for rest in (plain, plain - biases + of_names):
        assert 4.25 < 8 * (path.stat().st_size - rest) / sum(weights.values()) <= 4.4
    assert full > 5 * path.stat().st_size


def test_the_weights_can_be_read_with_safetensors_alone(small: Path) -> None:
    """As docs/PACKED.md says."""
    with safetensors.safe_open(small, framework="pt") as file:
        said = json.loads(file.metadata()["mxfp4"])
        codes = file.get_tensor("blocks.*.attn.qkv.codes")[1]
        scales = file.get_tensor("blocks.*.attn.qkv.scales")[1]
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int()
    weight = grid[nibbles & 7] * torch.where(nibbles & 8 > 0, -1.0, 1.0)
    weight = weight * (scales.float() - 127).exp2().repeat_interleave(32, dim=1)
    assert said["quant"]["block_size"] == 32 and said["quant"]["scale_format"] == "e8m0"
    assert torch.equal(weight, load_packed(small).blocks[1].attn.qkv.quantized_weight())


def test_layers_share_a_tensor_where_they_differ_in_the_number_of_their_block_alone() -> None:
    recipe, wide, narrow = PRESETS["tetrajet"], (96, 64), (96, 32)
    layers = {f"blocks.{n}.mlp.fc1": (recipe, wide) for n in (0, 1, 3)} | {"head": (recipe, wide)}
    layers |= {f"layers.{stage}.blocks.{n}.mlp.fc1": (recipe, wide) for stage in (0, 1) for n in (0, 1)}
    layers |= {"blocks.0.mlp.fc2": (recipe, wide), "blocks.1.mlp.fc2": (recipe, narrow)}
    assert stacks_of(layers) == {
        "blocks.*.mlp.fc1": [f"blocks.{n}.mlp.fc1" for n in (0, 1, 3)],
        "head": ["head"],
        **{f"layers.{s}.blocks.*.mlp.fc1": [f"layers.{s}.blocks.{n}.mlp.fc1" for n in (0, 1)] for s in (0, 1)},
        "blocks.0.mlp.fc2": ["blocks.0.mlp.fc2"],
        "blocks.1.mlp.fc2": ["blocks.1.mlp.fc2"],
    }


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
