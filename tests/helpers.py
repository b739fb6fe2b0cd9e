"""Tiny runs of main.py for the tests of program and training: in this process, as a process, or in two of one group."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_in_two

import engine
import main
from engine import Run
from quantization.watch.probe import OscillationProbe, Recording
from record.checkpoint import load_checkpoint
from record.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent

# A DeiT of 32 channels and 2 blocks on 64 generated images of 8x8 pixels: 4 steps an epoch, which take 0.1 s.
TINY = {
    "--device": "cpu",
    "--input-size": "8",
    "--model.patch_size": "4",
    "--model.kwargs": "{embed_dim: 32, depth: 2, num_heads: 2}",
    "--data-set": "generated",
    "--data.num_images": "64",
    "--nb-classes": "4",
    "--global-batch": "16",
    "--num_workers": "0",
    "--lr": "0.1",
    "--epochs": "2",
    "--warmup-epochs": "0",
    "--log-every": "1",
    "--aa": "null",
}
# Nothing random but the initial weights and the images: what is left is arithmetic.
PLAIN = [
    "--drop-path",
    "0",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--smoothing",
    "0",
    "--warmup-epochs",
    "0",
    "--lr",
    "0.03",
]
# Everything random, and everything that has a state: TetraJet, drop path, dropout, mixup, moving average.
FULL = [
    "--quant.scheme",
    "mx",
    "--drop-path",
    "0.3",
    "--drop",
    "0.1",
    "--mixup",
    "0.8",
    "--cutmix",
    "1",
    "--repeated-aug",
]
FULL += ["--reprob", "0.5", "--model-ema", "--model-ema-decay", "0.9"]
# The stabilizers, and the other scheme.
QRAMPING = ["--stabilizer.kind", "qramping", "--stabilizer.detect_steps", "5"]  # over the end of an epoch of 4
METHODS = {
    "qema": ["--stabilizer.kind", "qema", "--stabilizer.decay", "0.8"],
    "qramping": [*QRAMPING, "--stabilizer.k1", "0.5", "--stabilizer.update_period", "3", "--stabilizer.n_max", "4"],
    "dampen": ["--stabilizer.kind", "dampen", "--stabilizer.weight", "0.1"],
    "freeze": ["--stabilizer.kind", "freeze", "--stabilizer.momentum", "0.3", "--stabilizer.threshold_start", "0.2"],
    "int4": ["--quant.scheme", "int4"],
}


class Box:
    """Stands in for an object of which only these attributes are needed."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """For runs in this process: one thread, which is faster for tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tiny(output_dir: Path, *flags: str) -> list[str]:
    """The command line of a tiny run; later flags win."""
    return [*(word for pair in TINY.items() for word in pair), "--output_dir", str(output_dir), *flags]


def exit_code(argv: Sequence[str]) -> int:
    """What `main.py` ends with."""
    try:
        main.command(argv)
    except SystemExit as end:
        return end.code


def train(output_dir: Path, *flags: str) -> Path:
    """A tiny run that has to succeed; returns its folder."""
    assert exit_code(tiny(output_dir, *flags)) == 0
    return output_dir


def replace(patch: pytest.MonkeyPatch, function: Any, by: Any) -> None:
    """Let the whole program, wherever it has `function` by an import of its own, use `by`."""
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "/")
        if ROOT in file.parents and ROOT / "tests" not in file.parents:
            for name in [name for name, value in vars(module).items() if value is function]:
                patch.setattr(module, name, by)


def before_step(number: int, action: Callable[[Run], object]) -> Callable[..., dict[str, float]]:
    """engine.train_step that calls `action` before optimizer step `number` (from 0), be it trained or rehearsed."""
    step = engine.train_step

    def train_step(run: Run, batches: Any) -> dict[str, float]:
        if run.global_step == number:
            action(run)
        return step(run, batches)

    return train_step


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does."""


def killed(monkeypatch: pytest.MonkeyPatch, folder: Path, step: int, *flags: str, rehearsing: bool = False) -> None:
    """A tiny run that is killed before optimizer step `step`, of the training itself or of a rehearsal."""
    train_step, rehearse, rehearsals = engine.train_step, Run.rehearse, []

    def kill(run: Run, batches: Any) -> dict[str, float]:
        if run.global_step == step and bool(rehearsals) == rehearsing:
            raise Killed
        return train_step(run, batches)

    def note(run: Run, *args: Any) -> None:
        rehearsals.append(run.global_step)
        rehearse(run, *args)
        rehearsals.clear()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        replace(patch, engine.train_step, kill)
        patch.setattr(Run, "rehearse", note)
        main.main(tiny(folder, *flags))


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics without times and rates."""
    lines = read_metrics(output_dir)
    return [
        {"step": line["step"], "data": {k: v for k, v in line["data"].items() if not k.endswith(("seconds", "_per_s"))}}
        for line in lines
    ]


