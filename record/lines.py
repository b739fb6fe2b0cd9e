"""One line a finished run: results/STUDY.csv, read and added to.

    line = line_of(folder, study="digits", row="tetrajet", value="", command="python main.py ...")
    add_lines(Path("results/digits.csv"), [line])

A file has one study's lines, of all days and machines, in the order in which they came. Two versions of it are merged
by taking the lines of both (.gitattributes says so to git): a line that is there twice is read once, and of a run that
was done twice, on two machines say, the line that counts is the same in whichever order the two have come (`once`).
"""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from config import UserError, load_config, recipe_identity
from record.files import lock, open_ordinary
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
    r_Y_block: float | None  # noqa: N815 - its input fixed; empty in lines of before
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
OSCILLATION = ("r_w", "r_WQ", "r_Y", "r_Y_block", "oscillating_share", "confidence")


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


_KINDS = {"int": "whole number", "float": "number", "float | None": "number or nothing", "str": "text"}


def _possible(name: str, value: float) -> bool:
    """Whether a run can have left such a number. A run whose loss is no number any more has one all the same."""
    if name in ("top1", "top5", "best_top1"):
        return 0 <= value <= 100
    return value >= 0 or (name == "loss" and math.isnan(value))


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
                if kind != "str" and not _possible(name, values[name]):
                    raise ValueError
        except ValueError:
            given = "missing" if text is None else repr(text)
            raise UserError(f"{where}: {name} is {given}; a finished run's {_KINDS[kind]} was expected.") from None
    return Line(**values)


def _parse(data: bytes, path: Path) -> list[Line]:
    """Every line, in the order of the file. Raises UserError, and UnicodeError and csv.Error for what is no CSV."""
    text, head = data.decode(), ",".join(FIELDS)
    reader = csv.DictReader(io.StringIO(text), strict=True)
    if text and [*(reader.fieldnames or ())] != FIELDS:
        raise UserError(f"{path} does not have the columns of finished runs: {head}.")
    found: list[Line] = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row:
            raise UserError(f"{where}, has too many columns.")
        if [*row.values()] != FIELDS:  # else it is the head of another file that was joined to this one
            found.append(_line(row, where))
    return found


def _split(data: bytes, path: Path) -> tuple[bytes, bytes]:
    """(lines, what is behind the end of the last one: half a line, or half a head). Raises UserError.

    A line whose end alone is missing, since an editor has left it out, is one of the lines: its command is complete,
    which ends with the seed.
    """
    whole = data.rfind(b"\n") + 1
    lines, half = data[:whole], data[whole:]
    if not lines and not ",".join(FIELDS).encode().startswith(half):
        raise UserError(f"{path} does not have the columns of finished runs: {','.join(FIELDS)}.")
    try:
        [last] = _parse(as_csv([]).encode() + half, path)
    except (UserError, UnicodeError, csv.Error, ValueError):
        return lines, half
    return (data + b"\n", b"") if last.command.endswith(f"={last.seed}") else (lines, half)


def once(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """(lines, each run once; further lines of such a run that say something else).

    The line of the run that was started first counts, so that the order of the lines does not matter.
    """
    lines = [*dict.fromkeys(lines)]
    first: dict[tuple[str, str, int, str], Line] = {}
    for line in lines:
        other = first.setdefault(line.key, line)
        first[line.key] = min(line, other, key=lambda one: (one.started, as_csv([one])))
    return [*first.values()], [line for line in lines if line is not first[line.key]]


def read_every_line(path: Path) -> list[Line]:
    """The lines of a study as they are; none where there is no file. Raises UserError."""
    try:
        with open_ordinary(path) as file:
            return _parse(_split(file.read(), path)[0], path)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"The results {path} cannot be read: {error}.") from None


def read_lines(path: Path) -> list[Line]:
    """The lines of a study, each run once; none where there is no file. Raises UserError."""
    return once(read_every_line(path))[0]


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


def check_writable(path: Path) -> None:
    """Raises UserError where lines cannot be added to the file; it is not made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"The results {path} cannot be written ({error.strerror}); choose another --results.") from None


def add_lines(path: Path, lines: Sequence[Line]) -> list[Line]:
    """Add those lines to the file whose run it does not have yet; returns them. Raises UserError.

    One process at a time: others wait. The half of a line that a killed process or a full disk left is cut off first;
    its run has no line then and gets one when its study is started again. A line that only lacks its end, as an editor
    may leave the last one, gets it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            lock(file)
            file.seek(0)
            there = file.read()
            whole, _ = _split(there, path)
            known = {line.key: line for line in _parse(whole, path)}
            new = [line for line in lines if known.setdefault(line.key, line) is line]
            if new:
                begin = min(len(whole), len(there))  # of what is added: an end that was missing, the lines
                file.truncate(begin)
                try:
                    _write(file, whole[begin:] + as_csv(new, head=not whole).encode())
                except OSError:
                    file.truncate(begin)
                    raise
                os.fsync(file.fileno())
            return new
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"The results {path} cannot be written: {error}.") from None


def _write(file: io.RawIOBase, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
