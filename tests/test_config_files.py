"""What a configuration file may ask for: numbers, sizes, depths, aliases, pipes; and the same of stored text."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, environment

from config import Config, UserError, dump_config, load_config
from config.files import parse_yaml
from config.fold import read_stored
from config.rows import run_name

Write = Callable[..., Path]

BOMB = "a: &a [l, l, l, l, l, l, l, l, l]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{name}'] * 9)}]\n" for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{name}'] * 9)}]}}\n"
    for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)
# name: (text, what the sentence says)
HOSTILE = {
    "bomb": (BOMB, "with its aliases written out it has more than"),
    "bomb of mappings": (
        BOMB.replace("[", "{x: [").replace("]", "]}"),
        "with its aliases written out it has more than",
    ),
    "bomb of merges": (MERGES, "with its aliases written out it has more than"),
    "long text many times": (f"a: &a {'x' * 90_000}\nb: [{', '.join(['*a'] * 200)}]\n", "it has more than"),
    "list in itself": ("a: &a [*a]\n", "'a' holds itself"),
    "mapping in itself": ("a: &a {b: {c: *a}}\n", "'a' holds itself"),
    "brackets": ("[" * 90_000, "nested deeper than"),
    "closed brackets": (f"a: {'[' * 500}{']' * 500}\n", "nested deeper than"),
    "braces": ("{a: " * 20_000, "nested deeper than"),
    "dashes": ("- " * 40_000, "nested deeper than"),
    "keys": ("".join(f"{' ' * n}a:\n" for n in range(400)), "nested deeper than"),
    "size": ("# " + "x" * 200_000, "more than 100000 bytes"),
    "digits": (f"optim: {{lr: {'9' * 50_000}}}\n", "a number has 50000 digits"),
    "python": ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
    "own tag": ("a: !mine {}\n", "could not determine a constructor for the tag '!mine'"),
    "set": ("optim: !!set {lr}\n", "could not determine a constructor for the tag"),
    "binary": ("optim: {lr: !!binary aGFsbG8=}\n", "could not determine a constructor for the tag"),
    "no integer": ("schedule: {epochs: !!int ''}\n", "is not valid YAML"),
    "no switch": ("run: {eval: !!bool maybe}\n", "is not valid YAML"),
    "no number": ("optim: {lr: !!float x}\n", "is not valid YAML"),
    "key that is a list": ("{[a]: 1}\n", "unhashable key"),
    "NUL": ("run: {output_dir: a\0b}\n", "is not valid YAML: unacceptable character"),
    "no alias": ("a: *b\n", "undefined alias"),
}


def mistake(call: Callable[[], Any]) -> str:
    """The sentence of a mistake."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000 and text.endswith((".", "?"))
    return text


@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=[name.replace(" ", "_") for name in HOSTILE])
def test_what_no_configuration_needs_is_refused(text: str, said: str, write: Write) -> None:
    path = write(a=text)
    assert said in mistake(lambda: load_config(path)) and str(path) in mistake(lambda: load_config(path))
    assert str(path) in mistake(lambda: load_config(write(child="extends: a.yaml\n")))
    if text not in (HOSTILE["size"][0], BOMB, MERGES):  # of several lines or too long for a flag
        assert mistake(lambda: load_config(None, [f"optim.lr={text}"]))
    stored = mistake(lambda: read_stored(text, "last.pt"))
    assert stored.startswith("last.pt ")


@pytest.mark.parametrize("name", [name for name in HOSTILE if "bomb" in name or "times" in name])
def test_refusing_takes_no_memory(name: str) -> None:
    tracemalloc.start()
    mistake(lambda: parse_yaml(HOSTILE[name][0], "x"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


@pytest.mark.parametrize("value", [None, 3, 2.5, b"a: 1", ["a"], {"a": 1}, "- 1", "text", "3"], ids=repr)
def test_what_was_stored_must_be_a_mapping_as_text(value: object) -> None:
    if value is None:
        assert read_stored(value, "last.pt") == Config().model_dump(mode="json")
    else:
        assert mistake(lambda: read_stored(value, "last.pt")).startswith("last.pt must hold a mapping")


def test_what_was_stored_reads_back_and_newer_keys_get_their_defaults() -> None:
    cfg = load_config(overrides=["quant.scheme=mx", "schedule.epochs=3"])
    assert read_stored(dump_config(cfg), "last.pt") == cfg.model_dump(mode="json")
    assert read_stored("schedule: {epochs: 3}\n", "x")["schedule"]["min_lr"] == cfg.schedule.min_lr
    assert read_stored("schedule: {gone: 3}\n", "x") == {"schedule": {"gone": 3}}  # for a comparison to name


# ---------------------------------------------------------------------------------------------------------------------
# Files that are none
# ---------------------------------------------------------------------------------------------------------------------


def in_a_process(*overrides: str, config: Path) -> subprocess.CompletedProcess:
    code = "import sys; from config import load_config; load_config(sys.argv[1], sys.argv[2:])"
    command = [sys.executable, "-c", code, str(config), *overrides]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "extended"),
    [*((kind, False) for kind in ("fifo", "zero", "null", "folder", "loop", "long name", "endless")), ("zero", True)],
)
def test_a_file_that_is_none_is_named_at_once(kind: str, extended: bool, tmp_path: Path, write: Write) -> None:
    path = tmp_path / "odd.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind in ("zero", "null"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long name":
        path = tmp_path / ("x" * 300)
    else:
        with path.open("wb") as file:
            file.truncate(2**40)  # a terabyte of nothing
    config = write(a=f"extends: {path.name}\n") if extended else path
    done = in_a_process(config=config)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("config.explain.UserError: ") and path.name[:50] in last


