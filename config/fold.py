"""The configuration of a run: one frozen, typed object, built from defaults < extends < file < flags.

schema.py says what keys there are, and pydantic checks types, ranges and spelling. What is ours is the folding of files
(`extends`, changed tags, `paper` never inherited) and the wording of errors: each names the file or flag, the key and
the nearest valid key.

    cfg = load_config("configs/deit_tiny_tetrajet.yaml", overrides=["quant.scale_rule=floor"])
    cfg.quant.scale_rule            # "floor"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from config.schema import Config, RunConfig, iter_keys, sections_in


class UserError(Exception):
    """A mistake the user can mend: shown as one sentence, without a traceback, and exit code 2."""


def dump_config(cfg: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


# Keys that say where and how a run is executed and not what it computes: a run may be resumed with others.
_EXECUTION = {
    *(f"run.{name}" for name in RunConfig.model_fields if name != "seed"),
    *(f"data.{name}" for name in ("path", "batch_size", "num_workers", "pin_mem", "on_corrupt")),
    "probes",
    "paper",
}


def recipe_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys in which two dumped configurations differ that change what is computed: "optim.lr 0.001 (here 0.0005)"."""

    def leaves(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in mapping.items():
            dotted = f"{prefix}{key}"
            if dotted not in _EXECUTION:
                found |= leaves(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
        return found

    a, b = leaves(one), leaves(other)
    return [f"{key} {a.get(key)} (here {b.get(key)})" for key in {**a, **b} if a.get(key) != b.get(key)]


# ---------------------------------------------------------------------------------------------------------------------
# Folding: defaults < extends < file < flags
# ---------------------------------------------------------------------------------------------------------------------

_TAGGED = {"quant": "scheme", "stabilizer": "kind"}  # a changed tag replaces its mapping instead of merging into it


class _UniqueKeyLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key given twice in one mapping; plain YAML lets the last one win."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"key '{key.value}' is given twice, in line {lines[key.value]} and again in line {line}"
                )
            lines[key.value] = line
        return node


def _parse_yaml(text: str, what: str) -> Any:
    """Raises UserError, `what` being the file or override the text is from."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{what} is not valid YAML: {error.problem}, in line {mark.line + 1}, column {mark.column + 1}."
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a month of 13, say
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}.") from None


def read_yaml(path: Path, child: Path | None = None) -> dict[str, Any]:
    """The mapping in a file, which `child` extends."""
    by = f" ({child} extends it)" if child else ""
    if path.is_dir():
        raise UserError(f"{path} is a folder{by}; a configuration file (.yaml) was expected.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"There is no configuration file {path}{by}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {path}{by} cannot be read: {error}.") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else f"just {data!r}"
        raise UserError(f"{path} must hold a mapping of keys to values, not {found}.")
    return data


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge, everything else replaces, and a mapping whose tag changes is replaced as a whole."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            tag = _TAGGED.get(key)
            changed = tag in old and tag in value and old[tag] != value[tag]
            value = value if changed else _merge(old, value)
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
    from config import rows  # here, because it reads its files with this module

    data = {} if rows.is_row(path) else read_yaml(path, child)
    return rows.row_config(str(path)) if rows.is_row(path) or "rows" in data else data


def _fold_file(path: Path, origins: dict[str, str], chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file with everything it extends. `origins` gains, for every key, the file it was last set in."""
    if path.resolve() in [p.resolve() for p in chain]:
        raise UserError(f"{path} extends itself by way of {' -> '.join(p.name for p in chain)}.")
    data = _read_config(path, chain[-1] if chain else None)
    parents = data.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise UserError(f"{path}: extends must be a file name or a list of file names.")
    folded: dict[str, Any] = {}
    for parent in parents:
        folded = _merge(folded, _fold_file(path.parent / parent, origins, (*chain, path)))
    folded.pop("paper", None)  # a published figure belongs to the file that states it and to no other
    origins.update(dict.fromkeys(_paths(data), str(path)))
    return _merge(folded, data)


def _fold_overrides(overrides: Sequence[str], origins: dict[str, str], source: str) -> dict[str, Any]:
    folded: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        parts = dotted.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"The override '{override}' must be of the form key=value, such as schedule.epochs=10.")
        value = _parse_yaml(text, f"{source}: {override}")
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
    folded = _fold_file(Path(path), origins) if path is not None else {}
    folded = _merge(folded, _fold_overrides(overrides, origins, source))
    model = folded.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    # An mxfp4_ model is quantized unless the user says not.
    tags = {"quant": "mx" if str(name).startswith("mxfp4_") else "none", "stabilizer": "none"}
    for section, tag in _TAGGED.items():
        if isinstance(given := folded.get(section, {}), dict):
            folded[section] = {tag: tags[section], **given}
    try:
        return Config.model_validate(folded)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], origins)) from None


