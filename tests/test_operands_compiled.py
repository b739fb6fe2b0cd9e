"""Layers and models under torch.compile, and the custom ops that make their operands."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import timm
import torch
from operand_helpers import job_of
from quick import some
from test_operands import DTYPES, NOISE, numbers, same
from torch import Tensor, nn

from quantization import PRESETS, QuantizerSpec, QuantLinear, convert_linears, fake_quantize
from quantization.backends import reference
from quantization.backends.reference import pack, scale_codes
from quantization.job import CARRIED, DENSE, E5M2, NOTHING, PACKED, Job
from quantization.rotation import Turn


def steps_of(model: nn.Module, call, shape: tuple[int, ...], autocast: bool, steps: int = 2) -> list[list[Tensor]]:
    """Outputs and gradients of a few training steps, each on the same input."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    results = []
    for _ in range(steps):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = call(x)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype))
        results.append([output.detach().clone(), x.grad, *(p.grad.clone() for p in model.parameters())])
        optimizer.step()
        optimizer.zero_grad()
    return results


def assert_compiled_equals_eager(make, shape: tuple[int, ...], autocast: bool) -> None:
    torch.compiler.reset()
    eager, compiled = make(), make()
    expected = steps_of(eager, eager, shape, autocast)
    actual = steps_of(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True), shape, autocast)
    for step, other in zip(expected, actual, strict=True):
        assert all(same(a, b) for a, b in zip(step, other, strict=True))


@pytest.mark.parametrize("autocast", some([True, False], every=2), ids=["autocast", "float32"])
@pytest.mark.parametrize("bias", some([True, False], every=2), ids=["bias", "no bias"])
@pytest.mark.parametrize("carrier", ["bf16", "fp8"])
@pytest.mark.parametrize("preset", ["full_precision", "tetrajet", "microscaling"])  # others: test_methods.py
def test_a_compiled_layer_is_one_graph_and_gives_the_bits_of_eager(preset, carrier, bias, autocast):
    recipe = dataclasses.replace(PRESETS[preset], carrier=carrier)

    def make() -> QuantLinear:
        torch.manual_seed(0)
        return QuantLinear.from_linear(nn.Linear(48, 32, bias=bias), recipe)

    assert_compiled_equals_eager(make, (3, 17, 48), autocast)


@pytest.mark.parametrize(
    ("preset", "carrier", "autocast"),
    [pytest.param("tetrajet", "bf16", False, marks=pytest.mark.slow), ("tetrajet", "fp8", True)],
    ids=str,
)
def test_a_compiled_model_is_one_graph_with_fresh_noise_at_every_step(preset, carrier, autocast):
    recipe = dataclasses.replace(PRESETS[preset], carrier=carrier)

    def make() -> nn.Module:
        torch.manual_seed(0)
        size = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 10}
        model = timm.create_model("deit_tiny_patch16_224", **size)
        nn.init.normal_(model.head.weight)
        convert_linears(model, recipe)
        return model

    assert_compiled_equals_eager(make, (2, 3, 32, 32), autocast)


def test_a_compiled_step_is_not_given_the_noise_of_the_step_before():
    """The control of the tests above: the weights stand still here, so that noise alone tells two steps apart."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(48, 32), PRESETS["tetrajet"])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = []
    for position in (0, 1, 0):
        layer.noise.seek(position)
        x = numbers(64, 48).requires_grad_()
        compiled(x).square().sum().backward()
        gradients.append(x.grad)
    assert same(gradients[0], gradients[2]) and not same(gradients[0], gradients[1])


OPCHECKS = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")}


FORMS = [forms for forms in itertools.product((NOTHING, DENSE, PACKED, CARRIED), repeat=2) if set(forms) != {NOTHING}]


@pytest.mark.parametrize("forms", FORMS, ids="+".join)
def test_the_custom_op_prepare_is_what_it_is_declared_to_be(forms):
    specs = [
        None if form == NOTHING else QuantizerSpec(rounding="stochastic", axis=axis)
        for form, axis in zip(forms, (-1, 0), strict=True)
    ]
    for x, sums in ((numbers(70, 33), True), (numbers(16, 32, dtype=torch.bfloat16), False)):
        job = job_of(*specs, forms, torch.bfloat16, chained=True, sums=sums)
        arguments = (x, None, NOISE.state, NOISE.stream, None, None, job.text)
        torch.library.opcheck(torch.ops.mxfp4.prepare.default, arguments, **OPCHECKS)


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_custom_op_expand_is_what_it_is_declared_to_be(axis):
    spec = QuantizerSpec(axis=axis)
    x = numbers(70, 33)
    scales = scale_codes(x, spec)
    codes = pack(fake_quantize(x, spec), scales, spec)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.mxfp4.expand.default, (codes, scales, spec.text, 33, dtype), **OPCHECKS)


def test_the_text_of_a_job_in_a_custom_op_gives_the_job_back():
    specs = (QuantizerSpec("e3m0", "floor", "stochastic", -1, 16), QuantizerSpec(), None)
    columns = (QuantizerSpec("e3m0", "floor", axis=0), None)
    for row, column, form, dtype in itertools.product(specs, columns, (DENSE, PACKED), DTYPES):
        job = job_of(row, column, (form, DENSE), dtype, E5M2, chained=row is None, sums=column is None)
        assert Job.parse(job.text) == job and QuantizerSpec.parse(columns[0].text) == columns[0]


@pytest.mark.parametrize("signs", ["none", "fresh"])
def test_the_custom_op_turn_back_is_what_it_is_declared_to_be(signs):
    for x in (numbers(70, 32), numbers(16, 64, dtype=torch.bfloat16)):
        arguments = (x, Turn(32, signs, 1).text, NOISE.state, NOISE.stream)
        torch.library.opcheck(torch.ops.mxfp4.turn_back.default, arguments, **OPCHECKS)


def test_a_compiled_graph_turns_gradients_back_by_that_op(monkeypatch):
    """And not by what a compiler makes of its sums and differences."""
    turned, turn_back = [], reference.turn_back
    monkeypatch.setattr(reference, "turn_back", lambda x, *turn: turned.append(x.shape) or turn_back(x, *turn))
    torch.compiler.reset()
    layer = QuantLinear.from_linear(nn.Linear(64, 32), PRESETS["quartet"])
    torch.compile(layer, backend="aot_eager", fullgraph=True)(numbers(8, 64).requires_grad_()).sum().backward()
    assert turned == [(8, 64), (32, 64)]
