"""The FP4 methods of other papers: their presets, configurations and scripts, and that a model trains by each."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import yaml
from quick import some
from script_helpers import ROOT, STUB, bash, clean_env, executable
from torch import nn

from config import UserError, load_config
from models.zoo import create_model, quantizer_table
from quantization import PRESETS, LinearRecipe, QuantizerSpec, QuantLinear, convert_linears, fake_quantize, resolve
from quantization.policy import Policy
from quantization.rotation import Rotation
from quantization.stabilizers import Plan, build_stabilizer
from quantization.words import QUANTIZERS
from results.style import NAMES, method_name, spoken

FOLDER = ROOT / "configs/methods"
PAPER = ("full_precision", "tetrajet", "microscaling")  # presets whose configurations are in configs/
METHODS = tuple(name for name in PRESETS if name not in PAPER)
MODELS = ("deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small")
SCRIPTS = ROOT / "scripts/methods"
RUNS = [f"{model}_{method}" for model in MODELS for method in METHODS]

# Quantizer by quantizer: block, scale, rounding. The table of methods, with `=` for a square block of the weight.
NV, UE = "16 e4m3 pow2", "16 ue5m3 pow2"
POINTS = {
    "nvfp4": (f"{NV} RNE", f"{NV} RNE =", f"{NV} SR", f"{NV} RNE =", f"{NV} SR", f"{NV} RNE"),
    "mxfp4_tseng": ("off", "off", *["32 three_quarter SR"] * 4),
    "quartet": ("32 rms_nearest RNE", "32 rms_nearest RNE", *["32 truncation_free RNE"] * 4),
    "quartet_released": ("32 rms_floor RNE", "32 rms_floor RNE", *["32 three_quarter SR"] * 4),
    "tetrajet2": (f"{NV} RNE", f"{NV} RNE", *[f"{NV} SR"] * 4),
    "fqt": (f"{NV} RNE", f"{NV} RNE", f"{NV} SR", f"{NV} RNE", f"{NV} SR", f"{NV} SR"),
    "ue5m3": (f"{UE} RNE", f"{UE} RNE =", f"{UE} SR", f"{UE} RNE =", f"{UE} SR", f"{UE} RNE"),
    "amd_mxfp4": ("32 even RNE", "32 even RNE =", "32 even SR", "32 even RNE =", "32 even SR", "32 even RNE"),
}
ROTATIONS = {  # of output, grad_input, grad_weight
    "nvfp4": (None, None, (16, "fixed")),
    "mxfp4_tseng": (None, (64, "fresh"), (64, "fresh")),
    "quartet": ((32, "none"), (32, "fresh"), (32, "fresh")),
    "quartet_released": ((32, "none"), (32, "fresh"), (32, "fresh")),
    "tetrajet2": (None, (16, "fresh"), (16, "fresh")),
    "fqt": (None, None, None),
    "ue5m3": (None, None, None),
    "amd_mxfp4": (None, None, (32, "fixed")),
}
REQUANTIZED = {"quartet", "quartet_released", "tetrajet2"}  # q4 and q6 read the outputs of q2 and q1
MASKED = {"quartet", "quartet_released"}  # gradients pass q1 and q2 where these have not saturated
POLICIES = {"nvfp4": Policy(last=2)}  # what stays in high precision; of the others nothing


def point(spec: QuantizerSpec | None) -> str:
    if spec is None:
        return "off"
    scale = spec.scale_rule if spec.power_of_two else f"{spec.scale_format} {spec.outer}"
    rounding = {"nearest_even": "RNE", "stochastic": "SR"}[spec.rounding]
    return f"{spec.block_size} {scale} {rounding}" + (" =" if spec.block_rows > 1 else "")


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_is_its_point_of_the_design_space(method):
    recipe = PRESETS[method]
    assert tuple(point(getattr(recipe, name)) for name in QUANTIZERS) == POINTS[method]
    rotations = (recipe.rotate_output, recipe.rotate_grad_input, recipe.rotate_grad_weight)
    assert tuple(r and (r.size, r.signs) for r in rotations) == ROTATIONS[method]
    assert recipe.chained_weight == recipe.chained_activation == (method in REQUANTIZED)
    masks = {name for name in recipe.active if getattr(recipe, name).gradient == "mask"}
    assert masks == ({"q1", "q2"} if method in MASKED else set())
    corrected = [getattr(recipe, name).correction for name in recipe.active]
    assert corrected == ([1.0] * 2 + [1.009276] * 4 if method == "quartet" else [1.0] * len(corrected))
    assert recipe.policy == POLICIES.get(method, Policy())


def test_the_presets_are_these_and_the_paper_s():
    assert set(PRESETS) == {*POINTS, *PAPER} and set(ROTATIONS) == set(POINTS)
    assert len(set(PRESETS.values())) == len(PRESETS)
    spec = PRESETS["ue5m3"].q1
    assert (spec.outer_delay, spec.target_scale, spec.scale.max) == (50, 448.0, 114688.0)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations and scripts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_a_configuration_is_the_model_s_recipe_and_the_method_s_preset(model, method):
    cfg, tetrajet = load_config(FOLDER / f"{model}_{method}.yaml"), load_config(ROOT / f"configs/{model}_tetrajet.yaml")
    assert resolve(cfg.quant) == PRESETS[method] and cfg.paper is None
    differing = {name for name in type(cfg).model_fields if getattr(cfg, name) != getattr(tetrajet, name)}
    assert differing == {"quant", "paper"}
    assert method_name(cfg) == method and spoken(method) == NAMES[method]


def test_the_folders_have_a_piece_for_each_method_and_a_file_and_a_script_for_each_model():
    """Others may be there: a user's own."""
    assert {f"{name}.yaml" for name in (*RUNS, *METHODS)} <= {p.name for p in FOLDER.iterdir()}
    assert {f"{name}.sh" for name in RUNS} <= {p.name for p in SCRIPTS.iterdir()}
    for method in METHODS:
        assert set(yaml.safe_load((FOLDER / f"{method}.yaml").read_text())) == {"quant", "stabilizer"}
    assert set(NAMES) > set(METHODS)