def _nearest(dotted: str, keys: Iterable[str]) -> str | None:
    """The key of the same name in another section; else the one of a like name in its own or, if very like, in any."""
    scope, _, name = dotted.rpartition(".")
    anywhere = {key.rpartition(".")[2]: key for key in keys}
    inside = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == scope}
    near = difflib.get_close_matches(name, inside, n=1) if name not in anywhere else []
    if near:
        return inside[near[0]]
    near = difflib.get_close_matches(name, anywhere, n=1, cutoff=0.8)
    return anywhere[near[0]] if near else None


def _explain(error: Any, origins: dict[str, str]) -> str:
    """One sentence for a pydantic error: where, which key, what is wrong and what was expected."""
    loc = [str(part) for part in error["loc"]]
    tag = None
    if len(loc) > 1 and loc[0] in _TAGGED and len(sections_in(Config.model_fields[loc[0]].annotation)) > 1:
        tag = loc.pop(1)  # pydantic puts the tag of a union into the location; it is not part of the key
    if loc[:2] == ["model", "kwargs"]:
        del loc[3:]  # and the first of the types that a value may have
    if error["type"] == "union_tag_invalid":
        loc.append(_TAGGED[loc[0]])
    dotted = ".".join(loc)
    known = [".".join(loc[:n]) for n in range(len(loc), 0, -1) if ".".join(loc[:n]) in origins]
    where = origins[known[0]] if known else "the configuration"
    given, message = error.get("input"), error["msg"]
    shown = "null" if given is None else str(given).lower() if isinstance(given, bool) else repr(given)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        keys = {name for name, _ in iter_keys()}
        if any(f"{key}.".startswith(f"{dotted}.") for key in keys):
            return f"{where}: {dotted} does not apply while {loc[0]}.{_TAGGED[loc[0]]} is {tag}."
        if near := _nearest(dotted, sorted(keys | Config.model_fields.keys())):
            return f"{where}: there is no key {dotted}; did you mean {near}?"
        scope = "".join(f"{part}." for part in loc[:-1])
        valid = sorted({key.removeprefix(scope).split(".")[0] for key in keys if key.startswith(scope)})
        return f"{where}: there is no key {dotted}; valid keys here: {', '.join(valid)}."
    if error["type"] == "missing":
        if loc[-1].isdigit():
            return f"{where}: {'.'.join(loc[:-1])} is {shown}: it needs more values."
        return f"{where}: {dotted} is missing."
    if error["type"] == "union_tag_invalid":
        return f"{where}: {dotted} is {error['ctx']['tag']!r}: input should be one of {error['ctx']['expected_tags']}."
    if error["type"] == "value_error":
        return f"{where}: {dotted}: {error['ctx']['error']}."
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "a mapping of keys to values was expected"
    elif loc[:2] == ["model", "kwargs"]:
        message = "true, false, a number, a text or a list of whole numbers was expected"
    elif error["type"] == "string_type" and given is not None and not isinstance(given, list | dict):
        message += "; put it in quotes"
    message = message[0].lower() + message[1:].replace(" after validation", "")
    return f"{where}: {dotted} is {shown}: {message.replace('tuple', 'list')}."  # a tuple is a list in YAML
