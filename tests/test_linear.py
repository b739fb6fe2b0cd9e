"""QuantLinear and convert_linears: parameters, names, counts, printing, copies, and equality with plain models."""

import copy
import itertools
from dataclasses import fields

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from quantization import PRESETS, LinearRecipe, QuantizerSpec, QuantLinear, build_recipe, convert_linears, fake_quantize
from quantization.layers.clock import NoiseClock
from quantization.layers.linear_fn import Call, QuantLinearFunction

TETRAJET = PRESETS["tetrajet"]
BLOCK_NAMES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(D=48, C=40, bias=True):
    torch.manual_seed(0)
    return nn.Linear(D, C, bias=bias)


def small_vit():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=2, num_classes=10)


def small_swin():
    """Maps of 14 x 14 and 7 x 7 tokens, shifted windows and patch merging, narrower and shallower than Swin-T."""
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(1, 2),
        num_classes=10,
        drop_path_rate=0.0,
    )


def step(model, x, autocast=False):
    """Output, input gradient and parameter gradients of one forward and backward pass."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    output.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "grad_input": x.grad, **gradients}


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


# The layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(48,), (33, 48), (2, 5, 48), (2, 3, 4, 48), (0, 48), (0, 3, 48)], ids=str)
def test_all_quantizers_off_equals_a_plain_linear_bit_for_bit(shape, bias, autocast):
    plain = linear(bias=bias)
    quant = QuantLinear.from_linear(linear(bias=bias), LinearRecipe())
    assert_equal(step(quant, normal(*shape), autocast), step(plain, normal(*shape), autocast))
    if 0 not in shape:  # the control: with quantizers on the two differ
        on = QuantLinear.from_linear(linear(bias=bias), TETRAJET)
        assert not torch.equal(on(normal(*shape)), plain(normal(*shape)))


def test_the_layer_is_the_autograd_function_on_its_own_stream():
    X, G = normal(3, 17, 48), normal(3, 17, 40, seed=1)
    layer = QuantLinear.from_linear(linear(), build_recipe(forward="stochastic"))
    layer.noise.reseed(5, 0)
    layer.layer = 6
    layer.noise.seek(4)
    W, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    expected = QuantLinearFunction.apply(X, W, b, Call(layer.jobs, 8 * 6), torch.tensor([5, 4 << 32]))
    actual = layer(X)
    actual.backward(G)
    expected.backward(G)
    assert torch.equal(actual, expected)
    assert torch.equal(layer.weight.grad, W.grad) and torch.equal(layer.bias.grad, b.grad)


@pytest.mark.parametrize("preset", ["tetrajet", "microscaling"])
@pytest.mark.parametrize("shape", [(33, 48), (2, 5, 48), (2, 3, 4, 48), (0, 48), (2, 0, 48)], ids=str)
def test_inputs_of_any_rank_and_an_empty_batch_run_forward_and_backward(shape, preset):
    layer = QuantLinear.from_linear(linear(), PRESETS[preset])
    for autocast in (False, True):
        results = step(layer, normal(*shape), autocast)
        assert results["output"].shape == (*shape[:-1], 40)
        assert results["output"].dtype == (torch.bfloat16 if autocast else torch.float32)
        assert results["grad_input"].shape == shape
        assert results["weight"].dtype == results["bias"].dtype == torch.float32


def test_a_layer_takes_over_parameters_and_mode_of_the_linear():
    plain = linear().eval()
    layer = QuantLinear.from_linear(plain, TETRAJET)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert (layer.in_features, layer.out_features, layer.training) == (48, 40, False)
    assert isinstance(layer, nn.Linear)
    assert QuantLinear.from_linear(linear(bias=False), TETRAJET).bias is None
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_only_a_linear_becomes_a_quantized_one():
    with pytest.raises(TypeError, match=r"made from an nn\.Linear; got Conv2d"):
        QuantLinear.from_linear(nn.Conv2d(3, 4, 1), TETRAJET)


def test_a_frozen_weight_gets_no_gradient_and_the_input_still_does():
    layer = QuantLinear.from_linear(linear(), TETRAJET)
    layer.noise.reseed(1, 0)
    expected = step(layer, normal(33, 48))
    layer.weight.requires_grad_(False)
    layer.noise.seek(0)
    layer.weight.grad = None
    frozen = step(layer, normal(33, 48))
    assert "weight" not in frozen
    assert torch.equal(frozen["grad_input"], expected["grad_input"])
    assert torch.equal(frozen["bias"], expected["bias"])


def test_without_grad_mode_nothing_is_recorded():
    layer = QuantLinear.from_linear(linear(), TETRAJET)
    with torch.no_grad():
        assert layer(normal(33, 48)).grad_fn is None
    assert layer(normal(33, 48)).grad_fn is not None


def test_the_quantized_weight_is_the_one_of_the_output_product():
    layer = QuantLinear.from_linear(linear(bias=False), build_recipe(("q2", "q4"), backward="nearest_even"))
    assert torch.equal(layer(torch.eye(48)).t(), layer.quantized_weight())
    assert torch.equal(layer.quantized_weight(), fake_quantize(layer.weight, QuantizerSpec()))
    plain = layer.quantized_weight()
    layer.shadow = layer.weight.detach() + 0.1 * normal(40, 48)
    assert torch.equal(layer(torch.eye(48)).t(), layer.quantized_weight())
    assert not torch.equal(layer.quantized_weight(), plain)


@pytest.mark.parametrize(
    "recipe", [build_recipe(("q1",)), build_recipe(forward="stochastic")], ids=["off", "stochastic"]
)
def test_there_is_no_quantized_weight_where_q2_is_off_or_stochastic(recipe):
    with pytest.raises(ValueError, match="no quantized value"):
        QuantLinear.from_linear(linear(), recipe).quantized_weight()


# Conversion -----------------------------------------------------------------------------------------------------------


def on_no_device(name, **kwargs):
    """The architecture without its numbers."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "img_size", "count", "left"),
    [
        ("deit_tiny_patch16_224", 32, 48, ["head"]),
        ("deit_small_patch16_224", 32, 48, ["head"]),
        ("deit_base_patch16_224", 32, 48, ["head"]),
        ("swin_tiny_patch4_window7_224", 56, 48, [f"layers.{i}.downsample.reduction" for i in (1, 2, 3)] + ["head.fc"]),
        (
            "swin_small_patch4_window7_224",
            56,
            96,
            [f"layers.{i}.downsample.reduction" for i in (1, 2, 3)] + ["head.fc"],
        ),
    ],
)
def test_the_paper_s_models_have_48_or_96_quantized_linears(name, img_size, count, left):
    model = on_no_device(name, img_size=img_size)
    kinds = {n: type(m) for n, m in model.named_modules()}
    names = convert_linears(model, TETRAJET)
    assert len(names) == len(set(names)) == count
    assert all(n.endswith(BLOCK_NAMES) and "blocks." in n for n in names)
    modules = dict(model.named_modules())
    assert [n for n, m in modules.items() if isinstance(m, QuantLinear)] == names
    assert [n for n, m in modules.items() if type(m) is nn.Linear] == left
    changed = {n for n, kind in kinds.items() if type(modules[n]) is not kind}
    assert changed == set(names)
    assert set(modules) == set(kinds)


