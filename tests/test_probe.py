"""The probe: it changes nothing in a training, and what it records are the statistics of Appendix A."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import column, differences, exit_code, in_two_processes, killed, outcome, replace, tiny, train, undisturbed
from quick import some
from stabilizer_helpers import FLAGS, SMALL, captured
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import engine
from engine import Run
from quantization import PRESETS, Int4Linear, LinearRecipe, QuantizerSpec, build_recipe, convert_linears
from quantization.formats import FORMATS
from quantization.layers import int4
from quantization.oscillation import (
    OSCILLATING,
    latent_weight,
    oscillation_ratio,
    quantization_confidence,
    rate_of_change,
    signed_grid,
)
from quantization.stabilizers import Plan
from quantization.watch.probe import CONFIDENCE_BINS, OscillationProbe, Probe
from results.tables import read_table_run

METHODS = {
    **FLAGS,
    "full_precision": ["--quant.scheme", "none"],
    "int4": ["--quant.scheme", "int4"],
    "stochastic_forward": ["--quant.rounding.forward", "stochastic"],
    "without_q2": ["--quant.active", "q1", "q3", "q4", "q5", "q6"],
}
# Of the four steps of an epoch the last three.
PROBES = ["--probes", "--probes.steps", "3", "--probes.images", "2", "--probes.trajectories", "5"]


@pytest.fixture(scope="module", autouse=True)
def _process() -> Iterator[None]:
    with undisturbed():
        yield


def recordings(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every recording of a run, by the name of its file; loaded without pickle."""
    found = {}
    for path in sorted((folder / "probes").iterdir()):
        with np.load(path, allow_pickle=False) as arrays:
            found[path.name] = dict(arrays)
    return found


def same_recordings(one: Path, other: Path) -> bool:
    a, b = recordings(one), recordings(other)
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(np.array_equal(a[name][k], b[name][k]) for k in a[name]) for name in a
    )


def without_probe(folder: Path) -> dict[str, Any]:
    """All that a run shares with the same one without a probe."""
    found = outcome(folder)
    for name in ("last.pt", "best.pt"):
        del found[name]["probe"]
    for line in found["metrics"]:
        for name in ("r_w", "r_WQ", "r_Y", "r_Y_block", "oscillating", "oscillating_share", "confidence"):
            line["data"].pop(f"eval.{name}", None)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# It changes nothing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", some(METHODS, every=2))
def test_a_training_is_the_same_bit_for_bit_with_the_probe_on_or_off(method: str, tmp_path: Path) -> None:
    off = train(tmp_path / "off", *SMALL, *METHODS[method])
    on = train(tmp_path / "on", *SMALL, *METHODS[method], *PROBES)
    assert len(recordings(on)) == 2 and not (off / "probes").exists()
    assert differences(without_probe(off), without_probe(on)) == []


def test_a_probe_that_left_its_mark_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one that leaves the model in eval mode."""
    off = train(tmp_path / "off", *SMALL)
    monkeypatch.setattr(nn.Module, "eval", lambda self: self.train(False))
    monkeypatch.setattr(OscillationProbe, "output", lambda self, _=None: (self.model.eval()(self.images),) * 3)
    on = train(tmp_path / "on", *SMALL, *PROBES)
    assert any(where.startswith("/last.pt/model") for where in differences(without_probe(off), without_probe(on)))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run with a probe, by its method; trained once."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def run(method: str) -> Path:
        there = (folder / method).exists()
        return folder / method if there else train(folder / method, *SMALL, *METHODS[method], *PROBES)

    return run


@pytest.mark.parametrize("step", some([7, 2], every=2))  # of the recordings over steps 1 to 3 and 5 to 7
@pytest.mark.parametrize("method", some(["qramping", "none", "int4", "qema"], every=2))
def test_a_run_killed_in_mid_recording_goes_on_bit_for_bit(
    method: str, step: int, uninterrupted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training, and the recordings too: their sums are in the checkpoint."""
    flags = [*SMALL, *METHODS[method], *PROBES, "--save-every", "1"]
    killed(monkeypatch, tmp_path / "run", step, *flags)
    resumed = train(tmp_path / "run", *flags, "--resume", "auto")
    assert differences(outcome(uninterrupted(method)), outcome(resumed)) == []
    assert same_recordings(uninterrupted(method), resumed)


