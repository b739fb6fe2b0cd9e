"""A study from what it has to what it still needs: `python study.py run FILE`.

A run is done when results/STUDY.csv has its line. It is in the folder OUTPUT/ROW-VALUE-seedN, where main.py goes on
with it when it was stopped; where it is finished there and the line is missing, the line is written.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals as Signal

from config import UserError, load_config, recipe_identity
from config.rows import ROOT
from record.files import LOCK, FolderLock
from record.lines import CONFIGS, Finished, Line, add_lines, read_finished, read_lines
from record.metrics import finished_epochs
from studies.grid import Study, StudyRun
from studies.pool import Ended, Pool, Signals, threads

TICK_S, TELL_S = 0.05, 60.0  # between two looks at the processes; between two lines of progress
LET_GO_S = 120.0  # a run of a study that was killed has so long to save its state and to leave its folder
MAX_WORKERS = 10
MAIN = ROOT / "main.py"


@dataclass(frozen=True)
class Places:
    """Where a study's runs and lines are."""

    study: Study
    output: Path
    results: Path

    @classmethod
    def of(cls, study: Study, output: Path | None, results: Path | None) -> Places:
        """The folders given, or runs/STUDY and results in the repository."""
        return cls(study, output or Path("runs") / study.name, (results or ROOT / "results") / f"{study.name}.csv")

    def folder(self, run: StudyRun) -> Path:
        return self.output / run.name

    def log(self, run: StudyRun) -> Path:
        return self.output / "logs" / f"{run.name}.log"

    def finished(self, run: StudyRun) -> Finished | None:
        """What a run has left at its end; None before it. Raises UserError where its folder holds another run."""
        for path in sorted(self.folder(run).glob(CONFIGS)):
            config = load_config(path)
            if (recipe_identity(config.model_dump(mode="json")), config.run.seed) != (run.cell.recipe, run.seed):
                raise UserError(
                    f"{self.folder(run)} holds a run of another recipe or seed, says {path.name}; move it away, or "
                    "choose another --output."
                )
        return read_finished(self.folder(run))

    def epochs_done(self, run: StudyRun) -> int:
        try:
            return max(finished_epochs(self.folder(run), required=False), default=0)
        except UserError:  # main.py's to say
            return 0


def line_of(run: StudyRun, finished: Finished) -> Line:
    cell = run.cell
    return Line(cell.study, cell.row, cell.value, run.seed, cell.recipe, **finished.figures, command=run.command)


def collect(here: Places, runs: Sequence[StudyRun], places: Sequence[Path]) -> Iterator[str]:
    """Add the lines of finished runs of the study at and below `places`, wherever they were trained; says which.

    Raises UserError for a place without runs.
    """
    wanted = {(run.cell.recipe, run.seed): run for run in runs}
    for place in places:
        folders = sorted({path.parent for path in place.rglob(CONFIGS)})
        if not folders:
            raise UserError(f"There is no run at or below {place}; give a study's --output.")
        for folder in folders:
            try:
                finished = read_finished(folder)
            except UserError as error:
                yield f"{folder}: {error}"
                continue
            run = None if finished is None else wanted.get((finished.recipe, finished.seed))
            if run is None:
                yield f"{folder}: " + ("not finished" if finished is None else f"no run of {here.study.name}")
            else:
                added = add_lines(here.results, [line_of(run, finished)])
                yield f"{folder}: {run.name}" + ("" if added else ", whose line was there")


@dataclass
class Durations:
    """How long a run may take: as those of its cell have taken, or of its value, or of the study."""

    known: list[tuple[StudyRun | Line, float]] = field(default_factory=list)

    def expected(self, run: StudyRun) -> float | None:
        """Seconds; None where nothing is known."""
        cell = run.cell
        for keys in (("row", "value"), ("value",), ()):
            found = [
                seconds
                for one, seconds in self.known
                if all(
                    getattr(one.cell if isinstance(one, StudyRun) else one, key) == getattr(cell, key) for key in keys
                )
            ]
            if found:
                return statistics.fmean(found)
        return None


