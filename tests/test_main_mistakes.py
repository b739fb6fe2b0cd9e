"""The program: mistakes of users in a configuration, and in the files, images and devices of a run.

Each mistake ends with exit code 2 and one line on stderr, and leaves every file that was there as it was.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import column, exit_code, replace, tiny, train, tree
from PIL import Image

import engine
import report
import study
from config import UserError, load_config
from record.weights import load_weights
from training.build import check_carrier

pytestmark = pytest.mark.usefixtures("in_this_process")


class Malice:
    """What a pickled file can hold: loading it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A folder with all the files of the mistakes below; they run in it."""
    folder = tmp_path_factory.mktemp("given")
    texts = {
        "unclosed.yaml": "optim: {lr: [1\n",
        "twice.yaml": "optim: {lr: 1}\nschedule: {epochs: 3}\noptim: {opt: sgd}\n",
        "unknown_key.yaml": "schedule: {epoch: 3}\n",
        "unknown_section.yaml": "optimizer: {lr: 1}\n",
        "list.yaml": "- 1\n- 2\n",
        "wrong_type.yaml": "schedule: {epochs: many}\n",
        "mapping_for_number.yaml": "schedule: {epochs: {a: 1}}\n",
        "cycle_a.yaml": "extends: cycle_b.yaml\n",
        "cycle_b.yaml": "extends: cycle_a.yaml\n",
        "extends_nothing.yaml": "extends: missing_parent.yaml\n",
        "file": "not a folder\n",
        "text.pt": "these are no weights\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    shutil.copytree(finished, folder / "run")
    whole = (folder / "run" / "last.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(load_weights(folder / "run" / "last.pt"), folder / "weights.pt")
    torch.save({"model": {}, "optimizer": Malice(), "format": 1}, folder / "malice.pt")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for n in range(8):
                picture(folder / "images" / split / name / f"{n}.png", n)
                picture(folder / "corrupt" / split / name / f"{n}.png", n)
                picture(folder / "no_train" / "val" / name / f"{n}.png", n)
                picture(folder / "unlike" / split / (name if split == "train" else f"{name}s") / f"{n}.png", n)
    (folder / "corrupt" / "train" / "dog" / "3.png").write_bytes(b"\x89PNG but nothing else")
    return folder


IMAGES = ["--data-set", "imagenet", "--nb-classes", "2", "--no-repeated-aug", "--global-batch", "4", "--data-path"]
RUN = ["--resume", "run/last.pt", "--quant.scheme", "mx", "--model-ema"]
TOKEN = ["--model", "deit_tiny_distilled_patch16_224", "--distillation-type", "soft"]

# name: (flags, words that the sentence must have)
CONFIGURATION_MISTAKES = {
    "missing file": (["--config", "nowhere.yaml"], ["no configuration file nowhere.yaml"]),
    "misspelt file": (["--config", "wrong_tipe.yaml"], ["no configuration file", "Did you mean wrong_type.yaml?"]),
    "folder as file": (["--config", "images"], ["images is a folder", ".yaml"]),
    "no YAML": (["--config", "unclosed.yaml"], ["unclosed.yaml is not valid YAML", "line 2"]),
    "no mapping": (["--config", "list.yaml"], ["list.yaml must hold a mapping", "not a list"]),
    "key twice": (["--config", "twice.yaml"], ["twice.yaml", "'optim' is given twice", "line 1"]),
    "key unknown": (
        ["--config", "unknown_key.yaml"],
        ["unknown_key.yaml: there is no key schedule.epoch", "did you mean schedule.epochs?"],
    ),
    "section unknown": (
        ["--config", "unknown_section.yaml"],
        ["unknown_section.yaml: there is no key optimizer", "did you mean optim"],
    ),
    "type in file": (
        ["--config", "wrong_type.yaml"],
        ["wrong_type.yaml: schedule.epochs is 'many'", "valid integer"],
    ),
    "mapping for number": (["--config", "mapping_for_number.yaml"], ["schedule.epochs is {'a': 1}", "valid integer"]),
    "extends cycle": (["--config", "cycle_a.yaml"], ["extends itself", "cycle_a.yaml -> cycle_b.yaml"]),
    "extends nothing": (["--config", "extends_nothing.yaml"], ["no configuration file missing_parent.yaml"]),
    "flag unknown": (["--weight-decays", "1"], ["no flag --weight-decays", "did you mean --weight-decay?"]),
    "key as flag unknown": (["--optim.lrs", "1"], ["no flag --optim.lrs", "did you mean --optim.lr?"]),
    "flag without value": (["--lr"], ["--lr", "expected one argument"]),
    "word without flag": (["train"], ["train", "see --help"]),
    "type of flag": (["--lr", "fast"], ["the command line: optim.lr is 'fast'", "valid number"]),
    "switch for a number": (["--epochs", "true"], ["the command line: schedule.epochs is true", "valid integer"]),
    "switch in a list": (["--opt-betas", "0.9", "true"], ["optim.betas.1 is true", "valid number"]),
    "deviation of zero": (["--data.std", "0", "0", "0"], ["data.std.0 is 0", "greater than or equal to 0.000001"]),
    "area": (["--aug.scale", "-1", "1"], ["aug.scale.0 is -1", "greater than or equal to 0"]),
    "crop ratio": (["--eval-crop-ratio", "1e-9"], ["data.eval_crop_ratio is", "greater than or equal to 0.1"]),
    "fraction of an epoch": (["--epochs", "1.5"], ["schedule.epochs is 1.5", "valid integer"]),
    "number for folder": (["--output_dir", "[1, 2]"], ["run.output_dir is [1, 2]", "valid string"]),
    "choice": (["--mixup-mode", "all"], ["aug.mixup_mode is 'all'", "'batch', 'pair' or 'elem'"]),
    "negative number": (["--lr", "-1"], ["optim.lr is -1", "greater than 0"]),
    "rate out of range": (["--drop-path", "1.0"], ["model.drop_path is 1.0", "less than 1"]),
    "scheme": (["--quant.scheme", "fp8"], ["quant.scheme is 'fp8'", "should be one of 'none', 'mx'"]),
    "key of another scheme": (
        ["--quant.scale_rule", "floor"],
        ["quant.scale_rule does not apply while quant.scheme is none"],
    ),
    "quantizer twice": (["--quant.scheme", "mx", "--quant.active", "q1", "q1"], ["names a quantizer twice: q1, q1"]),
    "seed": (["--seed", "-3"], ["run.seed is -3", "greater than or equal to 0"]),
}
RUN_MISTAKES = {
    "model unknown": (
        ["--model", "deit_tinny_patch16_224"],
        ["no model deit_tinny", "did you mean deit_tiny_patch16_224?"],
    ),
    "model arguments": (
        ["--model.kwargs", "{width: 3}"],
        ["timm cannot make deit_tiny", "width=3", "unexpected keyword"],
    ),
    "model sizes": (
        ["--model.kwargs", "{embed_dim: 33, depth: 2, num_heads: 2}"],
        ["timm cannot make deit_tiny", "embed_dim=33", "divisible by num_heads"],
    ),
    "data set unknown": (["--data-set", "imagnet"], ["no data.set imagnet", "did you mean imagenet?"]),
    "data path not given": (["--data-set", "imagenet"], ["needs data.path (--data-path)", "train/ and val/"]),
    "data path missing": ([*IMAGES, "nowhere"], ["data.path nowhere does not exist", "train/ and val/"]),
    "data path without train": ([*IMAGES, "no_train"], ["no_train has no train/", "it holds val"]),
    "classes differ": ([*IMAGES, "unlike"], ["need the same classes", "2 for training and 2 for evaluation", "cat"]),
    "class count": ([*IMAGES, "images", "--nb-classes", "3"], ["has 2 classes but model.num_classes is 3"]),
    "image corrupt": ([*IMAGES, "corrupt"], ["corrupt/train/dog/3.png cannot be read", "--on-corrupt skip"]),
    "policy unknown": (["--aa", "random"], ["aug.aa random is not one of timm's", "rand-m9-mstd0.5-inc1"]),
    "batch": (["--batch-size", "5"], ["global batch of 16", "1 process(es) x 5", "a --batch-size that divides 16"]),
    "global batch": (["--global-batch", "128"], ["64 training images", "fewer than one batch of 128", "lower"]),
    "global batch in parts": (
        ["--global-batch", "128", "--batch-size", "16"],
        ["fewer images than the global batch of 128"],
    ),
    "odd batch with mixup": (["--global-batch", "15"], ["mixup pairs the images", "must be even, not 15"]),
    "cutmix boxes of no range": (
        ["--cutmix-minmax", "0.5", "0.6"],  # of 8 pixels: from 4 to 4
        ["aug.cutmix_minmax gives cutmix boxes of 4 to 4 pixels in images of 8", "larger than the first"],
    ),
    "resume nothing": (["--resume", "nowhere.pt"], ["no checkpoint nowhere.pt"]),
    "resume folder": (["--resume", "run"], ["run is a folder", "run/last.pt"]),
    "resume another recipe": (
        [*RUN, "--weight-decay", "0"],
        ["run/last.pt was trained with optim.weight_decay 0.05 (here 0.0); resume with the same recipe", "--finetune"],
    ),
    "evaluate another model": (
        ["--eval", *RUN, "--model.kwargs", "{embed_dim: 64, depth: 2, num_heads: 2}"],
        ["run/last.pt is the checkpoint of another model", "1x1x64 here and 1x1x32 in the file", "--finetune"],
    ),
    "resume truncated": (["--resume", "truncated.pt"], ["truncated.pt is truncated, damaged or not a checkpoint"]),
    "resume text": (["--resume", "text.pt"], ["text.pt is truncated, damaged or not a checkpoint"]),
    "resume code": (["--resume", "malice.pt"], ["malice.pt would run code when loaded and was not loaded"]),
    "resume weights": (["--resume", "weights.pt"], ["weights.pt is no training checkpoint", "--finetune"]),
    "finetune another model": (
        ["--finetune", "weights.pt", "--model.kwargs", "{embed_dim: 64, depth: 2, num_heads: 2}"],
        ["weights in weights.pt do not fit the model", "--model"],
    ),
    "folder holds a run": (["--output_dir", "run"], ["run already holds a run", "--resume auto", "--output_dir"]),
    "folder below a file": (["--output_dir", "file/run"], ["file/run cannot be written", "another --output_dir"]),
    "evaluate nothing": (["--eval"], ["--eval needs weights", "--resume CHECKPOINT"]),
    "evaluate nothing yet": (["--eval", "--resume", "auto"], ["--eval needs weights", "--resume CHECKPOINT"]),
    "optimizer unknown": (["--opt", "adamzzz"], ["optimizer adamzzz cannot be made", "not found", "check --opt"]),
    "optimizer of second order": (
        ["--opt", "adahessian"],
        ["adahessian cannot be made", "second derivatives", "--opt"],
    ),
    "betas": (["--opt-betas", "2", "0.9"], ["optimizer adamw cannot be made", "beta", "--opt-betas"]),
    "too few betas": (["--opt", "adan"], ["optimizer adan cannot be made", "--opt-betas"]),
    "warm-up": (
        ["--schedule.warmup_prefix", "--warmup-epochs", "2"],
        ["warm-up of 2 epochs must be shorter than the 2 epochs of training", "--warmup-epochs"],
    ),
    "stabilizer without quantizers": (
        ["--stabilizer.kind", "qema"],
        ["stabilizer qema works on weights in MXFP4, and the model has none", "see quant and stabilizer"],
    ),
    "stabilizer with another optimizer": (
        ["--stabilizer.kind", "qramping", "--quant.scheme", "mx", "--opt", "sgd"],
        ["qramping changes AdamW and cannot work with the optimizer sgd", "--opt"],
    ),
    "no distillation token": (["--distillation-type", "hard"], ["needs a model with a distillation token"]),
    "no teacher given": (TOKEN, ["teacher's checkpoint", "--teacher-path FILE"]),
    "teacher missing": ([*TOKEN, "--teacher-path", "nowhere.pth"], ["no checkpoint nowhere.pth"]),
    "teacher unknown": ([*TOKEN, "--teacher-path", "weights.pt", "--teacher-model", "owl"], ["no teacher model owl"]),
    "teacher of another shape": (
        [*TOKEN, "--teacher-path", "weights.pt", "--teacher-model", "test_resnet"],
        ["weights.pt does not fit the teacher test_resnet with 4 classes", "--teacher-model"],
    ),
    "no GPU": (["--device", "cuda"], ["--device is cuda and torch sees no CUDA device", "--device cpu"]),
    "device unknown": (["--device", "mps"], ["--device is 'mps'", "expected auto, cpu, cuda"]),
}


def expect_mistake(argv: list[str], sentence: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    assert exit_code(argv) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert err[:-1].endswith((".", "?")), err
    for words in sentence:
        assert words in err, err
    assert out == ""
    after = tree(folder)
    assert {name: after.get(name) for name in before} == before


def table(mistakes: dict[str, tuple[list[str], list[str]]]) -> Any:
    ids = [name.replace(" ", "_") for name in mistakes]
    return pytest.mark.parametrize(("flags", "sentence"), mistakes.values(), ids=ids)


@table(CONFIGURATION_MISTAKES)
def test_a_mistake_in_the_configuration(
    flags: list[str], sentence: list[str], given: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(given)
    expect_mistake(flags, sentence, given, capfd)


@table(RUN_MISTAKES)
def test_a_mistake_in_what_is_run(
    flags: list[str],
    sentence: list[str],
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_mistake(tiny(tmp_path / "run", *flags), sentence, given, capfd)
    assert not (given / "ran").exists()
    if flags[-1] != "corrupt":  # found out only in training
        assert not (tmp_path / "run").exists()


def test_the_code_in_the_malicious_file_would_have_run(given: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO((given / "malice.pt").read_bytes()), weights_only=False)
    assert Path("ran").is_dir()


def test_the_given_images_are_fine_without_the_mistake(given: Path, tmp_path: Path) -> None:
    flags = [*IMAGES, str(given / "images"), "--epochs", "1"]
    assert len(column(train(tmp_path / "run", *flags), "train.loss")) == 4


def test_corrupt_images_can_be_skipped_and_are_counted(given: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *IMAGES, str(given / "corrupt"), "--epochs", "1", "--on-corrupt", "skip")
    assert column(tmp_path / "run", "train.corrupt_images", 1) == [1]


def test_fp8_products_need_a_gpu_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    fp8, bf16 = (load_config(None, ["quant.scheme=mx", f"quant.carrier={carrier}"]) for carrier in ("fp8", "bf16"))
    with pytest.raises(UserError, match="NVIDIA A100 has no FP8 products"):
        check_carrier(fp8, cuda)
    check_carrier(bf16, cuda)
    check_carrier(fp8, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_carrier(fp8, cuda)


@pytest.mark.parametrize("where", ["data", "run", "report", "study"])
def test_a_path_that_cannot_be_looked_up_is_said_in_one_sentence(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("y" * 300)  # as a folder that this user may not enter
    if where == "data":
        code = exit_code(tiny(tmp_path / "run", "--data-set", "IMNET", "--data-path", str(path)))
    elif where == "run":
        code = exit_code(tiny(path, "--resume", "auto"))
    else:
        main, words = (report.main, ["curves"]) if where == "report" else (study.main, ["run"])
        with pytest.raises(SystemExit) as end:
            main([*words, str(path)])
        code = end.value.code
    said = capsys.readouterr().err
    assert code == 2 and str(path) in said and said.count("\n") == 1
    assert said.startswith("error: ") and said.endswith(" cannot be reached: File name too long.\n")


def test_too_little_device_memory_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB. GPU 0 has")

    replace(monkeypatch, engine.train_step, full)
    assert exit_code(tiny(tmp_path / "run")) == 2
    said = "error: The device has too little memory (CUDA out of memory); choose a smaller --batch-size, or "
    assert capsys.readouterr().err.startswith(said)