@pytest.mark.parametrize("name", RUNS[::7])
def test_a_script_starts_its_own_configuration(name, tmp_path: Path):
    script, record = SCRIPTS / f"{name}.sh", tmp_path / "record"
    env = clean_env(PYTHON=executable(tmp_path / "bin" / "python", STUB), RECORD=record, NPROC="1")
    result = bash(script, "--lr", "1", env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    words = record.read_text().splitlines()
    assert words[words.index("--config") + 1] == str(FOLDER / f"{name}.yaml")
    assert words[words.index("--output_dir") + 1] == str(ROOT / "runs" / name)
    assert words[-2:] == ["--lr", "1"] and os.access(script, os.X_OK)


def test_scripts_name_themselves_and_their_configuration():
    for name in RUNS:
        script = SCRIPTS / f"{name}.sh"
        text = script.read_text()
        assert f"scripts/methods/{script.name}" in text and f"configs/methods/{name}.yaml" in text
        assert f"scripts/methods/{script.name}" in (FOLDER / f"{name}.yaml").read_text()
        assert os.access(script, os.X_OK)


# ---------------------------------------------------------------------------------------------------------------------
# Keys of one quantizer, of products, of layers
# ---------------------------------------------------------------------------------------------------------------------


def quant(*overrides: str) -> LinearRecipe:
    return resolve(load_config(overrides=["quant.scheme=mx", *(f"quant.{o}" for o in overrides)]).quant)


def test_a_quantizer_has_keys_of_its_own():
    recipe = quant("block_size=16", "quantizers={q5: {rounding: nearest_up, block_size: 8}}", "scale_format=e8m3")
    assert recipe.q5 == QuantizerSpec("e2m1", rounding="nearest_up", axis=0, block_size=8, scale_format="e8m3")
    assert recipe.q4 == QuantizerSpec("e2m1", rounding="stochastic", axis=0, block_size=16, scale_format="e8m3")
    assert quant("quantizers.q1.block_rows=32").q1.block_rows == 32
    with pytest.raises(ValueError, match=r"names q1, which quant\.active does not"):
        quant("active=[q2]", "quantizers={q1: {block_size: 8}}")


def test_a_quantizer_s_own_scales_need_nothing_that_the_section_says_of_others():
    coded = ("block_size=16", "scale_format=e4m3", "target=5.5", "outer=pow2", "target_scale=256", "outer_delay=3")
    recipe = quant(*coded, "quantizers={q3: {scale_format: e8m0}, q4: {outer: none}, q5: {scale_format: e8m3}}")
    assert recipe.q3 == QuantizerSpec(rounding="stochastic", block_size=16)
    coarse = {"rounding": "stochastic", "axis": 0, "block_size": 16, "target": 5.5}
    assert recipe.q4 == QuantizerSpec(**coarse, scale_format="e4m3")
    assert recipe.q5 == QuantizerSpec(**coarse, scale_format="e8m3")
    assert recipe.q6 == QuantizerSpec(**coarse, scale_format="e4m3", outer="pow2", target_scale=256.0, outer_delay=3)
    ruled = quant(
        "scale_rule=three_quarter", "element.gradient=e1m2", *(f"quantizers.{q}.scale_rule=floor" for q in ("q3", "q5"))
    )
    assert (ruled.q3.scale_rule, ruled.q1.scale_rule) == ("floor", "three_quarter")
    assert quant("scale_rule=even", "quantizers.q2.scale_format=fp32").q2 == QuantizerSpec(scale_format="fp32")
    for own in ("{target: 4}", "{scale_format: e8m0, outer: pow2}", "{scale_rounding: up, scale_format: e8m0}"):
        with pytest.raises(ValueError, match=r"^for q2, "):
            quant(f"quantizers.q2={own}")
    with pytest.raises(ValueError, match=r"^target 5\.5 needs another scale_format"):
        quant("target=5.5", "quantizers.q6.outer=none")


def test_rotations_operands_and_the_policy_are_keys():
    recipe = quant(
        "rotation={output: {size: 8}, grad_weight: {signs: fresh}}",
        "weight_operand=original",
        "policy={first: 1, spare: {'*.fc2': [grad_weight]}}",
    )
    assert (recipe.rotate_output, recipe.rotate_grad_input, recipe.rotate_grad_weight) == (
        Rotation(8),
        None,
        Rotation(32, "fresh"),
    )
    assert not recipe.chained_weight and recipe.chained_activation
    assert recipe.policy == Policy(1, 0, (("*.fc2", ("grad_weight",)),))


def test_what_does_not_go_together_is_a_mistake_in_one_sentence():
    cfg = load_config(overrides=["quant.scheme=mx", "quant.target=4"])
    with pytest.raises(UserError, match=r"^The section quant does not fit together: target 4\.0 needs another scale"):
        create_model(cfg, num_classes=10)


def test_a_rotation_alone_is_done_too():
    small = ["model.kwargs={embed_dim: 32, depth: 1, num_heads: 2}", "model.img_size=16", "quant.scheme=mx"]
    for rotation, layers in (("{}", 0), ("{output: {size: 8}}", 4)):
        flags = [*small, "quant.active=[]", f"quant.rotation={rotation}"]
        model = create_model(load_config(overrides=flags), num_classes=10)
        assert sum(isinstance(m, QuantLinear) for m in model.modules()) == layers


def test_a_key_that_one_quantizer_does_not_have_is_answered_by_those_it_has():
    with pytest.raises(
        UserError, match=r"no key quant\.quantizers\.q1\.axis; valid keys here: arithmetic, block_rows, "
    ):
        load_config(overrides=["quant.scheme=mx", "quant.quantizers={q1: {axis: 0}}"])


class Blocks(nn.Module):
    """Linears called as those of timm's transformer blocks."""

    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()

        def block() -> nn.Module:
            mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})
            return nn.ModuleDict({"mlp": mlp})

        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["mlp"]["fc2"](torch.relu(block["mlp"]["fc1"](x)))
        return x


