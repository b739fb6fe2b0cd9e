"""For the tests of the INT4 layer: tensors, a layer, one pass of its function, and the same written out by hand."""

import itertools
import math

import torch
from torch import nn

from quantization.layers.int4 import Int4Linear, Int4LinearFunction
from quantization.noise import Noise, uniform
from quantization.spec import Int4Recipe

STREAM = 8 * 5  # of the layer under test
PLAIN = Int4Recipe(hadamard=False, sampling=False, learned_step=False)
RECIPES = [Int4Recipe(*switches) for switches in itertools.product((False, True), repeat=3)]
STEP_X, STEP_W = torch.tensor(0.3), torch.tensor(0.1)  # so small that some values saturate


def state(position=3, seed=11):
    return torch.tensor([seed, position << 32])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(*lead, D=48, C=40):
    """X, W, b and G; the rows of X and G differ in size, as those of tokens do."""
    X, W, b, G = normal(*lead, D, seed=1), 0.3 * normal(C, D, seed=2), normal(C, seed=3), normal(*lead, C, seed=4)
    return X * normal(*lead, 1, seed=5).exp(), W, b, G * normal(*lead, 1, seed=6).exp()


def layer_of(recipe=None, D=48, C=40, bias=True):
    torch.manual_seed(0)
    made = Int4Linear.from_linear(nn.Linear(D, C, bias=bias), recipe or Int4Recipe())
    made.noise.reseed(5, 0)
    return made


def run(X, W, b, G, recipe, noise_state=None, steps=(STEP_X, STEP_W), autocast=False):
    leaves = [t.clone().requires_grad_() for t in (X, W, b)]
    steps = [t.clone().requires_grad_() for t in steps] if recipe.learned_step else [None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = Int4LinearFunction.apply(
            *leaves, *steps, recipe, state() if noise_state is None else noise_state, STREAM
        )
    output.backward(G.to(output.dtype))
    names = ("grad_input", "grad_weight", "grad_bias", "grad_step_x", "grad_step_w")
    grads = {n: t.grad for n, t in zip(names, (*leaves, *steps), strict=True) if t is not None}
    return {"output": output.detach(), **grads}


# By hand, in float64 --------------------------------------------------------------------------------------------------


def sylvester(size):
    return (
        torch.ones(1, 1).double()
        if size == 1
        else torch.kron(torch.ones(2, 2).double(), sylvester(size // 2))
        * (torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.ones(size // 2, size // 2).double()))
    )


def transform(D, recipe):
    """The matrix from D inputs to what is quantized: D x D rounded up to a multiple of 32."""
    if not recipe.hadamard:
        return torch.eye(D).double()
    blocks = -(-D // 32)
    return torch.block_diag(*[sylvester(32) / math.sqrt(32)] * blocks)[:D]


def operand(x, step, recipe):
    """Transformed tensor, its quantized value, the step, and the mask of what lies inside the range."""
    t = x.double() @ transform(x.shape[-1], recipe)
    step = step.double() if recipe.learned_step else 2 * t.abs().mean() / math.sqrt(7)
    v = t / step
    return t, step * v.round().clamp(-8, 7), step, (v > -8) & (v < 7)


def water_filling(score, expected):
    """min(1, rate * score) by sorting: the largest rate * score that are above 1 give their rest to the others."""
    p = torch.zeros_like(score)
    order = score.argsort(descending=True)
    for place, i in enumerate(order):
        rest = score[order[place:]].sum()
        if score[i] == 0 or (expected - place) * score[i] < rest:
            p[order[place:]] = score[order[place:]] * (expected - place) / max(rest, 1e-30)
            break
        p[i] = 1.0
    return (p * 2**16).ceil() / 2**16


def by_hand(X, W, b, G, recipe, noise_state, steps=(STEP_X, STEP_W), exact_gradient=False):
    x, g = X.reshape(-1, X.shape[-1]), G.reshape(-1, G.shape[-1]).double()
    (x_t, x_q, s_x, x_in), (w_t, w_q, s_w, w_in) = (operand(t, s, recipe) for t, s in zip((x, W), steps, strict=True))
    stack, rows = g, [torch.eye(len(g)).double()] * 2  # the gradient to be summed, and which of its rows, how often
    if not exact_gradient:
        unit = g.abs().max() / 98
        high = (g / unit / 14).round().clamp(-6, 6)
        rest = g / unit - 14 * high
        low = rest.floor() + (rest - rest.floor() > 1 - uniform(G.reshape(g.shape).shape, Noise(noise_state, STREAM)))
        stack = torch.cat([14 * high, low]) * unit
        rows = [torch.eye(len(g)).double().repeat(1, 2)] * 2
        if recipe.sampling:
            for i, x_norm in enumerate((torch.ones(len(g)), x_q.norm(dim=1))):
                p = water_filling(stack.norm(dim=1) * x_norm.double().repeat(2), len(g))
                kept = uniform(p.shape, Noise(noise_state, STREAM + 1 + i)) < p
                rows[i] = rows[i] * torch.where(kept, 1 / p, 0.0)
    d_xq, d_wq = rows[0] @ stack @ w_q, (rows[1] @ stack).t() @ x_q
    return {
        "output": (x_q @ w_q.t() + b.double()).view(*X.shape[:-1], -1),
        "grad_input": (d_xq * x_in @ transform(X.shape[-1], recipe).t()).view(X.shape),
        "grad_weight": d_wq * w_in @ transform(X.shape[-1], recipe).t(),
        "grad_bias": g.sum(0),
        "grad_step_x": (d_xq * (x_q - x_t * x_in) / s_x).sum() / math.sqrt(7 * x_t.numel()),
        "grad_step_w": (d_wq * (w_q - w_t * w_in) / s_w).sum() / math.sqrt(7 * w_t.numel()),
    }


def assert_close(actual, expected, tolerance=1e-4):
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        error = (value.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < tolerance, (name, error.item())
