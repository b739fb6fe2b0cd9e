"""A study: rows x values x seeds over any configuration, read from configs/studies/NAME.yaml.

    study = read_study(Path("configs/studies/digits.yaml"))
    study.runs()[0].name        # "tetrajet-seed0"; table by table, and all rows of it seed by seed

How such a file is written:
  title      one line
  base       the configuration that a row starts from, relative to the file, or a row of the paper, FILE#ROW/MODEL
  set        what is changed in all of them (the scale of the study stands here, once)
  values     names with what each changes: every row is run with each; <value> in a base stands for the name
  seeds      of every row: a row has the weights, the order of images and the augmentation of a seed in common with
             all others, so that rows are compared seed by seed
  rows       name: {base, set, values (names of those that it is run with), seeds}, all of them optional
  choice     whether it is there to choose one of its values (results/choice.py)
  milliseconds  that a device works for a step of each value, for a choice among them: so long a run takes
  tables, findings   what it asks (studies/questions.py)
A cell, a row with one of its values, is the base with the changes of the study, of its value and of its own, in this
order. Two cells may not be the same recipe.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationError

from config import Config, UserError, iter_keys, load_config, read_yaml, recipe_differences, recipe_identity
from config.explain import did_you_mean
from config.flags import parse_flags
from config.rows import ROOT
from studies.questions import Finding, Part, Table, check_questions

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+=]+$")]  # a part of a folder's name


def _each_once(seeds: list[int]) -> list[int]:
    if (twice := next((seed for seed in seeds if seeds.count(seed) > 1), None)) is not None:
        raise ValueError(f"seed {twice} is there twice")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(_each_once)]
# What a study decides on for each of its runs.
OWN = {"run.seed", "run.output_dir", "run.resume", "run.eval", "run.finetune", "run.use_ema"}


def _none(given: Any) -> Any:
    """`name:` with nothing behind it is a row, or a value, that changes nothing."""
    return {} if given is None else given


class _Value(Part):
    set: dict[str, Any] = Field(default={})


class _Row(Part):
    base: str | None = None
    set: dict[str, Any] = Field(default={})
    values: list[str] | None = None
    seeds: Seeds | None = None


class _File(Part):
    title: str
    base: str | None = None
    set: dict[str, Any] = Field(default={})
    values: Annotated[dict[Name, Annotated[_Value, BeforeValidator(_none)]], Field(min_length=1)] | None = None
    seeds: Seeds
    rows: Annotated[dict[Name, Annotated[_Row, BeforeValidator(_none)]], Field(min_length=1)]
    choice: bool = False
    milliseconds: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default={})
    tables: list[Table] = Field(default=[])
    findings: list[Finding] = Field(default=[])


@dataclass(frozen=True)
class Cell:
    """A row with one of its values: one recipe, trained with several seeds."""

    study: str
    row: str
    value: str  # empty where the study has rows alone
    reference: str  # the configuration it starts from, as load_config takes it
    changes: dict[str, Any]  # by dotted keys
    seeds: tuple[int, ...]
    config: Config
    recipe: str

    @property
    def name(self) -> str:
        return f"{self.row}-{self.value}" if self.value else self.row

    def flags(self, seed: int) -> list[str]:
        """Those of main.py that make the configuration it starts from this cell with a seed."""
        return [*_as_flags({**self.changes, "run.seed": seed})]


@dataclass(frozen=True)
class StudyRun:
    """A cell with a seed."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """That of its folder too; the same as long as the study's file calls it so."""
        return f"{self.cell.name}-seed{self.seed}"

    @property
    def names(self) -> tuple[str, ...]:
        """What a filter may call it."""
        return self.cell.row, self.cell.value, self.cell.name, self.name

    def matches(self, pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in self.names)

    @property
    def key(self) -> tuple[str, str, int, str]:
        """That of its line in results/."""
        return self.cell.row, self.cell.value, self.seed, self.cell.recipe

    @property
    def command(self) -> str:
        """What trains it, from the root of the repository, beside where data and output are."""
        reference = os.path.relpath(self.cell.reference, ROOT)
        reference = self.cell.reference if reference.startswith("..") else reference
        return shlex.join(["python", "main.py", "--config", reference, *self.cell.flags(self.seed)])