def converted(policy: Policy, recipe: str = "tetrajet") -> dict[str, tuple[str, ...]]:
    """The quantizers that are on, by the layer's number and name; the others are nn.Linear still."""
    model = Blocks()
    convert_linears(model, dataclasses.replace(PRESETS[recipe], policy=policy))
    return {
        name.removeprefix("blocks.").replace(".mlp", ""): m.recipe.active
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear)
    }


def test_a_policy_spares_blocks_at_both_ends():
    assert set(converted(Policy(1, 2))) == {"1.fc1", "1.fc2"}
    assert len(converted(Policy())) == 8
    assert set(converted(Policy(0, 1))) == {f"{i}.fc{j}" for i in range(3) for j in (1, 2)}
    with pytest.raises(ValueError, match="policy spares every layer"):
        converted(Policy(2, 2))
    with pytest.raises(ValueError, match="spares the first 3 and the last 2 blocks, and there are 4"):
        converted(Policy(3, 2))


def test_a_policy_spares_products_by_the_names_of_layers():
    found = converted(Policy(spare=(("*.fc2", ("grad_weight",)), ("blocks.0.*", ("output", "grad_input")))))
    assert found["3.fc2"] == ("q1", "q2", "q3", "q4") and found["3.fc1"] == QUANTIZERS
    assert found["0.fc1"] == ("q5", "q6") and "0.fc2" not in found
    with pytest.raises(ValueError, match="names layers attn, and none"):
        converted(Policy(spare=(("attn", ("output",)),)))


