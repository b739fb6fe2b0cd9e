"""How runs are read, named, told apart and drawn: the same in every table and picture."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from config import Config, UserError, load_config, read_yaml
from quantization import PRESETS, resolve
from record.runlog import CONFIG

# Okabe and Ito's palette, told apart by colour-blind readers, with line styles for print.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
PRINT = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "legend.frameon": False}
NAMES = {"nvfp4": "NVFP4", "mxfp4_tseng": "MXFP4 of Tseng et al.", "quartet_released": "Quartet as released"}
NAMES |= {"quartet": "Quartet", "tetrajet2": "TetraJet-v2", "fqt": "FQT", "ue5m3": "UE5M3", "amd_mxfp4": "AMD's MXFP4"}
NAMES |= {"full_precision": "full precision", "tetrajet": "TetraJet", "microscaling": "Microscaling", "int4": "INT4"}
NAMES |= {"mx": "own recipe", "qema": "Q-EMA", "qramping": "Q-Ramping", "dampen": "Dampen", "freeze": "Freeze"}
DPI = 150


Read = TypeVar("Read")


def resolved(path: Path) -> Config:
    """The configuration of a run; one that does not even say what was trained is not that of the defaults."""
    cfg, given = load_config(path), read_yaml(path)
    if missing := [name for name in ("model", "quant", "optim", "schedule", "data", "run") if name not in given]:
        raise UserError(f"{path} is no resolved configuration: {missing[0]} is missing.")
    return cfg


def check_run(directory: Path) -> None:
    """Raises UserError for a folder that is not a run."""
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} is not a run: it holds no {CONFIG}; give the --output_dir of a run.")


def read_all(directories: Sequence[Path], read: Callable[[Path], Read]) -> list[Read]:
    """What `read` gives of every run. A run that it cannot read is named on stderr and left out.

    Raises UserError for a folder that is no run, and where no run is left.
    """
    for directory in directories:
        check_run(directory)
    found, broken = [], []
    for directory in directories:
        try:
            found.append(read(directory))
        except UserError as error:
            broken.append(error)
    if not found:
        raise broken[0]
    for error in broken:
        print(f"left out: {error}", file=sys.stderr)
    return found


class NamedRun(Protocol):
    """A run directory and the name of its method."""

    @property
    def directory(self) -> Path: ...

    @property
    def method(self) -> str: ...


def method_name(cfg: Config) -> str:
    """The method of a configuration by the name of its preset; `mx` for a recipe that is none of them."""
    recipe = resolve(cfg.quant)
    name = next((name for name, preset in PRESETS.items() if preset == recipe), cfg.quant.scheme)
    return name if cfg.stabilizer.kind == "none" else f"{name}_{cfg.stabilizer.kind}"


def spoken(method: str) -> str:
    """The method as the paper writes it: TetraJet + Q-EMA."""
    scheme = next(name for name in NAMES if method.startswith(name))  # so a name comes before those it begins with
    stabilizer = method.removeprefix(scheme).lstrip("_")
    return NAMES[scheme] + (f" + {NAMES[stabilizer]}" if stabilizer else "")


def labels(runs: Sequence[NamedRun], spell: Callable[[str], str] = spoken) -> list[str]:
    """The methods, as the paper writes them or by another spelling; with the directory where two runs have the same."""
    methods = [run.method for run in runs]
    return [spell(run.method) + (f" ({run.directory.name})" if methods.count(run.method) > 1 else "") for run in runs]


def line_styles(points: Sequence[int]) -> list[dict[str, Any]]:
    """Colour and line style of each run, the same in every picture; a dot for a run of one point, which has no line."""
    return [
        {
            "color": COLOURS[n % len(COLOURS)],
            "linestyle": STYLES[n % len(STYLES)],
            "marker": "o" if count == 1 else None,
        }
        for n, count in enumerate(points)
    ]


@contextlib.contextmanager
def picture(settings: Mapping[str, Any] = PRINT) -> Iterator[Any]:
    """A matplotlib figure that is drawn off screen, in the style of a printed page, and closed afterwards."""
    import matplotlib  # here and not above: tables need none

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(dict(settings)):
        figure = plt.figure(layout="constrained")
        try:
            yield figure
        finally:
            plt.close(figure)