@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_conversion_keeps_parameters_and_state_dict_and_draws_the_seed_of_its_noise(make):
    model = make()
    parameters, state_keys = dict(model.named_parameters()), list(model.state_dict())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    random_state = torch.get_rng_state()
    seed = int(torch.randint(2**32, ()))
    one_draw_later = torch.get_rng_state()
    torch.set_rng_state(random_state)
    convert_linears(model, TETRAJET)
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert list(model.state_dict()) == state_keys
    assert torch.equal(torch.get_rng_state(), one_draw_later) and model.noise.seed == seed
    plain = make()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(make().state_dict())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_a_converted_model_with_all_quantizers_off_equals_the_plain_one_bit_for_bit(make, autocast):
    size = 32 if make is small_vit else 56
    plain, converted = make(), make()
    assert convert_linears(converted, LinearRecipe())
    x = normal(3, 3, size, size)
    assert_equal(step(converted, x, autocast), step(plain, x, autocast))


@pytest.mark.parametrize("preset", ["tetrajet", "microscaling"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_swin_step_with_token_counts_not_divisible_by_32_has_finite_gradients_everywhere(preset, autocast):
    model = small_swin()
    seen = {}
    for name in convert_linears(model, PRESETS[preset]):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0].shape))
    results = step(model, normal(3, 3, 56, 56), autocast)
    tokens = {name: shape[:-1].numel() for name, shape in seen.items()}
    assert len(tokens) == 16 and all(n % 32 for n in tokens.values())
    assert set(results) == {"output", "grad_input", *dict(model.named_parameters())}
    assert all(t.isfinite().all() for t in results.values())
    assert all((results[f"{name}.weight"] != 0).any() for name in tokens)


