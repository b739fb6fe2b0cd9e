"""One run directory: what was run (resolved.yaml, manifest.json), metrics (metrics.log, tensorboard/) and progress.

    with RunLog(output_dir, enabled=rank == 0, resume=resumed, purge_step=step) as log:
        log.write_config(dump_config(cfg))
        log.write_manifest(manifest(cfg, device=device, ...))
        log.log((epoch, iteration), {"loss": 6.9, "lr": 1e-3}, tag="train", at=step)
        log.log((epoch,), {"top1": 10.3}, tag="val", at=step)
    read_metrics(output_dir)   # [{"step": (0, 50), "data": {"train.loss": 6.9, "train.lr": 0.001}}, ...]

metrics.log has the lines of NVIDIA's dllogger, written by dllogger where it is installed: "DLLL " and one JSON object,
whose step is [epoch, iteration] in training, [epoch] for an epoch's summary, [] for the run's and "PARAMETER" for
hyper-parameters. Floats read back bit for bit.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboardX import SummaryWriter
from tqdm import tqdm

from config import Config, UserError
from quantization.watch.probe import Recording
from record.checkpoint import LAST, atomic_write

MANIFEST, CONFIG, METRICS, PROBES = "manifest.json", "resolved.yaml", "metrics.log", "probes"
_PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "tensorboardX")
# What the manifest keeps of every start of a run that was stopped and continued.
_OF_A_START = ("start_time", "command_line", "git", "versions", "device", "world_size")


class _JsonLines:
    """dllogger's Logger with its JSONStreamBackend, for where dllogger is not installed: the same calls and bytes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")
        self.start = datetime.now()

    def _write(self, order: str, **fields: Any) -> None:
        now = datetime.now()
        times = {"timestamp": now.timestamp(), "datetime": now, "elapsedtime": (now - self.start).total_seconds()}
        record = {name: str(times[name]) for name in order.split()} | fields
        self.file.write(f"DLLL {json.dumps(record)}\n")

    def log(self, step: Any, data: Mapping[str, Any], verbosity: int = 0) -> None:
        self._write("timestamp datetime elapsedtime", type="LOG", step=step, data=data)

    def metadata(self, metric: str, metadata: Mapping[str, Any]) -> None:
        self._write("timestamp elapsedtime datetime", type="METADATA", metric=metric, metadata=metadata)

    def flush(self) -> None:
        self.file.flush()