def test_noise_does_not_depend_on_which_layers_are_spared():
    results = []
    for policy in (Policy(), Policy(first=1)):
        torch.manual_seed(0)
        model = Blocks()
        convert_linears(model, dataclasses.replace(PRESETS["tetrajet"], policy=policy), seed=5)
        layer = model.blocks[2]["mlp"]["fc1"]
        results.append((layer.layer, layer.noise.seed))
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", some(METHODS, every=2))
def test_a_small_model_learns_by_each_method(method):
    torch.manual_seed(1)
    model = Blocks()
    convert_linears(model, PRESETS[method], seed=1)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    target = torch.roll(x, 1, dims=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("method", some(METHODS, every=2))
def test_a_compiled_layer_gives_the_bits_of_eager(method):
    torch._dynamo.reset()
    torch.manual_seed(3)
    layer = QuantLinear.from_linear(nn.Linear(64, 48), PRESETS[method])
    x = torch.randn(32, 64)
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.noise.seek(7)
        if layer.held is not None:
            layer.held.zero_()
        layer.weight.grad = None
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), layer.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_a_layer_names_all_that_it_computes(method):
    layer = QuantLinear.from_linear(nn.Linear(32, 32), PRESETS[method])
    table = layer.recipe.table()
    for name in layer.recipe.active:
        assert getattr(layer.recipe, name).scale_format in table[name] or "e8m0" not in table[name]
    for name, rotation in zip(("output", "grad_input", "grad_weight"), ROTATIONS[method], strict=True):
        assert (f"rotate_{name}" in table) == (rotation is not None)
    assert str(layer.recipe) != str(PRESETS["tetrajet"])


def test_the_manifest_says_in_what_groups_a_layer_is_rotated():
    model = nn.Sequential(nn.Linear(96, 45), nn.Linear(45, 192))
    recipe = LinearRecipe(rotate_output=Rotation(64), rotate_grad_input=Rotation(128, "fresh"))
    convert_linears(model, recipe, ["0", "1"])
    tables = quantizer_table(model)
    assert tables["0"]["rotate_output"] == "hadamard 64 signs none in groups of 32"
    assert tables["0"]["rotate_grad_input"] == "hadamard 128 signs fresh in groups of 1"  # of 45: not at all
    assert tables["1"]["rotate_grad_input"] == "hadamard 128 signs fresh in groups of 64"
    assert "rotate_grad_weight" not in tables["0"]


