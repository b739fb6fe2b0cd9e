"""The sentences about mistakes in configuration files and overrides: what they name, and what they propose."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import leaf_types, of

from config import Config, UserError, fold, iter_keys, load_config, sections_in

KEYS = sorted({key for key, _ in iter_keys()})
SECTIONS = sorted(Config.model_fields)
NAME = "mxfp4_deit_tiny_patch16_224"

Write = Callable[..., Path]


def mistake(path: Path | None = None, overrides: typing.Sequence[str] = (), **kwargs: Any) -> str:
    """The sentence about a mistake; no other exception is shown with it."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, **kwargs)
    error = caught.value
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    text = str(error)
    assert "\n" not in text and text.endswith((".", "?")), text
    return text


def kind_of(key: str) -> list[str]:
    """Overrides after which a key of some kind of quantization or of stabilizer applies."""
    section, _, rest = key.partition(".")
    tag = {"quant": "scheme", "stabilizer": "kind"}.get(section)
    for kind in sections_in(Config.model_fields[section].annotation) if tag else []:
        if tag != rest and rest.partition(".")[0] in kind.model_fields:
            return [f"{section}.{tag}={typing.get_args(kind.model_fields[tag].annotation)[0]}"]
    return []


# name: (text of the file, what follows its name in the sentence)
IN_A_FILE = {
    "key": ("schedule: {epoch: 3}\n", ": there is no key schedule.epoch; did you mean schedule.epochs?"),
    "key in depth": (
        "quant: {scheme: mx, rounding: {backwards: nearest_up}}\n",
        ": there is no key quant.rounding.backwards; did you mean quant.rounding.backward?",
    ),
    "section": ("optimizer: {lr: 1}\n", ": there is no key optimizer; did you mean optim?"),
    "key without its section": ("epochs: 3\n", ": there is no key epochs; did you mean schedule.epochs?"),
    "key of another section": ("optim: {epochs: 3}\n", ": there is no key optim.epochs; did you mean schedule.epochs?"),
    "key like none": (
        "loss: {q: 3}\n",
        ": there is no key loss.q; valid keys here: bce, smoothing.",
    ),
    "section like none": ("xyz: {lr: 1}\n", f": there is no key xyz; valid keys here: {', '.join(SECTIONS)}."),
    "key that is a number": ("loss: {1: 3}\n", ": there is no key loss.1; valid keys here: bce, smoothing."),
    "key of another scheme": (
        "quant: {scale_rule: floor}\n",
        ": quant.scale_rule does not apply while quant.scheme is none.",
    ),
    "section of another scheme": (
        "quant: {scheme: int4, element: {gradient: e3m0}}\n",
        ": quant.element does not apply while quant.scheme is int4.",
    ),
    "key of another stabilizer": (
        "stabilizer: {kind: qema, k1: 16}\n",
        ": stabilizer.k1 does not apply while stabilizer.kind is qema.",
    ),
    "key of no scheme": (
        "quant: {scheme: mx, scale_rules: floor}\n",
        ": there is no key quant.scale_rules; did you mean quant.scale_rule?",
    ),
    "number": (
        "schedule: {epochs: many}\n",
        ": schedule.epochs is 'many': input should be a valid integer, unable to parse string as an integer.",
    ),
    "range": ("optim: {lr: 0}\n", ": optim.lr is 0: input should be greater than 0."),
    "not a number": ("optim: {lr: .nan}\n", ": optim.lr is nan: input should be a finite number."),
    "infinite": ("optim: {weight_decay: .inf}\n", ": optim.weight_decay is inf: input should be a finite number."),
    "null": ("optim: {lr: null}\n", ": optim.lr is null: input should be a valid number."),
    "choice": (
        "aug: {mixup_mode: all}\n",
        ": aug.mixup_mode is 'all': input should be 'batch', 'pair' or 'elem'.",
    ),
    "entry of a list": (
        "quant: {scheme: mx, active: [q1, q7]}\n",
        ": quant.active.1 is 'q7': input should be 'q1', 'q2', 'q3', 'q4', 'q5' or 'q6'.",
    ),
    "text for a list": (
        "quant: {scheme: mx, active: q1}\n",
        ": quant.active is 'q1': input should be a valid list.",
    ),
    "twice in a list": (
        "quant: {scheme: mx, active: [q1, q2, q1]}\n",
        ": quant: active names a quantizer twice: q1, q2, q1.",
    ),
    "short list": ("optim: {betas: [0.9]}\n", ": optim.betas is [0.9]: it needs more values."),
    "long list": (
        "optim: {betas: [0.9, 0.9, 0.9]}\n",
        ": optim.betas is [0.9, 0.9, 0.9]: list should have at most 2 items, not 3.",
    ),
    "text that looks like a number": (
        "run: {output_dir: 2024}\n",
        ": run.output_dir is 2024: input should be a valid string; put it in quotes.",
    ),
    "text that looks like a switch": (
        "aug: {aa: no}\n",
        ": aug.aa is false: input should be a valid string; put it in quotes.",
    ),
    "text that is a list": ("data: {set: [digits]}\n", ": data.set is ['digits']: input should be a valid string."),
    "scheme": ("quant: {scheme: fp8}\n", ": quant.scheme is 'fp8': input should be one of 'none', 'mx', 'int4'."),
    "stabilizer": (
        "stabilizer: {kind: ema}\n",
        ": stabilizer.kind is 'ema': input should be one of 'none', 'qema', 'qramping', 'dampen', 'freeze'.",
    ),
    "empty section": ("model:\n", ": model is null: a mapping of keys to values was expected."),
    "empty tagged section": ("quant:\n", ": quant is null: a mapping of keys to values was expected."),
    "empty section of an mxfp4 model": (
        f"quant:\nmodel: {{name: {NAME}}}\n",
        ": quant is null: a mapping of keys to values was expected.",
    ),
    "scheme for a section": ("quant: mx\n", ": quant is 'mx': a mapping of keys to values was expected."),
    "mapping for a number": ("optim: {lr: {a: 1}}\n", ": optim.lr is {'a': 1}: input should be a valid number."),
    "argument of the model": (
        "model: {kwargs: {a: {b: 1}}}\n",
        ": model.kwargs.a is {'b': 1}: true, false, a number, a text or a list of whole numbers was expected.",
    ),
    "unfinished figure": ("paper: {table: 2, column: a}\n", ": paper.row is missing."),
    "extends a number": ("extends: 3\n", ": extends must be a file name or a list of file names."),
    "extends a list of numbers": ("extends: [3]\n", ": extends must be a file name or a list of file names."),
    "extends nothing": ("extends: null\n", ": extends must be a file name or a list of file names."),
    "list": ("- 1\n- 2\n", " must hold a mapping of keys to values, not a list."),
    "empty list": ("[]\n", " must hold a mapping of keys to values, not a list."),
    "text": ("some text\n", " must hold a mapping of keys to values, not just 'some text'."),
    "false": ("false\n", " must hold a mapping of keys to values, not just False."),
    "unclosed": (
        "optim: {lr: [1\n",
        " is not valid YAML: expected ',' or ']', but got '<stream end>', in line 2, column 1.",
    ),
    "tab": (
        "optim:\n\tlr: 1\n",
        " is not valid YAML: found character '\\t' that cannot start any token, in line 2, column 1.",
    ),
    "key twice": (
        "optim: {lr: 1}\nloss: {}\noptim: {lr: 2}\n",
        " is not valid YAML: key 'optim' is given twice, in line 1 and again in line 3.",
    ),
    "key twice in depth": (
        "optim:\n  lr: 1\n  lr: 1\n",
        " is not valid YAML: key 'lr' is given twice, in line 2 and again in line 3.",
    ),
    "python object": (
        "optim: !!python/object/apply:os.getcwd []\n",
        " is not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.getcwd', in line 1, column 8.",
    ),
    "no date": ("run: {output_dir: 2024-13-01}\n", " is not valid YAML: month must be in 1..12."),
    "two documents": ("{}\n---\n{}\n", " is not valid YAML: but found another document, in line 2, column 1."),
}


