"""A study from what it has to what it still needs: `python study.py run FILE`.

A run is done when results/STUDY.csv has its line. It is in the folder OUTPUT/ROW-VALUE-seedN, where main.py goes on
with it when it was stopped; where it is finished there and the line is missing, the line is written.
"""

from __future__ import annotations

import heapq
import os
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
from record.lines import CONFIGS, Finished, Line, add_lines, check_writable, read_finished, read_lines
from record.manifest import COMMIT, git_state
from record.metrics import finished_epochs
from studies.grid import Study, StudyRun
from studies.pool import Ended, Pool, Signals, threads

TICK_S, TELL_S = 0.05, 60.0  # between two looks at the processes; between two lines of progress
LET_GO_S, LONG_S = 120.0, 2.0  # a run has so long to save its state and to leave its folder; what is worth a word
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
        self.limit_s = float("inf") if limit_s is None else limit_s
        self.deadline = time.monotonic() + self.limit_s
        self.failed: dict[str, str] = {}
        self.saved: list[str] = []
        self.waiting: deque[StudyRun] = deque()
        self.begun: dict[str, float] = {}  # the share of each run that was done when it was started
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
        return self._keep(run) is not None

    def _keep(self, run: StudyRun) -> Finished | None:
        """Write the line of a run if it is finished; None if it is not, or has failed by that."""
        try:
            finished = self.places.finished(run)
            if finished is not None:
                add_lines(self.places.results, [line_of(run, finished)])
        except UserError as error:
            self._fail(run.name, str(error))
            return None
        return finished

    def _fail(self, name: str, sentence: str) -> None:
        self.failed[name] = sentence
        self.tell(f"{name} FAILED: {sentence}")

    def whole(self, run: StudyRun) -> float | None:
        """Seconds that a run may take from its beginning; None where nothing is known."""
        return self.durations.expected(run) or self.earlier.expected(run)

    def share_done(self, run: StudyRun) -> float:
        return min(1.0, self.places.epochs_done(run) / run.cell.config.schedule.epochs)

    def expected(self, run: StudyRun) -> float | None:
        """Seconds that what is left of a run may take; None where nothing is known."""
        whole = self.whole(run)
        return whole and whole * (1 - self.share_done(run))

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def command(self, run: StudyRun) -> list[str]:
        words = [sys.executable, str(MAIN), "--config", run.cell.reference, *run.cell.flags(run.seed)]
        if self.pool.jobs > 1 and run.cell.config.data.num_workers is None:
            words.append(f"--data.num_workers={min(MAX_WORKERS, threads(self.pool.jobs))}")
        return [*words, *self.flags, "--output_dir", str(self.places.folder(run)), "--resume", "auto"]

    def _in_time(self, run: StudyRun) -> bool:
        """Whether the time left is enough for a run; one that no session of this length could hold goes on in each."""
        expected = self.expected(run)
        return expected is None or expected <= self.left_s or expected > self.limit_s

    def start(self) -> None:
        """Start what waits, as far as there is room, and time for a whole run."""
        while self.waiting and not self.pool.full and self._in_time(self.waiting[0]):
            run = self.waiting.popleft()
            self.begun[run.name] = self.share_done(run)
            try:
                self.pool.start(run.name, self.command(run), self.places.log(run))
            except UserError as error:
                self._fail(run.name, str(error))

    def end(self, ended: Ended, stopping: bool) -> None:
        """A process has ended."""
        run = self.runs[ended.name]
        if (finished := self._keep(run)) is not None:
            self.done += 1
            whole = finished.figures["seconds"] if self.begun[run.name] else ended.seconds
            self.durations.known.append((run, whole))
            self.tell(f"{run.name}: top-1 {finished.figures['top1']:.2f} %, {spoken(ended.seconds)}")
        elif run.name in self.failed:
            pass
        elif stopping and ended.code in (-Signal.SIGTERM, 128 + Signal.SIGTERM):
            self.saved.append(run.name)
        else:
            how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
            self._fail(run.name, f"{ended.said} ({how}; {self.places.log(run)})")

    def tell(self, what: str) -> None:
        """A line of progress: what has happened, how many runs are done, and about how long the others will take."""
        self._told = time.monotonic()
        total = len(self.runs)
        left = f", about {spoken(eta)} left" if (eta := self.eta()) else ""
        say(f"[{self.done:>{len(str(total))}}/{total}] {what}{left}")

    def eta(self) -> float | None:
        """Seconds, with the runs that wait begun in their order; None where nothing is known or nothing is left."""
        running = []
        for name, seconds in self.pool.running.items():
            whole = self.whole(self.runs[name])
            running.append(whole and max(0.0, whole * (1 - self.begun[name]) - seconds))
        waiting = [self.expected(run) for run in self.waiting]
        if None in waiting + running or not (waiting or running):
            return None
        ends = [*running, *[0.0] * (self.pool.jobs - len(running))]
        heapq.heapify(ends)
        for seconds in waiting:
            heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)

    def run(self, signals: Signals) -> None:
        """Until all runs are done, a signal is heard or the time is up; then the runs in progress save their state, and
        those that have not ended LET_GO_S later are killed."""
        stopped_at = None
        while True:
            for ended in self.pool.ended():
                self.end(ended, stopped_at is not None)
            if stopped_at is None and (signals.heard or self.left_s <= 0):
                stopped_at = time.monotonic()
                if self.pool.running:
                    self.tell(f"{', '.join(self.pool.running)}: to save and to end")
                self.pool.stop()
            if stopped_at is None:
                self.start()
            elif time.monotonic() > stopped_at + LET_GO_S:
                self.pool.kill()
            if not self.pool.running:
                return
            if time.monotonic() - self._told > TELL_S:
                self.tell("running: " + ", ".join(map(self._progress, self.pool.running)))
            time.sleep(TICK_S)

    def _progress(self, name: str) -> str:
        run = self.runs[name]
        return f"{name} ({self.places.epochs_done(run)} of {run.cell.config.schedule.epochs} epochs)"


