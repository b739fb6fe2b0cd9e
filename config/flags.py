"""The command line: every key of the configuration as a flag, under DeiT's name where DeiT has one.

argparse does the parsing; the flags are read off schema.py, so a new key is a new flag.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml
from pydantic.fields import FieldInfo

from config.deit import without_deits_own
from config.explain import Parser
from config.schema import Config, iter_keys, sections_in

# What the namespace of a command line has beside the configuration's keys.
_OWN = ("config", "print_config", "smoke", "export", "export_form", "export_dtype", "predict", "png")


class _HelpFormatter(argparse.HelpFormatter):
    """Writes `--lr, --optim.lr VALUE` where argparse would repeat VALUE after every name."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest)}"


def build_parser() -> argparse.ArgumentParser:
    """The command line of main.py: --config, --print-config, --smoke and a flag for every key."""
    parser = Parser(
        prog="main.py",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=34, width=118),
        description="Train or evaluate a vision transformer with every block linear in MXFP4.",
        usage="main.py [--config FILE] [flags]\n       torchrun --nproc-per-node=8 main.py [--config FILE] [flags]",
        epilog="Flags win over the file, the file over what it extends, and that over the defaults shown here. "
        "Exit codes: 0 done, 1 the run failed, 2 a mistake in flags, configuration, data or checkpoint, "
        "128 + n stopped by signal n with its state saved.",
    )
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="configuration file, such as configs/deit_tiny_tetrajet.yaml, or a row of a table, FILE#ROW/MODEL",
    )
    parser.add_argument(
        "--print-config", action="store_true", default=False, help="print the resolved configuration as YAML and exit"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        default=False,
        help="2 training steps and 1 evaluation batch on generated images, then exit; writes nothing",
    )
    _add_hand_on(parser)
    keys: dict[str, list[FieldInfo]] = {}  # a tag has a field in each of its section's classes
    for dotted, field in iter_keys():
        keys.setdefault(dotted, []).append(field)
    groups: dict[str, Any] = {}
    for dotted, (field, *others) in keys.items():
        if dotted.startswith("paper."):
            continue
        section = dotted.split(".")[0]
        if section not in groups:
            docs = [(kind.__doc__ or "").strip() for kind in sections_in(Config.model_fields[section].annotation)]
            groups[section] = parser.add_argument_group(section, " ".join(docs))
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        names = [*extra.get("flags", []), f"--{dotted}"]
        text = f"{field.description or ''} (default: {_show(field.default)})".strip()
        if field.annotation is bool:
            groups[section].add_argument(*names, dest=dotted, action=argparse.BooleanOptionalAction, help=text)
        else:
            nargs = "+" if isinstance(field.default, tuple) or "tuple" in str(field.annotation) else None
            groups[section].add_argument(*names, dest=dotted, metavar=_metavar(field, *others), nargs=nargs, help=text)
        for flag, value in extra.get("consts", {}).items():
            groups[section].add_argument(
                flag, dest=dotted, action="store_const", const=str(value), help=f"{dotted} = {value}"
            )
    return parser


def _add_hand_on(parser: argparse.ArgumentParser) -> None:
    """What is done with the model of --resume in place of training: written in another form, or asked about images."""
    options = {"default": None, "metavar": "FILE"}
    parser.add_argument(
        "--export", help="write the model of --resume to a safetensors file, its weights packed, and exit", **options
    )
    parser.add_argument(
        "--export-form",
        choices=["packed", "dequantized"],
        default=None,
        help="packed: codes and scales, for this program; dequantized: for plain timm (default: packed)",
    )
    parser.add_argument(
        "--export-dtype",
        choices=["float32", "bfloat16"],
        default=None,
        help="of all that is not packed (default: float32, or that of a packed --resume FILE)",
    )
    parser.add_argument(
        "--predict",
        nargs="+",
        default=None,
        metavar="IMAGE",
        help="print what the model of --resume sees in images, and exit",
    )
    parser.add_argument("--png", help="picture of the predictions (default: predictions.png)", **options)


def _show(value: Any) -> str:
    return yaml.safe_dump(
        list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000
    ).split("\n")[0]


def _metavar(*fields: FieldInfo) -> str:
    if typing.get_origin(fields[0].annotation) is Literal:
        return "|".join(choice for field in fields for choice in typing.get_args(field.annotation))
    return "VALUE"


def parse_flags(argv: Sequence[str], *, notes: bool = True) -> tuple[argparse.Namespace, list[str]]:
    """(namespace with _OWN; the other flags as "section.key=value" overrides).

    `-` and `_` are alike in the names of flags. Lists are given as in YAML, [q1,q3], or as several words, q1 q3.
    Flags that only DeiT needs are left out, with a line on stderr from the first process, where `notes` are wanted.
    """
    argv, of_deit = without_deits_own(argv)
    for note in of_deit if notes and os.environ.get("RANK", "0") == "0" else ():
        print(f"note: {note}", file=sys.stderr)
    parser = build_parser()
    canonical = {name.replace("_", "-"): name for name in parser._option_string_actions}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(canonical.get(name.replace("_", "-"), name) + equals + value if word.startswith("--") else word)
    flags = vars(parser.parse_args(words))
    own = {name: flags.pop(name) for name in _OWN}
    keys = dict(iter_keys())
    return argparse.Namespace(**own), [f"{dotted}={_as_yaml(value, keys[dotted])}" for dotted, value in flags.items()]


def _as_yaml(value: bool | str | list[str], field: FieldInfo) -> str:
    """The value of a flag as YAML. A single word for a list is a list of one; text is text whatever it looks like."""
    if isinstance(value, bool):
        return str(value).lower()
    nothing = ("", "~", "null")
    if isinstance(value, list):
        joined = ", ".join(word.rstrip(",") for word in value)
        return joined if joined in nothing or joined.startswith("[") else f"[{joined}]"
    is_text = str in (field.annotation, *typing.get_args(field.annotation))
    if is_text and value not in nothing and value[0] not in "[{'\"":
        return json.dumps(value, ensure_ascii=False)
    return value
