"""Flags of DeiT's main.py that this program has no use for: taken, explained in a line and left out.

Those that would train something else than this program does are refused, each with what to do about it. timm's
--pretrained, there a switch that downloads weights, takes a file here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from config.explain import UserError, shorten


@dataclass(frozen=True)
class _Flag:
    """values: how many words follow it, None for one or more. refused: it would train something else."""

    says: str
    values: int | None = 0
    refused: bool = False


_PROCESSES = "processes and where they meet are what torchrun says"
_NOISE = "the learning rate follows its schedule, without noise"
_FLAGS = {
    "--dist-eval": _Flag("evaluation is spread over all processes, and exact, in any case"),
    "--no-dist-eval": _Flag("evaluation is spread over all processes, and exact, in any case"),
    "--world-size": _Flag(_PROCESSES, 1),
    "--dist-url": _Flag(_PROCESSES, 1),
    "--dist-backend": _Flag("NCCL connects GPUs and gloo CPUs", 1),
    "--dist-on-itp": _Flag(_PROCESSES),
    "--local-rank": _Flag(_PROCESSES, 1),
    "--rank": _Flag(_PROCESSES, 1),
    "--gpu": _Flag("each process takes the GPU of its local rank; see --device", 1),
    "--distributed": _Flag(_PROCESSES),
    "--start-epoch": _Flag("a checkpoint knows its epoch; see --resume", 1),
    "--model-ema-force-cpu": _Flag("the moving average is kept where the model is"),
    "--no-model-ema-force-cpu": _Flag("the moving average is kept where the model is"),
    "--resplit": _Flag("there is no augmentation in splits that random erasing could leave out"),
    "--no-resplit": _Flag("there is no augmentation in splits that random erasing could leave out"),
    "--cooldown-epochs": _Flag("--epochs counts all epochs, as it does in DeiT", 1),
    "--patience-epochs": _Flag("it belongs to a schedule (plateau) that this program does not have", 1),
    "--lr-noise-pct": _Flag(_NOISE, 1),
    "--lr-noise-std": _Flag(_NOISE, 1),
    "--lr-noise": _Flag(f"{_NOISE}; leave it out", None, refused=True),
    "--inat-category": _Flag("the classes are the folders in train/ and val/ of --data-path", 1),
    "--train-mode": _Flag("the model is in training mode while it trains"),
    "--no-train-mode": _Flag("a model trains in training mode; --drop-path 0 goes without its drops", refused=True),
    "--attn-only": _Flag("all parameters are trained; leave it out", refused=True),
    "--cosub": _Flag("training of submodels (cosub) is not part of this program; leave it out", refused=True),
    "--fp32-resume": _Flag("there is no loss scaler whose state could be kept"),
}


def _is_switch(word: str) -> bool:
    """Whether what follows a flag is no value: another flag, nothing, or the word for on or off."""
    return word.startswith("--") or word.strip().lower() in ("", "true", "false", "yes", "no", "on", "off")


def without_deits_own(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words of a command line without flags that only DeiT needs, a line about each of those).

    Raises UserError for those that are refused.
    """
    kept: list[str] = []
    notes: dict[str, None] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        flag = _FLAGS.get(name.replace("_", "-")) if word.startswith("--") else None
        if name == "--pretrained" and _is_switch(value if equals else rest[0] if rest else ""):
            raise UserError(
                "--pretrained expects a local file of weights, such as timm's model.safetensors or pytorch_model.bin, "
                "and starts from it as --finetune does: nothing is downloaded."
            )
        if flag is None:
            kept.append(word)
            continue
        values = [value] if equals else []
        if flag.values == 0 and equals:
            raise UserError(f"Command line: argument {name}: ignored explicit argument '{shorten(value)}'; see --help.")
        while rest and not equals and not rest[0].startswith("--") and len(values) != flag.values:
            values.append(rest.pop(0))
        if flag.values != 0 and not values:
            raise UserError(f"Command line: argument {name}: expected one argument; see --help.")
        if flag.refused:
            raise UserError(f"{name} of DeiT is not available: {flag.says}.")
        notes[f"{name} of DeiT is not needed here: {flag.says}."] = None
    return kept, list(notes)