def say(line: str, *, error: bool = False) -> None:
    """Write a line to stdout or stderr. A reader that is gone, such as a tee that Ctrl-C has ended, stops no study."""
    name = "stderr" if error else "stdout"
    try:
        print(line, file=getattr(sys, name), flush=True)
    except (OSError, ValueError):
        setattr(
            sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        )  # what is in the buffer would fail again at the end


def spoken(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def await_release(folder: Path, signals: Signals) -> None:
    """Wait until no process writes in a run's folder any more. Raises UserError where that takes too long, and where
    the folder cannot be written."""
    began, told = time.monotonic(), False
    while (folder / LOCK).exists() and not signals.heard:
        try:
            FolderLock(folder, flag="--output").release()
        except UserError:
            if time.monotonic() > began + LET_GO_S:
                raise
            if not told and time.monotonic() > began + LONG_S:
                say(f"{folder} is written by another process; waiting up to {spoken(LET_GO_S)} for it to end.")
                told = True
            time.sleep(TICK_S)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error}).") from None


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

    Raises UserError where folders or lines cannot be written or another process runs the study in them.
    """
    study = places.study
    check_writable(places.results)
    try:
        places.output.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(places.output, "study", "--output")
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
            if conduct.waiting and git_state()["commit"] is None:
                say(f"note: git does not say which commit this is; {COMMIT}=HASH in the environment would.")
            if conduct.waiting and not signals.heard:
                pool.warm_up(MAIN)
            conduct.run(signals)
    finally:
        lock.release()
    conduct.tell(study.name)
    if conduct.waiting or conduct.saved:
        why = f"stopped by {Signal(signals.heard).name}" if signals.heard else "the time is up"
        saved = f"{len(conduct.saved)} saved where they were, " if conduct.saved else ""
        say(f"{why}: {saved}{len(conduct.waiting)} not begun; the same command goes on.")
    for name, sentence in conduct.failed.items():
        say(f"failed: {name}: {sentence}", error=True)
    return 128 + signals.heard if signals.heard else 1 if conduct.failed else 0
