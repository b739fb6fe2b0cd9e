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
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import Config, UserError, load_config, recipe_differences
from quantization.watch.recording import Recording
from record.checkpoint import BEST, LAST, check_state, load_checkpoint
from record.files import LOCK, FolderLock, atomic_write, refuse_links, remove_stale
from record.manifest import MANIFEST, add_session, read_manifest
from record.metrics import METRICS, VOID, finished_epochs, is_void, missing_final, open_metrics, plain, read_metrics
from record.progress import Progress
from record.recordings import PROBES, set_aside_recordings, write_recording
from record.tensorboard import TensorBoard

CONFIG, TENSORBOARD = "resolved.yaml", "tensorboard"
_FILES = (LAST, BEST, MANIFEST, METRICS, LOCK, "resolved*.yaml", "*.tmp", ".*.tmp")


def _content(path: Path) -> bytes:
    """Raises UserError where `path` is no file or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); move it away, or choose another --output_dir."
        ) from None


class RunLog(contextlib.AbstractContextManager):
    """The files of one run. On ranks other than 0 (enabled=False) every method does nothing.

    Raises UserError if `output_dir` cannot be written, holds a run and `resume` is False, holds links or is written by
    another process; nothing is touched then.
    purge_step: the optimizer steps a resumed run has done; TensorBoard drops what a killed run drew after that step.
    """

    def __init__(
        self, output_dir: Path, *, enabled: bool = True, resume: bool = False, purge_step: int | None = None
    ) -> None:
        self.output_dir = Path(output_dir)
        self.enabled = enabled
        self.tensorboard: TensorBoard | None = None
        self._logger: Any = None
        self._lock: FolderLock | None = None
        self._config: str | None = None
        self._earlier: dict[str, Any] = {}
        self._origin: tuple[float, float] | None = None  # when and where (in epochs) this session's training began
        if not enabled:
            return
        try:
            if not resume and any((self.output_dir / name).exists() for name in (LAST, MANIFEST, METRICS)):
                raise UserError(
                    f"{self.output_dir} already holds a run; pass --resume auto to continue it or choose another "
                    "--output_dir."
                )
            self.output_dir.mkdir(parents=True, exist_ok=True)
            refuse_links(self.output_dir, _FILES, (PROBES, TENSORBOARD))
            probes = self.output_dir / PROBES
            if probes.exists() and not probes.is_dir():  # said before an epoch is trained
                raise UserError(
                    f"{probes} is no folder, and recordings of the run go there; move it away, or choose another "
                    "--output_dir."
                )
            self._lock = FolderLock(self.output_dir)
            remove_stale(self.output_dir)
            self._earlier = read_manifest(self.output_dir)
            self._logger, self._file = open_metrics(self.output_dir / METRICS)
            # TensorBoard means the first step to drop; of a run that begins again it is that before its first.
            first_dropped = purge_step + 1 if purge_step else purge_step
            self.tensorboard = TensorBoard(self.output_dir / TENSORBOARD, purge_step=first_dropped)
        except OSError as error:
            self.close()
            raise UserError(
                f"The run directory {self.output_dir} cannot be written ({error.strerror or error}); choose another "
                "--output_dir."
            ) from None
        except BaseException:
            self.close()
            raise

    def go_back(self, epoch: int, step: int) -> None:
        """The run goes on after `epoch` epochs and `step` steps: what metrics and recordings have beyond that is void.

        Called once last.pt is of this moment, lest a run that goes on from a later one loses its figures.
        """
        if not self.enabled:
            return
        if any(is_void(line["step"], (epoch, step)) for line in read_metrics(self.output_dir)):
            self._write("PARAMETER", dict(zip(VOID, (epoch, step), strict=True)))
        set_aside_recordings(self.output_dir / PROBES, epoch + 1)

    def write_config(self, text: str) -> Path | None:
        """Keep `text` as resolved.yaml or, where a resumed run has another there, beside it as resolved.<n>.yaml."""
        if not self.enabled:
            return None
        path, n = self.output_dir / CONFIG, 0
        while path.exists() and _content(path) != text.encode():
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
        write_recording(self.output_dir / PROBES, recording.name, arrays)
        if self.tensorboard is None or "oscillating" not in arrays:
            return
        for layer, count, numel in zip(arrays["layers"], arrays["oscillating"], arrays["numel"], strict=True):
            self.tensorboard.add_scalar(f"oscillating_share/{layer}", count / numel, at)
        for name in ("latent", "confidence"):
            counts = arrays[f"{name}_counts"].sum(0)
            self.tensorboard.add_histogram(f"probe/{name}", arrays[f"{name}_edges"], counts, at)

    def flush(self) -> None:
        """Bring TensorBoard's points to the disk, as every line of metrics is already; called with each checkpoint."""
        if self.tensorboard is not None:
            self.tensorboard.flush()

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
            self.tensorboard.close()
            self.tensorboard = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# What a folder held before