def _open_metrics(path: Path) -> tuple[Any, Any]:
    """(logger, its file), appending; dllogger's where it is installed and knows how to append."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:  # a line torn by a kill must not swallow the first line of this session
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    try:
        import dllogger

        backend = dllogger.JSONStreamBackend(dllogger.Verbosity.DEFAULT, str(path), append=True)
        return dllogger.Logger(backends=[backend]), backend.file
    except (ImportError, TypeError):  # not installed, or a release from before `append`, which would empty the file
        lines = _JsonLines(path)
        return lines, lines.file


def _plain(value: Any) -> Any:
    """Tensors and NumPy scalars of one element as Python numbers, which JSON knows."""
    return value.item() if hasattr(value, "item") else value


class RunLog(contextlib.AbstractContextManager):
    """The files of one run. On ranks other than 0 (enabled=False) every method does nothing.

    Raises UserError if `output_dir` cannot be written, or holds a run and `resume` is False; nothing is touched then.
    purge_step: the optimizer steps a resumed run has done; TensorBoard drops what a killed run drew after that step.
    """

    def __init__(
        self, output_dir: Path, *, enabled: bool = True, resume: bool = False, purge_step: int | None = None
    ) -> None:
        self.output_dir = Path(output_dir)
        self.enabled = enabled
        self.tensorboard: SummaryWriter | None = None
        self._logger: Any = None
        self._config: str | None = None
        self._earlier: dict[str, Any] = {}
        self._origin: tuple[float, float] | None = None  # when and where (in epochs) this session's training began
        if not enabled:
            return
        try:
            held = [name for name in (LAST, MANIFEST, METRICS) if (self.output_dir / name).exists()]
            if held and not resume:
                raise UserError(
                    f"{self.output_dir} already holds a run; pass --resume auto to continue it or choose another "
                    "--output_dir."
                )
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if MANIFEST in held:
                self._earlier = dict(json.loads((self.output_dir / MANIFEST).read_bytes()))
            self._logger, self._file = _open_metrics(self.output_dir / METRICS)
            self.tensorboard = SummaryWriter(
                str(self.output_dir / "tensorboard"),
                purge_step=None if purge_step is None else purge_step + 1,  # tensorboardX means the first one to drop
                flush_secs=30,
                filename_suffix=f".{time.time_ns()}",  # else a restart within a second overwrites the file
            )
        except OSError as error:
            raise UserError(
                f"The run directory {self.output_dir} cannot be written ({error.strerror or error}); choose another "
                "--output_dir."
            ) from None
        except (ValueError, TypeError):
            raise UserError(
                f"{self.output_dir / MANIFEST} is not a JSON object; move it away to continue the run."
            ) from None

    def write_config(self, text: str) -> Path | None:
        """Keep `text` as resolved.yaml or, where a resumed run has another there, beside it as resolved.<n>.yaml."""
        if not self.enabled:
            return None
        path, n = self.output_dir / CONFIG, 0
        while path.exists() and path.read_bytes() != text.encode():
            n += 1
            path = self.output_dir / f"resolved.{n}.yaml"
        if not path.exists():
            atomic_write(path, lambda file: file.write(text.encode()))
        self._config = path.name
        return path

    def write_manifest(self, entries: Mapping[str, Any]) -> None:
        """Write manifest.json: `entries`, and under "sessions" one entry a start of the run, this one last.

        A value that this start changes stays in the entry of the start before. Writing again updates this start's.
        """
        if not self.enabled:
            return
        new = json.loads(json.dumps(entries))  # as it will read back, to compare with what is there
        old = dict(self._earlier)
        sessions = [dict(session) for session in old.pop("sessions", [])]
        if sessions:
            sessions[-1].update({k: v for k, v in old.items() if k not in new or new[k] != v})
        sessions.append({**{k: new[k] for k in _OF_A_START if k in new}, "config": self._config})
        text = json.dumps({**new, "sessions": sessions}, indent=2) + "\n"
        atomic_write(self.output_dir / MANIFEST, lambda file: file.write(text.encode()))

    def log(
        self, step: tuple[int, ...] | str, data: Mapping[str, Any], *, tag: str = "", at: int | None = None
    ) -> None:
        """One line of metrics: (epoch, iteration), (epoch,) for an epoch, () for the run; names become tag.name.

        With the step "PARAMETER", `data` are the hyper-parameters. TensorBoard gets the numbers as tag/name, `at` this
        optimizer step of the run. Left out, an epoch's line is drawn at its epoch (which purge_step cannot tell from a
        step) and the run's is not drawn; a training line must have it. Raises UserError when the disk is full.
        """
        if isinstance(step, tuple) and len(step) > 1 and at is None:
            raise ValueError("a training line needs `at`: iterations start anew in every epoch")
        if not self.enabled:
            return  # before any value is read off a device
        values = {name: _plain(value) for name, value in data.items()}
        self._record("log", step, {f"{tag}.{name}" if tag else name: value for name, value in values.items()})
        if at is None and step and isinstance(step, tuple):
            at = step[0]
        for name, value in values.items():
            if self.tensorboard is not None and at is not None and isinstance(value, int | float):
                self.tensorboard.add_scalar(f"{tag}/{name}" if tag else name, value, at)

    def write_recording(self, recording: Recording, *, at: int) -> None:
        """Keep a probe's recording as probes/NAME.npz; TensorBoard gets its histograms and figures of layers, `at` this
        optimizer step of the run. Raises UserError where the disk is full.
        """
        if not self.enabled:
            return
        arrays = recording.arrays
        folder = self.output_dir / PROBES
        folder.mkdir(exist_ok=True)
        atomic_write(folder / f"{recording.name}.npz", lambda file: np.savez_compressed(file, **arrays))
        if self.tensorboard is None or "oscillating" not in arrays:
            return
        for layer, count, numel in zip(arrays["layers"], arrays["oscillating"], arrays["numel"], strict=True):
            self.tensorboard.add_scalar(f"oscillating_share/{layer}", count / numel, at)
        for name in ("latent", "confidence"):
            edges, counts = arrays[f"{name}_edges"], arrays[f"{name}_counts"].sum(0)
            middles = (edges[1:] + edges[:-1]) / 2
            self.tensorboard.add_histogram_raw(
                f"probe/{name}",
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=counts @ middles,
                sum_squares=counts @ middles**2,
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=at,
            )

    def describe(self, metric: str, **fields: str) -> None:
        """What a metric (tag.name) is, as a METADATA record: unit="img/s", format=":.1f", say."""
        self._record("metadata", metric, fields)

    def _record(self, method: str, *arguments: Any) -> None:
        if self._logger is None:
            return
        verbosity = {"verbosity": 0} if method == "log" else {}  # dllogger's Logger would take 1 and write nothing
        try:
            getattr(self._logger, method)(*arguments, **verbosity)
            self._logger.flush()
        except OSError as error:
            raise UserError(
                f"{self.output_dir / METRICS} cannot be written ({error.strerror or error}); free some space and "
                "continue with --resume auto."
            ) from None

    def progress(self, desc: str, epochs: int | None, epoch: int, step: int, total: int) -> Progress:
        """Progress of epoch `epoch` from step `step` to `total`; with the run's time left where `epochs` is known."""
        progress = Progress(desc, epochs, epoch, step, total, enabled=self.enabled)
        if epochs is not None:
            self._origin = progress.origin = self._origin or progress.origin
        return progress

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        if self._logger is not None:
            atexit.unregister(self._logger.flush)  # dllogger's own, which would meet a closed file
            with contextlib.suppress(OSError):  # every line was flushed when it was written
                self._file.close()
            self._logger = None
        if self.tensorboard is not None:
            with contextlib.suppress(OSError):
                self.tensorboard.close()
            self.tensorboard = None

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run in its order: [{"step": (epoch, iteration) | (epoch,) | (), "data": {"tag.name": value}}].

    Lines of one step are joined; where a killed run replayed a step, the later value wins. Torn lines are left out.
    Raises UserError if there is no metrics.log.
    """
    path = Path(output_dir) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"There are no metrics at {path} ({error.strerror}); give the directory of a run.") from None
    steps: dict[tuple[int, ...], dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line.removeprefix(b"DLLL "))
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("type") == "LOG" and isinstance(record.get("step"), list):
            steps.setdefault(tuple(record["step"]), {}).update(record["data"])
    # A summary follows the lines it sums up: (0, 50) before (0,), and () comes last.
    return [{"step": step, "data": steps[step]} for step in sorted(steps, key=lambda step: (*step, math.inf))]


def git_state() -> dict[str, Any]:
    """{"commit": hash, "dirty": whether tracked files differ from it}; both None without git or outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "--no-optional-locks", "-C", str(root)]
    ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=30)
    try:
        top, commit = ask([*command, "rev-parse", "--show-toplevel", "HEAD"]).stdout.splitlines()
        changes = ask([*command, "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    if Path(top).resolve() != root:  # unpacked inside another repository, whose commit says nothing about this one
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def manifest(
    cfg: Config,
    *,
    device: torch.device | str,
    world_size: int,
    seed: int,
    patches: Sequence[Mapping[str, Any]],
    quantizers: Mapping[str, Mapping[str, str | None]],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What manifest.json says about a run.

    patches: the timm patches in force. quantizers: layer name -> {"q1": ..., ..., "q6": ...}, a description or None
    each. extra: further entries, such as the parameter count. Unknown versions and an unknown commit are None.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "start_time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command_line": shlex.join(sys.orig_argv),
        "git": git_state(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
            "cuda": torch.version.cuda,
        },
        "device": {"type": device.type, "name": name},
        "world_size": world_size,
        "seed": seed,
        "model": cfg.model.name,
        "paper": cfg.paper.model_dump(mode="json") if cfg.paper else None,
        "timm_patches": [dict(patch) for patch in patches],
        "quantizers": {layer: dict(table) for layer, table in quantizers.items()},
        **(extra or {}),
    }


@dataclass
class Progress(contextlib.AbstractContextManager):
    """One epoch: a bar on a terminal, elsewhere a plain line at most every `every` seconds. Made by RunLog.progress.

    Shows iterations, images a second of this epoch, what update() was given, and the time left for the run: the time
    since `origin` (seconds, epochs) for the epochs done since, stretched over those to come, evaluation included.
    """

    desc: str
    epochs: int | None
    epoch: int
    done: int  # iterations of this epoch
    total: int
    every: float = 30.0
    enabled: bool = True

    def __post_init__(self) -> None:
        self.images = 0
        self._start = self._shown_at = time.monotonic()
        self.origin = (self._start, self._position())
        self._latest: dict[str, Any] = {}
        self._bar: tqdm | None = None
        if self.enabled and sys.stderr.isatty():
            self.every = 0.5
            self._bar = tqdm(total=self.total, desc=self.desc, initial=self.done, dynamic_ncols=True)

    def _position(self) -> float:
        return self.epoch + self.done / max(self.total, 1)

    def update(self, n_images: int, **shown: Any) -> float:
        """One iteration over `n_images` images of all processes; returns images a second since the epoch began here.

        `shown` stays until given anew. Values may be tensors on a device: they are read only when they are displayed.
        """
        self.done += 1
        self.images += n_images
        self._latest.update(shown)
        if self.enabled and time.monotonic() - self._shown_at >= self.every:
            self._show()
        return self._rate()

    def _rate(self) -> float:
        return self.images / max(time.monotonic() - self._start, 1e-9)

    def text(self) -> str:
        """The figures, as in "1024.0 img/s, loss 6.9, lr 0.001, run ETA 1:02:03"."""
        parts = [f"{self._rate():.1f} img/s"]
        for name, value in self._latest.items():
            number = _plain(value)
            parts.append(f"{name} {f'{number:.4g}' if isinstance(number, float) else number}")
        began, origin = self.origin
        if self.epochs is not None and self._position() > origin:
            left = (time.monotonic() - began) * (self.epochs - self._position()) / (self._position() - origin)
            parts.append(f"run ETA {tqdm.format_interval(left)}")
        return ", ".join(parts)

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        if self._bar is None:
            print(f"{self.desc} {self.done}/{self.total}: {self.text()}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(self.text(), refresh=False)
            self._bar.update(self.done - self._bar.n)

    def close(self) -> None:
        """Show the last state of the bar and leave it."""
        if self._bar is not None:
            self._show()
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class Meter:
    """Running means as (sum, count) pairs of floats, saved with a checkpoint and restored bit for bit."""

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}

    def add(self, name: str, value_sum: float, count: float) -> None:
        """Add a sum over `count` samples."""
        total = self._totals.setdefault(name, [0.0, 0.0])
        total[0] += float(value_sum)
        total[1] += float(count)

    def mean(self, name: str) -> float:
        """Sum over count, NaN where nothing was counted. Raises KeyError for a name never added."""
        value_sum, count = self._totals[name]
        return value_sum / count if count else math.nan

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(total) for name, total in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._totals = {name: [float(value) for value in total] for name, total in state.items()}
