"""Two calls never share their noise, however layers are made and called; a pass computed again has its own."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import timm
import torch
import torch.distributed as dist
from quick import some
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import models  # noqa: F401  registers the mxfp4_ models
from quantization import PRESETS, Int4Recipe, LinearRecipe, QuantizerSpec, QuantLinear, build_recipe, convert_linears
from quantization.layers.clock import NoiseClock
from quantization.noise import LAPS

RECIPES = {
    "tetrajet": PRESETS["tetrajet"],
    "forward stochastic": build_recipe(forward="stochastic"),
    "original operands": build_recipe(backward_operands="original"),
    "int4": Int4Recipe(),
}
SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
IMAGES, OTHERS = (torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (2, 3))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64)


def vit(recipe: LinearRecipe | Int4Recipe = PRESETS["tetrajet"]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mxfp4_deit_tiny_patch16_224", recipe=recipe, **SMALL)


def swin(recipe: LinearRecipe | Int4Recipe = PRESETS["tetrajet"]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mxfp4_swin_tiny_patch4_window7_224", recipe=recipe, num_classes=4, **SWIN)


def gradient(layer: nn.Linear, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    layer.weight.grad = None
    (call or layer)(X).square().sum().backward()
    return layer.weight.grad.clone()


def all_differ(tensors: list[Tensor]) -> bool:
    return not any(torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))


# How layers are made --------------------------------------------------------------------------------------------------


def by_from_linear() -> list[nn.Linear]:
    one = linear()
    return [QuantLinear.from_linear(copy.deepcopy(one), PRESETS["tetrajet"]) for _ in range(3)]


def by_from_linear_in_one_model() -> list[nn.Linear]:
    return list(nn.Sequential(*by_from_linear()))


def by_submodules() -> list[nn.Linear]:
    one = linear()
    model = nn.Sequential(*(nn.Sequential(copy.deepcopy(one)) for _ in range(3)))
    for part in model:
        convert_linears(part, PRESETS["tetrajet"], ["0"])
    return [part[0] for part in model]


def by_two_calls_for_one_model() -> list[nn.Linear]:
    one = linear()
    model = nn.Sequential(*(copy.deepcopy(one) for _ in range(3)))
    for name in ("0", "1", "2"):
        convert_linears(model, PRESETS["tetrajet"], [name])
    return list(model)


def by_one_call() -> list[nn.Linear]:
    one = linear()
    model = nn.Sequential(*(copy.deepcopy(one) for _ in range(3)))
    convert_linears(model, PRESETS["tetrajet"], ["0", "1", "2"])
    return list(model)


def by_copies_of_a_layer() -> list[nn.Linear]:
    one = QuantLinear.from_linear(linear(), PRESETS["tetrajet"])
    return [one, *(copy.deepcopy(one) for _ in range(2)), copy.deepcopy(copy.deepcopy(one))]


def by_copies_within_a_model() -> list[nn.Linear]:
    model = nn.Sequential(nn.Sequential(linear()))
    convert_linears(model, PRESETS["tetrajet"], ["0.0"])
    for _ in range(2):
        model.append(copy.deepcopy(model[0]))
    return [part[0] for part in model] + [part[0] for part in copy.deepcopy(list(model)[:1])]


@pytest.mark.parametrize(
    "made",
    [
        by_from_linear,
        by_from_linear_in_one_model,
        by_submodules,
        by_two_calls_for_one_model,
        by_one_call,
        by_copies_of_a_layer,
        by_copies_within_a_model,
    ],
    ids=lambda f: f.__name__,
)
def test_layers_of_equal_weights_and_inputs_have_noise_of_their_own_however_they_are_made(made):
    assert all_differ([gradient(layer) for layer in made()])


def test_the_same_seed_before_makes_the_same_noise():
    """What is random in a layer follows from torch.manual_seed, as its initial weights do."""
    one, other = (gradient(by_from_linear()[0]) for _ in range(2))
    assert torch.equal(one, other)


def test_a_number_that_the_clock_has_no_room_for_is_refused():
    layer = by_one_call()[0]
    with pytest.raises(ValueError, match="room for 16384 linear layers"):
        layer.join(layer.noise, 2**14)


# How layers are called ------------------------------------------------------------------------------------------------

WAYS = {
    "model(x)": lambda m, x: m(x),
    "model.forward(x)": lambda m, x: m.forward(x),
    "forward_features": lambda m, x: m.forward_head(m.forward_features(x)),
    "features alone": lambda m, x: m.forward_features(x),
    "blocks in another module": lambda m, x: nn.Sequential(*m.blocks)(m._pos_embed(m.patch_embed(x))),
    "one block": lambda m, x: m.blocks[0](m._pos_embed(m.patch_embed(x))),
    "get_intermediate_layers": lambda m, x: m.get_intermediate_layers(x, n=2)[0],
    "forward_intermediates": lambda m, x: m.forward_intermediates(x)[0],
    "one layer": lambda m, x: m.blocks[0].mlp.fc1(m._pos_embed(m.patch_embed(x))),
}


@pytest.mark.parametrize("way", WAYS)
def test_noise_is_fresh_at_every_pass_however_a_model_is_entered(way):
    model, layer = (m := vit()), m.blocks[0].mlp.fc1
    found = []
    for _ in range(4):
        model.zero_grad()
        WAYS[way](model, IMAGES).square().sum().backward()
        found.append(layer.weight.grad.clone())
    assert all_differ(found)


def test_swin_s_stages_called_one_by_one_have_fresh_noise():
    model, found = swin(), []
    for _ in range(3):
        model.zero_grad()
        model.layers(model.patch_embed(IMAGES)).square().sum().backward()
        found.append(model.layers[0].blocks[0].mlp.fc1.weight.grad.clone())
    assert all_differ(found)


def test_ways_mixed_share_no_noise():
    model, states = vit(), []
    for way in (*WAYS, *reversed(WAYS)):
        WAYS[way](model, IMAGES)
        states.append(tuple(model.noise.state.tolist()))
    assert len(set(states)) == len(states)


def test_the_mean_gradient_of_passes_through_parts_of_a_model_converges():
    """The error of the mean over 48 passes is that of independent draws: a seventh of one pass's, not all of it."""
    model, layer = (m := vit()), m.blocks[0].mlp.fc1

    def gradients(passes: int) -> Tensor:
        found = []
        for _ in range(passes):
            model.zero_grad()
            WAYS["forward_features"](model, IMAGES).square().sum().backward()
            found.append(layer.weight.grad.clone())
        return torch.stack(found)

    first, second = gradients(48), gradients(48)
    spread = (first - first.mean(0)).square().sum() / 47  # the variance of one pass, summed over elements
    difference = (first.mean(0) - second.mean(0)).square().sum()
    assert difference < 3 * (2 / 48) * spread  # with the same noise in all passes the spread is zero
    assert spread > 0


