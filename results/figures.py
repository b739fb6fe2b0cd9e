"""Figures 2 to 6 and Table 3 of the paper from runs with a probe: `python report.py figures RUN_DIR ... --out FOLDER`.

Each picture comes with a CSV of the numbers in it. What a run has no figures for is left out of the picture: of a run
in full precision, whose weights are not quantized, there are rates of change alone.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from quantization.oscillation import OSCILLATING
from record.recordings import PROBES, read_recording
from record.runlog import CONFIG
from results.style import COLOURS, DPI, STYLES, check_run, labels, line_styles, method_name, picture, read_all, resolved

THRESHOLD = {"color": "#999999", "linestyle": ":", "linewidth": 0.8}
FOLLOWED, JUMP = 3, 0.1  # of Figure 3: weights in a panel; a step of w / S that no optimizer makes
CONFIDENCE_SHOWN, FLAT = 10, 0.1  # of Figure 5: bins, and by how much its axis exceeds an even distribution at least


@dataclass(frozen=True)
class ProbedRun:
    """A run's recordings, the arrays of quantization/probe.py, in the order of their epochs."""

    directory: Path
    method: str
    recordings: list[dict[str, np.ndarray]]

    @property
    def quantized(self) -> list[dict[str, np.ndarray]]:
        """The recordings that have quantized weights."""
        return [arrays for arrays in self.recordings if "r_WQ" in arrays]

    @property
    def last(self) -> dict[str, np.ndarray]:
        return self.recordings[-1]


def read_recordings(directory: Path) -> ProbedRun:
    """Raises UserError for a folder that is not a run, has no recording or one that cannot be read."""
    check_run(directory)
    recordings = [read_recording(path) for path in sorted((directory / PROBES).glob("epoch_*.npz"))]
    if not recordings:
        raise UserError(f"The run in {directory} has no recordings of a probe; train it with --probes.")
    return ProbedRun(directory, method_name(resolved(directory / CONFIG)), recordings)


def styles(runs: Sequence[ProbedRun]) -> list[dict[str, Any]]:
    """Colour and line style of each run."""
    return line_styles([len(run.recordings) for run in runs])


def series(recordings: Sequence[dict[str, np.ndarray]], name: str) -> tuple[list[int], list[float]]:
    """(epochs, the mean of a figure over the layers)."""
    return [int(r["epoch"]) for r in recordings], [float(np.mean(r[name])) for r in recordings]


def steps_of(runs: Sequence[ProbedRun]) -> str:
    """T0 of the recordings: "T0 = 200"."""
    steps = sorted({int(r["steps"]) for run in runs for r in run.recordings})
    return f"T0 = {steps[0]}" if len(steps) == 1 else f"T0 = {steps[0]} to {steps[-1]}"


def thresholds(grid: np.ndarray) -> np.ndarray:
    return (grid[1:] + grid[:-1]) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Figures: each draws into `figure` and returns the rows of its CSV, header first; None where no run has anything for it
# ---------------------------------------------------------------------------------------------------------------------

Rows = list[list[Any]]
RATES = ("r_w", "r_WQ", "r_Y", "r_Y_block")  # as a recording has them


