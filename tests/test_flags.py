"""The command line: DeiT's names, a flag for every key, and what becomes of the words after a flag."""

from __future__ import annotations

import argparse
import functools
import re
import typing
from typing import Any, Literal

import pytest
from helpers import leaf_types

from config import Config, UserError, flags, iter_keys, load_config, sections_in
from config.flags import build_parser, parse_flags
from config.quant import QuantizerConfig

KEYS = {key: field for key, field in iter_keys() if not key.startswith("paper.")}
TAGS = {"quant": "scheme", "stabilizer": "kind"}

# DeiT's flags: (command line, the key it sets, the value there). No value is the default.
DEIT = [
    ("--model deit_small_patch16_224", "model.name", "deit_small_patch16_224"),
    ("--batch-size 64", "data.batch_size", 64),
    ("--epochs 300", "schedule.epochs", 300),
    ("--input-size 192", "model.img_size", 192),
    ("--drop 0.2", "model.drop", 0.2),
    ("--drop-path 0.3", "model.drop_path", 0.3),
    ("--model-ema", "model_ema.enabled", True),
    ("--model-ema --no-model-ema", "model_ema.enabled", False),
    ("--model-ema-decay 0.999", "model_ema.decay", 0.999),
    ("--opt sgd", "optim.opt", "sgd"),
    ("--opt-eps 1e-6", "optim.eps", 1e-6),
    ("--opt-betas 0.8 0.95", "optim.betas", (0.8, 0.95)),
    ("--clip-grad 1", "optim.clip_grad", 1.0),
    ("--momentum 0.8", "optim.momentum", 0.8),
    ("--weight-decay 1e-4", "optim.weight_decay", 1e-4),
    ("--sched step", "schedule.sched", "step"),
    ("--lr 3e-4", "optim.lr", 3e-4),
    ("--warmup-lr 1e-7", "schedule.warmup_lr", 1e-7),
    ("--min-lr 1e-6", "schedule.min_lr", 1e-6),
    ("--decay-epochs 20", "schedule.decay_epochs", 20.0),
    ("--warmup-epochs 3", "schedule.warmup_epochs", 3),
    ("--color-jitter 0.4", "aug.color_jitter", 0.4),
    ("--aa rand-m7-mstd0.5", "aug.aa", "rand-m7-mstd0.5"),
    ("--smoothing 0.2", "loss.smoothing", 0.2),
    ("--train-interpolation bilinear", "aug.interpolation", "bilinear"),
    ("--repeated-aug", "aug.repeats", 3),
    ("--no-repeated-aug", "aug.repeats", 1),
    ("--ThreeAugment", "aug.three_augment", True),
    ("--src", "aug.crop", "src"),
    ("--reprob 0.5", "aug.reprob", 0.5),
    ("--remode const", "aug.remode", "const"),
    ("--recount 2", "aug.recount", 2),
    ("--mixup 0.5", "aug.mixup", 0.5),
    ("--cutmix 0.5", "aug.cutmix", 0.5),
    ("--cutmix-minmax 0.2 0.8", "aug.cutmix_minmax", (0.2, 0.8)),
    ("--mixup-prob 0.5", "aug.mixup_prob", 0.5),
    ("--mixup-switch-prob 0.25", "aug.mixup_switch_prob", 0.25),
    ("--mixup-mode elem", "aug.mixup_mode", "elem"),
    ("--teacher-model regnety_320", "distillation.teacher_model", "regnety_320"),
    ("--teacher-path https://a.b/c_d-e.pth", "distillation.teacher_path", "https://a.b/c_d-e.pth"),
    ("--distillation-type hard", "distillation.type", "hard"),
    ("--distillation-alpha 0.25", "distillation.alpha", 0.25),
    ("--distillation-tau 3", "distillation.tau", 3.0),
    ("--finetune some.pth", "run.finetune", "some.pth"),
    ("--pretrained model.safetensors", "run.finetune", "model.safetensors"),
    ("--pretrained=./true", "run.finetune", "./true"),
    ("--data-path /data/image_net-1k", "data.path", "/data/image_net-1k"),
    ("--data-set CIFAR", "data.set", "cifar100"),
    ("--data-set IMNET", "data.set", "imagenet"),
    ("--output_dir out/run_1-a", "run.output_dir", "out/run_1-a"),
    ("--device cuda", "run.device", "cuda"),
    ("--seed 5", "run.seed", 5),
    ("--resume last.pt", "run.resume", "last.pt"),
    ("--compile", "run.compile", True),
    ("--no-cuda-graphs", "run.cuda_graphs", False),
    ("--eval", "run.eval", True),
    ("--eval-crop-ratio 1.0", "data.eval_crop_ratio", 1.0),
    ("--num_workers 4", "data.num_workers", 4),
    ("--pin-mem", "data.pin_mem", True),
    ("--no-pin-mem", "data.pin_mem", False),
    ("--bce-loss", "loss.bce", True),
    ("--unscale-lr", "optim.unscale_lr", True),
    ("--nb-classes 10", "model.num_classes", 10),
    ("--decay-rate 0.5", "schedule.decay_rate", 0.5),
    ("--dr 0.5", "schedule.decay_rate", 0.5),
]
# These state what is so without them.
# Keys that are mappings, and values of theirs.
NOTHING = dict.fromkeys(QuantizerConfig.model_fields)
MAPPINGS = {
    "model.kwargs": {"depth": 3, "act_layer": "relu"},
    "quant.quantizers": {"q5": {**NOTHING, "rounding": "stochastic"}},
    "quant.rotation": {"grad_weight": {"size": 16, "signs": "fixed"}},
    "quant.policy.spare": {"a": ["output"]},
}
AS_DEFAULT = ["--model-ema --no-model-ema", "--repeated-aug", "--data-set IMNET", "--pin-mem"]


