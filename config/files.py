"""Configuration files: YAML of a bounded size in which no key is given twice; each mistake is one sentence.

Numbers are those of YAML 1.2's core schema: 010 is ten and not eight, 1:30 is text and not ninety, 3e-4 is a number.
What a file asks for is bounded before it is built, so that none takes more than a moment or a few megabytes: its size,
its depth, and its length once all aliases are written out.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from config.explain import UserError, shorten

MAX_BYTES, MAX_DEPTH, MAX_NODES = 100_000, 30, 20_000  # of a file or override; the longest of ours has 4,000 bytes
MAX_DIGITS, TEXT_OF_A_NODE = 40, 64  # of a whole number; how much text counts as one node more
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", re.ASCII
)
_NUMBERS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader with the bounds above that refuses a key given twice, of which plain YAML takes the last."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in resolvers if pair[0] not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # nodes below a node, aliases written out, by its identity

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if not isinstance(event, yaml.AliasEvent) and event.tag is not None and event.tag not in _TAGS | {"!"}:
            raise yaml.constructor.ConstructorError(
                None, None, f"could not determine a constructor for the tag '{event.tag}'", event.start_mark
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node.end_mark is None:
            raise yaml.YAMLError(f"'{event.anchor}' holds itself")
        if id(node) not in self._sizes:
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            text = len(node.value) // TEXT_OF_A_NODE if isinstance(node, yaml.ScalarNode) else 0
            self._sizes[id(node)] = 1 + text + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > MAX_NODES:
            raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_NODES} entries")
        return node

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

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number has {len(text)} digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"\.(inf|nan)$", r"\1", self.construct_scalar(node).lower()))


class Dumper(yaml.SafeDumper):
    """yaml.SafeDumper that also puts text in quotes which is a number in YAML 1.2 alone, such as 1e3."""


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z", re.ASCII), list("-+.0123456789"))
    Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z", re.ASCII), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def parse_yaml(text: str, what: str) -> Any:
    """The value that YAML text stands for. Raises UserError, `what` being the file or override the text is from."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{what} is longer than a configuration can be ({MAX_BYTES} bytes).")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{what} is not valid YAML: {error.problem}, in line {mark.line + 1}, column {mark.column + 1}."
        ) from None
    # ValueError: a date with a month of 13, say; the others: a tag whose text is none of its values.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}.") from None


def parse_mapping(text: object, what: str) -> dict[Any, Any]:
    """The mapping that YAML text holds; nothing is an empty one. Raises UserError."""
    data = parse_yaml(text, what) if isinstance(text, str) else text
    if data is None:
        return {}
    if not isinstance(text, str) or not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else f"just {shorten(repr(data))}"
        raise UserError(f"{what} must hold a mapping of keys to values, not {found}.")
    return data


def _read_text(path: Path) -> str:
    """The text of a regular file. Raises OSError and ValueError, whose text says why it cannot be read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would wait for one
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes, which no configuration needs")
    return data.decode()


def read_yaml(path: Path, child: Path | None = None) -> dict[str, Any]:
    """The mapping in a file, which `child` extends. Raises UserError."""
    by = f" ({child} extends it)" if child else ""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder{by}; a configuration file (.yaml) was expected.")
        text = _read_text(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"There is no configuration file {path}{by}.{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, a name with a NUL, and ours above
        raise UserError(f"The configuration file {shorten(str(path))}{by} cannot be read: {error}.") from None
    return parse_mapping(text, str(path))