def column(output_dir: Path, name: str, words: int = 2) -> list[Any]:
    """One figure of every step (`words` 2) or epoch (1), in order."""
    return [line["data"][name] for line in read_metrics(output_dir) if len(line["step"]) == words]


def outcome(output_dir: Path) -> dict[str, Any]:
    """All that two equal runs share: both checkpoints without the configuration (which names the folder), metrics."""
    files = {name: load_checkpoint(output_dir / name) for name in ("last.pt", "best.pt")}
    for state in files.values():
        del state["config"]
    return {**files, "metrics": metrics(output_dir)}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested values are not the same bit for bit; empty if nowhere."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [where]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for index, (a, b) in pairs for d in differences(a, b, f"{where}/{index}")]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if one == other else [where]


def of(cfg: Any, key: str) -> Any:
    """The value of a key of a configuration."""
    value: Any = cfg
    for name in key.split("."):
        value = getattr(value, name)
    return value


def leaf_types(annotation: Any) -> set[Any]:
    """The types that a key's annotation is made of: {float} for tuple[float, float], {int, NoneType} for int | None."""
    inner = typing.get_args(annotation) if typing.get_origin(annotation) is not typing.Literal else ()
    if typing.get_origin(annotation) is typing.Annotated:
        inner = inner[:1]
    return set().union(*map(leaf_types, inner)) if inner else {annotation}


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def environment() -> dict[str, str]:
    """For a process that computes as this one does."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


def stop_in_evaluation(run: Run) -> None:
    run.model.register_forward_hook(lambda model, *_: None if model.training else stop_itself(run))


def stop_itself(run: Run) -> None:
    run.stop._remember(15, None)


def break_weight(run: Run) -> None:
    run.model.blocks[1].mlp.fc1.weight.data[0] = torch.inf


ACTIONS = {"stop": stop_itself, "stop in evaluation": stop_in_evaluation, "break": break_weight}


def in_two_processes(folder: Path, runs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Work through `runs` in two processes of gloo, or of NCCL on GPUs; returns for each run what the ranks report.

    A run is {"argv": [...]} and, if something is to happen on one rank, {"rank": 1, "step": 2, "action": "stop"}.
    A report is {"code": exit code, "stderr": text, "noise": the two words of noise state of every step, "weights": a
    digest of the weights after every step, "held": one of what outer scales hang from, "recordings": one of every
    recording of a probe}.
    """
    (folder / "plan.json").write_text(json.dumps(list(runs)))
    run_in_two(work_through, folder)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return [list(reports) for reports in zip(*ranks, strict=True)]


def work_through(folder: Path) -> None:
    """What each of them does."""
    rank, reports = int(os.environ["RANK"]), []
    # One group serves all runs.
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    dist.init_process_group = functools.cache(dist.init_process_group)
    train_step, record_probe = engine.train_step, OscillationProbe._record
    for run in json.loads((folder / "plan.json").read_text()):
        if dist.is_initialized():
            dist.barrier()  # a run resumed by both must find what rank 0 saved last
        report: dict[str, Any] = {"noise": [], "weights": [], "held": [], "recordings": []}

        def record(run: Run, batches: Any, report: dict[str, Any] = report) -> dict[str, float]:
            figures = train_step(run, batches)
            if run.cfg.quant.scheme != "none":
                report["noise"].append(run.model.noise.state.tolist())
            weights = b"".join(p.detach().cpu().numpy().tobytes() for p in run.model.parameters())
            held = b"".join(tensor.cpu().numpy().tobytes() for tensor in run.held)
            report["held"].append(hashlib.sha256(held).hexdigest())
            report["weights"].append(hashlib.sha256(weights).hexdigest())
            return figures

        def note(probe: OscillationProbe, epoch: int, report: dict[str, Any] = report) -> Recording:
            recording = record_probe(probe, epoch)
            arrays = b"".join(name.encode() + array.tobytes() for name, array in recording.arrays.items())
            report["recordings"].append(hashlib.sha256(arrays).hexdigest())
            return recording

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as stderr:
            replace(patch, engine.train_step, record)
            patch.setattr(OscillationProbe, "_record", note)
            if run.get("rank") == rank:
                replace(patch, engine.train_step, before_step(run["step"], ACTIONS[run["action"]]))
            code = exit_code(run["argv"])
        reports.append({"code": code, "stderr": stderr.getvalue(), **report})
    (folder / f"rank{rank}.json").write_text(json.dumps(reports))
    leave()