@pytest.mark.parametrize(("text", "sentence"), IN_A_FILE.values(), ids=[n.replace(" ", "_") for n in IN_A_FILE])
def test_a_mistake_in_a_file(text: str, sentence: str, write: Write) -> None:
    path = write(a=text)
    assert mistake(path) == f"{path}{sentence}"
    # What comes from a file is its mistake, whatever extends it and whatever else is set beside it.
    child = write(child="extends: a.yaml\nloss: {smoothing: 0.2}\n")
    if not text.startswith(("extends", "paper")):  # a figure is not inherited, mistaken or not
        assert mistake(child, ["loss.bce=true"]) == f"{path}{sentence}"


# name: (overrides, sentence)
IN_OVERRIDES = {
    "key": (["optim.lrr=1"], "a flag: there is no key optim.lrr; did you mean optim.lr?"),
    "key after others": (
        ["loss.bce=true", "loss.bbce=true"],
        "a flag: there is no key loss.bbce; did you mean loss.bce?",
    ),
    "key below a value": (["optim.lr.x=1"], "a flag: optim.lr is {'x': 1}: input should be a valid number."),
    "extends": (
        ["extends=a.yaml"],
        f"a flag: there is no key extends; valid keys here: {', '.join(SECTIONS)}.",
    ),
    "value": (["run.seed=-3"], "a flag: run.seed is -3: input should be greater than or equal to 0."),
    "nothing": (["optim.lr="], "a flag: optim.lr is null: input should be a valid number."),
    "scheme": (["quant.scheme=fp8"], "a flag: quant.scheme is 'fp8': input should be one of 'none', 'mx', 'int4'."),
    "other scheme": (["quant.active=[q1]"], "a flag: quant.active does not apply while quant.scheme is none."),
    "section": (["optim=3"], "a flag: optim is 3: a mapping of keys to values was expected."),
    "unfinished figure": (["paper.top1=3"], "a flag: paper.table is missing."),
    "YAML": (
        ["optim.lr=[1"],
        "a flag: optim.lr=[1 is not valid YAML: expected ',' or ']', but got '<stream end>', in line 1, column 3.",
    ),
    "key twice": (
        ["optim={lr: 1, lr: 2}"],
        "a flag: optim={lr: 1, lr: 2} is not valid YAML: key 'lr' is given twice, in line 1 and again in line 1.",
    ),
    **{
        form: ([form], f"The override '{form}' must be of the form key=value, such as schedule.epochs=10.")
        for form in ("schedule.epochs", "", "=3", "optim.=3", ".lr=3", "optim..lr=3")
    },
}


