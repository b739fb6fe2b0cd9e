"""A forward pass of DeiT from packed weights: PackedLinear against nn.Linear, eager, no gradients.

    python benchmarks/bench_packed.py [--models deit_tiny deit_base] [--batches 1 256] [--cpu --rounds 5 --warmup 1]

`bf16` and `fp32` are the dequantized model with all its weights in bfloat16 or float32. `packed` quantizes activations
as in training and expands its weights at every call, `packed, plain activations` expands them alone; both have the rest
in bfloat16 too, `packed, fp32` has it in float32. Peak memory counts a model's weights and all that its pass allocates.
A CPU is measured where there is no GPU, or with --cpu.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from common import MODELS, TINY, Results, command, method_config, parse, parser_for, peak_gib, take_turns
from torch import nn

from config import load_config
from models import create_model
from quantization.export import PackedLinear, dequantized_state, pack_linears, packed_layers, put

BASELINE = "bf16"
CLASSES = 1000


def variants(column: str, quick: bool, device: torch.device) -> tuple[dict[str, nn.Module], int]:
    """The models that are compared, with the same weights, and the side of their images."""
    changes = [f"model.kwargs={TINY['deit']}"] if quick else []
    cfg = load_config(method_config(column, "tetrajet"), changes, source="the benchmark")
    torch.manual_seed(0)
    packed = create_model(cfg, CLASSES).eval()
    pack_linears(packed)
    plain = copy.deepcopy(packed)
    for name, layer in packed_layers(plain).items():
        put(plain, name, PackedLinear(layer.weight, layer.bias, layer.recipe, quantize_activations=False))
    linear = create_model(load_config(method_config(column, "fp"), changes, source="the benchmark"), CLASSES).eval()
    linear.load_state_dict(dequantized_state(packed, torch.float32))
    models = {BASELINE: copy.deepcopy(linear).bfloat16(), "fp32": linear, "packed": copy.deepcopy(packed).bfloat16()}
    models |= {"packed, plain activations": plain.bfloat16(), "packed, fp32": packed}
    return {name: net.requires_grad_(False).to(device) for name, net in models.items()}, cfg.model.img_size


def pass_of(net: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            net(images)

    return forward


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=50)
    deit = [name for name in MODELS if name.startswith("deit")]
    parser.add_argument("--models", nargs="+", default=["deit_tiny", "deit_base"], choices=deit)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 256], help="images of a pass (default: 1 256)")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU, whether there is a GPU or not")
    options, device = parse(parser, argv, on_cpu=True)
    results = Results("packed", options, device)
    for column in options.models:
        models, size = variants(column, options.quick, device)
        for batch in options.batches:
            count = min(batch, 2) if options.quick else batch
            images = torch.randn(count, 3, size, size, device=device)
            given = {name: images.to(next(net.parameters()).dtype) for name, net in models.items()}
            passes = {name: pass_of(net, given[name]) for name, net in models.items()}
            samples = take_turns(passes, device, options, kernels=False)
            own = {name: [list(net.parameters()), list(net.buffers()), given[name]] for name, net in models.items()}
            results.add(
                f"{column} batch {count}",
                f"{count}x3x{size}x{size}",
                samples,
                dict.fromkeys(samples, BASELINE),
                rate=lambda _, seconds, n=count: n / seconds,
                rate_unit="images/s",
                peaks={name: peak_gib(passes[name], own[name], device, on_cpu=True) for name in models},
            )


if __name__ == "__main__":
    command(main)
