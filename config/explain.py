"""Mistakes of the user, one sentence each: the exception, its wording, and how a program ends with it."""

from __future__ import annotations

import argparse
import difflib
import errno
import sys
import typing
from collections.abc import Iterable
from typing import Any, NoReturn

from config.schema import TAGS, Config, iter_keys, sections_in


class UserError(Exception):
    """A mistake the user can mend: shown as one sentence, without a traceback, and exit code 2."""


def fail(sentence: object, code: int = 2) -> NoReturn:
    """End the program with a sentence on stderr and an exit code; 2 is that of a mistake of the user."""
    print(f"error: {one_line(sentence)}", file=sys.stderr)
    raise SystemExit(code) from None


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are UserErrors, so that every program reports every mistake in the same way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            flag = message.split(":", 1)[1].split()[0].split("=")[0]
            parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
            known = {f for p in parsers for f in p._option_string_actions} - {flag}  # it may be another command's
            near = difflib.get_close_matches(flag, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help."
            raise UserError(f"There is no flag {shorten(flag)}; {hint}") from None
        raise UserError(f"Command line: {shorten(message)}; see --help.") from None


def out_of_reach(error: BaseException) -> str | None:
    """What to say where a path cannot even be looked up, as nobody may enter its folder; None for any other error."""
    barred = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
    return f"{error.filename} cannot be reached: {error.strerror}." if barred and error.filename else None


def one_line(text: object) -> str:
    """With escapes for what would break the line or steer a terminal: a file may have any name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def shorten(text: str) -> str:
    """For a sentence: on one line, and of a long text its beginning."""
    text = one_line(text)
    return text if len(text) <= 200 else f"{text[:150]} ... ({len(text)} characters)"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The nearest valid name, or all of them."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."


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


def _keys_of_entry(loc: list[str]) -> list[str]:
    """The keys of a section that is an entry of a mapping: those of q5 in quant.quantizers."""
    sections = [Config]
    for part in loc:
        inner = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        entries = [argument for annotation in inner for argument in typing.get_args(annotation)]
        found = [s for annotation in (*inner, *entries) for s in sections_in(annotation)]
        sections = found or sections  # a name in a mapping is no field
    return sorted({name for s in sections for name in s.model_fields})


def explain(error: Any, origins: dict[str, str]) -> str:
    """One sentence for a pydantic error: where, which key, what is wrong and what was expected."""
    loc = [str(part) for part in error["loc"]]
    tag = None
    if len(loc) > 1 and loc[0] in TAGS and len(sections_in(Config.model_fields[loc[0]].annotation)) > 1:
        tag = loc.pop(1)  # pydantic puts the tag of a union into the location; it is not part of the key
    if loc[-1] == "[key]":  # what pydantic calls a name that is no key of a mapping
        loc.pop()
    if loc[:2] == ["model", "kwargs"]:
        del loc[3:]  # and the first of the types that a value may have
    if error["type"] == "union_tag_invalid":
        loc.append(TAGS[loc[0]])
    dotted = shorten(".".join(loc))
    known = [name for n in range(len(loc), 0, -1) if (name := ".".join(loc[:n])) in origins]
    where = origins[known[0]] if known else "the configuration"
    given, message = error.get("input"), error["msg"]
    shown = "null" if given is None else str(given).lower() if isinstance(given, bool) else shorten(repr(given))
    if error["type"] in ("extra_forbidden", "invalid_key"):
        keys = {name for name, _ in iter_keys()}
        is_key = any(f"{key}.".startswith(f"{dotted}.") for key in keys)
        if is_key and (written := next((part for part in loc if "." in part), None)):
            nested = written.replace(".", ": {") + ": ..." + "}" * written.count(".")
            return f"{where}: {written} has a dot, as flags have; in a file write {nested}."
        if is_key and loc[0] in TAGS:
            return f"{where}: {dotted} does not apply while {loc[0]}.{TAGS[loc[0]]} is {tag}."
        if near := _nearest(dotted, sorted(keys | Config.model_fields.keys())):
            return f"{where}: there is no key {dotted}; did you mean {near}?"
        scope = "".join(f"{part}." for part in loc[:-1])
        valid = sorted({key.removeprefix(scope).split(".")[0] for key in keys if key.startswith(scope)})
        valid = valid or _keys_of_entry(loc[:-1])
        return f"{where}: there is no key {dotted}; valid keys here: {', '.join(valid)}."
    if error["type"] == "missing":
        if loc[-1].isdigit():
            return f"{where}: {'.'.join(loc[:-1])} is {shown}: it needs more values."
        return f"{where}: {dotted} is missing."
    if error["type"] == "union_tag_invalid":
        shown = shorten(repr(error["ctx"]["tag"]))
        return f"{where}: {dotted} is {shown}: input should be one of {error['ctx']['expected_tags']}."
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
