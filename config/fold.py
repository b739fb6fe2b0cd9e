"""The configuration of a run: one frozen, typed object, built from defaults < extends < file < flags.

schema.py says what keys there are, and pydantic checks types, ranges and spelling. What is ours is the folding of files
(`extends`, changed tags, `paper` never inherited) and the wording of errors: each names the file or flag, the key and
the nearest valid key.

    cfg = load_config("configs/deit_tiny_tetrajet.yaml", overrides=["quant.scale_rule=floor"])
    cfg.quant.scale_rule            # "floor"
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from config.explain import UserError, explain, shorten
from config.files import MAX_DEPTH, Dumper, parse_mapping, parse_yaml, read_yaml
from config.rows import is_row, row_config
from config.schema import ENTRIES, TAGS, Config, RunConfig


def dump_config(cfg: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.dump(cfg.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120)


def read_stored(text: object, what: str) -> dict[str, Any]:
    """The dump of a configuration that was stored as YAML, in a checkpoint, say; newer keys get their defaults.

    One that is valid no more comes back as it is. Raises UserError, one sentence about `what`, for what is no YAML.
    """
    given = parse_mapping(text, what)
    try:
        return Config.model_validate(given).model_dump(mode="json")
    except ValidationError:
        return given


MAX_FILES = 100  # that one configuration extends
# Keys that say where and how a run is executed and not what it computes. Compiled or recorded as graphs, a run has the
# same arithmetic but for the order of sums; which precision `amp: auto` means depends on the device.
_EXECUTION = {
    *(f"run.{name}" for name in RunConfig.model_fields if name not in ("seed", "amp")),
    *(f"data.{name}" for name in ("path", "num_workers", "pin_mem", "on_corrupt", "pipeline", "resident")),
    "probes",
    "paper",
}
# Of the keys that make two recipes, those that a run may be continued with another value of.
CONTINUABLE = ("schedule.epochs", "data.batch_size", "data.gpu_decode")


def _section(dumped: dict[str, Any], name: str) -> dict[str, Any]:
    return section if isinstance(section := dumped.get(name), dict) else {}


def precision(dumped: dict[str, Any]) -> str:
    """The autocast of a dumped configuration: run.amp, where `auto` is none on a CPU and bfloat16 elsewhere."""
    run = _section(dumped, "run")
    amp = run.get("amp", "auto")
    return amp if amp != "auto" else "none" if run.get("device") == "cpu" else "bfloat16"


def mixes(dumped: dict[str, Any]) -> bool:
    """Whether a dumped configuration mixes images, which mixup and cutmix do batch by batch of a process."""
    aug = _section(dumped, "aug")
    return bool(aug.get("mixup") or aug.get("cutmix") or aug.get("cutmix_minmax"))


def _recipe(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaf keys of a dumped configuration that change what is computed, by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        dotted = f"{prefix}{key}"
        if dotted not in _EXECUTION:
            found |= _recipe(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
    return found


def recipe_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys in which two dumped configurations differ that change what is computed: "optim.lr 0.001 (here 0.0005)".

    data.batch_size counts where mixup draws over it, and null, which follows from the processes, equals any size.
    """
    a, b = _recipe(one), _recipe(other)
    different = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    alike = {"run.amp"} if precision(one) == precision(other) else set()
    sizes = a.get("data.batch_size"), b.get("data.batch_size")
    if None in sizes or not (mixes(one) or mixes(other)):
        alike.add("data.batch_size")
    return [f"{key} {a.get(key)} (here {b.get(key)})" for key in different if key not in alike]


def recipe_identity(dumped: dict[str, Any]) -> str:
    """Twelve hexadecimal digits, the same for two dumped configurations that differ in nothing but seed and execution.

    Only keys that are not at their defaults count, so that a new key leaves the identity of older recipes as it is.
    """
    tags = {section: {tag: dumped[section][tag]} for section, tag in TAGS.items()}
    defaults = _recipe(Config.model_validate(tags).model_dump(mode="json"))
    recipe = {key: value for key, value in _recipe(dumped).items() if key not in defaults or value != defaults[key]}
    recipe |= {f"{section}.{tag}": dumped[section][tag] for section, tag in TAGS.items()}
    for key in ("run.seed", *([] if mixes(dumped) else ["data.batch_size"])):
        recipe.pop(key, None)
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# Folding: defaults < extends < file < flags
# ---------------------------------------------------------------------------------------------------------------------


