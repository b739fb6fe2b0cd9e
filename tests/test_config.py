"""The folding of configuration files and overrides, and the sentences about mistakes in them."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from helpers import leaf_types
from pydantic import BaseModel, ValidationError

import config
from config import Config, UserError, dump_config, iter_keys, load_config, sections_in

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
KEYS = sorted({key for key, _ in iter_keys()})
SECTIONS = sorted(Config.model_fields)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(a="text", b="text") writes a.yaml and b.yaml and returns the path of the last."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path / f"{list(texts)[-1]}.yaml"

    return write


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


def of(cfg: Config, key: str) -> Any:
    value: Any = cfg
    for name in key.split("."):
        value = getattr(value, name)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Folding
# ---------------------------------------------------------------------------------------------------------------------


def test_without_a_file_the_defaults_hold() -> None:
    assert load_config() == Config()
    assert (Config().quant.scheme, Config().stabilizer.kind, Config().paper) == ("none", "none", None)


@pytest.mark.parametrize("text", ["", "# a comment\n", "---\n", "null\n"])
def test_a_file_that_holds_nothing_is_the_defaults(text: str, write: Write) -> None:
    assert load_config(write(a=text)) == Config()


def test_defaults_then_extends_then_file_then_overrides(write: Write) -> None:
    path = write(
        base="schedule: {epochs: 11, warmup_epochs: 1, decay_epochs: 1}\n",
        a="extends: base.yaml\nschedule: {epochs: 22, warmup_epochs: 2}\n",
    )
    s = load_config(path, ["schedule.epochs=33"]).schedule
    assert (s.epochs, s.warmup_epochs, s.decay_epochs, s.min_lr) == (33, 2, 1, Config().schedule.min_lr)
    assert load_config(path).schedule.epochs == 22
    assert load_config(path.parent / "base.yaml").schedule.epochs == 11
    assert load_config().schedule.epochs == 90


def test_the_last_override_of_a_key_wins() -> None:
    assert load_config(overrides=["schedule.epochs=3", "schedule.epochs=4"]).schedule.epochs == 4
    cfg = load_config(overrides=["schedule.epochs=3", "schedule={warmup_epochs: 1}"])
    assert (cfg.schedule.epochs, cfg.schedule.warmup_epochs) == (3, 1)


def test_mappings_merge_at_every_depth(write: Write) -> None:
    path = write(
        base="quant: {scheme: mx, rounding: {forward: nearest_up, backward: nearest_away}}\n"
        "model: {kwargs: {depth: 3}}\n",
        a="extends: base.yaml\nquant: {rounding: {backward: nearest_even}}\nmodel: {kwargs: {num_heads: 2}}\n",
    )
    cfg = load_config(path, ["model.kwargs.embed_dim=64"])
    assert cfg.quant.scheme == "mx"
    assert (cfg.quant.rounding.forward, cfg.quant.rounding.backward) == ("nearest_up", "nearest_even")
    assert cfg.model.kwargs == {"depth": 3, "num_heads": 2, "embed_dim": 64}


def test_lists_replace(write: Write) -> None:
    path = write(base="quant: {scheme: mx, active: [q1, q2, q3]}\n", a="extends: base.yaml\nquant: {active: [q5]}\n")
    assert load_config(path).quant.active == ("q5",)
    assert load_config(path, ["quant.active=[q6, q1]"]).quant.active == ("q6", "q1")
    assert load_config(path, ["quant.active=[]"]).quant.active == ()


def test_null_replaces_a_value(write: Write) -> None:
    path = write(base="aug: {aa: original}\n", a="extends: base.yaml\naug: {aa: null}\n")
    assert load_config(path.parent / "base.yaml").aug.aa == "original"
    assert load_config(path).aug.aa is None


def test_a_changed_tag_replaces_its_mapping(write: Write) -> None:
    path = write(
        base="quant: {scheme: mx, scale_rule: floor}\nstabilizer: {kind: qema, decay: 0.9}\n",
        a="extends: base.yaml\nquant: {scheme: none}\nstabilizer: {kind: none}\n",
    )
    assert load_config(path) == Config()
    back = load_config(path, ["quant.scheme=mx", "stabilizer.kind=qema"])
    assert back.quant.scale_rule == "truncation_free" and back.stabilizer.decay == 0.998  # not those of base.yaml


def test_the_same_tag_again_merges(write: Write) -> None:
    path = write(
        base="quant: {scheme: mx, scale_rule: floor}\n",
        a="extends: base.yaml\nquant: {scheme: mx, backward_operands: original}\n",
    )
    quant = load_config(path, ["quant.scheme=mx"]).quant
    assert (quant.scale_rule, quant.backward_operands) == ("floor", "original")


@pytest.mark.parametrize(
    "overrides", list(itertools.permutations(["quant.scheme=mx", "quant.scale_rule=floor", "quant.active=[q2]"]))
)
def test_a_tag_may_come_before_or_after_its_keys(overrides: tuple[str, ...], write: Write) -> None:
    quant = load_config(overrides=overrides).quant
    assert (quant.scheme, quant.scale_rule, quant.active) == ("mx", "floor", ("q2",))
    path = write(base="quant: {scale_rule: floor, active: [q2]}\n", a="extends: base.yaml\nquant: {scheme: mx}\n")
    assert load_config(path).quant == quant
    assert load_config(path.parent / "base.yaml", ["quant.scheme=mx"]).quant == quant


@pytest.mark.parametrize("name", ["scheme", "kind"])
def test_only_the_tagged_sections_have_tags(name: str, write: Write) -> None:
    path = write(
        base=f"model: {{kwargs: {{{name}: a, depth: 3}}}}\n",
        a=f"extends: base.yaml\nmodel: {{kwargs: {{{name}: b}}}}\n",
    )
    assert load_config(path).model.kwargs == {name: "b", "depth": 3}


def test_paper_is_never_inherited(write: Write) -> None:
    figure = "{table: 2, row: tetrajet, column: deit_tiny, top1: 59.75}"
    write(base=f"paper: {figure}\nschedule: {{epochs: 7}}\n", child="extends: base.yaml\n")
    grandchild = write(grandchild="extends: [child.yaml]\n")
    folder = grandchild.parent
    assert load_config(folder / "base.yaml").paper.top1 == 59.75
    for name in ("child", "grandchild"):
        cfg = load_config(folder / f"{name}.yaml")
        assert cfg.paper is None and cfg.schedule.epochs == 7
    own = write(own="extends: base.yaml\npaper: {table: 5, row: a, column: top1}\n")
    assert load_config(own).paper.model_dump() == {"table": 5, "row": "a", "column": "top1", "top1": None, "top5": None}
    assert load_config(write(below="extends: own.yaml\n")).paper is None
    assert load_config(folder / "base.yaml", ["paper.top1=60"]).paper.top1 == 60
    assert load_config(folder / "base.yaml", ["paper=null"]).paper is None


def test_extends_takes_a_name_or_a_list_whose_later_entries_win(write: Write) -> None:
    write(a="schedule: {epochs: 1, warmup_epochs: 1}\n", b="schedule: {epochs: 2}\n")
    ab = load_config(write(ab="extends: [a.yaml, b.yaml]\n")).schedule
    ba = load_config(write(ba="extends: [b.yaml, a.yaml]\n")).schedule
    assert (ab.epochs, ab.warmup_epochs, ba.epochs, ba.warmup_epochs) == (2, 1, 1, 1)
    assert load_config(write(one="extends: b.yaml\n")).schedule.epochs == 2
    assert load_config(write(none="extends: []\n")) == Config()


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows" / "common").mkdir(parents=True)
    (tmp_path / "elsewhere" / "common").mkdir(parents=True)
    (tmp_path / "rows" / "a.yaml").write_text("extends: common/b.yaml\n")
    (tmp_path / "rows" / "common" / "b.yaml").write_text("extends: [../c.yaml, d.yaml]\n")
    (tmp_path / "rows" / "c.yaml").write_text("schedule: {epochs: 5}\n")
    (tmp_path / "rows" / "common" / "d.yaml").write_text("optim: {lr: 1.0}\n")
    (tmp_path / "elsewhere" / "common" / "b.yaml").write_text("schedule: {epochs: 6}\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (tmp_path / "rows" / "a.yaml", Path("../rows/a.yaml"), "../rows/a.yaml"):
        cfg = load_config(path)
        assert (cfg.schedule.epochs, cfg.optim.lr) == (5, 1.0)


def test_a_file_may_be_extended_by_way_of_two_others(write: Write) -> None:
    write(
        root="schedule: {epochs: 1, decay_epochs: 8}\n",
        left="extends: root.yaml\nschedule: {epochs: 2}\n",
        right="extends: root.yaml\n",
    )
    s = load_config(write(both="extends: [left.yaml, right.yaml]\n")).schedule
    assert (s.epochs, s.decay_epochs) == (1, 8)  # right.yaml comes later, with all that it extends


def test_yaml_anchors_and_merge_keys_work(write: Write) -> None:
    text = "aug: {mixup: 0.5, cutmix: 0.25}\nmodel: {kwargs: &k {depth: 3, num_heads: 2}}\n"
    assert load_config(write(a=text)).model.kwargs == {"depth": 3, "num_heads": 2}
    text = "optim: &o {lr: 0.5, momentum: 0.25}\nmodel: {kwargs: {<<: *o, lr: 0.75}}\n"
    assert load_config(write(a=text)).model.kwargs == {"lr": 0.75, "momentum": 0.25}


# ---------------------------------------------------------------------------------------------------------------------
# The object
# ---------------------------------------------------------------------------------------------------------------------


def sections(model: BaseModel) -> Iterator[BaseModel]:
    yield model
    for name in type(model).model_fields:
        if isinstance(value := getattr(model, name), BaseModel):
            yield from sections(value)


def test_the_object_is_frozen() -> None:
    cfg = load_config(overrides=["quant.scheme=mx", "stabilizer.kind=qema", "paper={table: 2, row: a, column: b}"])
    all_sections = list(sections(cfg))
    assert len(all_sections) == 1 + len(SECTIONS) + 2  # quant.element and quant.rounding
    for section in all_sections:
        for name in type(section).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, getattr(section, name))
        with pytest.raises(ValidationError):
            section.another = 1


def test_two_configurations_share_nothing_that_can_change() -> None:
    load_config().model.kwargs["depth"] = 99
    assert load_config().model.kwargs == {} == Config().model.kwargs


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("schedule.epochs=10", 10),
        ("schedule.epochs='10'", 10),
        ("schedule.epochs=10.0", 10),
        ("optim.lr=3e-4", 0.0003),
        ("optim.lr=3E-4", 0.0003),
        ("optim.lr=1e+1", 10.0),
        ("optim.lr=2", 2.0),
        ("optim.lr = .5", 0.5),
        ("optim.clip_grad=null", None),
        ("optim.clip_grad=5", 5.0),
        ("optim.betas=[0.5, 9e-1]", (0.5, 0.9)),
        ("optim.betas=null", None),
        ("run.eval=true", True),
        ("run.eval=no", False),
        ("run.seed=4294967295", 2**32 - 1),
        ("run.output_dir=runs/1e3", "runs/1e3"),
        ("run.output_dir=a=b", "a=b"),
        ("run.output_dir='2024'", "2024"),
        ("aug.aa=rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        ("aug.scale=[1, 1]", (1.0, 1.0)),
        ("model.kwargs={depth: 4, qkv_bias: false, drop: 0.5, depths: [2, 2]}", None),
        ("data.set=IMNET", "imagenet"),
        ("data.set=CIFAR", "cifar100"),
        ("data.set=CIFAR10", "cifar10"),
        ("data.set=digits", "digits"),
        ("data.mean=[0.5, 0.5, 0.5]", (0.5, 0.5, 0.5)),
        ("quant={scheme: mx, active: [q1]}", None),
    ],
)
def test_an_override_has_the_type_of_its_key(override: str, expected: Any) -> None:
    key = override.partition("=")[0].strip()
    value = of(load_config(overrides=[override]), key)
    if key == "model.kwargs":
        expected = {"depth": 4, "qkv_bias": False, "drop": 0.5, "depths": [2, 2]}
        assert [type(v) for v in value.values()] == [int, bool, float, list]
    if key == "quant":
        value, expected = (value.scheme, value.active), ("mx", ("q1",))
    assert value == expected and type(value) is type(expected)


def test_scientific_notation_needs_no_dot(write: Write) -> None:
    """YAML 1.1 reads 3e-4 as text; pydantic makes it a number again."""
    assert yaml.safe_load("3e-4") == "3e-4"
    cfg = load_config(write(a="optim: {lr: 3e-4, eps: 1e-8, betas: [9e-1, 0.999]}\nschedule: {min_lr: 1E-5}\n"))
    assert (cfg.optim.lr, cfg.optim.eps, cfg.optim.betas, cfg.schedule.min_lr) == (3e-4, 1e-8, (0.9, 0.999), 1e-5)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_written_of_a_configuration_reads_back_equal(path: Path, write: Write) -> None:
    cfg = load_config(path)
    text = dump_config(cfg)
    assert load_config(write(again=text)) == cfg
    assert dump_config(load_config(write(again=text))) == text
    assert not any(line.startswith("extends") for line in text.splitlines())


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.output_dir='2024'", "run.resume='null'", "data.path='true'", "aug.aa='1e3'"],
        ["run.output_dir='~'", "run.finetune=' x: #y '", "data.path='é\u4e2d'", "distillation.teacher_path='a\\b\"c'"],
        ["optim.lr=1.0e-300", "optim.eps=null", "optim.weight_decay=0.1", "run.seed=4294967295"],
        ["model.kwargs={a: '1', b: 1, c: 1.0, d: true, e: 'true', f: [1, 2]}"],
        ["quant.scheme=mx", "quant.active=[]", "stabilizer.kind=freeze", "paper={table: 1, row: '1', column: b}"],
        ["quant.scheme=int4", "stabilizer.kind=qramping"],
    ],
)
def test_awkward_values_read_back_equal(overrides: list[str], write: Write) -> None:
    cfg = load_config(overrides=overrides)
    again = load_config(write(again=dump_config(cfg)))
    assert again == cfg
    assert {k: type(v) for k, v in again.model.kwargs.items()} == {k: type(v) for k, v in cfg.model.kwargs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# mxfp4_ names
# ---------------------------------------------------------------------------------------------------------------------

NAME = "mxfp4_deit_tiny_patch16_224"


def test_an_mxfp4_name_is_quantized_unless_the_scheme_is_given(write: Write) -> None:
    override = f"model.name={NAME}"
    assert load_config(overrides=[override]).quant == load_config(overrides=["quant.scheme=mx"]).quant
    assert load_config(write(a=f"model: {{name: {NAME}}}\n")).quant.scheme == "mx"
    assert load_config(overrides=["model.name=deit_tiny_patch16_224"]).quant.scheme == "none"
    for none in ("quant.scheme=none", "quant={scheme: none}"):
        assert load_config(overrides=[override, none]).quant.scheme == "none"
        assert load_config(overrides=[none, override]).quant.scheme == "none"
    assert load_config(write(a="quant: {scheme: none}\n"), [override]).quant.scheme == "none"
    assert load_config(write(b=f"extends: a.yaml\nmodel: {{name: {NAME}}}\n")).quant.scheme == "none"
    assert load_config(overrides=[override, "quant.scheme=int4"]).quant.scheme == "int4"


def test_an_mxfp4_name_takes_the_other_keys_of_its_quantization(write: Write) -> None:
    quant = load_config(
        write(a=f"model: {{name: {NAME}}}\nquant: {{scale_rule: floor}}\n"), ["quant.active=[q1]"]
    ).quant
    assert (quant.scheme, quant.scale_rule, quant.active) == ("mx", "floor", ("q1",))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

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
    named = f"{key}.a" if key == "model.kwargs" else key
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

    monkeypatch.setattr(config, "_merge", broken)
    with pytest.raises(KeyError, match="a bug"):
        load_config()
