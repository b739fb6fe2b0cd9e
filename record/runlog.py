"""One run directory: what was run (resolved.yaml, manifest.json), metrics (metrics.log, tensorboard/) and progress.

    with RunLog(output_dir, enabled=rank == 0, resume=resumed, purge_step=step) as log:
        log.write_config(dump_config(cfg))
        log.write_manifest(manifest(cfg, device=device, ...))
        log.log((epoch, iteration), {"loss": 6.9, "lr": 1e-3}, tag="train", at=step)
        log.log((epoch,), {"top1": 10.3}, tag="val", at=step)

metrics.py says how metrics.log is written, manifest.py what manifest.json holds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from config import UserError
from quantization.watch.recording import Recording
from record.checkpoint import LAST, atomic_write
from record.manifest import MANIFEST, add_session
from record.metrics import METRICS, open_metrics, plain
from record.progress import Progress

CONFIG, PROBES = "resolved.yaml", "probes"


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
            self._logger, self._file = open_metrics(self.output_dir / METRICS)
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
        text = json.dumps(add_session(self._earlier, entries, self._config), indent=2) + "\n"
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
        values = {name: plain(value) for name, value in data.items()}
        self._write(step, {f"{tag}.{name}" if tag else name: value for name, value in values.items()})
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

    def _write(self, step: tuple[int, ...] | str, data: Mapping[str, Any]) -> None:
        try:
            self._logger.log(step, data, verbosity=0)  # dllogger's Logger would take 1 and write nothing
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