def leaves(cfg: Config) -> dict[str, Any]:
    """Every key with its value, as {"section.key": value}."""

    def walk(mapping: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in mapping.items():
            nested = isinstance(value, dict) and f"{prefix}{name}" not in MAPPINGS
            found |= walk(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
        return found

    return walk(cfg.model_dump(), "")


def parse(*argv: str) -> Config:
    return load_config(None, parse_flags(argv)[1], source="the command line")


def changed(*argv: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys that a command line changes, with their new values."""
    base = leaves(parse(*before))
    return {key: value for key, value in leaves(parse(*before, *argv)).items() if base[key] != value}


def mistake(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    error = caught.value
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    return str(error)


def kind_of(key: str) -> tuple[str, ...]:
    """Flags after which a key of some kind of quantization or of stabilizer applies."""
    section, _, rest = key.partition(".")
    for kind in sections_in(Config.model_fields[section].annotation) if section in TAGS else []:
        if rest != TAGS[section] and rest.partition(".")[0] in kind.model_fields:
            return f"--{section}.{TAGS[section]}", typing.get_args(kind.model_fields[TAGS[section]].annotation)[0]
    return ()


def words_for(key: str) -> tuple[list[str], Any]:
    """(words after the flag of a key, the value they mean), which is not the default."""
    annotation, default = KEYS[key].annotation, KEYS[key].default
    arguments = typing.get_args(annotation)
    if key in ("quant.scheme", "stabilizer.kind"):
        return [choices(key)[1]], choices(key)[1]
    if key == "quant.active":
        return ["q5", "q2"], ("q5", "q2")
    if key in MAPPINGS:
        return [str(MAPPINGS[key]).replace("'", "").replace("None", "null")], MAPPINGS[key]
    if typing.get_origin(annotation) is Literal:
        other = next(choice for choice in arguments if choice != default)
        return [other], other
    if "tuple" in str(annotation):
        shape = next((a for a in arguments if "tuple" in str(a)), annotation)
        value = tuple(0.125 * (i + 1) for i in range(len(typing.get_args(shape))))
        return [str(v) for v in value], value
    types = leaf_types(annotation)
    if int in types:
        return ["7"], 7
    if float in types:
        return ["0.375"], 0.375
    assert str in types, key
    return ["some text"], "some text"


def choices(key: str) -> list[str]:
    """The values of a key that takes only some, in the order of the schema."""
    return [c for k, field in iter_keys() if k == key for c in typing.get_args(field.annotation)]


@functools.cache
def parser() -> argparse.ArgumentParser:
    return build_parser()


@pytest.fixture(autouse=True)
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the parser takes most of the time of parsing, and it keeps nothing of what it parses."""
    monkeypatch.setattr(flags, "build_parser", parser)


def actions() -> dict[str, argparse.Action]:
    return parser()._option_string_actions


# ---------------------------------------------------------------------------------------------------------------------
# Flags and keys
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "key", "value"), DEIT, ids=[line for line, _, _ in DEIT])
def test_a_flag_of_deit_sets_its_key_and_nothing_else(line: str, key: str, value: Any) -> None:
    assert changed(*line.split()) == ({} if line in AS_DEFAULT else {key: value})
    assert leaves(parse(*line.split()))[key] == value
    flag, *words = line.split()
    if len(words) == 1 and not words[0].startswith("--"):
        assert leaves(parse(f"{flag}={words[0]}"))[key] == value


def test_what_states_the_default_can_be_seen_against_something_else() -> None:
    assert changed("--no-model-ema", before=("--model-ema",)) == {"model_ema.enabled": False}
    assert changed("--repeated-aug", before=("--no-repeated-aug",)) == {"aug.repeats": 3}
    assert changed("--data-set", "IMNET", before=("--data-set", "digits")) == {"data.set": "imagenet"}
    assert changed("--pin-mem", before=("--no-pin-mem",)) == {"data.pin_mem": True}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_is_a_flag_under_its_own_name(key: str) -> None:
    before = kind_of(key)
    if KEYS[key].annotation is bool:
        default = KEYS[key].default
        on, off = f"--{key}", f"--no-{key}"
        assert changed(*([off] if default else [on]), before=before) == {key: not default}
        assert changed(on, off, before=before) == changed(*([off] if default else []), before=before)
        return
    words, value = words_for(key)
    assert value != KEYS[key].default
    after = leaves(parse(*before, f"--{key}", *words))
    assert after[key] == value and type(after[key]) is type(value)
    if not key.endswith((".scheme", ".kind")):  # these bring keys of their own
        assert changed(f"--{key}", *words, before=before) == {key: value}
        if len(words) == 1:
            assert changed(f"--{key}={words[0]}", before=before) == {key: value}


def test_published_figures_are_no_flags() -> None:
    assert not [flag for flag in actions() if flag.startswith("--paper")]
    assert mistake("--paper.top1", "60") == "There is no flag --paper.top1; see --help."


@pytest.mark.parametrize("flag", sorted({f for f in actions() if re.search("[-_]", f[2:]) and f[:2] == "--"}))
def test_dashes_and_underscores_are_alike(flag: str) -> None:
    body = flag[2:]
    for spelling in (flag, "--" + body.replace("-", "_"), "--" + body.replace("_", "-")):
        assert set(actions()[flag].option_strings) <= set(actions())
        words = [] if actions()[flag].nargs == 0 else [(actions()[flag].choices or ["0"])[0]]
        reference, found = parse_flags([flag, *words]), parse_flags([spelling, *words])
        assert vars(found[0]) == vars(reference[0]) and found[1] == reference[1]


def test_no_two_flags_differ_in_dashes_alone() -> None:
    assert len({flag.replace("_", "-") for flag in actions()}) == len(actions())


def test_values_keep_their_dashes_and_underscores() -> None:
    given = {"--output-dir": "a_b-c", "--data_path": "--d_e-f"}
    argv = [f"{flag}={value}" for flag, value in given.items()]
    assert changed(*argv) == {"run.output_dir": "a_b-c", "data.path": "--d_e-f"}
    assert changed("--resume", "x_y-z=1_2-3") == {"run.resume": "x_y-z=1_2-3"}


def test_flags_cannot_be_abbreviated() -> None:
    for flag in (flag for flag in actions() if flag.startswith("--")):
        for short in {flag[:-1], flag[: len(flag) // 2], flag[:3]} - actions().keys():
            assert mistake(short, "1").startswith(f"There is no flag {short}; ")


def test_the_last_of_two_names_of_a_key_wins() -> None:
    assert changed("--lr", "1", "--optim.lr", "2") == changed("--optim.lr", "1", "--lr", "2") == {"optim.lr": 2.0}


# ---------------------------------------------------------------------------------------------------------------------
# The words after a flag
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["q1", "q3"], ("q1", "q3")),
        (["q1"], ("q1",)),
        (["q1,q3"], ("q1", "q3")),
        (["q1,", "q3"], ("q1", "q3")),
        (["[q1,q3]"], ("q1", "q3")),
        (["[q1, q3]"], ("q1", "q3")),
        (["[q1,", "q3]"], ("q1", "q3")),
        (["[q1]"], ("q1",)),
        (["[]"], ()),
    ],
)
def test_a_list_is_one_word_or_several(words: list[str], value: tuple[str, ...]) -> None:
    before = ("--quant.scheme", "mx")
    assert changed("--quant.active", *words, before=before) == {"quant.active": value}
    assert changed("--quant.active", *words, "--lr", "1", before=before) == {"quant.active": value, "optim.lr": 1.0}


