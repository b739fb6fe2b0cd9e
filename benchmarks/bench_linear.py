"""One linear layer of DeiT, forward and backward: QuantLinear against nn.Linear under bfloat16 autocast, eager.

    python benchmarks/bench_linear.py [--models deit_base deit_tiny] [--layers fc1] [--recipes tetrajet] [--carrier fp8]

Weights are float32, gradients of the output bfloat16, inputs as the layer meets them in the model: float32 from a norm
(qkv, fc1), bfloat16 otherwise (proj, fc2). The rate counts the 6 N D C operations of the three products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from common import Results, add_carrier, command, method_config, parse, parser_for, peak_gib, take_turns
from torch import Tensor, nn

from config import load_config
from quantization import QuantLinear, resolve

WIDTH = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
TOKENS = {"deit_tiny": 256 * 197, "deit_small": 256 * 197, "deit_base": 128 * 197}
LAYERS = {  # D and C in widths of the model, dtype of the input
    "qkv": (1, 3, torch.float32),
    "proj": (1, 1, torch.bfloat16),
    "fc1": (1, 4, torch.float32),
    "fc2": (4, 1, torch.bfloat16),
}
BASELINE = "bf16"
RECIPES = ("tetrajet", "microscaling")


def pass_of(layer: nn.Linear, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """One forward and backward pass, with gradients of input, weight and bias as those of a first micro-batch."""

    def both() -> None:
        x.grad = layer.weight.grad = layer.bias.grad = None
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            output = layer(x)
        output.backward(grad)

    return both


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=50)
    parser.add_argument("--models", nargs="+", default=["deit_base", "deit_tiny"], choices=WIDTH)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--tokens", type=int, help=f"N (default: {TOKENS})")
    add_carrier(parser)
    options, device = parse(parser, argv)
    results = Results("linear", options, device)
    for model in options.models:
        recipes = {
            name + options.carrier_suffix: resolve(
                load_config(method_config(model, name), options.carrier_override, source="the command line").quant
            )
            for name in options.recipes
        }
        tokens, width = (197, 64) if options.quick else (options.tokens or TOKENS[model], WIDTH[model])
        for name in options.layers:
            inputs, outputs, dtype = LAYERS[name]
            inputs, outputs = inputs * width, outputs * width
            torch.manual_seed(0)
            x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
            grad = 1e-3 * torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)
            linear = nn.Linear(inputs, outputs, device=device)
            layers = {BASELINE: linear}
            for variant, recipe in recipes.items():
                own = nn.Linear(inputs, outputs, device=device)
                own.load_state_dict(linear.state_dict())
                layers[variant] = QuantLinear.from_linear(own, recipe)
            passes = {variant: pass_of(layer, x, grad) for variant, layer in layers.items()}
            samples = take_turns(passes, device, options, kernels=True)
            peaks = {}
            for variant, layer in layers.items():
                for other in layers.values():
                    other.weight.grad = other.bias.grad = x.grad = None
                peaks[variant] = peak_gib(passes[variant], [list(layer.parameters()), x, grad], device)
            results.add(
                f"{model} {name}",
                f"{tokens} tokens {inputs}->{outputs}",
                samples,
                dict.fromkeys(samples, BASELINE),
                rate=lambda _, seconds, n=6 * tokens * inputs * outputs: n / seconds / 1e12,
                rate_unit="TFLOP/s",
                peaks=peaks,
            )


if __name__ == "__main__":
    command(main)
