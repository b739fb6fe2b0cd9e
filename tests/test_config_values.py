"""Values that cannot mean what is written, and which keys make two recipes of one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import exit_code, tiny
from test_config_mistakes import kind_of, mistake

from config import Config, UserError, iter_keys, load_config, recipe_differences
from config.fold import CONTINUABLE
from datasets import build_data

Write = Callable[..., Path]
KEYS = sorted({key for key, _ in iter_keys()})

# What somebody may write where something else was meant, as YAML.
JUNK = [
    *("null", "''", "' '", "true", "-1", "0", "1.5", "1e400", "-.inf", ".nan", "99999999999999999999999999", "1:30"),
    *(
        "[]",
        "{}",
        "[[]]",
        "[1, 2, 3, 4]",
        "{a: 1}",
        "{1: 2}",
        "[null]",
        "text",
        "'\\0'",
        '"a\\0b"',
        '"a\\nb"',
        "2024-01-01",
    ),
    *(
        '"\\ud83d\\ude00"',
        "x" * 5000,
        "[a, [b]]",
        "{a: {b: {c: d}}}",
        "~/x",
        "None",
        "nan",
        "inf",
        "'1'",
        "0x10",
        "1_0",
    ),
]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_takes_a_value_or_says_in_a_sentence_why_not(key: str, write: Write) -> None:
    before = ["paper={table: 2, row: a, column: b}"] if key.startswith("paper.") else kind_of(key)
    section, _, rest = key.partition(".")
    for junk in JUNK:
        text = f"{{{rest.replace('.', ': {')}: {junk}{'}' * key.count('.')}"
        for given in ([f"{key}={junk}"], [f"{section}={text}"]):
            try:
                cfg = load_config(overrides=[*before, *given])
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, junk
            else:
                assert isinstance(cfg, Config)
                json.dumps(cfg.model_dump(mode="json"), allow_nan=False)


# (override, what the sentence says)
MEANINGLESS = [
    ("aug.scale=[1.0, 0.08]", "aug.scale: a range was expected, the smaller share first; got [1.0, 0.08]."),
    ("aug.scale=[0, 0]", "aug.scale: a range was expected"),
    ("aug.cutmix_minmax=[0.8, 0.2]", "aug.cutmix_minmax: a range was expected, the smaller share first"),
    ("aug.scale=[-0.1, 1]", "aug.scale.0 is -0.1: input should be greater than or equal to 0."),
    ("aug.aa=''", "aug.aa: the name of a policy was expected, or null for none."),
    ("data.mean=[0.5, 0.5]", "data.mean is [0.5, 0.5]: it needs more values."),
    ("data.std=[0.5, 0.5, 0]", "data.std.2 is 0: input should be greater than or equal to 0.000001."),
    ("data.std=[0.5, 0.5, 1e-300]", "data.std.2 is 1e-300: input should be greater than or equal to 0.000001."),
    ("data.mean=[1e300, 0.5, 0.5]", "data.mean.0 is 1e+300: input should be less than or equal to 1000000."),
    *((f"model.kwargs={{{name}: {value}}}", f"model.kwargs: {name} is not for this program") for name, value in [
        ("pretrained", "true"), ("pretrained", "1"), ("pretrained_cfg", "x"), ("pretrained_cfg_overlay", "x"),
        ("cache_dir", "x"), ("features_only", "true"),
    ]),
    *((f'{key}="a\\0b"', f"{key}: a path cannot have a NUL character in it.") for key in (
        "run.output_dir", "run.resume", "run.finetune", "data.path", "distillation.teacher_path")),
    *((f"{key}=''", f"{key}: a path was expected, not an empty text.") for key in (
        "run.output_dir", "run.resume", "run.finetune", "data.path", "distillation.teacher_path")),
    *((f"{key}={url}", f"{key}: {url} is a URL and a path was expected; download") for key, url in itertools.product(
        ("run.output_dir", "run.resume", "run.finetune", "data.path"),
        ("https://a.b/c.pth", "s3://bucket/x", "file:///x"))),
    ("schedule.epochs=1000000000", "schedule.epochs is 1000000000: input should be less than or equal to 100000."),
    ("model.img_size=1e9", "input should be less than or equal to"),
    ("data.num_workers=100000", "input should be less than or equal to"),
    ("aug.repeats=100000", "input should be less than or equal to"),
    ("optim.global_batch=99999999999", "input should be less than or equal to"),
    ("schedule.decay_rate=2", "input should be less than or equal to 1."),
    ("schedule.warmup_epochs=-1", "input should be greater than or equal to 0."),
    ("optim.lr=-1", "input should be greater than 0."),
    ("optim.lr='nan'", "input should be a finite number."),
    ("optim.lr=inf", "input should be a finite number."),
    (f"{'a.' * 5000}b=1", "must be of the form key=value"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said"), MEANINGLESS, ids=[override[:40] for override, _ in MEANINGLESS])
def test_what_cannot_be_meant_is_refused(override: str, said: str) -> None:
    assert said in mistake(None, [override])


@pytest.mark.parametrize(
    "override",
    ["model.kwargs={pretrained: false}", "aug.scale=[0.5, 0.5]", "aug.cutmix_minmax=[0, 0.5]", "data.path='a:b//c'"],
)
def test_what_can_be_meant_is_taken(override: str) -> None:
    load_config(overrides=[override])


def test_a_url_stands_where_its_reader_takes_one() -> None:
    assert load_config(overrides=["data.set=wds/x", "data.path=https://a.b/c"]).data.path == "https://a.b/c"
    url = "distillation.teacher_path=https://a.b/c.pth"
    assert load_config(overrides=[url]).distillation.type == "none"  # no file is looked at
    assert "is a URL and a path was expected" in mistake(None, [url, "distillation.type=hard"])


@pytest.mark.parametrize(
    ("text", "written", "nested"),
    [
        ("optim.lr: 0.1\n", "optim.lr", "optim: {lr: ...}"),
        ("quant: {scheme: mx, rounding.forward: nearest_up}\n", "rounding.forward", "rounding: {forward: ...}"),
        ("quant.rounding.forward: nearest_up\n", "quant.rounding.forward", "quant: {rounding: {forward: ...}}"),
        ("optim: {momentum: 0.5}\noptim.lr: 0.1\n", "optim.lr", "optim: {lr: ...}"),
        ("quant.scheme: mx\n", "quant.scheme", "quant: {scheme: ...}"),
        ("stabilizer.kind: qema\n", "stabilizer.kind", "stabilizer: {kind: ...}"),
        ("model.kwargs: {depth: 3}\n", "model.kwargs", "model: {kwargs: ...}"),
    ],
)
def test_a_key_with_a_dot_in_a_file_is_explained(text: str, written: str, nested: str, write: Write) -> None:
    path = write(a=text)
    assert mistake(path) == f"{path}: {written} has a dot, as flags have; in a file write {nested}."


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith("paper.")])
def test_no_key_may_be_written_with_its_dot_in_a_file(key: str, write: Write) -> None:
    assert f"{key} has a dot, as flags have" in mistake(write(a=f"{key}: 1\n"))


def test_a_misspelt_key_with_a_dot_is_named(write: Write) -> None:
    path = write(a="optim.lrr: 0.1\n")
    assert mistake(path) == f"{path}: there is no key optim.lrr; did you mean optim.lr?"


# ---------------------------------------------------------------------------------------------------------------------
# What only data, model and schedule can say
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_set", ["digits", "generated"])
@pytest.mark.parametrize(
    "policy",
    [
        *(
            "garbage",
            "none",
            "rand",
            "random",
            "rand_m9",
            "rand-",
            "rand-strong",
            "rand-m",
            "rand-m9-mstd",
            "rand-m9-x3",
        ),
        *("rand-m9x", "rand-m-9", "rand-n0", "rand-p0", "rand-p2", "rand-tfoo", "rand-m9-m8", "original-m9", "v0-foo"),
        *("v1", "augmix-x", "augmix-w0", "RAND-m9", " rand-m9", "rand m9", "3a-", "rand-inc2", "rand-m9-"),
    ],
)
def test_a_policy_that_is_none_of_timms_is_refused_whatever_the_data(policy: str, data_set: str) -> None:
    cfg = load_config(overrides=[f"data.set={data_set}", f"aug.aa='{policy}'", "aug.repeats=1"])
    if policy == "rand":  # with timm's own magnitude
        build_data(cfg, rank=0, world_size=1, batch_size=8)
        return
    with pytest.raises(UserError, match=r"^aug\.aa .* is not one of timm's, such as rand-m9-mstd0\.5-inc1: ") as caught:
        build_data(cfg, rank=0, world_size=1, batch_size=8)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "policy",
    [
        *("rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.5-mmax10", "rand-mstd1-tweights", "rand-m9-t3a", "original", "v0r"),
        *("original-mstd0.5", "augmix-m5-w4-d2", "augmix-m3-b1-a1.0-mstd101", "3a", "originalr", "v0"),
    ],
)
def test_timms_policies_are_taken(policy: str) -> None:
    cfg = load_config(overrides=["data.set=generated", f"aug.aa={policy}", "aug.repeats=1"])
    build_data(cfg, rank=0, world_size=1, batch_size=8)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--input-size", "10"], "no multiple of deit_tiny_patch16_224's patches of 4 pixels"),
        (["--input-size", "9"], "choose 8 or 12, or a model.patch_size."),
        (["--input-size", "40", "--model.patch_size", "16"], "choose 32 or 48"),
        (["--aa", "garbage"], "aug.aa garbage is not one of timm's"),
        (["--lr", "1e-6"], "The schedule would rise from optim.lr 1e-06 to schedule.min_lr 1e-05; lower --min-lr."),
        (["--min-lr", "1"], "The schedule would rise"),
        (["--warmup-lr", "1", "--warmup-epochs", "1"], "The warm-up would fall from schedule.warmup_lr 1 to optim.lr"),
        (
            ["--quant.scheme", "mx", "--stabilizer.kind", "freeze", "--stabilizer.threshold_end", "0.5"],
            "Freeze's threshold falls, so threshold_start (0.1) must be at least threshold_end (0.5);",
        ),
        (["--output_dir", ""], None),
        (["--model.kwargs", "{pretrained: true}"], "model.kwargs: pretrained is not for this program"),
        (["--opt-betas", "0.9", "1.0"], "The optimizer adamw cannot be made"),
        (["--opt-betas", "-0.1", "0.9"], "The optimizer adamw cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_be_meant_does_not_begin(
    flags: list[str],
    said: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    if said is None:  # null: the folder of its name
        assert exit_code([*tiny(tmp_path / "run", *flags), "--print-config"]) == 0
        return
    assert exit_code(tiny(tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1
    assert set(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


UNMIXED = ["aug.mixup=0", "aug.cutmix=0"]


def between(one: list[str], other: list[str]) -> list[str]:
    return recipe_differences(*(load_config(overrides=o).model_dump(mode="json") for o in (one, other)))


@pytest.mark.parametrize(
    ("one", "other", "differences"),
    [
        (["run.amp=none"], [], ["run.amp none (here auto)"]),
        (["run.amp=none"], ["run.amp=bfloat16"], ["run.amp none (here bfloat16)"]),
        (["run.amp=bfloat16"], [], []),  # what auto is on a GPU
        (["run.amp=bfloat16"], ["run.device=cuda"], []),
        (["run.amp=bfloat16"], ["run.device=cpu"], ["run.amp bfloat16 (here auto)"]),
        (["run.amp=none"], ["run.device=cpu"], []),
        (["run.device=cpu"], ["run.device=cuda"], []),  # the same recipe, wherever it is computed
        (["data.batch_size=64"], ["data.batch_size=128"], ["data.batch_size 64 (here 128)"]),
        (["data.batch_size=64"], [], []),  # null is what follows from the processes
        (["data.batch_size=8", *UNMIXED], ["data.batch_size=16", *UNMIXED], []),
        (
            ["data.batch_size=64", *UNMIXED, "aug.cutmix_minmax=[0.2, 0.8]"],
            ["data.batch_size=32", *UNMIXED, "aug.cutmix_minmax=[0.2, 0.8]"],
            ["data.batch_size 64 (here 32)"],
        ),
        (["run.compile=true", "run.cuda_graphs=false", "data.num_workers=3", "data.path=x", "run.log_every=1"], [], []),
        (["run.seed=1"], [], ["run.seed 1 (here 0)"]),
    ],
)  # fmt: skip
def test_what_makes_two_recipes(one: list[str], other: list[str], differences: list[str]) -> None:
    assert between(one, other) == differences
    assert len(between(other, one)) == len(differences)


def test_differences_of_what_is_no_configuration() -> None:
    """A stored one that is valid no more: it differs, and nothing breaks."""
    cfg = load_config().model_dump(mode="json")
    for given in ({}, {"run": 3, "aug": None}, {"run": {"amp": []}, "data": {"batch_size": "x"}}, {1: 2}):
        assert recipe_differences(given, cfg) and recipe_differences(cfg, given)


def test_a_run_goes_on_with_another_batch_size_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_this_process: None
) -> None:
    assert set(CONTINUABLE) == {"schedule.epochs", "data.batch_size", "data.gpu_decode"}
    flags = ["--mixup", "0.8", "--epochs", "1"]
    assert exit_code(tiny(tmp_path / "run", *flags, "--batch-size", "8")) == 0
    capsys.readouterr()
    again: list[Any] = [*flags, "--epochs", "2", "--resume", "auto"]
    assert exit_code(tiny(tmp_path / "run", *again, "--batch-size", "16")) == 0
    assert "was trained with data.batch_size 8 (here 16)." in capsys.readouterr().err
    assert exit_code(tiny(tmp_path / "run", *again, "--batch-size", "16", "--amp", "bfloat16")) == 2
    assert "was trained with run.amp auto (here bfloat16); resume with the same recipe" in capsys.readouterr().err