@dataclass(frozen=True)
class Study:
    """A file of configs/studies, read and checked."""

    file: Path
    title: str
    cells: tuple[Cell, ...]
    choice: bool
    milliseconds: dict[str, float]
    tables: tuple[Table, ...]
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        return self.file.stem

    def runs(
        self, patterns: Sequence[str] = (), seeds: Sequence[int] = (), without: Sequence[str] = ()
    ) -> list[StudyRun]:
        """What the first of its tables needs, then the second, ..., then what none needs: a study that is cut off can
        answer what it asks first. Each of these seed by seed, so that rows come in pairs; then value by value.

        patterns: names of rows, values, cells or runs, * and ? in them as in names of files; empty: all. without: those
        that are left out. seeds: in place of the study's. Raises UserError for a pattern that matches nothing, and
        where no run is left.
        """
        found = []
        for cell in self.cells:
            chosen = seeds or cell.seeds
            asked = next((n for n, one in enumerate(self.tables) if one.has(cell.row, cell.value)), len(self.tables))
            found += [((asked, place), StudyRun(cell, seed)) for place, seed in enumerate(dict.fromkeys(chosen))]
        runs = [run for _, run in sorted(found, key=lambda pair: pair[0])]
        for pattern in (*patterns, *without):
            if not any(run.matches(pattern) for run in runs):
                known = dict.fromkeys(name for run in runs for name in run.names[:3] if name)
                raise UserError(f"{self.file} has no run {pattern}; {did_you_mean(pattern, known)}")
        runs = [run for run in runs if not patterns or any(map(run.matches, patterns))]
        kept = [run for run in runs if not any(map(run.matches, without))]
        if runs and not kept:
            raise UserError(f"No run of {self.file} is left without {' '.join(without)}.")
        return kept


def _flat(changes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.1} of {"optim": {"lr": 0.1}}; a key's own mapping, such as model.kwargs, stays whole."""
    keys, found = dict(iter_keys()), {}
    for name, value in changes.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and value and dotted not in keys:
            found |= _flat(value, f"{dotted}.")
        else:
            found[dotted] = value
    return found


def _overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _as_flags(changes: dict[str, Any]) -> list[str]:
    """As the words of a command line."""
    words = []
    for key, value in changes.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        else:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            words.append(f"--{key}={text}")
    return words


def _explain(error: Any) -> str:
    """One sentence for a mistake in a study's file."""
    loc = [str(part) for part in error["loc"] if part != "[key]"]
    where = ".".join(loc)
    if error["type"] == "extra_forbidden":
        kinds = {"rows": _Row, "values": _Value, "tables": Table, "findings": Finding}
        part = kinds.get(loc[0], _File) if len(loc) > 2 else _File
        return f"there is no key {where}; {did_you_mean(loc[-1], part.model_fields)}"
    if error["type"] == "missing":
        return f"{where} is missing."
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: a name may have letters, digits and _ . + = in it, since folders are named after it."
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}."
    if error["type"] in ("model_type", "dict_type"):
        message = "a mapping of keys to values was expected"
    elif error["type"] == "string_type":
        message = "text was expected; put it in quotes"
    else:
        message = (error["msg"][0].lower() + error["msg"][1:]).replace(" after validation", "")
    return f"{where} is {json.dumps(error['input'], default=str)[:100]}: {message}."