def test_a_layer_called_twice_in_a_pass_draws_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.last = linear(), linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.shared(x), self.shared(x), self.last(x)

    model = Twice()
    convert_linears(model, build_recipe(forward="stochastic"), ["shared", "last"])
    passes = [model(X) for _ in range(3)]
    assert all_differ([output for outputs in passes for output in outputs])
    model.noise.seek(1)  # and a position gives all of it back
    assert all(torch.equal(a, b) for a, b in zip(model(X), passes[1], strict=True))
    assert not torch.equal(model(X)[0], passes[1][0])


def test_laps_beyond_those_of_a_position_use_positions_up():
    layer = by_one_call()[0]
    clock, seen = layer.noise, []
    layer(X)
    clock.laps.fill_(LAPS - 2)
    clock.lapped = True
    for _ in range(4):
        layer(X)
        seen.append(clock.state[1].item() & (2**64 - 1))
    clock.advance()  # a whole pass of the model
    seen.append(clock.state[1].item() & (2**64 - 1))
    assert seen == sorted(set(seen)) and seen[0] >> 32 == 0 and seen[-1] >> 32 == 2


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_seek_is_followed_whatever_is_called_next(name):
    model = vit(build_recipe(forward="stochastic"))
    getattr(model, name)()
    outputs = []
    for _ in range(2):
        model.noise.seek(7)
        outputs.append(model.forward_features(IMAGES))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], model.forward_features(IMAGES))


def test_elsewhere_leaves_the_clock_where_it_stood():
    model, straight = vit(), vit()
    for _ in range(2):
        model(IMAGES)
        straight(IMAGES)
    with model.noise.elsewhere(2**31):
        model(OTHERS)
        model.forward_features(OTHERS)
    for way in ("forward_features", "model(x)"):
        for m in (model, straight):
            WAYS[way](m, IMAGES)
        assert torch.equal(model.noise.state, straight.noise.state)


# The rank -------------------------------------------------------------------------------------------------------------


def test_the_rank_counts_whenever_the_process_group_was_made(monkeypatch):
    early = by_one_call()[0]
    alone = gradient(early)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        early.noise.seek(0)
        ranks.append(gradient(early))
    assert torch.equal(ranks[0], alone) and not torch.equal(*ranks)
    early.noise.reseed(early.noise.seed, 0)  # a rank that is given stays
    assert torch.equal(gradient(early), alone)


# Passes computed again ------------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


BETWEEN = {
    "nothing": lambda m: None,
    "a pass without gradients": lambda m: torch.no_grad()(m)(OTHERS),
    "an evaluation in inference mode": lambda m: torch.inference_mode()(m)(OTHERS),
    "another training pass": lambda m: m(OTHERS).sum(),
    "a part of the model": lambda m: m.forward_features(OTHERS),
}


