"""The learned step of the INT4 layer: its gradient, where it starts, and how it is kept."""

import copy
import math
import types

import pytest
import torch
import torch.distributed as dist
from int4_helpers import PLAIN, STEP_W, STEP_X, layer_of, normal, run, transform
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from quantization.layers.int4 import Int4Linear
from quantization.rotation import hadamard
from quantization.spec import Int4Recipe


def exact_case():
    """X, W and a G of integers up to 98, whose split is exact whatever the noise."""
    g = torch.Generator().manual_seed(0)
    G = torch.randint(-98, 99, (20, 8), generator=g).float()
    G[0, 0] = 98
    return normal(20, 16, seed=1), 0.3 * normal(8, 16, seed=2), torch.zeros(8), G


def straight_through(x, step):
    """LSQ for autograd: clamp, then a rounding whose gradient is 1."""
    v = (x / step).clamp(-8, 7)
    return (v + (v.round() - v).detach()) * step


@pytest.mark.parametrize("hadamard_on", [False, True])
def test_gradients_equal_autograd_s_through_straight_through_rounding(hadamard_on):
    X, W, b, G = exact_case()
    recipe = Int4Recipe(hadamard=hadamard_on, sampling=False)
    actual = run(X, W, b, G, recipe)
    x, w, s_x, s_w = (t.double().requires_grad_() for t in (X, W, STEP_X, STEP_W))
    H = transform(16, recipe)
    output = straight_through(x @ H, s_x) @ straight_through(w @ H, s_w).t()
    output.backward(G.double())
    assert torch.allclose(actual["output"].double(), output, atol=1e-5)
    assert torch.allclose(actual["grad_input"].double(), x.grad, rtol=1e-5, atol=1e-3)
    assert torch.allclose(actual["grad_weight"].double(), w.grad, rtol=1e-5, atol=1e-3)
    for name, step, numel in (("grad_step_x", s_x, 20 * len(H[0])), ("grad_step_w", s_w, 8 * len(H[0]))):
        assert actual[name].item() == pytest.approx(step.grad.item() / math.sqrt(7 * numel), rel=1e-4)


def test_the_step_s_gradient_against_finite_differences_of_the_loss():
    """Between two jumps the loss is linear in s with slope sum of dL/dq q / s; LSQ takes dL/dq v / s off inside."""
    X, W, b, G = exact_case()
    recipe = Int4Recipe(hadamard=False, sampling=False)
    actual = run(X, W, b, G, recipe)
    x, w, g, s_x, s_w = (t.double() for t in (X, W, G, STEP_X, STEP_W))

    def quantized(t, s):
        return s * (t / s).round().clamp(-8, 7)

    eps = 1e-8  # no value lies so close to a threshold that it jumps
    for name, t, s, other in (
        ("grad_step_x", x, s_x, g @ quantized(w, s_w)),
        ("grad_step_w", w, s_w, g.t() @ quantized(x, s_x)),
    ):
        assert torch.equal((t / (s - eps)).round(), (t / (s + eps)).round())
        slope = ((quantized(t, s + eps) - quantized(t, s - eps)) * other).sum() / (2 * eps)
        inside = (t / s > -8) & (t / s < 7)
        assert 0 < inside.double().mean() < 1
        expected = (slope - (other * t / s)[inside].sum()) / math.sqrt(7 * t.numel())
        assert actual[name].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_gradient_is_masked_outside_the_range():
    X, W, b, G = exact_case()
    actual = run(X, W, b, G, Int4Recipe(hadamard=False, sampling=False))
    for name, t, step in (("grad_input", X, STEP_X), ("grad_weight", W, STEP_W)):
        inside = (t / step > -8) & (t / step < 7)
        assert 0 < inside.sum() < inside.numel()
        assert torch.equal(actual[name] != 0, inside)