def test_a_list_may_be_null_where_its_key_may() -> None:
    assert changed("--opt-betas", "null") == {"optim.betas": None}
    assert changed("--cutmix-minmax", "null", before=("--cutmix-minmax", "0.1", "0.2")) == {"aug.cutmix_minmax": None}
    assert "the command line: aug.scale is null" in mistake("--aug.scale", "null")


def test_lists_of_numbers_may_be_negative_and_scientific() -> None:
    assert changed("--data.mean", "-1", "0.5", "1e-1") == {"data.mean": (-1.0, 0.5, 0.1)}


@pytest.mark.parametrize(
    "text", ["2024", "2024-01-01", "no", "0123", "1e3", "12:30", "run #3", "a: b", "@x", "%x", "*"]
)
@pytest.mark.parametrize("text_after", ["", " 'quoted'", ' "quoted"', "\\n", "é\u4e2d\U0001f600"])
def test_text_is_text_whatever_it_looks_like(text: str, text_after: str) -> None:
    """A folder called 2024 is no number, and one called `run #3` does not end before the comment that YAML sees."""
    text += text_after
    for flag, key in (("--output_dir", "run.output_dir"), ("--data-path", "data.path"), ("--aa", "aug.aa")):
        assert changed(flag, text) == {key: text}


@pytest.mark.parametrize("nothing", ["null", "~", ""])
def test_text_may_be_null_where_its_key_may(nothing: str) -> None:
    assert changed("--aa", nothing) == {"aug.aa": None}
    assert changed("--resume", nothing, before=("--resume", "a.pt")) == {"run.resume": None}
    assert mistake("--opt", nothing) == "the command line: optim.opt is null: input should be a valid string."
    assert changed("--clip-grad", nothing, before=("--clip-grad", "1")) == {"optim.clip_grad": None}


