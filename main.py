"""Train or evaluate a vision transformer in MXFP4 (section 7.1 of the paper): `python main.py --help`.

Configuration -> run (data, model, optimizer) -> epochs of training and evaluation -> the run's summary.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from config import Config, UserError, dump_config, load_config
from config.explain import one_line
from config.flags import parse_flags
from config.rows import run_name
from engine import Run, Stopped, evaluate, train_one_epoch
from images.classes import check_classes
from models import PATCHES, quantizer_table
from quantization.layers.convert import unquantized_in_blocks
from record.checkpoint import BEST, LAST, find_last, load_checkpoint
from record.manifest import manifest
from record.packed import is_packed
from record.runlog import RunLog, check_new, complete, mend_best
from record.weights import load_weights, saved_classes
from results.predictions import draw_predictions
from training.build import build_evaluation, build_run, pick_device
from training.export import export, predict, restore
from training.given import as_trained, fit
from training.processes import Processes, leave, say

SMOKE_STEPS, SMOKE_BATCH = 2, 2
PICTURE = "predictions.png"


def resume_path(cfg: Config, output_dir: Path) -> Path | None:
    """The checkpoint --resume asks for; None for a fresh start."""
    if cfg.run.resume == "auto":
        return find_last(output_dir)
    return None if cfg.run.resume is None else Path(cfg.run.resume)


def evaluate_only(
    cfg: Config,
    own: Mapping[str, Any] | None,
    path: Path,
    notes: Sequence[str],
    processes: Processes,
    device: torch.device,
) -> None:
    """--eval: print loss and accuracy of a checkpoint's weights and, with --model-ema, of their moving average; writes
    nothing. own: the checkpoint's configuration, if it has one. notes: printed once its weights are in the model."""
    packed = path if is_packed(path) else None
    run = build_evaluation(cfg, rank=processes.rank, world_size=processes.world_size, device=device, packed=packed)
    check_classes(path, saved_classes(path), run.data.classes)
    figures: dict[str, float] = {}
    for prefix in ["", "ema_"] if cfg.model_ema.enabled else [""]:
        resampled = packed is None and fit(
            run.model, load_weights(path, average=bool(prefix)), path, own, cfg.model.img_size
        )
        if resampled:
            notes = [*notes, f"{path} is resampled to images of {cfg.model.img_size} pixels."]
        for note in notes if not prefix and run.rank == 0 else []:
            print(f"note: {one_line(note)}", file=sys.stderr)
        figures |= {f"{prefix}{name}": value for name, value in evaluate(run, run.model).items()}
    if run.rank == 0:
        stabilizer = "" if cfg.stabilizer.kind == "none" else f", stabilizer.kind {cfg.stabilizer.kind}"
        scored = f"{describe(figures)} on {run.data.eval_size} images"
        say(f"{one_line(path)}: {scored}, quant.scheme {cfg.quant.scheme}{stabilizer}")


def describe(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if "loss" in name else f"{name} {value:.2f} %" for name, value in figures.items()
    )


def left_alone(run: Run) -> list[str]:
    """The linears in the blocks of a quantized model that are not quantized."""
    return [] if run.cfg.quant.scheme == "none" else unquantized_in_blocks(run.model)


def describe_run(run: Run, resumed_from: Path | None) -> dict[str, Any]:
    """manifest.json of a run."""
    cfg = run.cfg
    return manifest(
        cfg,
        device=run.device,
        world_size=run.world_size,
        seed=cfg.run.seed,
        patches=[patch.record() for patch in PATCHES],
        quantizers=quantizer_table(run.model),
        extra={
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "classes": run.data.num_classes,
            "class_names": list(run.data.classes),
            "unquantized_block_linears": left_alone(run),
            "batch": {"process": run.batch_size, "accumulation": run.accumulation, "global": cfg.optim.global_batch},
            "steps_per_epoch": run.steps_per_epoch,
            "images": run.data.pipeline,
            "autocast": str(run.amp).removeprefix("torch."),
            "resumed_from": str(resumed_from) if resumed_from else None,
            "finetuned_from": cfg.run.finetune,
            "not_loaded_in_finetuning": run.not_loaded,
        },
    )


