"""One line a finished run: results/STUDY.csv, read and added to.

    line = line_of(folder, study="digits", row="tetrajet", value="", command="python main.py ...")
    add_lines(Path("results/digits.csv"), [line])

A file has one study's lines, of all days and machines, in the order in which they came. Two versions of it are merged
by taking the lines of both (.gitattributes says so to git): a line that is there twice is read once.
"""

from __future__ import annotations

import csv
import fcntl
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from config import UserError, load_config, recipe_identity
from record.manifest import read_manifest
from record.metrics import METRICS, read_metrics

CONFIGS = "resolved*.yaml"


@dataclass(frozen=True)
class Line:
    """A finished run of a study. Accuracies in %; oscillation is that of the last epoch, None where it was not read."""

    study: str
    row: str
    value: str  # empty where the study has rows alone
    seed: int
    recipe: str  # config.recipe_identity: what was trained, but for the seed
    top1: float  # of the last epoch
    top5: float
    loss: float  # on the evaluation set
    best_top1: float
    epochs: int
    steps: int  # optimizer steps
    seconds: float  # of training and evaluation, beside whatever else ran on the device
    r_w: float | None  # rates of change of Appendix A.3: weights, quantized weights, the watched block's output
    r_WQ: float | None  # noqa: N815
    r_Y: float | None  # noqa: N815
    oscillating_share: float | None  # of the weights, R_w > 16
    confidence: float | None  # quantization confidence, mean
    classes: int
    autocast: str
    device: str  # this, torch and commit: of each start of the run, one after the other where they differ
    torch: str
    commit: str  # with a + where tracked files differed from it
    started: str
    command: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes two lines those of one run."""
        return self.row, self.value, self.seed, self.recipe


FIELDS = [field.name for field in fields(Line)]
_TYPES = {field.name: str(field.type) for field in fields(Line)}
OSCILLATION = ("r_w", "r_WQ", "r_Y", "oscillating_share", "confidence")


@dataclass(frozen=True)
class Finished:
    """What the folder of a finished run says."""

    folder: Path
    recipe: str
    seed: int
    figures: dict[str, Any]  # the columns of a line that are measured or of the machine


def read_finished(folder: Path) -> Finished | None:
    """The finished run in a folder; None where there is no run or it is not at its end.

    Raises UserError where it cannot be read or was trained by more than one recipe.
    """
    if not (folder / METRICS).is_file():
        return None
    metrics = {line["step"]: line["data"] for line in read_metrics(folder)}
    final = metrics.get((), {})
    configs = [load_config(path) for path in sorted(folder.glob(CONFIGS))]
    if "final.epochs" not in final or not configs:
        return None
    epochs = final["final.epochs"]
    if epochs < configs[-1].schedule.epochs:
        return None
    dumped = [cfg.model_dump(mode="json") for cfg in configs]
    recipes = {recipe_identity(one) for one in dumped}
    if len(recipes) > 1 or len({cfg.run.seed for cfg in configs}) > 1:
        raise UserError(f"The run in {folder} was trained by more than one recipe, so it is none of a study's.")
    if any(cfg.run.finetune for cfg in configs):
        raise UserError(f"The run in {folder} started from given weights, so it is none of a study's.")
    try:
        manifest = read_manifest(folder)
    except OSError as error:
        raise UserError(f"The manifest in {folder} cannot be read ({error.strerror or error}).") from None
    last = metrics.get((epochs - 1,), {})
    summaries = [data for step, data in metrics.items() if len(step) == 1]
    starts = manifest.get("sessions") or [manifest]  # a run that went on may have done so with other code or elsewhere
    figures = {
        **{name: final[f"final.{name}"] for name in ("top1", "top5", "loss", "best_top1")},
        "epochs": epochs,
        "steps": epochs * manifest.get("steps_per_epoch", 0),
        "seconds": round(sum(d.get(f"{part}.seconds", 0.0) for d in summaries for part in ("train", "eval")), 1),
        **{name: _finite(last.get(f"eval.{name}")) for name in OSCILLATION},
        "classes": manifest.get("classes", 0),
        "autocast": manifest.get("autocast", "").lower(),
        "device": _each((start.get("device") or {}).get("name") for start in starts),
        "torch": _each((start.get("versions") or {}).get("torch") for start in starts),
        "commit": _each(map(_commit, starts)),
        "started": manifest.get("start_time", ""),
    }
    return Finished(folder, recipes.pop(), configs[-1].run.seed, figures)


def _each(texts: Iterable[str | None]) -> str:
    return " ".join(dict.fromkeys(text or "unknown" for text in texts))


def _commit(start: dict[str, Any]) -> str | None:
    git = start.get("git") or {}
    return git.get("commit") and f"{git['commit'][:12]}{'+' if git.get('dirty') else ''}"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _line(row: dict[str, str], where: str) -> Line:
    """Raises UserError for what is no line."""
    values: dict[str, Any] = {}
    for name in FIELDS:
        text, kind = row.get(name), _TYPES[name]
        try:
            if text is None:
                raise ValueError
            if text == "" and "None" in kind:
                values[name] = None
            else:
                values[name] = int(text) if kind == "int" else float(text) if "float" in kind else text
        except ValueError:
            raise UserError(f"{where}: {name} is {text!r}; a finished run's {kind} was expected.") from None
    return Line(**values)


def _parse(text: str, path: Path) -> list[Line]:
    reader = csv.DictReader(io.StringIO(text))
    if text and [*(reader.fieldnames or ())] != FIELDS:
        raise UserError(f"{path} does not have the columns of finished runs: {','.join(FIELDS)}.")
    found: dict[tuple[str, str, int, str], Line] = {}
    for row in reader:
        if None in row or row.get("study") == "study":  # the head of another file that was joined to this one
            if None in row:
                raise UserError(f"{path}, line {reader.line_num}, has too many columns.")
            continue
        line = _line(row, f"{path}, line {reader.line_num}")
        found.setdefault(line.key, line)
    return [*found.values()]


def read_lines(path: Path) -> list[Line]:
    """The lines of a study, each run once; none where there is no file. Raises UserError."""
    try:
        return _parse(path.read_text(), path)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"The results {path} cannot be read: {error}.") from None


def as_csv(lines: Iterable[Line], *, head: bool = True) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if head:
        writer.writerow(FIELDS)
    for line in lines:
        writer.writerow(
            [
                "" if value is None else repr(value) if isinstance(value, float) else value
                for value in asdict(line).values()
            ]
        )
    return text.getvalue()


def add_lines(path: Path, lines: Sequence[Line]) -> list[Line]:
    """Add those lines to the file whose run it does not have yet; returns them. Raises UserError.

    One process at a time: others wait. The half of a line that a killed process or a full disk left is cut off first;
    its run has no line then and gets one when its study is started again.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                file.truncate(len(whole))
            known = {line.key: line for line in _parse(whole.decode(), path)}
            new = [line for line in lines if known.setdefault(line.key, line) is line]
            if new:
                file.write(as_csv(new, head=not whole).encode())
                file.flush()
                os.fsync(file.fileno())
            return new
    except (OSError, UnicodeError) as error:
        raise UserError(f"The results {path} cannot be written: {error}.") from None