def test_quoted_text_is_text() -> None:
    assert changed("--aa", "'null'") == {"aug.aa": "null"}
    assert changed("--output_dir", '"2024"') == {"run.output_dir": "2024"}


def test_the_order_of_a_scheme_and_its_keys_does_not_matter() -> None:
    scheme, rule = ["--quant.scheme", "mx"], ["--quant.scale_rule", "floor"]
    assert parse(*scheme, *rule) == parse(*rule, *scheme)
    assert parse(*rule, *scheme).quant.scale_rule == "floor"


def test_what_is_no_key_is_kept_apart() -> None:
    options, overrides = parse_flags(["--print_config", "--config", "a_b-c.yaml", "--lr", "1"])
    others = {"export": None, "export_form": None, "export_dtype": None, "predict": None, "png": None}
    assert vars(options) == {"config": "a_b-c.yaml", "print_config": True, "smoke": False, **others}
    assert overrides == ["optim.lr=1"]
    options, overrides = parse_flags([])
    assert vars(options) == {"config": None, "print_config": False, "smoke": False, **others} and overrides == []
    assert parse_flags(["--smoke"])[0].smoke


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes and help
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--weight-decays 1", "There is no flag --weight-decays; did you mean --weight-decay?"),
        ("--weight_decays=1", "There is no flag --weight_decays; did you mean --weight-decay?"),
        ("--optim.lrs 1", "There is no flag --optim.lrs; did you mean --optim.lr?"),
        ("--three-augment", "There is no flag --three-augment; did you mean --ThreeAugment?"),
        ("--xyzxyz", "There is no flag --xyzxyz; see --help."),
        ("train", "There is no flag train; see --help."),
        ("--lr 1 2", "There is no flag 2; see --help."),
        ("--lr", "Command line: argument --lr/--optim.lr: expected one argument; see --help."),
        ("--lr --epochs 3", "Command line: argument --lr/--optim.lr: expected one argument; see --help."),
        ("--quant.active", "Command line: argument --quant.active: expected at least one argument; see --help."),
        ("--config", "Command line: argument --config: expected one argument; see --help."),
        ("--src=1", "Command line: argument --src: ignored explicit argument '1'; see --help."),
        ("--lr fast", "the command line: optim.lr is 'fast': input should be a valid number, unable to parse string "
         "as a number."),
        ("--opt-betas 0.9", "the command line: optim.betas is [0.9]: it needs more values."),
        ("--epochs [1", "the command line: schedule.epochs=[1 is not valid YAML: expected ',' or ']', but got "
         "'<stream end>', in line 1, column 3."),
        ("--quant.element.gradient e3m0", "the command line: quant.element does not apply while quant.scheme is none."),
    ],
)  # fmt: skip
def test_a_mistake_is_named(line: str, sentence: str) -> None:
    assert mistake(*line.split()) == sentence


