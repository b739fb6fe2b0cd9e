"""What the methods against weight oscillation have in common: which is active, mistakes, resuming, two processes.

Each has a file of its own beside: test_qema.py, test_qramping.py, test_dampen.py, test_freeze.py.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import before_step, differences, exit_code, killed, outcome, replace, tiny, train
from processes import run_in_two
from stabilizer_helpers import FLAGS, KINDS, SMALL, block, build, last, layer_of, normal, stabilized
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import engine
import main
from config import UserError, load_config
from engine import Run
from quantization import LinearRecipe, build_recipe
from quantization.stabilizers import STABILIZERS, QRampingAdamW, Stabilizer

pytestmark = pytest.mark.usefixtures("in_this_process")


# ---------------------------------------------------------------------------------------------------------------------
# Which one, and errors
# ---------------------------------------------------------------------------------------------------------------------


def test_exactly_one_is_active_by_construction() -> None:
    keys = {kind: set(type(build(kind, layer_of(block())).cfg).model_fields) - {"kind"} for kind in STABILIZERS}
    assert set(keys) == set(FLAGS) and all(keys[kind] for kind in KINDS) and not keys["none"]
    for kind in STABILIZERS:
        assert type(build(kind, layer_of(block()))) is STABILIZERS[kind]
        for key in set().union(*keys.values()):
            overrides = [f"stabilizer.kind={kind}", f"stabilizer.{key}=1"]
            if key in keys[kind] and key not in ("decay", "start"):  # in which 1 is out of range
                load_config(overrides=overrides)
            elif key not in keys[kind]:
                with pytest.raises(UserError, match=f"{key} does not apply while stabilizer.kind is {kind}"):
                    load_config(overrides=overrides)
    with pytest.raises(UserError, match="input should be one of 'none', 'qema', 'qramping', 'dampen', 'freeze'"):
        load_config(overrides=["stabilizer.kind=[qema, freeze]"])


def test_keys_of_another_kind_end_the_run_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "both.yaml"
    config.write_text("quant: {scheme: mx}\nstabilizer: {kind: qema, decay: 0.9, k1: 16}\n")
    assert exit_code(["--config", str(config), *tiny(tmp_path / "run")]) == 2
    said = "stabilizer.k1 does not apply while stabilizer.kind is qema"
    assert capsys.readouterr().err == f"error: {config}: {said}.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stabilizer_needs_weights_with_one_quantized_value(kind: str) -> None:
    with pytest.raises(ValueError, match=f"stabilizer {kind} works on weights in MXFP4, and the model has none"):
        build(kind, nn.Linear(32, 1))
    recipes = (build_recipe(("q1", "q3", "q4", "q5", "q6")), build_recipe(forward="stochastic"), LinearRecipe())
    for recipe in recipes:
        with pytest.raises(ValueError, match=f"stabilizer {kind} needs q2 on, with a nearest rounding"):
            build(kind, layer_of(block()), layer_of(block(), recipe))
        build("none", layer_of(block(), recipe))
    build(kind, layer_of(block()), layer_of(block(), build_recipe(("q2",), forward="nearest_away")))


MISTAKES = {
    "not quantized": ("none", [], "works on weights in MXFP4, and the model has none"),
    "int4": ("int4", [], "works on weights in MXFP4, and the model has none"),
    "q2 off": ("mx", ["--quant.active", "[q1, q3]"], "needs q2 on, with a nearest rounding"),
    "q2 stochastic": ("mx", ["--quant.rounding.forward", "stochastic"], "needs q2 on, with a nearest rounding"),
}


@pytest.mark.parametrize(("scheme", "flags", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_a_stabilizer_cannot_work_on_is_the_user_s_mistake(
    scheme: str, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny(tmp_path / "run", "--quant.scheme", scheme, *flags, "--stabilizer.kind")
    for kind in ("qema", "freeze"):
        assert exit_code([*argv, kind]) == 2
        err = f"error: stabilizer {kind} {said}; see quant and stabilizer in the configuration.\n"
        assert capsys.readouterr().err == err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("opt", ["sgd", "adam", "lookahead_adamw"])
def test_qramping_works_with_adamw_alone(opt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(tiny(tmp_path / "run", "--quant.scheme", "mx", *stabilized("qramping"), "--opt", opt)) == 2
    said = f"The optimizer {opt} cannot be made: qramping changes AdamW and cannot work with the optimizer {opt};"
    assert capsys.readouterr().err.startswith(f"error: {said}")
    stabilizer = build("qramping", layer_of(block()))
    assert stabilizer.optimizer_name("adamw") == "qrampingadamw"
    assert build("qema", layer_of(block())).optimizer_name(opt) == opt  # the control: others take any


# ---------------------------------------------------------------------------------------------------------------------
# All of them: resuming, accumulation, processes
# ---------------------------------------------------------------------------------------------------------------------


def acts(kind: str, state: dict[str, Any]) -> bool:
    """Whether the checkpoint of a run shows that its stabilizer has been at work."""
    if kind == "qema":
        return any(
            not torch.equal(state["model"][key], state["model"][key.replace("shadow", "weight")])
            for key in state["model"]
            if key.endswith("shadow")
        )
    if kind == "qramping":
        ramping = state["optimizer"]["ramping"]
        return bool((ramping["period"] > 1).any() and (ramping["count"] > 0).any() and ramping["grad_sum"].any())
    if kind == "freeze":
        return any(s["frozen"].any() for s in state["stabilizer"].values())
    return state["stabilizer"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_after_its_first_epoch_goes_on_bit_for_bit(
    kind: str, straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    killed(monkeypatch, folder, 4, *SMALL, *FLAGS[kind])
    stopped = last(folder)
    assert (stopped["epoch"], stopped["step"]) == (1, 0)
    train(folder, *SMALL, *FLAGS[kind], "--resume", "auto")
    whole = outcome(straight(kind))
    assert differences(whole, outcome(folder)) == []
    assert differences(stopped["model"], whole["last.pt"]["model"])
    # The control: it is at work in what is compared, and another run than without it.
    assert acts(kind, stopped) and acts(kind, whole["last.pt"])
    weights = [key for key in whole["last.pt"]["model"] if not key.endswith("shadow")]
    plain = last(straight("none"))["model"]
    assert any(not torch.equal(whole["last.pt"]["model"][key], plain[key]) for key in weights)


def test_a_run_killed_in_a_rehearsal_goes_on_bit_for_bit(
    straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 7 as the detection at step 3 rehearses it; saved last was step 3, amid accumulations."""
    flags = [*SMALL, *FLAGS["qramping"], "--save-every", "3"]
    killed(monkeypatch, tmp_path / "run", 7, *flags, rehearsing=True)
    state = last(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (0, 3) and acts("qramping", state)
    train(tmp_path / "run", *flags, "--resume", "auto")
    assert differences(outcome(straight("qramping")), outcome(tmp_path / "run")) == []


@pytest.mark.parametrize(("kind", "part"), [("qramping", "ramping"), ("freeze", "stabilizer"), ("qema", "shadow")])
def test_what_a_stabilizer_saves_is_needed(
    kind: str, part: str, straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of resuming: without its saved state a run goes on otherwise."""
    load = main.load_checkpoint

    def without(path: Path) -> dict[str, Any]:
        state = load(path)
        if part == "ramping":
            state["optimizer"]["ramping"] = {k: v.clamp(max=1) for k, v in state["optimizer"]["ramping"].items()}
        elif part == "stabilizer":
            state["stabilizer"] = {
                name: {k: torch.zeros_like(v) for k, v in s.items()} for name, s in state["stabilizer"].items()
            }
        else:
            shadows = [key for key in state["model"] if key.endswith("shadow")]
            state["model"].update({key: state["model"][key.replace("shadow", "weight")] for key in shadows})
        return state

    killed(monkeypatch, tmp_path / "run", 4, *SMALL, *FLAGS[kind])
    replace(monkeypatch, main.load_checkpoint, without)
    train(tmp_path / "run", *SMALL, *FLAGS[kind], "--resume", "auto")
    assert differences(last(straight(kind))["model"], last(tmp_path / "run")["model"])


@pytest.mark.parametrize("batch_size", [8, 4])
def test_a_stabilizer_is_called_once_an_optimizer_step(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 x 8 samples or 2 x 4: as many updates."""
    called: list[tuple[str, int]] = []
    passes: list[int] = []

    class Counting(Stabilizer):
        def before_step(self, step: int, trainer: Any) -> None:
            called.append(("before", step))

        def after_backward(self, step: int) -> None:
            assert all(layer.weight.grad is not None for layer in self.layers.values())
            called.append(("gradients", step))

        def after_step(self, step: int) -> None:
            assert all(layer.weight.grad is None for layer in self.layers.values())
            called.append(("after", step))

    def count(run: Run) -> None:
        run.model.register_forward_hook(lambda model, *_: passes.append(1) if model.training else None)

    monkeypatch.setitem(STABILIZERS, "qema", Counting)
    replace(monkeypatch, engine.train_step, before_step(0, count))
    train(tmp_path / "run", *SMALL, *FLAGS["qema"], "--batch-size", str(batch_size))
    assert len(passes) == 8 * 8 // batch_size
    assert called == [(point, step) for step in range(8) for point in ("before", "gradients", "after")]


def a_step(kind: str, device: str = "cpu") -> Callable[[int], None]:
    """A step's calls of a stabilizer on two layers, with gradients that are there; its optimizer where it has one."""
    layers = [layer_of(normal(40, 72)), layer_of(normal(72, 40, seed=1))]
    layers = layers if device == "cpu" else [layer.to(device) for layer in layers]  # tensors without values cannot move
    stabilizer = build(kind, *layers, **({} if kind in ("qema", "qramping") else {"start": 0}))
    optimizer = None
    if kind == "qramping":
        optimizer = QRampingAdamW([layer.weight for layer in layers], fused=device == "cuda" or None)
        stabilizer.bind(optimizer)

    def step(number: int) -> None:
        for layer in layers:
            layer.weight.grad = torch.ones_like(layer.weight)
        stabilizer.after_backward(number)
        if optimizer is not None:
            optimizer.step()
        stabilizer.after_step(number)
        assert set(stabilizer.figures()) == {"dampen": {"dampen_loss"}, "freeze": {"frozen_share"}}.get(kind, set())

    return step


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_decides_what_a_step_computes(kind: str) -> None:
    """Tensors without values go through it, so that on a GPU nothing waits for them."""
    a_step(kind)(1)  # fills the tables of formats with values, which later tests need
    with FakeTensorMode(allow_non_fake_inputs=True):
        a_step(kind)(1)
        with pytest.raises(DataDependentOutputException):  # the control
            normal(3).sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_synchronise(kind: str) -> None:
    step = a_step(kind, "cuda")
    step(1)  # the first one brings tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key], f"{name}/{key}")


def unlike(state: dict[str, Any]) -> tuple[list[str], int]:
    """The tensors that differ between the two processes, and how many there are."""
    found, count = [], 0
    for name, value in tensors(state):
        mine = value.detach().contiguous().reshape(-1).view(torch.uint8).clone()
        theirs = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine)
        found += [] if torch.equal(*theirs) else [name]
        count += 1
    return found, count


def compare_processes(folder: Path) -> None:
    """Train what plan.json says; report.json says what differs between the two. For a process that then ends."""
    # One group serves all runs.
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    dist.init_process_group = functools.cache(dist.init_process_group)
    runs: list[Run] = []
    train = main.train
    main.train = lambda run, max_steps=None: (runs.append(run), train(run, max_steps))
    report: dict[str, Any] = {}
    for kind, argv in json.loads((folder / "plan.json").read_text()).items():
        main.main(argv)
        run = runs.pop()
        found, count = unlike(run.state_dict())
        report[kind] = {"unlike": found, "tensors": count, "noise": unlike({"state": run.model.noise.state})[0]}
        report[kind]["steps"] = run.global_step
    rank, one = dist.get_rank(), torch.ones(3)
    one[1] += rank * 2.0**-23
    report["control"] = unlike({"a": torch.ones(2), "b": one})[0]
    if rank == 0:
        (folder / "report.json").write_text(json.dumps(report))
    del run  # a model that outlives the group it was distributed over can abort the process at its exit
    gc.collect()
    leave()


def test_two_processes_keep_the_same_state(tmp_path: Path) -> None:
    """Each process has data, dropout and quantization noise of its own; weights, moments, shadows, periods,
    accumulations and frozen weights are the same bits on both."""
    flags = {kind: [*SMALL, *FLAGS[kind], "--epochs", "1"] for kind in KINDS}
    flags["dampen"] += ["--stabilizer.start", "0"]
    flags["freeze"] += ["--stabilizer.start", "0"]
    plan = {kind: tiny(tmp_path / kind, *flags[kind]) for kind in KINDS}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run_in_two(compare_processes, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("control") == ["/b"]
    assert set(report) == set(KINDS)
    for kind, found in report.items():
        assert found["unlike"] == [] and found["tensors"] > 50, kind
        assert found["noise"] == ["/state"]  # the control: what is to differ does
        assert found["steps"] == 4
        assert acts(kind, last(tmp_path / kind)), kind