# ---------------------------------------------------------------------------------------------------------------------
# What reads quantized weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nvfp4", "quartet", "tetrajet2", "ue5m3", "amd_mxfp4"])
def test_the_quantized_weight_is_what_the_output_product_sees(method):
    torch.manual_seed(4)
    layer = QuantLinear.from_linear(nn.Linear(64, 48, bias=False), dataclasses.replace(PRESETS[method], q1=None))
    x = torch.randn(32, 64)
    torch.testing.assert_close(layer(x), x @ layer.quantized_weight().t(), rtol=1e-4, atol=1e-4)
    layer.shadow = layer.weight.detach() + 0.02 * torch.randn(48, 64)
    with_shadow = layer.quantized_weight()
    torch.testing.assert_close(layer(x), x @ with_shadow.t(), rtol=1e-4, atol=1e-4)
    layer.shadow = None
    assert not torch.equal(with_shadow, layer.quantized_weight())  # the control


@pytest.mark.parametrize("method", ["nvfp4", "ue5m3", "tetrajet2"])
@pytest.mark.parametrize("kind", ["qema", "qramping", "dampen", "freeze"])
def test_every_stabilizer_works_under_other_scales(kind, method):
    cfg = load_config(overrides=[f"stabilizer.kind={kind}"]).stabilizer
    model = Blocks()
    convert_linears(model, PRESETS[method], seed=1)
    plan = Plan(steps_per_epoch=4, total_steps=8)
    stabilizer = build_stabilizer(cfg, model, plan)
    for layer in stabilizer.layers.values():
        layer.weight.grad = torch.ones_like(layer.weight)
    stabilizer.after_backward(6)
    with torch.no_grad():
        for layer in stabilizer.layers.values():
            layer.weight.add_(0.01 * torch.randn(layer.weight.shape))
    stabilizer.after_step(6)
    assert all(value.isfinite().all() for value in stabilizer.figures().values())
    if kind == "freeze":
        for name in stabilizer.layers:
            code = stabilizer.state[name]["code"].abs()
            assert code.max() == 7 and len(code.unique()) == 8  # every code of e2m1 and no other


def test_freeze_and_fresh_rotations_do_not_go_together_with_rotated_weights():
    for recipe, kind, sentence in (
        ("quartet", "freeze", "rotated ones are quantized together"),
        (dataclasses.replace(PRESETS["tetrajet"], rotate_output=Rotation(8, "fresh")), "qema", "not drawn anew"),
    ):
        model = Blocks()
        convert_linears(model, recipe, seed=1)
        cfg = load_config(overrides=[f"stabilizer.kind={kind}"]).stabilizer
        with pytest.raises(ValueError, match=sentence):
            build_stabilizer(cfg, model, Plan(4, 8))


def test_q_ema_rounds_to_the_shadow_s_side_among_multiples_of_an_e4m3_scale():
    spec = QuantizerSpec(block_size=16, scale_format="e4m3")
    w = torch.tensor([[6.0, 2.4, 2.4, -2.4, 0.9] + [0.0] * 11]) * 1.125  # a scale of 9/8
    shadow = torch.tensor([[6.0, 2.6, 2.3, -2.6, 9.0] + [0.0] * 11]) * 1.125
    expected = torch.tensor([[6.0, 3.0, 2.0, -3.0, 1.0] + [0.0] * 11]) * 1.125
    assert torch.equal(fake_quantize(w, spec, shadow=shadow), expected)
    assert torch.equal(fake_quantize(w, spec, shadow=w), fake_quantize(w, spec))
    assert not torch.equal(fake_quantize(w, spec), expected)