def test_help_groups_the_flags_by_section_and_describes_each() -> None:
    groups = {group.title: group for group in parser()._action_groups if group._group_actions}
    assert list(groups) == ["options", *(name for name in Config.model_fields if name != "paper")]
    for title, group in groups.items():
        if title != "options":
            assert group.description.strip().endswith(".") and group.description.count("\n") == 0
            assert {action.dest.partition(".")[0] for action in group._group_actions} == {title}
        for action in group._group_actions:
            assert re.match(r"[\w(]", action.help or "") and not action.help.endswith("."), action.option_strings
    assert {action.dest for action in parser()._actions if "." in action.dest} == set(KEYS)


@pytest.mark.parametrize("key", sorted(KEYS))
def test_the_help_of_a_key_has_its_text_its_default_and_its_choices(key: str) -> None:
    action = actions()[f"--{key}"]
    described = [field for k, field in iter_keys() if k == key and field.description]
    assert any(action.help.startswith(field.description) for field in described)
    assert action.help.count("(default: ") == 1
    assert "=" not in action.help and "PydanticUndefined" not in action.help
    if choices(key) and typing.get_origin(KEYS[key].annotation) is Literal:
        assert action.metavar == "|".join(choices(key))


def test_the_defaults_in_the_help_are_those_of_the_configuration() -> None:
    for flag, shown in {
        "--lr": "0.0005",
        "--opt-betas": "[0.9, 0.999]",
        "--aa": "rand-m9-mstd0.5-inc1",
        "--clip-grad": "null",
        "--pin-mem": "true",
        "--model.kwargs": "{}",
        "--quant.active": "[q1, q2, q3, q4, q5, q6]",
        "--quant.scheme": "none",
    }.items():
        assert actions()[flag].help.endswith(f"(default: {shown})"), flag


def test_the_help_fits_its_page() -> None:
    lines = parser().format_help().splitlines()
    assert max(map(len, lines)) <= 118
    text = "\n".join(lines)
    assert "  --lr, --optim.lr VALUE          learning rate for a global batch of 512 (default: 0.0005)" in lines
    assert "%(" not in text and "None" not in text
    assert lines[0].startswith("usage: main.py [--config FILE] [flags]")


# ---------------------------------------------------------------------------------------------------------------------
# Flags that DeiT has and this program has no use for
# ---------------------------------------------------------------------------------------------------------------------