def test_a_name_with_a_nul_is_no_file(write: Write) -> None:
    assert "cannot be read: embedded null byte" in mistake(lambda: load_config("a\0b.yaml"))
    path = write(a='extends: "b\\0.yaml"\n')
    assert "cannot be read: embedded null byte" in mistake(lambda: load_config(path))


def test_a_url_is_no_file() -> None:
    said = mistake(lambda: load_config("https://a.b/c.yaml"))
    assert said == "https://a.b/c.yaml is a URL and a configuration file was expected; download it first."


def test_files_that_extend_ever_more_files_are_counted(write: Write) -> None:
    """Two for each: 2^30 in the end."""
    for n in range(30):
        path = write(**{f"f{29 - n}": f"extends: [f{30 - n}.yaml, f{30 - n}.yaml]\n" if n else "{}\n"})
    assert "f0.yaml extends more than 100 files" in mistake(lambda: load_config(path))


@pytest.mark.parametrize("circle", [["one"], ["one", "two"]])
def test_a_row_that_is_the_same_run_as_itself_has_no_name(circle: list[str], tmp_path: Path) -> None:
    after = [*circle[1:], circle[0]]
    rows = "".join(f"  {a}: {{same_as: 't.yaml#{b}/<column>'}}\n" for a, b in zip(circle, after, strict=True))
    (tmp_path / "t.yaml").write_text(f"table: 1\ntitle: t\ncolumns: [a]\nrows:\n{rows}")
    assert "is the same run as itself" in mistake(lambda: run_name(f"{tmp_path}/t.yaml#one/a"))
    assert "extends itself" in mistake(lambda: load_config(f"{tmp_path}/t.yaml#one/a"))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0777", 777),
        ("08", 8),
        ("-010", -10),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e3", 1000.0),
        ("3e-4", 0.0003),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5E+1", -5.0),
        ("1:30", "1:30"),
        ("12:30:45", "12:30:45"),
        ("190:20:30.15", "190:20:30.15"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1_0.5", "1_0.5"),
        ("1e", "1e"),
        ("0x", "0x"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any, write: Write) -> None:
    assert parse_yaml(text, "x") == value and type(parse_yaml(text, "x")) is type(value)
    kwargs = load_config(write(a=f"model: {{kwargs: {{a: {text}}}}}\n")).model.kwargs
    assert kwargs == {"a": value} == load_config(overrides=[f"model.kwargs.a={text}"]).model.kwargs
    again = load_config(write(b=dump_config(load_config(overrides=[f"model.kwargs.a={text}"])))).model.kwargs
    assert again == kwargs and type(again["a"]) is type(value)


def test_infinity_and_nan_are_numbers() -> None:
    assert parse_yaml("[.inf, -.INF, +.Inf]", "x") == [float("inf"), float("-inf"), float("inf")]
    assert str(parse_yaml(".nan", "x")) == "nan"


@pytest.mark.parametrize("text", ["1e3", "010", "0o17", "08", "1:30", "0x1", ".5", "no", "on", "null", "~", "1_0", "-"])
def test_text_that_is_a_number_somewhere_reads_back_as_text(text: str, write: Write) -> None:
    cfg = load_config(overrides=[f"data.path='{text}'"])
    assert load_config(write(a=dump_config(cfg))).data.path == text
    assert yaml.safe_load(dump_config(cfg))["data"]["path"] == text


@pytest.mark.parametrize(
    ("override", "value"), [("schedule.epochs=010", 10), ("run.seed=0x10", 16), ("optim.lr=1e-3", 0.001)]
)
def test_a_number_means_what_it_says(override: str, value: float) -> None:
    cfg = load_config(overrides=[override]).model_dump()
    section, _, key = override.partition("=")[0].partition(".")
    assert cfg[section][key] == value


@pytest.mark.parametrize(
    "override", ["optim.lr=1:30", "schedule.epochs=1:30", "run.seed=0b11", "optim.lr=0x", "optim.lr=1,5"]
)
def test_what_is_no_number_is_refused(override: str) -> None:
    assert "unable to parse string as" in mistake(lambda: load_config(overrides=[override]))