def test_given_names_alone_are_converted_and_returned_in_the_order_of_the_model():
    model = small_vit()
    names = ["head", "blocks.1.mlp.fc2", "blocks.0.attn.qkv"]
    assert convert_linears(model, TETRAJET, names=names) == names[::-1]
    assert [n for n, m in model.named_modules() if isinstance(m, QuantLinear)] == names[::-1]
    assert convert_linears(small_vit(), TETRAJET, names=iter(["head"])) == ["head"]


def test_a_wrong_name_is_answered_with_the_nearest_and_leaves_the_model_alone():
    model = small_vit()
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc3 is not a linear .* did you mean blocks.0.mlp.fc[12]\?"):
        convert_linears(model, TETRAJET, names=["head", "blocks.0.mlp.fc3"])
    with pytest.raises(ValueError, match="norm is not a linear layer"):
        convert_linears(model, TETRAJET, names=["norm"])
    assert not any(isinstance(m, QuantLinear | NoiseClock) for m in model.modules())


def test_a_model_with_nothing_to_convert_is_refused():
    with pytest.raises(ValueError, match="Sequential has no transformer blocks"):
        convert_linears(nn.Sequential(nn.Linear(4, 4)), TETRAJET)
    with pytest.raises(ValueError, match=r"use QuantLinear\.from_linear"):
        convert_linears(linear(), TETRAJET, names=[""])


def test_converting_again_with_another_recipe_keeps_parameters_clock_and_noise_numbers():
    model = small_vit()
    names = convert_linears(model, TETRAJET)
    parameters, clock = dict(model.named_parameters()), model.noise
    numbers = [model.get_submodule(n).layer for n in names]
    assert convert_linears(model, PRESETS["microscaling"]) == names
    layers = [model.get_submodule(n) for n in names]
    assert all(layer.recipe == PRESETS["microscaling"] and layer.noise is clock for layer in layers)
    assert model.noise is clock and [layer.layer for layer in layers] == numbers
    assert all(p is parameters[name] for name, p in model.named_parameters())
    fresh = small_vit()
    convert_linears(fresh, PRESETS["microscaling"])
    x = normal(2, 3, 32, 32)
    assert_equal(step(model, x), step(fresh, x))


def test_layers_of_a_model_have_numbers_and_so_noise_of_their_own():
    model = small_vit()
    names = convert_linears(model, TETRAJET)
    assert len({model.get_submodule(n).layer for n in names}) == len(names)
    assert len({id(model.get_submodule(n).noise) for n in names}) == 1