NOT_NEEDED = [
    *("--dist-eval", "--no-dist-eval", "--dist_url env://", "--world_size 8", "--dist-backend nccl", "--dist_on_itp"),
    *("--local_rank 0", "--rank 0", "--gpu 0", "--distributed", "--start_epoch 3", "--model-ema-force-cpu"),
    *("--resplit", "--cooldown-epochs 10", "--patience-epochs 10", "--lr-noise-pct 0.67", "--lr-noise-std 1.0"),
    *("--inat-category name", "--train-mode", "--fp32-resume"),
]
NOT_AVAILABLE = ["--lr-noise 0.4", "--lr-noise 0.4 0.8", "--no-train-mode", "--attn-only", "--cosub"]


# All flags of its main.py.
DEITS = """
--batch-size --epochs --bce-loss --unscale-lr --model --input-size --drop --drop-path --model-ema
--no-model-ema --model-ema-decay --model-ema-force-cpu --opt --opt-eps --opt-betas --clip-grad --momentum
--weight-decay --sched --lr --lr-noise --lr-noise-pct --lr-noise-std --warmup-lr --min-lr --decay-epochs
--warmup-epochs --cooldown-epochs --patience-epochs --decay-rate --color-jitter --aa --smoothing
--train-interpolation --repeated-aug --no-repeated-aug --train-mode --no-train-mode --ThreeAugment --src --reprob
--remode --recount --resplit --mixup --cutmix --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode
--teacher-model --teacher-path --distillation-type --distillation-alpha --distillation-tau --cosub --finetune
--attn-only --data-path --data-set --inat-category --output_dir --device --seed --resume --start_epoch --eval
--eval-crop-ratio --dist-eval --num_workers --pin-mem --no-pin-mem --distributed --world_size --dist_url
"""


@pytest.mark.parametrize("line", NOT_NEEDED)
@pytest.mark.parametrize("after", [[], ["--lr", "1"], ["--eval"]], ids=str)
def test_a_flag_of_deit_that_is_not_needed_is_taken_and_explained(
    line: str, after: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    flag, *values = line.split()
    forms = [[flag, *values], [flag.replace("-", "_").replace("__", "--", 1), *values]]
    for words in [*forms, *([[f"{flag}={values[0]}"]] if values else [])]:
        assert changed(*words, *after) == changed(*after) == changed(*after, *words)
        capsys.readouterr()
        parse(*words, *after)
        (note,) = capsys.readouterr().err.splitlines()
        assert note.startswith(f"note: {words[0].partition('=')[0]} of DeiT is not needed here: ") and note.endswith(
            "."
        )
    monkeypatch.setenv("RANK", "1")
    parse(*words)
    assert capsys.readouterr().err == ""  # the first process has said it


@pytest.mark.parametrize("line", NOT_AVAILABLE)
def test_a_flag_of_deit_that_trains_something_else_is_refused(line: str) -> None:
    assert mistake(*line.split(), "--lr", "1").startswith(f"{line.split()[0]} of DeiT is not available: ")


def test_a_flag_of_deit_without_its_value_is_named() -> None:
    assert mistake("--world_size") == "Command line: argument --world_size: expected one argument; see --help."
    assert mistake("--world_size", "--lr", "1").startswith("Command line: argument --world_size: expected one argument")
    assert mistake("--dist-eval=yes").startswith("Command line: argument --dist-eval: ignored explicit argument 'yes'")


def test_no_flag_of_deit_is_left_over() -> None:
    """All that DeiT's main.py has is a flag here, or explained."""
    explained = {line.split()[0] for line in (*NOT_NEEDED, *NOT_AVAILABLE)}
    assert set(DEITS.split()) <= actions().keys() | explained
    assert not actions().keys() & explained


@pytest.mark.parametrize(
    "words",
    [
        "--pretrained",
        "--pretrained --epochs 2",
        "--epochs 2 --pretrained",
        "--pretrained true",
        "--pretrained=True",
        "--pretrained false",
        "--pretrained=",
        "--pretrained on --lr 1",
    ],
)
def test_pretrained_as_a_switch_is_told_to_name_a_file(words):
    message = mistake(*words.split())
    assert message.startswith("--pretrained expects a local file of weights") and "nothing is downloaded" in message