@pytest.mark.parametrize(("overrides", "sentence"), IN_OVERRIDES.values(), ids=IN_OVERRIDES.keys())
def test_a_mistake_in_an_override(overrides: list[str], sentence: str, write: Write) -> None:
    assert mistake(None, overrides, source="a flag") == sentence
    assert mistake(write(a="optim: {lr: 1}\n"), overrides, source="a flag") == sentence
    assert mistake(None, overrides) == sentence.replace("a flag", "an override")


def test_the_place_named_is_where_the_key_was_set_last(write: Write) -> None:
    base, a = write(base="optim: {lr: x}\n"), write(a="extends: base.yaml\noptim: {momentum: 0.5}\n")
    assert mistake(a).startswith(f"{base}: optim.lr")
    assert mistake(write(a="extends: base.yaml\noptim: {lr: y}\n")).startswith(f"{a}: optim.lr is 'y'")
    assert mistake(a, ["optim.lr=z"], source="a flag").startswith("a flag: optim.lr is 'z'")
    assert load_config(a, ["optim.lr=1"]).optim.lr == 1  # what is replaced is not looked at


def test_a_file_that_is_not_there(write: Write) -> None:
    path = write(deit_tiny="{}\n")
    folder = path.parent
    assert mistake(folder / "xyz.yaml") == f"There is no configuration file {folder}/xyz.yaml."
    assert mistake(folder / "deit_tinny.yaml") == (
        f"There is no configuration file {folder}/deit_tinny.yaml. Did you mean {path}?"
    )
    assert mistake(folder / "nowhere" / "a.yaml") == f"There is no configuration file {folder}/nowhere/a.yaml."
    assert mistake(folder) == f"{folder} is a folder; a configuration file (.yaml) was expected."


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"optim: {lr: \xff}\n")
    text = mistake(tmp_path / "a.yaml")
    assert text.startswith(f"The configuration file {tmp_path}/a.yaml cannot be read: 'utf-8' codec can't decode")
    (tmp_path / "b.yaml").write_bytes(b"optim: {lr: \x01}\n")
    assert mistake(tmp_path / "b.yaml").startswith(
        f"{tmp_path}/b.yaml is not valid YAML: unacceptable character #x0001"
    )