@pytest.mark.parametrize("between", some(BETWEEN, every=2))
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", some([vit, swin], every=2))
def test_activation_checkpointing_changes_no_bit_of_the_gradients(make, recipe, between):
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = make(RECIPES[recipe])
        model(IMAGES)  # INT4's steps start here
        model.set_grad_checkpointing(checkpointing)
        loss = model(IMAGES).square().sum()
        kept = BETWEEN[between](model)  # noqa: F841  its graph lives on
        return gradients_of(model, loss)

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_two_passes_before_one_backward_pass_each_have_their_noise():
    def gradients(checkpointing: bool) -> list[list[Tensor]]:
        model = vit(build_recipe(forward="stochastic"))
        model.set_grad_checkpointing(checkpointing)
        losses = [model(x).square().sum() for x in (IMAGES, OTHERS)]
        first = gradients_of(model, losses[0])  # in the order of the passes, not the reverse one
        return [first, gradients_of(model, losses[1])]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    convert_linears(model, build_recipe(forward="stochastic"), [f"{n}.0" for n in range(4)], seed=5)
    return model


def twice(part: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: part(part(x))


CHECKPOINTS = {
    "not reentrant": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "by segments": lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=False),
    "nested": lambda m, x: checkpoint(
        lambda y: checkpoint(m[1:], m[0](y), use_reentrant=False), x, use_reentrant=False
    ),
    "a layer twice": lambda m, x: checkpoint(twice(m), x, use_reentrant=False),
}
PLAIN = {"a layer twice": lambda m, x: twice(m)(x)}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_kind_of_checkpoint_computes_the_same_pass_again(kind):
    def gradients(call: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        model, x = stack(), X.clone().requires_grad_()
        loss = call(model, x).square().sum()
        call(model, X.clone().requires_grad_())  # a later pass, whose noise must not be taken
        return [*gradients_of(model, loss), x.grad]

    plain = PLAIN.get(kind, lambda m, x: m(x))
    assert all(torch.equal(a, b) for a, b in zip(gradients(CHECKPOINTS[kind]), gradients(plain), strict=True))


def test_a_checkpointed_pass_may_be_computed_again_more_than_once():
    model, x = stack(), X.clone().requires_grad_()
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    found = []
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        found.append(model[0][0].weight.grad.clone())
    assert torch.equal(*found)


def test_a_single_layer_s_clock_does_not_advance_for_a_pass_computed_again():
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 64), PRESETS["tetrajet"])
    checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert layer.noise.next_position.item() == 1


# Modes and processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["bf16", "fp8"])
@pytest.mark.parametrize("way", ["model(x)", "forward_features", "one block"])
def test_training_goes_on_after_inference_mode(way, carrier):
    model = vit(build_recipe(carrier=carrier))
    with torch.inference_mode():
        model(IMAGES)
        WAYS[way](model, IMAGES)
    WAYS[way](model, IMAGES).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad.isfinite().all()


def test_specs_and_recipes_are_the_same_keys_in_another_process():
    """Strings hash to other numbers in every process; what was pickled there must be found here."""
    code = (
        "import pickle, sys\n"
        "from quantization import PRESETS, QuantizerSpec, Int4Recipe\n"
        "from quantization.job import Job\n"
        "import torch\n"
        "job = Job(QuantizerSpec(), None, 'dense', 'nothing', torch.float32)\n"
        "things = [QuantizerSpec(), PRESETS['tetrajet'], Int4Recipe(), job]\n"
        "[hash(thing) for thing in things]\n"
        "sys.stdout.buffer.write(pickle.dumps(things))\n"
    )
    from helpers import environment

    env = {**environment(), "PYTHONHASHSEED": "123"}
    there = pickle.loads(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    spec, recipe, int4, job = there
    assert {QuantizerSpec(): 1}.get(spec) == {PRESETS["tetrajet"]: 1}.get(recipe) == {Int4Recipe(): 1}.get(int4) == 1
    assert {type(job).parse(job.text): 1}.get(job) == 1


def test_a_model_copied_or_pickled_has_a_clock_of_its_own_that_goes_on():
    model = stack()
    model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.noise, NoiseClock) and twin.noise is not model.noise
        with model.noise.elsewhere(1):
            expected = model(X)
        assert torch.equal(twin(X), expected)


def by_to_empty(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu").load_state_dict(weights)


def by_assign(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights, assign=True)


@pytest.mark.parametrize("fill", [by_to_empty, by_assign], ids=lambda f: f.__name__)
def test_a_model_made_on_the_device_of_shapes_draws_what_another_would(fill):
    torch.manual_seed(0)
    weights, found = vit().state_dict(), []
    for device in ("cpu", "meta"):
        torch.manual_seed(5)
        with torch.device(device):
            model = timm.create_model("mxfp4_deit_tiny_patch16_224", **SMALL)
        model.noise.reseed(3, None)
        fill(model, weights) if device == "meta" else model.load_state_dict(weights)
        model(IMAGES).square().sum().backward()
        found.append((model.blocks[0].attn.qkv.weight.grad, model.noise.next_position.item()))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] == 1


def test_to_empty_leaves_the_clock_where_it_stood():
    model = stack()
    model.noise.seek(7)
    model.to_empty(device="cpu")
    assert model.noise.next_position.item() == 7 and model.noise.laps.item() == 0