class Conduct:
    """A study being run."""

    def __init__(
        self, places: Places, runs: Sequence[StudyRun], pool: Pool, flags: Sequence[str], limit_s: float | None
    ) -> None:
        self.places, self.runs, self.pool, self.flags = places, {run.name: run for run in runs}, pool, flags
        self.deadline = None if limit_s is None else time.monotonic() + limit_s
        self.failed: dict[str, str] = {}
        self.saved: list[str] = []
        self.waiting: deque[StudyRun] = deque()
        self.durations = Durations()  # of this session
        self.earlier = Durations()  # of lines
        self.done = 0
        self._told = time.monotonic()

    def look_around(self, signals: Signals) -> None:
        """What is done, what lacks its line, what is to be run."""
        lines = read_lines(self.places.results)
        known = {line.key for line in lines}
        recipes = {run.cell.recipe for run in self.runs.values()}
        self.earlier = Durations([(line, line.seconds) for line in lines if line.recipe in recipes])
        for run in self.runs.values():
            if run.key in known or self._left_finished(run, signals):
                self.done += 1
            elif run.name not in self.failed:
                self.waiting.append(run)

    def _left_finished(self, run: StudyRun, signals: Signals) -> bool:
        """Whether a run that has no line has ended all the same; a process of a killed study may still be at it."""
        try:
            await_release(self.places.folder(run), signals)
        except UserError as error:
            self._fail(run.name, str(error))
            return False
        return self._keep(run)

    def _keep(self, run: StudyRun) -> bool:
        """Write the line of a run if it is finished."""
        try:
            finished = self.places.finished(run)
        except UserError as error:
            self._fail(run.name, str(error))
            return False
        if finished is not None:
            add_lines(self.places.results, [line_of(run, finished)])
        return finished is not None

    def _fail(self, name: str, sentence: str) -> None:
        self.failed[name] = sentence
        self.tell(f"{name} FAILED: {sentence}")

    def expected(self, run: StudyRun) -> float | None:
        """Seconds that what is left of a run may take; None where nothing is known."""
        whole = self.durations.expected(run) or self.earlier.expected(run)
        return whole and whole * (1 - min(1.0, self.places.epochs_done(run) / run.cell.config.schedule.epochs))

    @property
    def left_s(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def command(self, run: StudyRun) -> list[str]:
        words = [sys.executable, str(MAIN), "--config", run.cell.reference, *run.cell.flags(run.seed)]
        if self.pool.jobs > 1 and run.cell.config.data.num_workers is None:
            words.append(f"--data.num_workers={min(MAX_WORKERS, threads(self.pool.jobs))}")
        return [*words, *self.flags, "--output_dir", str(self.places.folder(run)), "--resume", "auto"]

    def start(self) -> None:
        """Start what waits, as far as there is room, and time for a whole run."""
        while self.waiting and not self.pool.full and (self.expected(self.waiting[0]) or 0.0) <= self.left_s:
            run = self.waiting.popleft()
            try:
                self.pool.start(run.name, self.command(run), self.places.log(run))
            except UserError as error:
                self._fail(run.name, str(error))

    def end(self, ended: Ended, stopping: bool) -> None:
        """A process has ended."""
        run = self.runs[ended.name]
        if self._keep(run):
            self.done += 1
            self.durations.known.append((run, ended.seconds))
            line = next(line for line in read_lines(self.places.results) if line.key == run.key)
            self.tell(f"{run.name}: top-1 {line.top1:.2f} %, {spoken(ended.seconds)}")
        elif run.name in self.failed:
            pass
        elif stopping and ended.code in (-15, 143):
            self.saved.append(run.name)
        else:
            how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
            self._fail(run.name, f"{ended.said} ({how}; {self.places.log(run)})")

    def tell(self, what: str) -> None:
        """A line of progress: what has happened, how many runs are done, and about how long the others will take."""
        self._told = time.monotonic()
        total = len(self.runs)
        left = f", about {spoken(eta)} left" if (eta := self.eta()) else ""
        print(f"[{self.done:>{len(str(total))}}/{total}] {what}{left}", flush=True)

    def eta(self) -> float | None:
        """Seconds; None where nothing is known or nothing is left."""
        waiting = [self.expected(run) for run in self.waiting]
        whole = {name: self.durations.expected(self.runs[name]) for name in self.pool.running}
        running = [max(0.0, (whole[name] or 0.0) - seconds) for name, seconds in self.pool.running.items()]
        if None in waiting or None in whole.values() or not (waiting or running):
            return None
        return max((sum(waiting) + sum(running)) / self.pool.jobs, max(running, default=0.0))

    def run(self, signals: Signals) -> None:
        """Until all runs are done, a signal is heard or the time is up; then the runs in progress save their state."""
        stopping = False
        while True:
            for ended in self.pool.ended():
                self.end(ended, stopping)
            if not stopping and (signals.heard or self.left_s <= 0):
                stopping = True
                if self.pool.running:
                    self.tell(f"{', '.join(self.pool.running)}: to save and to end")
                self.pool.stop()
            if not stopping:
                self.start()
            if not self.pool.running:
                return
            if time.monotonic() - self._told > TELL_S:
                self.tell("running: " + ", ".join(map(self._progress, self.pool.running)))
            time.sleep(TICK_S)

    def _progress(self, name: str) -> str:
        run = self.runs[name]
        return f"{name} ({self.places.epochs_done(run)} of {run.cell.config.schedule.epochs} epochs)"


def spoken(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def await_release(folder: Path, signals: Signals) -> None:
    """Wait until no process writes in a run's folder any more. Raises UserError where that takes too long."""
    end = time.monotonic() + LET_GO_S
    while (folder / LOCK).exists() and not signals.heard:
        try:
            FolderLock(folder).release()
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(TICK_S)


def states(places: Places, runs: Sequence[StudyRun]) -> list[str]:
    """What a study has and what it needs, a line a run."""
    known = {line.key for line in read_lines(places.results)}
    said = []
    for run in runs:
        try:
            finished = None if run.key in known else places.finished(run)
            epochs = f"{places.epochs_done(run)} of {run.cell.config.schedule.epochs} epochs done"
            state = "done" if run.key in known else "finished, its line is to be written" if finished else epochs
        except UserError as error:
            state = str(error)
        said.append(f"{run.name}: {state}")
    done = sum(run.key in known for run in runs)
    return [*said, f"{done} of {len(runs)} runs are done ({places.results})."]


def run_study(places: Places, runs: Sequence[StudyRun], pool: Pool, flags: Sequence[str], limit_s: float | None) -> int:
    """Run what is not done yet; returns the exit code: 1 if a run has failed, 128 + n after signal n.

    Raises UserError where the folders cannot be written or another process runs the study in them.
    """
    study = places.study
    try:
        places.output.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(places.output)
    except OSError as error:
        raise UserError(
            f"{places.output} cannot be written ({error.strerror or error}); choose another --output."
        ) from None
    try:
        with Signals() as signals, pool:
            conduct = Conduct(places, runs, pool, flags, limit_s)
            conduct.look_around(signals)
            conduct.tell(
                f"{study.name}: {len(conduct.waiting)} to run, {pool.jobs} at a time, in {places.output}; lines go to "
                f"{places.results}"
            )
            conduct.run(signals)
    finally:
        lock.release()
    conduct.tell(study.name)
    if conduct.waiting or conduct.saved:
        why = f"stopped by {Signal(signals.heard).name}" if signals.heard else "the time is up"
        saved = f"{len(conduct.saved)} saved where they were, " if conduct.saved else ""
        print(f"{why}: {saved}{len(conduct.waiting)} not begun; the same command goes on.")
    for name, sentence in conduct.failed.items():
        print(f"failed: {name}: {sentence}", file=sys.stderr)
    return 128 + signals.heard if signals.heard else 1 if conduct.failed else 0