def test_an_extended_file_that_is_not_there(write: Write) -> None:
    a = write(bass="{}\n", a="extends: base.yaml\n")
    folder = a.parent
    assert mistake(write(b="extends: a.yaml\n")) == (
        f"There is no configuration file {folder}/base.yaml ({a} extends it). Did you mean {folder}/bass.yaml?"
    )
    assert mistake(write(a="extends: .\n")) == (
        f"{folder} is a folder ({a} extends it); a configuration file (.yaml) was expected."
    )


@pytest.mark.parametrize("files", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_files_that_extend_each_other_in_a_circle(files: list[str], write: Write) -> None:
    for file, extended in zip(files, [*files[1:], files[0]], strict=True):
        path = write(**{file: f"extends: [./{extended}.yaml]\n"})
    chain = " -> ".join(f"{name}.yaml" for name in files)
    assert mistake(path.parent / "a.yaml") == f"{path.parent}/a.yaml extends itself by way of {chain}."
    before = write(before="extends: a.yaml\n")
    assert mistake(before) == f"{path.parent}/a.yaml extends itself by way of before.yaml -> {chain}."


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_recognised_when_misspelt_and_named_when_wrong(key: str, write: Write) -> None:
    """The key with one letter too many, and a value of a type that no key has."""
    before = ["paper={table: 2, row: a, column: b}"] if key.startswith("paper.") else kind_of(key)
    assert mistake(None, [*before, f"{key}x=1"]) == f"an override: there is no key {key}x; did you mean {key}?"
    named = f"{key}.a" if key in ("model.kwargs", "quant.quantizers", "quant.rotation", "quant.policy.spare") else key
    assert mistake(None, [*before, f"{key}={{a: {{b: 1}}}}"]).startswith(f"an override: {named} is ")
    text = "{a: {b: 1}}"
    for name in reversed(key.split(".")):
        text = f"{{{name}: {text}}}"
    path = write(a=text)
    before = ["paper.table=2", "paper.row=a", "paper.column=b"] if key.startswith("paper.") else before
    assert mistake(path, [o for o in before if not o.startswith(f"{key}=")]).startswith(f"{path}: {named} is ")


FIELDS = {key: field for key, field in iter_keys() if leaf_types(field.annotation) & {int, float}}


@pytest.mark.parametrize("key", FIELDS)
def test_no_number_can_be_true_or_false(key: str, write: Write) -> None:
    """pydantic alone would take them for 1 and 0."""
    if key == "model.kwargs":  # may hold switches, but not among numbers
        assert mistake(None, ["model.kwargs={depths: [2, true]}"]).startswith("an override: model.kwargs.depths is ")
        return
    in_a_list = "tuple" in str(FIELDS[key].annotation)
    given = "[false, false]" if in_a_list else "true"  # of three too: what is missing is named last
    named, shown = (f"{key}.0", "false") if in_a_list else (key, "true")
    before = ["paper={table: 2, row: a, column: b}"] if key.startswith("paper.") else kind_of(key)
    said = mistake(None, [*before, f"{key}={given}"])
    kind = "integer" if int in leaf_types(FIELDS[key].annotation) else "number"
    assert said == f"an override: {named} is {shown}: input should be a valid {kind}."


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_recognised_when_misspelt(section: str) -> None:
    assert mistake(None, [f"{section}x.y=1"]) == f"an override: there is no key {section}x; did you mean {section}?"


CHOICES = {
    (key, choice)
    for key, field in iter_keys()
    if typing.get_origin(field.annotation) is Literal
    for choice in typing.get_args(field.annotation)
}


@pytest.mark.parametrize("key", sorted({key for key, _ in CHOICES}))
def test_every_choice_is_listed_when_another_is_given_and_accepted_when_it_is_given(key: str) -> None:
    choices = [choice for k, choice in CHOICES if k == key]
    text = mistake(None, [*kind_of(key), f"{key}=zzz"])
    for choice in choices:
        assert f"'{choice}'" in text
        assert of(load_config(overrides=[*kind_of(key), f"{key}={choice}"]), key) == choice


def test_a_bug_is_not_shown_as_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(fold, "_merge", broken)
    with pytest.raises(KeyError, match="a bug"):
        load_config()