@pytest.mark.parametrize("step", some([6, 2], every=2))
@pytest.mark.parametrize("before", [[], PROBES], ids=["off_then_on", "on_then_off"])
def test_a_resumed_run_may_switch_it(
    before: list[str], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = train(tmp_path / "off", *SMALL)
    killed(monkeypatch, tmp_path / "run", step, *SMALL, *before, "--save-every", "1")
    after = [] if before else PROBES
    resumed = train(tmp_path / "run", *SMALL, *after, "--resume", "auto", "--save-every", "1")
    assert differences(without_probe(off), without_probe(resumed)) == []
    if after:  # the recording that the run was resumed in covers the steps that were left of it
        assert recordings(resumed)["epoch_0002.npz"]["steps"] == min(3, 8 - step)


def test_a_run_stopped_behind_a_recording_still_reports_it(
    uninterrupted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, step = uninterrupted("none"), engine.train_step

    def last_of_the_epoch(run: Run, batches: Any) -> dict[str, float]:
        if run.global_step == 3:
            run.stop._remember(15, None)
        return step(run, batches)

    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, last_of_the_epoch)
        assert exit_code(tiny(tmp_path / "run", *SMALL, *PROBES)) == 128 + 15
    resumed = train(tmp_path / "run", *SMALL, *PROBES, "--resume", "auto")
    assert column(resumed, "eval.r_WQ", words=1) == column(straight, "eval.r_WQ", words=1)
    assert same_recordings(straight, resumed)


def test_two_processes_record_the_same_and_train_as_without_it(tmp_path: Path) -> None:
    flags = [*SMALL, "--quant.rounding.forward", "stochastic"]  # even noise is the same in a probe
    runs = [
        {"argv": tiny(tmp_path / "off", *flags)},
        {"argv": tiny(tmp_path / "on", *flags, *PROBES)},
        {"argv": tiny(tmp_path / "qema", *SMALL, *FLAGS["qema"], *PROBES)},
    ]
    off, *on = in_two_processes(tmp_path, runs)
    assert [report["code"] for report in (*off, *on[0], *on[1])] == [0] * 6
    assert off[0]["weights"] == off[1]["weights"] == on[0][0]["weights"]
    assert off[0]["noise"] != off[1]["noise"]
    for first, second in on:
        assert len(first["recordings"]) == 2 and first["recordings"] == second["recordings"]
    assert len(recordings(tmp_path / "on")) == 2


def test_a_forward_pass_of_it_puts_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = captured(monkeypatch, tmp_path, *SMALL, *PROBES)
    model, clock = run.model.train(), run.model.noise
    model.blocks[0].mlp.eval()  # part of a model may be in another mode
    model(torch.randn(2, 3, 8, 8))
    modes = [module.training for module in model.modules()]
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    noise = clock.rank, clock.state.clone(), clock.next_position.clone()
    first, second = run.probe.output(), run.probe.output()
    assert all(map(torch.equal, first, second)) and not any(x.requires_grad for x in first)
    assert modes == [module.training for module in model.modules()] and len(set(modes)) == 2
    assert draws[0] == random.getstate() and draws[1] == np.random.get_state()[1].tolist()
    assert torch.equal(draws[2], torch.get_rng_state())
    assert noise[0] == clock.rank and all(map(torch.equal, noise[1:], (clock.state, clock.next_position)))
    assert not any(module._forward_hooks for module in model.modules())


class Reads(TorchFunctionMode):
    """Counts the values that are read off tensors: on a GPU each of them would wait for the device."""

    NAMES = ("cpu", "numpy", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__array__")
    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["none", "qema", "int4", "full_precision"])
def test_it_waits_for_no_value_but_at_the_end_of_a_recording(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = captured(monkeypatch, tmp_path, *SMALL, *METHODS[method], *PROBES, "--epochs", "1")
    run.model.train()(torch.randn(2, 3, 8, 8))  # INT4 finds its steps in the first batch
    probe = run.probe
    probe.before_step(1)  # opens the recording and chooses the weights to follow
    with Reads() as reads:
        for step in (1, 2):
            probe.before_step(step)
            assert probe.after_step(step) is None
    assert reads.count == 0
    probe.before_step(3)
    with Reads() as reads:  # the control
        assert probe.after_step(3) is not None
    assert reads.count > 0


# ---------------------------------------------------------------------------------------------------------------------
# What it records
# ---------------------------------------------------------------------------------------------------------------------


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[list[dict[str, Any]], Run]:
    """What a run with a probe goes through: before its first step and after each, the master weights and what they
    are quantized to, layer by layer, the output of the block, and that for what it read at each moment so far."""
    seen: list[dict[str, Any]] = []
    runs: list[Run] = []
    read: list[Tensor] = []
    step = engine.train_step

    def look(run: Run) -> None:
        layers = run.probe.layers.values()
        block, output = run.model.blocks[-1], []
        handle = block.register_forward_hook(lambda _m, x, y: (read.append(x[0].clone()), output.append(y))[1])
        training = run.model.training
        with torch.no_grad():
            run.model.eval()(run.probe.images)
            handle.remove()
            of_read = [block(x) for x in read]
        run.model.train(training)
        quantized = run.probe.views and [layer.quantized_weight().clone() for layer in layers]
        w = [x.weight.detach().clone() for x in layers]
        seen.append({"w": w, "q": quantized, "y": output[0], "of_read": of_read})

    def train_step(run: Run, batches: Any) -> dict[str, float]:
        if not seen:
            runs.append(run)
            look(run)
        figures = step(run, batches)
        look(run)
        return figures

    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, train_step)
        train(folder, *flags)
    return seen, runs[0]


@pytest.mark.parametrize("method", ["none", "qema", "dampen"])
def test_a_recording_holds_the_statistics_of_its_steps(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, run = watched(tmp_path, monkeypatch, *SMALL, *METHODS[method], *PROBES)
    for epoch, steps in ((1, seen[1:5]), (2, seen[5:9])):  # the weights that three steps start from and lead to
        arrays = recordings(tmp_path)[f"epoch_000{epoch}.npz"]
        assert (arrays["epoch"], arrays["steps"], arrays["first_step"]) == (epoch, 3, 4 * epoch - 3)
        w = [torch.stack(ws) for ws in zip(*(s["w"] for s in steps), strict=True)]
        q = [torch.stack(qs) for qs in zip(*(s["q"] for s in steps), strict=True)]
        assert arrays["r_w"].tolist() == pytest.approx([rate_of_change(x).item() for x in w], rel=1e-5)
        assert arrays["r_WQ"].tolist() == pytest.approx([rate_of_change(x).item() for x in q], rel=1e-5)
        y = torch.stack([s["y"] for s in steps])
        assert arrays["r_Y"].item() == pytest.approx(rate_of_change(y).item(), rel=1e-5)
        first = 4 * epoch - 3
        y = torch.stack([s["of_read"][first] for s in steps])
        assert arrays["r_Y_block"].item() == pytest.approx(rate_of_change(y).item(), rel=1e-5)
        assert arrays["r_Y_block"] != arrays["r_Y"]
        ratios = [oscillation_ratio(a, b) for a, b in zip(w, q, strict=True)]
        assert arrays["oscillating"].tolist() == [int((r > OSCILLATING).sum()) for r in ratios]
        assert arrays["numel"].tolist() == [r.numel() for r in ratios]
        assert arrays["layers"].tolist() == list(run.probe.layers) and str(arrays["block"]) == "blocks.0"

        latent = [latent_weight(x[-1], QuantizerSpec()).flatten().numpy() for x in w]
        counts = [np.histogram(x, arrays["latent_edges"])[0].tolist() for x in latent]
        assert arrays["latent_counts"].tolist() == counts
        confidence = [quantization_confidence(x[-1], QuantizerSpec()).flatten() for x in w]
        counts = [torch.histc(c, CONFIDENCE_BINS, 0, 1).sum().item() for c in confidence]
        assert arrays["confidence_counts"].sum(1).tolist() == counts
        assert arrays["confidence"].tolist() == pytest.approx([c.double().mean().item() for c in confidence])
        below = [(c < 0.5).sum().item() for c in confidence]
        assert arrays["confidence_counts"][:, : CONFIDENCE_BINS // 2].sum(1).tolist() == below
    for name, value in {
        "r_w": arrays["r_w"].mean(),
        "r_WQ": arrays["r_WQ"].mean(),
        "r_Y": arrays["r_Y"],
        "r_Y_block": arrays["r_Y_block"],
        "oscillating": arrays["oscillating"].sum(),
        "oscillating_share": arrays["oscillating"].sum() / arrays["numel"].sum(),
        "confidence": np.average(arrays["confidence"], weights=arrays["numel"]),
    }.items():
        assert column(tmp_path, f"eval.{name}", words=1)[-1] == pytest.approx(float(value), rel=1e-6)


def test_the_most_oscillating_weights_are_followed_through_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = watched(tmp_path, monkeypatch, *SMALL, *PROBES)
    first, last = recordings(tmp_path).values()
    assert not any(name.startswith("trajectory") for name in first)
    before = [
        oscillation_ratio(torch.stack([s["w"][n] for s in seen[1:5]]), torch.stack([s["q"][n] for s in seen[1:5]]))
        for n in range(4)
    ]
    finite = torch.cat([torch.where(r.isfinite(), r, 0.0).flatten() for r in before])
    layers, rows, columns = (last[f"trajectory_{name}"] for name in ("layer", "row", "column"))
    chosen = [before[n][i, j].item() for n, i, j in zip(layers, rows, columns, strict=True)]
    assert sorted(chosen) == sorted(finite.topk(5).values.tolist())
    assert last["trajectory_first_step"] == 4 and last["trajectory_latent"].shape == (5, 5)
    for k, (n, i, j) in enumerate(zip(layers, rows, columns, strict=True)):
        latent = [latent_weight(s["w"][n], QuantizerSpec())[i, j].item() for s in seen[4:9]]
        assert last["trajectory_latent"][:, k].tolist() == latent
        scales = [s["w"][n][i, j].item() / x for s, x in zip(seen[4:9], latent, strict=True)]
        quantized = [s["q"][n][i, j].item() / scale for s, scale in zip(seen[4:9], scales, strict=True)]
        assert last["trajectory_quantized"][:, k].tolist() == quantized
    assert set(np.abs(last["trajectory_quantized"]).flatten()) <= set(FORMATS["e2m1"].magnitudes)
    assert last["grid"].tolist() == signed_grid(FORMATS["e2m1"], torch.device("cpu")).tolist()
    assert (np.diff(last["trajectory_ratio"]) <= 0).all()


def test_a_run_of_one_epoch_follows_the_weights_nearest_to_a_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = watched(tmp_path, monkeypatch, *SMALL, *PROBES, "--epochs", "1")
    arrays = recordings(tmp_path)["epoch_0001.npz"]
    confidence = torch.cat([quantization_confidence(w, QuantizerSpec()).flatten() for w in seen[0]["w"]])
    thresholds = (arrays["grid"][1:] + arrays["grid"][:-1]) / 2
    distance = np.abs(arrays["trajectory_latent"][0][:, None] - thresholds).min(1)
    assert distance.max() <= confidence.topk(5, largest=False).values.max().item()  # no cell is wider than its MaxDist


def test_without_quantized_weights_there_are_the_rates_of_weights_and_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("full_precision", "without_q2", "stochastic_forward"):
        seen, _ = watched(tmp_path / method, monkeypatch, *SMALL, *METHODS[method], *PROBES)
        arrays = recordings(tmp_path / method)["epoch_0002.npz"]
        expected = {"r_w", "r_Y", "r_Y_block", "steps", "first_step", "layers", "block", "epoch"}
        assert arrays.keys() == expected and len(arrays["layers"]) == 4
        w = [torch.stack(ws) for ws in zip(*(s["w"] for s in seen[5:9]), strict=True)]
        assert arrays["r_w"].tolist() == pytest.approx([rate_of_change(x).item() for x in w], rel=1e-5)
        data = {k for line in outcome(tmp_path / method)["metrics"] if len(line["step"]) == 1 for k in line["data"]}
        assert {"eval.r_w", "eval.r_Y", "eval.r_Y_block"} <= data and not {"eval.r_WQ", "eval.confidence"} & data


def test_int4_is_watched_in_the_basis_that_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = watched(tmp_path, monkeypatch, *SMALL, *METHODS["int4"], *PROBES)
    arrays = recordings(tmp_path)["epoch_0002.npz"]
    w, q = (torch.stack([s[name][0] for s in seen[5:9]]) for name in ("w", "q"))
    # The rotation keeps norms; channels are padded to 32, and Q(w) is cut back to 16 of them.
    assert arrays["r_w"][0] == pytest.approx(rate_of_change(w).item(), rel=1e-4)
    assert arrays["numel"][0] == 48 * 32 and rate_of_change(q).item() > 0
    layer = next(iter(run.probe.layers.values()))
    assert isinstance(layer, Int4Linear)
    latent = (int4.basis(layer.weight.detach(), layer.recipe) / layer.step_w).detach()
    counts = np.histogram(latent.clamp(-8, 7.99).numpy(), arrays["latent_edges"])[0]
    assert np.abs(counts - arrays["latent_counts"][0]).sum() <= 4  # division may round over an edge
    assert arrays["grid"].tolist() == list(range(-8, 8))
    assert set(arrays["trajectory_quantized"].flatten()) <= set(range(-8, 8))


# ---------------------------------------------------------------------------------------------------------------------
# When, of what, and where to
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "epochs"), some([(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (9, [4, 5]), (3, [3, 4, 5])], every=2, many=True)
)
def test_it_records_every_so_many_epochs_and_the_last_two(every: int, epochs: list[int], tmp_path: Path) -> None:
    train(tmp_path, *SMALL, *PROBES, "--epochs", "5", "--probes.every", str(every))
    assert [int(arrays["epoch"]) for arrays in recordings(tmp_path).values()] == epochs
    logged = [line["step"][0] + 1 for line in outcome(tmp_path)["metrics"] if "eval.r_WQ" in line["data"]]
    assert logged == epochs


def test_t0_is_at_most_an_epoch(tmp_path: Path) -> None:
    train(tmp_path, *SMALL, *PROBES, "--probes.steps", "200")
    assert [(int(a["first_step"]), int(a["steps"])) for a in recordings(tmp_path).values()] == [(0, 4), (4, 4)]


def probe_of(model: nn.Module, size: int, block: int | None = None) -> OscillationProbe:
    cfg = SimpleNamespace(steps=1, every=1, block=block, images=1, trajectories=1)
    images = torch.zeros(1, 3, size, size)
    return OscillationProbe(cfg, model, Plan(1, 1), images=images, autocast=torch.no_grad, position=0)


@pytest.mark.parametrize(
    ("name", "kwargs", "block", "expected"),
    [
        ("deit_tiny_patch16_224", {}, None, "blocks.8"),
        ("deit_tiny_patch16_224", {}, 12, "blocks.11"),
        ("deit_tiny_patch16_224", {"depth": 2}, None, "blocks.1"),
        ("swin_tiny_patch4_window7_224", {}, None, "layers.2.blocks.4"),  # stages of 2, 2, 6 and 2
    ],
)
def test_the_block_is_the_ninth_of_all_stages_or_the_last_of_fewer(
    name: str, kwargs: dict[str, Any], block: int | None, expected: str
) -> None:
    model = timm.create_model(name, img_size=224, num_classes=2, **kwargs)
    convert_linears(model, PRESETS["tetrajet"])
    probe = probe_of(model, 224, block)
    assert probe.block_name == expected
    assert len(probe.layers) == 4 * sum(".attn.proj" in name for name in probe.layers)
    if expected == "layers.2.blocks.4":
        assert probe.output()[0].shape == (1, 14, 14, 384)


@pytest.mark.parametrize("scale_rule", ["truncation_free", "floor"])
@pytest.mark.parametrize("element", ["e2m1", "e3m0"])
def test_every_latent_weight_is_in_the_histogram_and_every_threshold_on_its_edges(
    element: str, scale_rule: Any
) -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=2)
    convert_linears(model, build_recipe(activation_weight=element, scale_rule=scale_rule))
    arrays = probe_of(model, 224)._histograms()
    layers = [model.blocks[0].attn.qkv, model.blocks[0].attn.proj, model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2]
    assert arrays["latent_counts"].sum(1).tolist() == [layer.weight.numel() for layer in layers]
    largest = max(latent_weight(x.weight, x.recipe.q2).abs().max().item() for x in layers)
    assert largest <= arrays["latent_edges"][-1] < 2 * largest + 1
    grid = signed_grid(FORMATS[element], torch.device("cpu")).numpy()
    assert set((grid[1:] + grid[:-1]) / 2) <= set(arrays["latent_edges"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--probes", "--probes.block", "3"], "probes.block is 3, and the model has 2 transformer blocks; see probes"),
        (["--probes.steps", "0"], "probes.steps is 0: input should be greater than or equal to 1"),
        (["--probes.blocks", "3"], "There is no flag --probes.blocks; did you mean --probes.block?"),
    ],
)
def test_a_mistake_is_one_sentence(flags: list[str], sentence: str, tmp_path: Path, capsys: Any) -> None:
    assert exit_code(tiny(tmp_path / "run", *flags)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_without_transformer_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="probes watch the linears of transformer blocks, and the model has none"):
        probe_of(nn.Sequential(nn.Linear(3, 3)), 8)


def test_it_is_off_unless_asked_for_and_in_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(captured(monkeypatch, tmp_path / "a", *SMALL).probe) is Probe
    run = train(tmp_path / "b", *SMALL)
    replace(monkeypatch, OscillationProbe, None)
    assert exit_code(tiny(run, *SMALL, *PROBES, "--resume", str(run / "last.pt"), "--eval")) == 0


def test_tensorboard_has_its_figures_its_layers_and_its_histograms(uninterrupted: Callable[[str], Path]) -> None:
    folder = uninterrupted("none")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert {"eval/r_w", "eval/r_WQ", "eval/r_Y", "eval/oscillating_share", "eval/confidence"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("oscillating_share/blocks.0.mlp.fc1")] == [4, 8]
    last = recordings(folder)["epoch_0002.npz"]
    histogram = events.Histograms("probe/confidence")[-1].histogram_value
    assert histogram.num == last["numel"].sum() and max(histogram.bucket_limit) == 1.0
    assert sum(histogram.bucket) == last["numel"].sum()


def test_table_3_reads_its_figures(uninterrupted: Callable[[str], Path]) -> None:
    folder = uninterrupted("qema")
    figures = read_table_run(folder).figures
    assert figures["r_WQ"] == column(folder, "eval.r_WQ", words=1)[-1]
    assert figures["r_Y"] == column(folder, "eval.r_Y", words=1)[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["none", "qema", "full_precision"])
def test_on_a_gpu_it_changes_nothing_either(method: str, tmp_path: Path) -> None:
    flags = [*SMALL, *METHODS[method], "--device", "cuda"]
    off, on = train(tmp_path / "off", *flags), train(tmp_path / "on", *flags, *PROBES)
    assert differences(without_probe(off), without_probe(on)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["none", "qema", "int4", "full_precision"])
def test_on_a_gpu_a_step_does_not_synchronise(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*SMALL, *METHODS[method], *PROBES, "--epochs", "1", "--device", "cuda"]
    run = captured(monkeypatch, tmp_path, *flags)
    run.model.train()(torch.randn(2, 3, 8, 8, device="cuda"))  # INT4 finds its steps in the first batch
    probe = run.probe
    probe.before_step(1)
    assert probe.after_step(1) is None  # the first one brings tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        probe.before_step(2)
        assert probe.after_step(2) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_moves_a_block_s_output_is_activations_unless_its_input_is_fixed() -> None:
    """Why r(Y), which is of fixed images, hardly hears of weights that oscillate."""
    recipe, moved = PRESETS["tetrajet"], {}
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name in ("q1", "q2"):
        torch.manual_seed(1)
        size = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
        model = timm.create_model("deit_tiny_patch16_224", **size).eval()
        convert_linears(model, LinearRecipe(**{name: getattr(recipe, name)}))
        block, seen = model.blocks[5], []
        block.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        with torch.no_grad():
            model(images)
            block(seen[0][0])
            assert torch.equal(seen[0][1], seen[1][1])  # nothing is drawn
            for layer in model.blocks.modules():
                if isinstance(layer, nn.Linear):
                    step = torch.randn(layer.weight.shape)
                    layer.weight += 5.3e-5 * layer.weight.norm() / step.norm() * step
            model(images)
            block(seen[0][0])
        (_, before), _, (_, of_images), (_, of_its_input) = seen
        moved[name] = [float((after - before).norm() / before.norm()) for after in (of_images, of_its_input)]
    assert moved["q1"][0] > 5 * moved["q2"][0] > 0
    assert 0 < moved["q1"][1] < 3 * moved["q2"][1]
