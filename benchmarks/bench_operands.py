"""What a linear layer of TetraJet is made of: its operands and its products, with either carrier, one by one.

    python benchmarks/bench_operands.py [--models deit_base] [--layers fc1 fc2]

X, W and G each quantized for both products they enter (G with the sums of its columns for the bias), against a device
copy of the same tensor; X unpacked again, as the bf16 carrier's grad_weight needs it, against a copy of the result; and
the three products of those operands, fp8 against bf16. GB/s count what must be moved: the tensor once in, every result
once out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from bench_linear import LAYERS, TOKENS, WIDTH
from common import Results, command, method_config, parse, parser_for, take_turns, tensors_in
from torch import Tensor

from config import load_config
from quantization import resolve
from quantization.job import Dense, Operand, tensors_of
from quantization.noise import Noise
from quantization.operands import COLUMNS, ROWS, G, LinearJobs, multiply, prepare, values_of
from quantization.operands.forms import ROLES
from quantization.spec import LinearRecipe

CARRIERS = ("bf16", "fp8")
COPY = "copy"
DTYPE = torch.bfloat16  # of the products
QUANTIZERS = {letter: (role.row, role.column) for letter, role in ROLES.items()}
Call = Callable[[], object]


def recipe_of(model: str, carrier: str) -> LinearRecipe:
    config = load_config(method_config(model, "tetrajet"), [f"quant.carrier={carrier}"], source="the command line")
    return resolve(config.quant)


def quantizers_of(recipe: LinearRecipe, matrices: Mapping[str, Tensor]) -> dict[str, Call]:
    """By matrix, what makes its two operands and its sums."""
    jobs, noise = LinearJobs(recipe, matrices["W"].shape), Noise.from_seed(0, matrices["X"].device)
    lost = torch.zeros((), dtype=torch.int64, device=matrices["X"].device)
    return {
        letter: functools.partial(prepare, x, jobs.of(letter, x, DTYPE, sums=letter == G), noise, lost=lost)
        for letter, x in matrices.items()
    }


def products_of(operands: Mapping[str, Operand], matrices: Mapping[str, Tensor]) -> dict[str, Call]:
    """The products of a layer, without a bias, of operands by the names of their quantizers."""
    results = {
        "output": ("q1", "q2", (COLUMNS, COLUMNS), DTYPE),
        "grad_input": ("q3", "q4", (COLUMNS, ROWS), matrices["X"].dtype),
        "grad_weight": ("q5", "q6", (ROWS, ROWS), matrices["W"].dtype),
    }
    return {
        name: functools.partial(multiply, operands[a], operands[b], over, DTYPE, dtype)
        for name, (a, b, over, dtype) in results.items()
    }


def bytes_of(value: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(value))


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=50)
    parser.add_argument("--models", nargs="+", default=["deit_base"], choices=WIDTH)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    options, device = parse(parser, argv)
    results = Results("operands", options, device)

    def record(case: str, calls: Mapping[str, Call], work: Mapping[str, float], unit: str) -> None:
        """work: by variant, how many of `unit` times seconds a call is worth."""
        samples = take_turns(calls, device, options, kernels=True)
        baselines = dict.fromkeys(calls, next(iter(calls)))
        results.add(case, shape, samples, baselines, rate=lambda v, seconds: work[v] / seconds, rate_unit=unit)

    for model in options.models:
        tokens, width = (197, 64) if options.quick else (TOKENS[model], WIDTH[model])
        for name in options.layers:
            inputs, outputs, x_dtype = LAYERS[name]
            inputs, outputs = inputs * width, outputs * width
            layer, shape = f"{model} {name}", f"{tokens} tokens {inputs}->{outputs}"
            torch.manual_seed(0)
            matrices = {
                "X": torch.randn(tokens, inputs, device=device, dtype=x_dtype),
                "W": 0.02 * torch.randn(outputs, inputs, device=device),
                "G": 1e-3 * torch.randn(tokens, outputs, device=device, dtype=DTYPE),
            }
            quantizers = {carrier: quantizers_of(recipe_of(model, carrier), matrices) for carrier in CARRIERS}
            operands: dict[str, dict[str, Operand]] = {carrier: {} for carrier in CARRIERS}
            for letter, x in matrices.items():
                calls: dict[str, Call] = {COPY: functools.partial(torch.empty_like(x).copy_, x)}
                gigabytes = {COPY: 2 * bytes_of(x) / 1e9}
                for carrier in CARRIERS:
                    calls[carrier] = quantizers[carrier][letter]
                    pair = calls[carrier]()[:2]
                    operands[carrier].update(zip(QUANTIZERS[letter], pair, strict=True))
                    gigabytes[carrier] = bytes_of([x, *map(tensors_of, pair)]) / 1e9
                record(f"{layer} {letter}", calls, gigabytes, "GB/s")

            packed = operands["bf16"]["q6"]
            numbers = values_of(packed, DTYPE)
            operands["bf16"]["q6"] = Dense(numbers)
            calls = {COPY: functools.partial(torch.empty_like(numbers).copy_, numbers)}
            calls["bf16"] = functools.partial(values_of, packed, DTYPE)
            gigabytes = {COPY: 2 * bytes_of(numbers) / 1e9, "bf16": bytes_of([tensors_of(packed), numbers]) / 1e9}
            record(f"{layer} X unpacked", calls, gigabytes, "GB/s")

            products = {carrier: products_of(operands[carrier], matrices) for carrier in CARRIERS}
            for product in products["bf16"]:
                calls = {carrier: products[carrier][product] for carrier in CARRIERS}
                record(f"{layer} {product}", calls, dict.fromkeys(calls, 2e-12 * tokens * inputs * outputs), "TFLOP/s")


if __name__ == "__main__":
    command(main)