class _Whole(dict):
    """A mapping that replaces the one before it."""


def _merge(base: dict[str, Any], top: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings merge, everything else replaces, and a mapping whose tag changes is replaced as a whole.

    Where the user names the entries (ENTRIES), an empty mapping takes all of them out; null takes out one, which the
    schema does, so that its name is checked.
    """
    merged = type(base)(base)
    for key, value in top.items():
        old, dotted, an_entry = merged.get(key), f"{prefix}{key}", prefix[:-1] in ENTRIES
        if (value is None and dotted in ENTRIES) or (value == {} and (an_entry or dotted in ENTRIES)):
            value = _Whole()
        elif isinstance(value, dict) and not isinstance(value, _Whole):
            tag, was = TAGS.get(key), old if isinstance(old, dict) else {}
            changed = tag in was and tag in value and was[tag] != value[tag]
            value = _merge({} if changed else was, value, f"{dotted}.")
            if an_entry and key in merged and old is None:
                value = _Whole(value)  # in the place of one that was taken out
        merged[key] = value
    return merged


def _paths(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of a mapping's keys, of its sections too."""
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _read_config(path: Path, child: Path | None) -> dict[str, Any]:
    """What a file says, or a row of a table of runs: configs/ablations/table1.yaml#q1/deit_tiny."""
    data = {} if is_row(path) else read_yaml(path, child)
    return row_config(str(path)) if is_row(path) or "rows" in data else data


def _fold_file(path: Path, origins: dict[str, str], read: list[Path], chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file with everything it extends. `origins` gains, for every key, the file it was last set in.

    read: every file so far; chain: those that lead to this one.
    """
    if "\0" not in str(path) and os.path.realpath(path) in map(os.path.realpath, chain):
        raise UserError(f"{path} extends itself by way of {' -> '.join(p.name for p in chain)}.")
    read.append(path)
    if len(read) > MAX_FILES:
        raise UserError(f"{read[0]} extends more than {MAX_FILES} files, those that they extend counted.")
    data = _read_config(path, chain[-1] if chain else None)
    parents = data.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise UserError(f"{path}: extends must be a file name or a list of file names.")
    folded: dict[str, Any] = {}
    for parent in parents:
        folded = _merge(folded, _fold_file(path.parent / parent, origins, read, (*chain, path)))
    folded.pop("paper", None)  # a published figure belongs to the file that states it and to no other
    origins.update(dict.fromkeys(_paths(data), str(path)))
    return _merge(folded, data)


def _fold_overrides(overrides: Sequence[str], origins: dict[str, str], source: str) -> dict[str, Any]:
    folded: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        parts = dotted.strip().split(".")
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            override = shorten(override)
            raise UserError(f"The override '{override}' must be of the form key=value, such as schedule.epochs=10.")
        value = parse_yaml(text, f"{source}: {shorten(override)}")
        for part in reversed(parts):
            value = {part: value}
        folded = _merge(folded, value)
        origins.update(dict.fromkeys(_paths(value), source))
    return folded


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, source: str = "an override"
) -> Config:
    """Fold defaults, `path` with what it extends, and `overrides` ("section.key=value") into one frozen Config.

    Raises UserError, one sentence that names the file (or `source`), the key and the nearest valid key.
    """
    origins: dict[str, str] = {}
    if isinstance(path, str) and "://" in path:
        raise UserError(f"{shorten(str(path))} is a URL and a configuration file was expected; download it first.")
    folded = _fold_file(Path(path), origins, []) if path is not None else {}
    folded = _merge(folded, _fold_overrides(overrides, origins, source))
    model = folded.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    # An mxfp4_ model is quantized unless the user says not.
    tags = {"quant": "mx" if str(name).startswith("mxfp4_") else "none", "stabilizer": "none"}
    for section, tag in TAGS.items():
        if isinstance(given := folded.get(section, {}), dict):
            folded[section] = {tag: tags[section], **given}
    try:
        return Config.model_validate(folded)
    except ValidationError as error:
        raise UserError(explain(error.errors()[0], origins)) from None
