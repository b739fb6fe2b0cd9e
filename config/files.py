"""Configuration files: YAML in which no key is given twice; every mistake is one sentence that names the file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from config.explain import UserError


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


def parse_yaml(text: str, what: str) -> Any:
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
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else f"just {data!r}"
        raise UserError(f"{path} must hold a mapping of keys to values, not {found}.")
    return data