def run_training(
    cfg: Config, output_dir: Path, *, rank: int, world_size: int, device: torch.device, smoke: bool
) -> None:
    """A run from its configuration to its last epoch, fresh or resumed."""
    run = build_run(cfg, output_dir, rank=rank, world_size=world_size, device=device)
    resume = resume_path(cfg, output_dir)
    here = resume is not None and resume.resolve().parent == output_dir.resolve()
    state = None
    if resume is not None:
        state = load_checkpoint(resume)
        run.load_state_dict(state, resume)
    elif cfg.run.resume == "auto":
        check_new(output_dir, cfg)
    if run.epoch >= cfg.schedule.epochs:
        if rank == 0:
            if here and resume.name == LAST:
                complete(output_dir, state)
            say(f"{resume} is complete: {run.epoch} epochs, best top-1 {run.best_top1:.2f} %.")
        return
    run.log = RunLog(
        output_dir,
        enabled=rank == 0,
        resume=cfg.run.resume == "auto" or here,
        purge_step=run.global_step if resume or cfg.run.resume == "auto" else None,
    )
    with run.stop, run.log:
        if here and resume.name != LAST:
            run.save(LAST)
        if here and rank == 0:
            mend_best(output_dir, state)
        run.log.go_back(run.epoch, run.step)
        run.log.write_config(dump_config(cfg))
        run.log.write_manifest(describe_run(run, resume))
        if (left := left_alone(run)) and rank == 0:
            print(
                f"note: not quantized in the blocks: {', '.join(left[:4])}{' ...' if left[4:] else ''}.",
                file=sys.stderr,
            )
        if resume and rank == 0:
            say(f"Continuing {resume} at epoch {run.epoch}, step {run.step}.")
        try:
            train(run, max_steps=SMOKE_STEPS if smoke else None)
        finally:
            if run.graphs is not None:
                run.graphs.forget()  # before the communicator goes that they use


def train(run: Run, max_steps: int | None = None) -> None:
    """The epochs from where the run stands. Ends with exit code 128 + n where signal n stopped it, its state saved."""
    figures: dict[str, float] = {}
    while run.epoch < run.cfg.schedule.epochs:
        began, first_step = time.monotonic(), run.step
        train_one_epoch(run, max_steps)
        trained = time.monotonic() - began
        if run.stop.heard_anywhere:
            if run.step < run.steps_per_epoch:  # a whole epoch is saved already
                run.save(LAST)
            end_stopped(run)
        rate = (run.step - first_step) * run.cfg.optim.global_batch / trained
        train_figures = {"loss": run.meter.mean("loss"), "lr": run.lr}
        train_figures |= {"images_per_s": rate, "seconds": trained}
        if run.data.corrupt:
            train_figures["corrupt_images"] = run.data.corrupt
        try:
            figures = evaluate_epoch(run, 1 if max_steps else None)
        except Stopped:  # the epoch is saved
            end_stopped(run)
        finish_epoch(run, train_figures, figures)
        if max_steps:
            break
    scores = {name: value for name, value in figures.items() if name != "seconds"}
    run.log.log((), {**scores, "best_top1": run.best_top1, "epochs": run.epoch}, tag="final")


def evaluate_epoch(run: Run, max_batches: int | None) -> dict[str, float]:
    """Figures of the model, of its moving average where there is one (ema_*), and the seconds it took."""
    began = time.monotonic()
    figures = evaluate(run, run.model, max_batches, run.stop)
    if run.ema is not None:
        average = evaluate(run, run.ema.module, max_batches, run.stop)
        figures |= {f"ema_{name}": value for name, value in average.items()}
    return {**figures, "seconds": time.monotonic() - began}


def finish_epoch(run: Run, train_figures: dict[str, float], figures: dict[str, float]) -> None:
    """What follows an epoch's evaluation: its lines of metrics, the checkpoints, a line on the screen."""
    run.schedule.step(run.epoch)  # as DeiT: after the epoch, with the epoch's own number
    done = run.epoch
    run.epoch, run.step = run.epoch + 1, 0
    run.log.log((done,), train_figures, tag="train", at=run.global_step)
    run.log.log((done,), {**figures, **run.probe.figures(done)}, tag="eval", at=run.global_step)
    run.meter = type(run.meter)()
    is_best = figures["top1"] > run.best_top1
    run.best_top1 = max(run.best_top1, figures["top1"])
    run.save(*([LAST, BEST] if is_best else [LAST]))  # killed between the two, it is mended when it is started again
    if run.rank == 0:
        scores = {name: value for name, value in figures.items() if name != "seconds"}
        say(
            f"epoch {run.epoch}/{run.cfg.schedule.epochs}: train loss {train_figures['loss']:.4f}, "
            f"{train_figures['images_per_s']:.0f} images/s, {describe(scores)}, best {run.best_top1:.2f} %"
        )


def end_stopped(run: Run) -> NoReturn:
    """Say where a signal has stopped the run, whose state is saved, and end with 128 + its number."""
    number = run.stop.heard or signal.SIGTERM
    if run.rank == 0:
        print(
            f"Stopped by {signal.Signals(number).name} at epoch {run.epoch}, step {run.step}; the state is in "
            f"{run.log.output_dir / LAST}: go on with --resume auto.",
            file=sys.stderr,
        )
    raise SystemExit(128 + number)