def test_printing_a_model_shows_the_recipe():
    model = small_vit()
    convert_linears(model, build_recipe(("q1", "q2", "q4"), gradient="e3m0"))
    text = str(model)
    assert text.count("QuantLinear(") == 8
    assert "q1 q2: e2m1/truncation_free/nearest_even, q4: e2m1/truncation_free/stochastic, requantized" in text
    assert "full_precision" in str(QuantLinear.from_linear(linear(), LinearRecipe()))


def test_a_deep_copy_computes_the_same_and_shares_nothing():
    model = small_vit()
    names = convert_linears(model, build_recipe(forward="stochastic"))
    x = normal(2, 3, 32, 32)
    model(x)
    clone = copy.deepcopy(model)
    assert_equal(step(clone, x), step(model, x))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in clone.parameters()}
    for name in names:
        layer = clone.get_submodule(name)
        assert layer.recipe == model.get_submodule(name).recipe
        assert layer.noise is clone.noise is not model.noise
    single = QuantLinear.from_linear(linear(), TETRAJET)
    assert copy.deepcopy(single).noise is not single.noise
    assert torch.equal(copy.deepcopy(single)(normal(4, 48)), single(normal(4, 48)))


def test_training_and_evaluation_quantize_alike():
    model = small_vit()
    convert_linears(model, TETRAJET)
    x = normal(2, 3, 32, 32)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_a_model_trains_and_its_loss_falls():
    """Twenty steps on one batch: the gradients point downhill."""
    model = small_vit()
    convert_linears(model, TETRAJET)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, target = normal(8, 3, 32, 32), torch.arange(8)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_clock_moves_with_the_model_and_is_reseeded_where_it_is():
    model = small_vit()
    convert_linears(model, TETRAJET)
    model.to("meta")
    assert model.noise.state.device.type == model.noise.next_position.device.type == "meta"
    model.noise.reseed(3, 1)
    assert model.noise.state.device.type == model.noise.next_position.device.type == "meta"


def test_a_sequential_can_be_converted():
    """The clock is a child of the model, and a Sequential calls its children one after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40))
    plain = copy.deepcopy(model)
    convert_linears(model, LinearRecipe(), names=["0", "2"])
    assert torch.equal(model(normal(5, 48)), plain(normal(5, 48)))
    convert_linears(model, TETRAJET, names=["0", "2"])
    assert not torch.equal(model(normal(5, 48)), plain(normal(5, 48)))


def test_every_set_of_quantizers_prints_and_hashes_apart():
    recipes = [
        build_recipe(active)
        for n in range(7)
        for active in itertools.combinations(("q1", "q2", "q3", "q4", "q5", "q6"), n)
    ]
    assert len(set(recipes)) == len({str(r) for r in recipes}) == 64


def test_quantizers_that_differ_in_one_word_print_apart():
    pow2 = {"scale_format": "e4m3", "outer": "pow2"}
    words = [{}, pow2, {"element": "e3m0"}, {"scale_rule": "floor"}, {"rounding": "nearest_up"}, {"block_size": 16}]
    words += [{"scale_format": "e4m3"}, {"scale_format": "e4m3", "scale_rounding": "up"}, {"block_rows": 32}]
    words += [{"scale_format": "e4m3", "target": 4.0}, {**pow2, "outer_delay": 3}, {**pow2, "target_scale": 64.0}]
    words += [{"scale_format": "e4m3", "outer": "fp32", "arithmetic": "te"}, {"correction": 1.5}, {"gradient": "mask"}]
    words += [{"scale_format": "e4m3", "target": target} for target in (6 * 16 / 17, 5.64706)]
    words += [{"correction": correction} for correction in (1.009276, 1.00928)]
    assert {word for some in words for word in some} == {f.name for f in fields(QuantizerSpec)} - {"axis"}
    assert len({str(LinearRecipe(q2=QuantizerSpec(**some))) for some in words}) == len(words)
    assert str(PRESETS["fqt"]).startswith("q1 q2 q4: e2m1/e4m3/nearest_even outer pow2 block 16, q3 q5 q6: ")