def figure2(figure: Any, runs: Sequence[ProbedRun]) -> Rows | None:
    """Rate of change of weights and of a block's output over the epochs."""
    figure.set_size_inches(7.5, 3.2)
    weights, output = figure.subplots(1, 2)
    rows: Rows = [["run", "method", "epoch", "steps", *RATES]]
    for run, label, style in zip(runs, labels(runs), styles(runs), strict=True):
        if run.quantized:
            weights.plot(*series(run.quantized, "r_WQ"), **style, linewidth=1.6, label=f"{label}: $r(W_Q)$")
            weights.plot(*series(run.recordings, "r_w"), **{**style, "marker": None}, linewidth=0.8)
        else:
            weights.plot(*series(run.recordings, "r_w"), **style, linewidth=1.6, label=f"{label}: $r(W)$")
        output.plot(*series(run.recordings, "r_Y"), **style, linewidth=1.6, label=label)
        for r in run.recordings:
            rates = [float(np.mean(r[name])) if name in r else "" for name in RATES]
            rows.append([run.directory, run.method, int(r["epoch"]), int(r["steps"]), *rates])
    weights.set_title("weights, mean over layers" + (" (thin: $r(W)$)" if any(run.quantized for run in runs) else ""))
    output.set_title(f"output $Y$ of {', '.join(sorted({str(run.last['block']) for run in runs}))}, fixed batch")
    for axes in (weights, output):
        axes.set(xlabel="epoch", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    weights.set_ylabel(f"rate of change per step ({steps_of(runs)})")
    return rows


def flips(quantized: np.ndarray) -> np.ndarray:
    """How often each weight's quantized value changes: (steps + 1, weights) -> (weights,)."""
    return (np.diff(quantized, axis=0) != 0).sum(0)


def around_one_threshold(arrays: dict[str, np.ndarray]) -> tuple[float, list[int]]:
    """(threshold, up to FOLLOWED weights around it): the threshold whose weights' quantized values change most often.

    A weight that changes is around the threshold its quantized value crosses most often. Under Q-EMA the weight may be
    elsewhere: it is the shadow that crosses, or the weight crosses a number of the grid and gets other neighbours. One
    that does not change, shown only where none does, is around the threshold next to it. Those whose latent value
    jumps come last: the scale of their block has changed, and not they.
    """
    grid, latent, quantized = (arrays[name] for name in ("grid", "trajectory_latent", "trajectory_quantized"))
    limits = thresholds(grid)
    crossed = [(q[1:] + q[:-1])[q[1:] != q[:-1]] / 2 for q in quantized.T]
    crossings = [np.bincount(np.abs(c[:, None] - limits).argmin(1), minlength=len(limits)) for c in crossed]
    distance = np.abs(np.median(latent, axis=0)[:, None] - limits)
    own = [int(n.argmax()) if n.any() else int(d.argmin()) for n, d in zip(crossings, distance, strict=True)]
    jumps = np.abs(np.diff(latent, axis=0)).max(0) > JUMP
    changes = flips(quantized) * ~jumps

    def rank(k: int) -> tuple[bool, int, float]:
        return bool(jumps[k]), -int(changes[k]), float(distance[k, own[k]])

    groups = {n: sorted((k for k in range(len(own)) if own[k] == n), key=rank)[:FOLLOWED] for n in set(own)}
    best = max(groups, key=lambda n: (changes[groups[n]].sum(), (~jumps[groups[n]]).sum(), len(groups[n])))
    return float(limits[best]), [k for k in groups[best] if changes[k]] or groups[best]


def figure3(figure: Any, runs: Sequence[ProbedRun]) -> Rows | None:
    """Trajectories of oscillating weights through the last epoch, around one threshold."""
    drawn = [(run, label) for run, label in zip(runs, labels(runs), strict=True) if "trajectory_latent" in run.last]
    if not drawn:
        return None
    figure.set_size_inches(max(4.5, 2.9 * len(drawn)), 4.2)
    axes = figure.subplots(2, len(drawn), sharex="col", squeeze=False)
    rows: Rows = [["run", "method", "layer", "row", "column", "threshold", "step", "latent", "quantized"]]
    for (run, label), (top, bottom) in zip(drawn, axes.T, strict=True):
        arrays = run.last
        threshold, chosen = around_one_threshold(arrays)
        latent, quantized = arrays["trajectory_latent"][:, chosen], arrays["trajectory_quantized"][:, chosen]
        steps = int(arrays["trajectory_first_step"]) + np.arange(len(latent))
        for n, k in enumerate(chosen):
            style = {"color": COLOURS[1 + n], "linewidth": 1.2}
            top.step(steps, quantized[:, n], where="post", **style, linestyle=STYLES[n])
            bottom.plot(steps, latent[:, n] - threshold, **style, linestyle=STYLES[n])
            where = [str(arrays["layers"][arrays["trajectory_layer"][k]])]
            where += [int(arrays[f"trajectory_{name}"][k]) for name in ("row", "column")]
            rows += [
                [run.directory, run.method, *where, threshold, int(step), float(w), float(q)]
                for step, w, q in zip(steps, latent[:, n], quantized[:, n], strict=True)
            ]
        bottom.axhline(0, color="#000000", linestyle="--", linewidth=1)
        spread = max(np.abs(latent - threshold).max() * 1.25, 1e-6)
        bottom.set_ylim(-spread, spread)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        bottom.set_title(f"threshold {threshold:g} (dashed)", loc="right")
        grid = arrays["grid"]
        levels = grid[(grid >= quantized.min() - 0.5) & (grid <= quantized.max() + 0.5)]
        top.set_yticks(levels)
        top.set_ylim(levels[0] - 0.25, levels[-1] + 0.25)
        changes = ", ".join(str(n) for n in flips(quantized))
        top.set(title=f"{label}\n{changes} changes in {len(steps) - 1} steps")
        bottom.set(xlabel="optimizer step")
        for panel in (top, bottom):
            panel.grid(alpha=0.3)
        bottom.xaxis.get_major_locator().set_params(integer=True, nbins=4)
    axes[0, 0].set(ylabel="quantized value $Q(w) / S$")
    axes[1, 0].set(ylabel="latent $w / S$ - threshold")
    return rows


def density(arrays: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(edges, share of weights a unit) of a histogram over all layers."""
    edges, counts = arrays[f"{name}_edges"], arrays[f"{name}_counts"].sum(0)
    return edges, counts / counts.sum() / np.diff(edges)


def early_and_late(run: ProbedRun) -> list[dict[str, np.ndarray]]:
    """The recording nearest to a third of the way (the paper: epoch 30 of 90) and the last one."""
    late = run.quantized[-1]
    early = min(run.quantized, key=lambda r: abs(int(r["epoch"]) - int(late["epoch"]) / 3))
    return [early, late] if early is not late else [late]


def figure4(figure: Any, runs: Sequence[ProbedRun]) -> Rows | None:
    """Distributions of latent weight and of quantization confidence, early against late."""
    drawn = [(run, label) for run, label in zip(runs, labels(runs), strict=True) if run.quantized]
    if not drawn:
        return None
    figure.set_size_inches(max(5.0, 3.1 * len(drawn)), 4.6)
    axes = figure.subplots(2, len(drawn), sharey="row", squeeze=False)
    rows: Rows = [["run", "method", "epoch", "quantity", "from", "to", "share"]]
    for (run, label), (top, bottom) in zip(drawn, axes.T, strict=True):
        for arrays, colour, width in zip(early_and_late(run)[::-1], (COLOURS[4], COLOURS[2]), (1.3, 1.0), strict=False):
            epoch = int(arrays["epoch"])
            for panel, name in ((top, "latent"), (bottom, "confidence")):
                edges, values = density(arrays, name)
                mean = f", mean {np.average(arrays['confidence'], weights=arrays['numel']):.3f}"
                text = f"epoch {epoch}{mean if name == 'confidence' else ''}"
                late = arrays is run.quantized[-1]
                panel.stairs(
                    values, edges, color=colour, linewidth=width, label=text, fill=late, alpha=0.45 if late else 1
                )
                shares = values * np.diff(edges)
                rows += [
                    [run.directory, run.method, epoch, name, float(a), float(b), float(share)]
                    for a, b, share in zip(edges, edges[1:], shares, strict=False)
                ]
        for threshold in thresholds(run.quantized[-1]["grid"]):
            top.axvline(threshold, **THRESHOLD)
        top.set(
            title=label, xlabel="latent weight $w / S$ (dotted: thresholds)", xlim=(edges_of(run)[0], edges_of(run)[-1])
        )
        bottom.set(xlabel="quantization confidence", xlim=(0, 1))
        bottom.legend(loc="lower center")
        top.legend(loc="upper right", handlelength=1)
    axes[0, 0].set(ylabel="density of weights")
    axes[1, 0].set(ylabel="density of weights")
    return rows


def edges_of(run: ProbedRun) -> np.ndarray:
    return run.quantized[-1]["latent_edges"]


def figure5(figure: Any, runs: Sequence[ProbedRun]) -> Rows | None:
    """Distribution of the quantization confidence after each run's last recording."""
    if not any(run.quantized for run in runs):
        return None
    figure.set_size_inches(5.0, 3.4)
    axes = figure.subplots()
    rows: Rows = [["run", "method", "epoch", "from", "to", "share"]]
    inner = [1 - FLAT, 1 + FLAT]
    for run, label, style in zip(runs, labels(runs), styles(runs), strict=True):
        if not run.quantized:
            continue
        arrays = run.quantized[-1]
        edges, values = density(arrays, "confidence")
        mean = np.average(arrays["confidence"], weights=arrays["numel"])
        # Coarse bins: of fine ones a small model shows the noise alone.
        coarse = values.reshape(CONFIDENCE_SHOWN, -1).mean(1)
        inner += list(coarse[:-1])  # without the last one, which holds all that saturates under the scale rule `floor`
        beyond = f", {coarse[-1]:.2f} at 1" if coarse[-1] > max(inner) else ""
        style = {**style, "marker": "."}
        middles = (np.arange(CONFIDENCE_SHOWN) + 0.5) / CONFIDENCE_SHOWN
        axes.plot(middles, coarse, linewidth=1.5, label=f"{label}: mean {mean:.3f}{beyond}", **style)
        rows += [
            [run.directory, run.method, int(arrays["epoch"]), float(a), float(b), float(share)]
            for a, b, share in zip(edges, edges[1:], values * np.diff(edges), strict=False)
        ]
    low, high = min(inner), max(inner)
    low, high = max(0.0, low - 0.5 * (high - low)), high + 0.1 * (high - low)
    axes.set(xlabel="quantization confidence (0: at a threshold)", ylabel="density of weights", xlim=(0, 1))
    axes.set_ylim(low, high)  # with room for the legend below the lines
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title("quantization confidence of the final model")
    return rows


def figure6(figure: Any, runs: Sequence[ProbedRun]) -> Rows | None:
    """Oscillating weights over the epochs."""
    drawn = [run for run in runs if run.quantized]
    if not drawn:
        return None
    figure.set_size_inches(5.0, 3.4)
    axes = figure.subplots()
    rows: Rows = [["run", "method", "epoch", "steps", "oscillating", "weights", "share"]]
    for run, label, style in zip(runs, labels(runs), styles(runs), strict=True):
        if not run.quantized:
            continue
        counts = [(int(r["oscillating"].sum()), int(r["numel"].sum())) for r in run.quantized]
        epochs = [int(r["epoch"]) for r in run.quantized]
        axes.plot(epochs, [100 * count / total for count, total in counts], **style, linewidth=1.6, label=label)
        rows += [
            [run.directory, run.method, int(r["epoch"]), int(r["steps"]), count, total, count / total]
            for r, (count, total) in zip(run.quantized, counts, strict=True)
        ]
    axes.set(xlabel="epoch", ylabel="oscillating weights (% of all)")
    axes.set_title(f"weights with oscillation ratio $R_w$ > {OSCILLATING:g} ({steps_of(drawn)})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.xaxis.get_major_locator().set_params(integer=True)
    return rows


def table3(figure: Any, runs: Sequence[ProbedRun]) -> Rows | None:
    """Rates of change at the end of training, as a picture of a table."""
    rows: Rows = [["run", "method", "epoch", "steps", "block", *RATES]]
    cells = []
    for run, label in zip(runs, labels(runs), strict=True):
        r = run.last
        rates = [float(np.mean(r[name])) if name in r else None for name in RATES]
        rows.append(
            [run.directory, run.method, int(r["epoch"]), int(r["steps"]), str(r["block"])]
            + ["" if rate is None else rate for rate in rates]
        )
        shown = ["-" if rate is None else f"{rate:.4f}" if rate >= 1e-3 else f"{rate:.1e}" for rate in rates]
        cells.append([label, str(int(r["epoch"])), *shown])
    figure.set_size_inches(5.6, 0.4 + 0.25 * (len(cells) + 1))
    axes = figure.subplots()
    axes.set_axis_off()
    header = ["", "epoch", "$r(W)$", "$r(W_Q)$", "$r(Y)$", "$r(Y|X)$"]
    table = axes.table(
        [header, *cells],
        loc="upper center",
        cellLoc="right",
        edges="horizontal",
        colWidths=[0.36, 0.1, 0.135, 0.135, 0.135, 0.135],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.35)
    for (_, column), cell in table.get_celld().items():
        if column == 0:
            cell.set_text_props(ha="left")
    blocks = sorted({str(run.last["block"]) for run in runs})
    of_y = f"$Y$: {', '.join(blocks)}, $Y|X$: its input fixed"
    axes.set_title(f"rates of change per step in the last recording ({steps_of(runs)}; {of_y})")
    return rows


PICTURES = {
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "table3": table3,
}


def write_figures(directories: Sequence[Path], out: Path) -> None:
    """`report.py figures`: PNG and CSV of every figure into the folder `out`; prints what was written.

    A run without a probe, or one that cannot be read, is named and left out. Raises UserError for a folder that is no
    run, where no run is left, or a file cannot be written.
    """
    runs = read_all(directories, read_recordings)
    for name, draw in PICTURES.items():
        with picture() as figure:
            rows = draw(figure, runs)
            if rows is None:
                print(f"{name}: no run has what it shows (quantized weights, followed to the last epoch)")
                continue
            path = out / f"{name}.png"
            try:
                out.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=DPI)
                path = out / f"{name}.csv"
                with path.open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(rows)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be written ({error.strerror or error}); choose another --out."
                ) from None
        print(f"{name}: {(draw.__doc__ or '').splitlines()[0]} {out / name}.png, {out / name}.csv")