# ---------------------------------------------------------------------------------------------------------------------


def check_new(output_dir: Path, cfg: Config) -> None:
    """Raises UserError where a run that finds no last.pt in `output_dir` would begin anew over what is there.

    A run of the same recipe that was killed before its first checkpoint was complete, best.pt's coming after it, may
    begin again.
    """
    best, epochs = output_dir / BEST, len(finished_epochs(output_dir, required=False))
    allowed = 1 if (output_dir / CONFIG).is_file() else 0
    held = [BEST] * best.exists() + [f"{epochs} finished epochs in {METRICS}"] * (epochs > 0)
    if best.exists() or epochs > allowed:
        go_on = f"put {LAST} back" + (f", go on from {BEST} with --resume {best}" if best.exists() else "")
        raise UserError(
            f"{output_dir} has no {LAST} to continue from and holds {' and '.join(held)}: {go_on}, or choose another "
            "--output_dir."
        )
    for path in sorted(output_dir.glob("resolved*.yaml")):
        differences = recipe_differences(load_config(path).model_dump(mode="json"), cfg.model_dump(mode="json"))
        differences = [d for d in differences if not d.startswith("schedule.epochs ")]
        if differences:
            raise UserError(
                f"{output_dir} was begun with {differences[0]}, says {path.name}; start it with the same recipe, or "
                "choose another --output_dir."
            )


def mend_best(output_dir: Path, state: Mapping[str, Any]) -> None:
    """See to it that best.pt is the best checkpoint of the run that goes on from `state`, that of its last.pt.

    Where best.pt is missing, damaged or an earlier one and last.pt is the best, as after a kill between the two,
    last.pt is copied; else this is said on stderr.
    """
    best, last = output_dir / BEST, output_dir / LAST
    if state["best_top1"] < 0:
        return
    try:
        kept = load_checkpoint(best)
        check_state(kept, best)
        if kept["best_top1"] >= state["best_top1"]:
            return
        fault = "is that of an earlier epoch"
    except UserError:
        fault = "cannot be read" if best.exists() else "is missing"
    epochs = finished_epochs(output_dir, required=False)
    epoch = next((n for n, figures in epochs.items() if figures["eval.top1"] == state["best_top1"]), None)
    if epoch == state["epoch"] and not state["step"] and last.is_file():
        with last.open("rb") as source:
            atomic_write(best, lambda file: shutil.copyfileobj(source, file))
        return
    of_epoch = "" if epoch is None else f" of epoch {epoch}"
    print(
        f"{best} {fault}: the state of the best top-1 so far, {state['best_top1']:.2f} %{of_epoch}, is lost; the next "
        "better one is kept.",
        file=sys.stderr,
    )


def complete(output_dir: Path, state: Mapping[str, Any]) -> None:
    """Write what a run that was killed in its last moments lacks, its best checkpoint or its final line.

    state: that of last.pt, after the last epoch. A folder that cannot be written stays as it is.
    """
    try:
        lock = FolderLock(output_dir)
    except OSError:
        return
    try:
        remove_stale(output_dir)
        mend_best(output_dir, state)
        figures = missing_final(output_dir, state["epoch"])
    finally:
        lock.release()
    if figures is not None:
        with RunLog(output_dir, resume=True) as log:
            log.log((), {**figures, "best_top1": state["best_top1"], "epochs": state["epoch"]}, tag="final")