def test_initial_steps():
    made = layer_of()
    assert made.step_w.item() == pytest.approx(2 * hadamard(made.weight).abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert made.step_w.dtype == made.step_x.dtype == torch.float32 and made.step_w.shape == made.step_x.shape == ()
    plain = layer_of(Int4Recipe(hadamard=False))
    assert plain.step_w.item() == pytest.approx(2 * plain.weight.abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert not hasattr(layer_of(PLAIN), "step_x_known") and list(layer_of(PLAIN).state_dict()) == ["weight", "bias"]


def test_step_x_starts_from_the_first_training_batch_once():
    made, X = layer_of(), 3 * normal(5, 9, 48)
    made.eval()
    before = made(X)
    assert made.step_x.item() == 1 and not made.step_x_known
    made.train()
    made(torch.zeros(5, 48))
    made(torch.zeros(0, 48))
    assert not made.step_x_known  # there was no data to start from
    output = made(X)
    first = made.step_x.item()
    assert first == pytest.approx(2 * hadamard(X).abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert made.step_x_known and torch.equal(output, before)
    made(10 * X)
    made.eval()(10 * X)
    assert made.step_x.item() == first
    assert not torch.equal(made(10 * X), 10 * (made(X) - made.bias) + made.bias)  # with the step as it was


def test_step_x_starts_from_the_finite_values():
    made, X = layer_of(Int4Recipe(hadamard=False)), normal(20, 48)
    X[3, 5], X[7, 7] = math.nan, -math.inf
    output = made(X)
    finite = torch.where(torch.isfinite(X), X, 0.0)
    assert made.step_x.item() == pytest.approx(2 * finite.abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert output.isnan().any(1).nonzero().flatten().tolist() == [3, 7]


def test_a_state_dict_brings_the_steps_and_that_they_are_known():
    made, X = layer_of(), normal(9, 48)
    fresh = copy.deepcopy(made.state_dict())
    made(X)
    assert list(made.state_dict()) == ["weight", "bias", "step_x", "step_w", "step_x_known"]
    other = layer_of()
    other.load_state_dict(made.state_dict())
    other(100 * X)
    assert torch.equal(other.step_x, made.step_x)
    assert torch.equal(other(X), made(X))
    other.load_state_dict(fresh)  # of a layer that has seen no data: to be started again
    other(100 * X)
    assert other.step_x.item() == pytest.approx(100 * made.step_x.item(), rel=1e-5)


@pytest.mark.parametrize("hadamard", [True, False])
def test_weights_without_steps_start_the_steps_anew(hadamard):
    """As --finetune loads them from a checkpoint in full precision."""
    made, X, recipe = layer_of(Int4Recipe(hadamard=hadamard)), normal(9, 48), Int4Recipe(hadamard=hadamard)
    made(X)
    old = made.step_w.item()
    weights = {"weight": 5 * normal(40, 48, seed=9), "bias": torch.zeros(40)}
    made.load_state_dict(weights, strict=False)
    linear = nn.Linear(48, 40)
    linear.load_state_dict(weights)
    fresh = Int4Linear.from_linear(linear, recipe)
    assert torch.equal(made.step_w, fresh.step_w) and made.step_w.item() > 10 * old
    assert not made.step_x_known and made.step_x.item() == 1
    made(100 * X), fresh(100 * X)
    assert torch.equal(made.step_x, fresh.step_x) and made.step_x_known
    made.load_state_dict({"bias": torch.ones(40)}, strict=False)  # the controls: what brings no weight changes no step
    assert torch.equal(made.step_w, fresh.step_w) and made.step_x_known
    made.load_state_dict({**weights, "step_w": torch.tensor(0.5)}, strict=False)
    assert made.step_w.item() == 0.5
    layer_of(PLAIN).load_state_dict(weights)  # nor is there one to change


def test_a_moving_average_made_before_the_first_step_uses_its_own_step_x():
    made, X = layer_of(), normal(9, 48)
    average = ModelEmaV3(made, decay=0.5)
    made(X)
    average.update(made)
    layer = average.module
    assert 0 < layer.step_x.item() < 1 and layer.step_x.item() != made.step_x.item()
    output = layer(100 * X)
    assert torch.equal(
        output,
        run(
            100 * X,
            *(p.detach() for p in (layer.weight, layer.bias)),
            output,
            layer.recipe,
            None,
            (layer.step_x.detach(), layer.step_w.detach()),
        )["output"],
    )


def test_step_x_is_the_same_on_all_processes(monkeypatch):
    """The other process has 3 values of magnitude 4 in all; `all_reduce` adds what it has."""
    made = layer_of(Int4Recipe(hadamard=False), D=2, C=2)
    parallel = types.SimpleNamespace(process_group="all of them")
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda: parallel)
    other = torch.tensor([12.0, 3.0])
    monkeypatch.setattr(dist, "all_reduce", lambda sums, group: sums.add_(other) if group == "all of them" else None)
    made(torch.tensor([[1.0, -2.0]]))
    assert made.step_x.item() == pytest.approx(2 * (15 / 5) / math.sqrt(7))
    monkeypatch.setattr(dist, "all_reduce", None)  # no further call
    made(torch.ones(3, 2))


def test_a_forward_pass_of_one_process_alone_waits_for_no_other(tmp_path):
    """With a process group, but not under DistributedDataParallel; under it, the control, the process does meet."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    met, all_reduce = [], dist.all_reduce
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", lambda *args, **kwargs: met.append(all_reduce(*args, **kwargs)))
            alone, together = (layer_of(Int4Recipe(hadamard=False), D=2, C=2) for _ in range(2))
            alone(torch.tensor([[1.0, -2.0]]))
            assert not met and alone.step_x.item() == pytest.approx(2 * 1.5 / math.sqrt(7))
            DistributedDataParallel(together)(torch.tensor([[1.0, -2.0]]))
            assert len(met) == 1 and torch.equal(together.step_x, alone.step_x)
    finally:
        dist.destroy_process_group()


def test_without_learned_steps_they_follow_the_tensors():
    made, X = layer_of(Int4Recipe(learned_step=False), bias=False), normal(9, 48)
    output = made(X)
    assert torch.allclose(made(8 * X), 8 * output)
    with torch.no_grad():
        made.weight *= 4
    assert torch.allclose(made(X), 4 * output)


def test_a_step_at_or_below_zero_keeps_a_gradient():
    X, W, b, G = exact_case()
    for step in (0.0, -1.0):
        results = run(X, W, b, G, Int4Recipe(), steps=(torch.tensor(step), STEP_W))
        assert all(t.isfinite().all() for t in results.values()) and results["grad_step_x"] != 0
