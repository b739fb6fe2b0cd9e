"""The folding of configuration files and overrides, the object they fold into, and mxfp4_ names."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import of
from pydantic import BaseModel, ValidationError

from config import Config, UserError, dump_config, load_config
from config.schema import ENTRIES

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SECTIONS = sorted(Config.model_fields)

Write = Callable[..., Path]


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


def test_entries_that_a_file_has_can_be_taken_out(write: Write) -> None:
    base = "quant:\n  scheme: mx\n  rotation: {output: {size: 8}, grad_weight: {size: 16, signs: fixed}}\n"
    base += "  quantizers: {q2: {block_rows: 32}}\n  policy: {last: 2, spare: {'*.fc2': [output]}}\n"
    base += "model: {kwargs: {depth: 3}}\n"
    whole = load_config(write(base=base, a="extends: base.yaml\n"))
    assert [*whole.quant.rotation] == ["output", "grad_weight"]
    for nothing in ("{}", "null"):
        emptied = write(base=base, a=f"extends: base.yaml\nquant: {{rotation: {nothing}}}\n")
        keys = ("quant.rotation", "quant.quantizers", "quant.policy.spare", "model.kwargs")
        for cfg in (
            load_config(emptied),
            load_config(emptied.with_name("base.yaml"), [f"{k}={nothing}" for k in keys]),
        ):
            assert cfg.quant.rotation == {} and cfg.quant.policy.last == 2
        assert (cfg.quant.quantizers, cfg.quant.policy.spare, cfg.model.kwargs) == ({}, {}, {})
    path = write(base=base, a="extends: base.yaml\n")
    one = load_config(path, ["quant.rotation.grad_weight=null", "quant.quantizers.q2=null", "model.kwargs.depth=null"])
    assert [*one.quant.rotation] == ["output"] and one.quant.rotation["output"].size == 8
    assert (one.quant.quantizers, one.model.kwargs) == ({}, {})
    assert load_config(write(base=dump_config(one), a="extends: base.yaml\n")) == one


def test_what_comes_after_an_entry_is_taken_out_starts_anew(write: Write) -> None:
    base = "quant: {scheme: mx, rotation: {grad_weight: {size: 16, signs: fixed}}}\n"
    path = write(base=base, a="extends: base.yaml\n")
    for nothing in ("quant.rotation={}", "quant.rotation=null", "quant.rotation.grad_weight=null"):
        rotation = load_config(path, [nothing, "quant.rotation.grad_weight.size=8"]).quant.rotation
        assert rotation["grad_weight"].model_dump() == {"size": 8, "signs": "none"}
    again = load_config(path, ["quant.rotation.grad_weight={}"]).quant.rotation
    assert again["grad_weight"].model_dump() == {"size": 32, "signs": "none"}
    assert load_config(path, ["quant={rotation: {output: {}}}"]).quant.rotation["grad_weight"].size == 16
    back = write(base=base, b="extends: base.yaml\nquant: {rotation: {}}\n", a="extends: [b.yaml, base.yaml]\n")
    assert load_config(back).quant.rotation["grad_weight"].size == 16
    assert load_config(back.with_name("b.yaml")).quant.rotation == {}


def test_an_empty_section_says_nothing_and_a_name_is_checked(write: Write) -> None:
    path = write(base="aug: {aa: original}\nquant: {scheme: mx}\n", a="extends: base.yaml\naug: {}\n")
    assert load_config(path).aug.aa == "original"
    with pytest.raises(UserError, match=r"quant\.rotation\.grad_wieght is 'grad_wieght'.*'grad_weight'"):
        load_config(path, ["quant.rotation.grad_wieght=null"])


def test_entries_are_those_of_the_schema() -> None:
    def mappings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            if typing.get_origin(field.annotation) is dict:
                yield f"{prefix}{name}"
            for part in (field.annotation, *typing.get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    yield from mappings(part, f"{prefix}{name}.")

    assert sorted({*mappings(Config)}) == sorted(ENTRIES)


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
    assert len(all_sections) == 1 + len(SECTIONS) + 3  # quant.element, quant.rounding and quant.policy
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