def hand_on(
    options: argparse.Namespace, overrides: Sequence[str], path: Path | None, cfg: Config, device: torch.device
) -> None:
    """--export and --predict: the model of a checkpoint written in another form, or asked about images."""
    if path is None:
        flag = "--export" if options.export is not None else "--predict"
        raise UserError(f"{flag} needs a model; pass --resume CHECKPOINT.")
    if cfg.run.eval or options.smoke:
        raise UserError("--export and --predict neither train nor evaluate; leave --smoke and --eval away.")
    images, picture = [Path(image) for image in options.predict or ()], Path(options.png or PICTURE)
    if images:
        keep("The picture", picture, [*images, path])
    if options.export is not None:
        keep("The file", Path(options.export), [*images, path])
    restored = restore(path, options.config, overrides, device)
    if images:
        predictions = predict(restored, images, device)
        for prediction in predictions:
            say(one_line(prediction))
        draw_predictions(predictions, picture)
        say(one_line(f"{picture}: the picture of {'it' if len(predictions) == 1 else 'them'}"))
    if options.export is not None:
        form = options.export_form or "packed"
        say(one_line(export(restored, path, Path(options.export), form, options.export_dtype)))


def check_hand_on(options: argparse.Namespace) -> None:
    """Raises UserError where it is said how something is to be written that is not asked for."""
    for flag, of in (("export_form", "export"), ("export_dtype", "export"), ("png", "predict")):
        if getattr(options, flag) is not None and getattr(options, of) is None:
            raise UserError(f"--{flag.replace('_', '-')} is for --{of}, and there is no --{of}; leave it away.")


def keep(what: str, target: Path, sources: Sequence[Path]) -> None:
    """Raises UserError where a file that is to be written is one of those that it is made of."""
    if os.path.exists(target) and any(os.path.exists(source) and source.samefile(target) for source in sources):
        raise UserError(f"{what} {target} would be written over what it is made of; give another name.")


def check_average(cfg: Config) -> None:
    """Raises UserError where --use-ema is given and weights are read of which it says nothing."""
    if not cfg.run.use_ema:
        return
    if cfg.run.eval and (cfg.run.finetune is None or cfg.run.resume is None):
        raise UserError(
            "--use-ema is for --finetune, --export and --predict: with --eval, --model-ema scores the moving average."
        )
    if cfg.run.finetune is None:
        raise UserError(
            "--use-ema says from which weights of a file --finetune starts, and there is no --finetune; leave it away. "
            "To keep a moving average in training, take --model-ema."
        )


def smoke_overrides(cfg: Config, world_size: int) -> list[str]:
    """What --smoke changes: a few generated images in the smallest batches, no worker processes."""
    images = 4 * SMOKE_STEPS * SMOKE_BATCH * world_size
    return [
        "data.set=generated",
        "data.val_split=null",
        "data.class_map=null",
        f"data.num_images={images}",
        f"data.batch_size={SMOKE_BATCH}",
        f"optim.global_batch={SMOKE_BATCH * world_size}",
        "data.num_workers=0",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "run.log_every=1",
        "run.eval=false",
        "run.resume=null",
        "run.finetune=null",
        "run.use_ema=false",
        "distillation.type=none",
        *(["stabilizer.detect_steps=1"] if cfg.stabilizer.kind == "qramping" else []),
    ]


def main(argv: Sequence[str] | None = None, processes: Processes | None = None) -> None:
    """The command line. Raises UserError and TrainingError, which `command` turns into exit codes."""
    processes = processes or Processes()
    processes.look_around()
    rank, world_size = processes.rank, processes.world_size
    options, overrides = parse_flags(sys.argv[1:] if argv is None else argv)
    cfg = load_config(options.config, overrides, source="the command line")
    if options.smoke:
        cfg = load_config(options.config, overrides + smoke_overrides(cfg, world_size), source="the command line")
    if options.print_config:
        say(dump_config(cfg).rstrip("\n"))
        return
    device = pick_device(cfg)
    name = run_name(options.config) if options.config else cfg.model.name
    output_dir = Path(cfg.run.output_dir or Path("runs") / name)
    check_hand_on(options)
    if options.export is not None or options.predict is not None:
        if rank == 0:
            hand_on(options, overrides, resume_path(cfg, output_dir), cfg, device)
        return
    check_average(cfg)
    if cfg.run.eval:
        path = resume_path(cfg, output_dir) or (Path(cfg.run.finetune) if cfg.run.finetune else None)
        if path is None:
            raise UserError("--eval needs weights to evaluate; pass --resume CHECKPOINT.")
        cfg, own, said = as_trained(path, options.config, overrides, source="the command line")
        with processes.group(device):
            evaluate_only(cfg, own, path, said, processes, device)
        return
    with processes.group(device), tempfile.TemporaryDirectory() as scratch:
        output_dir = Path(scratch) / "smoke" if options.smoke else output_dir
        run_training(cfg, output_dir, rank=rank, world_size=world_size, device=device, smoke=options.smoke)
    if options.smoke and rank == 0:
        say(f"smoke test passed: {SMOKE_STEPS} training steps and 1 evaluation batch of {cfg.model.name}")


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """`main`, with mistakes and failures as one sentence on stderr and an exit code."""
    processes = Processes()
    try:
        main(argv, processes)
    except Exception as error:
        processes.end_failed(error)
    raise SystemExit(0)


if __name__ == "__main__":
    try:
        command()
    except SystemExit as end:
        if not end.code:
            raise
        leave(end.code)