def _cell(file: Path, given: _File, row: str, value: str) -> Cell:
    part = given.rows[row]
    base = part.base or given.base
    if base is None:
        raise UserError(f"{file}: rows.{row} needs a base, or the study one for all rows.")
    if "<value>" in base and not value:
        raise UserError(
            f"{file}: rows.{row}: its base {base} stands for one of each value, and the study has no values."
        )
    reference = os.path.normpath(file.absolute().parent / base.replace("<value>", value))
    of_value = given.values[value].set if value else {}
    changes: dict[str, Any] = {}
    for key, new in (pair for level in (given.set, of_value, part.set) for pair in _flat(level).items()):
        old = changes.get(key)
        changes[key] = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new
    if own := OWN & changes.keys():
        raise UserError(f"{file}: {min(own)} is the study's own to set, for each run.")
    source = f"{file}: {row}{f' with {value}' if value else ''}"
    try:
        config = load_config(reference, _overrides(changes), source=source)
    except UserError as error:
        raise (error if str(error).startswith(source) else UserError(f"{source}: {error}")) from None
    return Cell(
        study=file.stem,
        row=row,
        value=value,
        reference=reference,
        changes=changes,
        seeds=tuple(part.seeds or given.seeds),
        config=config,
        recipe=recipe_identity(config.model_dump(mode="json")),
    )


def read_study(file: Path) -> Study:
    """Raises UserError, one sentence that names the file and the key."""
    data = read_yaml(file)
    try:
        given = _File.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{file}: {_explain(error.errors()[0])}") from None
    if not re.fullmatch(r"[A-Za-z0-9_]+", file.stem):
        raise UserError(
            f"{file}: a study's file is named by letters, digits and _ alone; its results are named after it."
        )
    for row, part in given.rows.items():
        for value in part.values or []:
            if value not in (given.values or {}):
                known = did_you_mean(value, given.values) if given.values else "the study has no values."
                raise UserError(f"{file}: rows.{row}.values: there is no value {value}; {known}")
    cells = [
        _cell(file, given, row, value)
        for value in given.values or [""]
        for row, part in given.rows.items()
        if part.values is None or value in part.values
    ]
    seen: dict[str, Cell] = {}
    for cell in cells:
        if (twin := seen.setdefault(cell.recipe, cell)) is not cell:
            raise UserError(f"{file}: {cell.name} is the same recipe as {twin.name}; one of them is enough.")
    values = [*given.values] if given.values else []
    if given.choice and not (values and len(given.rows) > 1):
        raise UserError(f"{file}: choice is one of several values by two rows, and the study has not both.")
    if given.milliseconds and (odd := given.milliseconds.keys() ^ {*values}):
        raise UserError(f"{file}: milliseconds are given of all values and of nothing else; see {min(odd)}.")
    if given.milliseconds and not given.choice:
        raise UserError(f"{file}: milliseconds are for a choice among the values, and the study has none.")
    if said := check_questions(given.tables, given.findings, [(cell.row, cell.value) for cell in cells]):
        raise UserError(f"{file}: {said}")
    asked = tuple(given.tables), tuple(given.findings)
    return Study(file, given.title, tuple(cells), given.choice, given.milliseconds, *asked)


def execution_flags(study: Study, flags: Sequence[str]) -> list[str]:
    """The flags of main.py that a study is started with, checked: they may say where and how it runs, not what.

    Raises UserError.
    """
    options, overrides = parse_flags(flags, notes=False)
    if options.config or options.smoke or options.print_config:
        raise UserError(
            "A study has the configurations of its file: --config, --smoke and --print-config are main.py's."
        )
    if options.export is not None or options.predict is not None:
        raise UserError("A study trains its runs: --export and --predict are main.py's, of one checkpoint.")
    for key in (override.partition("=")[0] for override in overrides):
        if key in OWN:
            raise UserError(f"--{key} is the study's own to set, for each run.")
    for cell in study.cells if overrides else ():
        given = load_config(cell.reference, [*_overrides(cell.changes), *overrides], source="the command line")
        dumped = given.model_dump(mode="json")
        differences = recipe_differences(dumped, cell.config.model_dump(mode="json"))
        if (
            not differences and recipe_identity(dumped) != cell.recipe
        ):  # spelled otherwise, or not to be told in advance
            differences = [f"{', '.join(override.partition('=')[0] for override in overrides)} for {cell.name}"]
        if differences:
            raise UserError(
                f"{differences[0]} would change what {study.name} trains; flags may say where and how a study runs, "
                f"and what it trains stands in {study.file}."
            )
    return [*flags]
