"""Training steps on a CUDA device by kernels and by the reference: layer by layer for 200, as a whole for 60."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F

from quantization import build_recipe, convert_linears
from quantization.backends import choose, reference
from quantization.backends.gpu import launch
from quantization.job import Job, Prepared

pytestmark = pytest.mark.gpu

STEPS, BATCH, CLASSES = 200, 64, 10
ALL, SHARE = 20, 4  # steps of which all is compared, and the share of the others', since the reference takes long
BY_REFERENCE = 60  # steps that it trains by itself


def train(carrier: str, steps: int, begin: Callable[[int], None] = lambda step: None) -> list[float]:
    """The losses of a small DeiT under TetraJet and bfloat16 autocast, on the same images whatever trains it."""
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=CLASSES, drop_path_rate=0.1
    ).cuda()
    convert_linears(model, build_recipe(carrier=carrier))
    model.noise.reseed(3, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    g = torch.Generator().manual_seed(1)
    images = torch.randn(4 * BATCH, 3, 32, 32, generator=g).cuda()
    labels = torch.randint(CLASSES, (4 * BATCH,), generator=g).cuda()
    losses = []
    for step in range(steps):
        begin(step)
        batch = slice(step % 4 * BATCH, (step % 4 + 1) * BATCH)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def checked(prepare: Callable, counts: dict[str, int]) -> Callable:
    """The kernels' `prepare` that does its work by the reference too and counts the tensors that differ in a bit."""

    def both(x: torch.Tensor, job: Job, *arguments: object) -> Prepared:
        ours = prepare(x, job, *arguments)
        counts["jobs"] += 1
        if counts["step"] >= ALL and (counts["jobs"] + counts["step"]) % SHARE:  # each job in turn, at every step some
            return ours
        theirs = reference.prepare(x, job, *arguments)
        if job.sums:  # of the bias gradient: float32, in another order
            error = 1e-5 * float(theirs.sums.abs().max())
            torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-4, atol=error)
        pairs = zip(*(job.flatten(prepared)[: -1 if job.sums else None] for prepared in (ours, theirs)), strict=True)
        for result, wanted in pairs:
            counts["tensors"] += 1
            counts["differing"] += not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (result, wanted)))
        return ours

    return both


@pytest.mark.parametrize("carrier", ["bf16", "fp8"])
def test_kernels_and_reference_make_the_same_operands_at_every_step(monkeypatch, carrier):
    counts = {"step": 0, "jobs": 0, "tensors": 0, "differing": 0}
    monkeypatch.setattr(launch, "prepare", checked(launch.prepare, counts))
    losses = train(carrier, STEPS, lambda step: counts.update(step=step))
    assert counts["jobs"] == STEPS * 8 * 3  # layers, and matrices of each: what stays in a share's turn of them
    assert counts["tensors"] >= (ALL + (STEPS - ALL) // SHARE) * 8 * 6 and counts["differing"] == 0
    assert losses[-1] < 0.5 * losses[0]

    monkeypatch.undo()
    monkeypatch.setattr(choose, "IN_LAYERS", "reference")
    by_reference = train(carrier, BY_REFERENCE)
    # Only bias gradients are summed in another order, from the first step on; steps of rounding make that grow.
    assert max(abs(a - b) for a, b in zip(losses[:10], by_reference[:10], strict=True)) < 1e-2
    means = [sum(curve[BY_REFERENCE - 20 : BY_REFERENCE]) / 20 for curve in (losses, by_reference)]
    assert abs(means[0] - means[1]) < 0.1 * losses[0]
