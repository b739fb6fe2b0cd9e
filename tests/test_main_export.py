"""main.py --export and --predict, and packed files in the other commands: from training to a prediction."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import METHODS, ROOT, exit_code, metrics, tiny, train
from PIL import Image
from quick import some

from config import UserError, load_config
from models import load_packed
from quantization.stabilizers import Plan
from record.checkpoint import load_checkpoint, save_checkpoint
from record.packed import KEY, read_info
from record.weights import saved_config
from training.build import build_model, stabilize
from training.export import _read

pytestmark = pytest.mark.usefixtures("in_this_process")

MX = ["--quant.scheme", "mx"]
FREEZE = [*METHODS["freeze"], "--stabilizer.threshold_end", "0.01", "--stabilizer.start", "0"]
KINDS = {**METHODS, "none": [], "freeze": FREEZE}
DATA = ["--device", "cpu", "--data-set", "generated", "--data.num_images", "64", "--num_workers", "0"]
Say = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a short run, by the kind of its stabilizer, `int4` or `fp`; trained once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(kind: str) -> Path:
        if kind not in made:
            flags = [] if kind == "fp" else KINDS[kind] if kind == "int4" else [*MX, *KINDS[kind]]
            made[kind] = train(folder / kind, *flags, "--data.mean", "0.4", "0.5", "0.6", "--epochs", "1")
        return made[kind]

    return run


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """What a command that has to end with `code` prints, on stdout and on stderr."""

    def run(*argv: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert exit_code([str(word) for word in argv]) == code
        return capsys.readouterr()

    return run


def refusal(say: Say, *argv: object) -> str:
    """The one sentence that a mistake gets, after notes if there are any."""
    out, err = say(*argv, code=2)
    *notes, said = err.splitlines()
    assert out == "" and said.startswith("error: ") and all(line.startswith("note: ") for line in notes)
    return said.removeprefix("error: ")


def photograph(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("kind", some(["none", "dampen", "qema", "qramping", "freeze"], every=2))
def test_what_is_exported_of_a_run_computes_its_bits(kind: str, runs: Callable, tmp_path: Path, say: Say) -> None:
    checkpoint, path = runs(kind) / "last.pt", tmp_path / "file.safetensors"
    out, err = say("--device", "cpu", "--export", path, "--resume", checkpoint)
    size = f"{path.stat().st_size / 1e6:.2f} MB"
    assert out == f"{path}: deit_tiny_patch16_224, 8 layers packed, the rest in float32, {size}\n" and err == ""

    own = saved_config(checkpoint)
    cfg = load_config(None, [f"{key}={json.dumps(own[key])}" for key in ("model", "quant", "stabilizer")])
    net = build_model(cfg, 4, rank=0, device=torch.device("cpu"))
    stabilize(cfg, net, Plan(1, 1))
    net.load_state_dict(load_checkpoint(checkpoint)["model"])
    x = torch.randn(6, 3, 8, 8)
    packed = load_packed(path)
    with torch.no_grad():
        assert torch.equal(packed(x), net.eval()(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed(x), net(x))
    logged = metrics(runs(kind))[-2]["data"]
    assert read_info(path).trained.top1 == logged["eval.top1"] and read_info(path).trained.data_set == "generated"


def test_an_exported_file_is_exported_again_to_the_same_bytes(runs: Callable, tmp_path: Path, say: Say) -> None:
    files = [runs("qema") / "last.pt", *(tmp_path / f"{n}.safetensors" for n in range(2))]
    for source, target in itertools.pairwise(files):
        say(
            "--device",
            "cpu",
            "--export",
            target,
            "--resume",
            source,
            *["--export-dtype", "bfloat16"][: 2 * (source == files[0])],
        )
    assert files[1].read_bytes() == files[2].read_bytes()
    assert read_info(files[1]).dtype == "bfloat16"


def test_evaluation_of_a_packed_file_gives_the_runs_own_top1(runs: Callable, tmp_path: Path, say: Say) -> None:
    path, logged = tmp_path / "file.safetensors", metrics(runs("qema"))[-2]["data"]
    say("--device", "cpu", "--export", path, "--resume", runs("qema") / "last.pt")
    figures = f"loss {logged['eval.loss']:.4f}, top1 {logged['eval.top1']:.2f} %, top5 {logged['eval.top5']:.2f} %"
    out, err = say(*DATA, "--eval", "--resume", path)
    assert out == f"{path}: {figures} on 6 images, quant.scheme mx\n" and "by its own configuration" in err
    out, _ = say(*DATA, "--eval", "--resume", path, *MX, "--quant.active", "q2")  # activations left alone
    assert figures not in out
    said = refusal(say, *DATA, "--eval", "--resume", path, *MX, "--quant.scale_rule", "floor")
    assert "holds weights that are quantized already" in said
    assert "model.img_size 8, and the command says 16" in refusal(
        say, *DATA, "--eval", "--resume", path, "--input-size", "16"
    )
    assert "holds no moving average" in refusal(say, *DATA, "--eval", "--resume", path, "--model-ema")


SHALLOW = "{embed_dim: 32, depth: 2, num_heads: 2}"
DESIGN = ["--quant.scale_format", "ue5m3", "--quant.block_size", "16", "--quant.outer", "pow2"]
DESIGN += ["--quant.outer_delay", "5", "--quant.target_scale", "448"]
DESIGN += ["--quant.quantizers", "{q2: {block_rows: 16}}", "--quant.policy.last", "1"]


@pytest.mark.parametrize(("method", "flags"), [("qema", []), ("tetrajet", DESIGN)], ids=["qema", "design"])
def test_a_packed_model_of_digits_scores_as_its_run(method: str, flags: list[str], tmp_path: Path, say: Say) -> None:
    run, data = tmp_path / "run", ("--device", "cpu", "--batch-size", "64")
    short = ["--epochs", "1", "--warmup-epochs", "0", "--no-probes", "--model.kwargs", SHALLOW]
    say("--config", ROOT / f"configs/digits_{method}.yaml", *flags, *short, *data, "--output_dir", run)
    path, logged = tmp_path / "digits.safetensors", metrics(run)[-2]["data"]
    say("--device", "cpu", "--export", path, "--resume", run / "last.pt")
    out, _ = say("--data-set", "digits", "--num_workers", "0", *data, "--eval", "--resume", path)
    assert f"top1 {logged['eval.top1']:.2f} %" in out and f"loss {logged['eval.loss']:.4f}" in out
    assert logged["eval.top1"] == read_info(path).trained.top1 > 30


def test_training_starts_from_a_packed_file(runs: Callable, tmp_path: Path, say: Say) -> None:
    path = tmp_path / "file.safetensors"
    say("--device", "cpu", "--export", path, "--resume", runs("none") / "last.pt")
    train(tmp_path / "tuned", *MX, "--finetune", str(path), "--lr", "1e-30", "--min-lr", "0", "--epochs", "1")
    weights = load_checkpoint(tmp_path / "tuned" / "last.pt")["model"]
    expected = load_packed(path).blocks[0].attn.qkv.quantized_weight()
    assert torch.allclose(weights["blocks.0.attn.qkv.weight"], expected, rtol=0, atol=1e-12)
    assert "--finetune" in refusal(say, *tiny(tmp_path / "none", *MX, "--resume", str(path)))


def test_the_dequantized_form_and_the_moving_average(tmp_path: Path, say: Say) -> None:
    run = train(tmp_path / "run", *MX, "--model-ema", "--model-ema-decay", "0.5", "--epochs", "1")
    for form, name in (("packed", "packed"), ("dequantized", "plain")):
        target = tmp_path / f"{name}.safetensors"
        say("--device", "cpu", "--export", target, "--export-form", form, "--use-ema", "--resume", run / "last.pt")
    plain = safetensors.torch.load_file(tmp_path / "plain.safetensors")
    packed = load_packed(tmp_path / "packed.safetensors")
    assert torch.equal(plain["blocks.1.mlp.fc1.weight"], packed.blocks[1].mlp.fc1.quantized_weight())
    logged = metrics(run)[-2]["data"]
    assert packed.packed_info.trained.top1 == logged["eval.ema_top1"]
    assert torch.equal(plain["norm.weight"], load_checkpoint(run / "last.pt")["ema"]["norm.weight"])


def test_a_prediction_is_the_models_and_is_drawn(runs: Callable, tmp_path: Path, say: Say) -> None:
    state = load_checkpoint(runs("qema") / "last.pt")
    save_checkpoint(tmp_path / "named.pt", {**state, "classes": ["ant", "bee", "cat", "dog"]})
    image = photograph(tmp_path / "photo, one.png")
    files = {kind: tmp_path / name for kind, name in {"packed": "file.safetensors", "checkpoint": "named.pt"}.items()}
    say("--device", "cpu", "--export", files["packed"], "--resume", files["checkpoint"])
    lines = {}
    for kind, file in files.items():
        picture = tmp_path / f"{kind}.png"
        out, err = say("--device", "cpu", "--predict", image, image, "--resume", file, "--png", picture)
        lines[kind] = out.splitlines()[:2]
        assert err == "" and out.endswith(f"{picture}: the picture of them\n")
        assert Image.open(picture).format == "PNG" and Image.open(picture).size[0] > 500
    assert lines["packed"] == lines["checkpoint"] and len(set(lines["packed"])) == 1
    names = [word for word in lines["packed"][0].replace(",", "").split() if word in ("ant", "bee", "cat", "dog")]
    shares = [float(word) for word in lines["packed"][0].split() if word.replace(".", "").isdigit()]
    assert sorted(names) == ["ant", "bee", "cat", "dog"] and shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_a_model_without_quantizers_predicts_too(runs: Callable, tmp_path: Path, say: Say) -> None:
    image, picture = photograph(tmp_path / "a.png"), tmp_path / "p.png"
    out, _ = say("--device", "cpu", "--predict", image, "--resume", runs("fp") / "last.pt", "--png", picture)
    assert out.startswith(f"{image}: ") and picture.is_file()


def test_mistakes_get_one_sentence(runs: Callable, tmp_path: Path, say: Say) -> None:
    target, checkpoint, cpu = tmp_path / "file.safetensors", runs("none") / "last.pt", ("--device", "cpu")
    assert refusal(say, *cpu, "--export", target).startswith("--export needs a model; pass --resume")
    assert refusal(say, *cpu, "--predict", "a.png").startswith("--predict needs a model; pass --resume")
    assert "neither train nor evaluate" in refusal(say, *cpu, "--export", target, "--resume", checkpoint, "--eval")
    said = refusal(say, *cpu, "--export", tmp_path / "file.pt", "--resume", checkpoint)
    assert said.endswith("give it a name that ends in .safetensors.")
    said = refusal(say, *cpu, "--export", target, "--resume", runs("int4") / "last.pt")
    assert "cannot be packed: blocks.0.attn.qkv is an INT4 layer" in said
    said = refusal(say, *cpu, "--export", target, "--resume", runs("fp") / "last.pt")
    assert said.endswith("cannot be packed: the model has no layer with a weight in MXFP4.")
    assert "There is no checkpoint" in refusal(say, *cpu, "--export", target, "--resume", tmp_path / "none.pt")
    assert not target.exists()
    text = tmp_path / "text.png"
    text.write_text("no image")
    for image, reason in ((text, "not an image"), (tmp_path / "none.png", "No such file")):
        said = refusal(say, *cpu, "--predict", image, "--resume", checkpoint)
        assert said.startswith(f"The image {image} cannot be read: ") and reason in said
    image, nowhere = photograph(tmp_path / "a.png"), tmp_path / "no" / "p.png"
    _, err = say(*cpu, "--predict", image, "--resume", checkpoint, "--png", nowhere, code=2)
    assert f"The picture {nowhere} cannot be written: No such file" in err and err.count("\n") == 1
    target.write_bytes(b"\x10")
    assert "is truncated, damaged" in refusal(say, *cpu, "--predict", text, "--resume", target)


def test_names_of_any_length_and_letters_are_in_one_sentence(runs: Callable, tmp_path: Path, say: Say) -> None:
    checkpoint, image, cpu = runs("none") / "last.pt", photograph(tmp_path / "a.png"), ("--device", "cpu")
    (tmp_path / "p.png").touch()  # a picture that is there is compared with what it is made of
    for name in ("y" * 300, "a\nb\x1b[31m"):
        path = tmp_path / name / f"{name}.safetensors"
        for said in (
            refusal(say, *cpu, "--predict", path, "--resume", checkpoint, "--png", tmp_path / "p.png"),
            refusal(say, *cpu, "--predict", image, "--resume", path, "--png", tmp_path / "p.png"),
            refusal(say, *cpu, "--export", path, "--resume", checkpoint),
        ):
            assert "\x1b" not in said and said.endswith(".")
    image, png = photograph(tmp_path / "a\nb.png"), tmp_path / "p\nq.png"
    out, _ = say(*cpu, "--predict", image, "--resume", checkpoint, "--png", png)
    assert out.count("\n") == 2 and "a\\nb.png: " in out and "p\\nq.png: the picture of it\n" in out


@pytest.mark.parametrize(
    ("flag", "value", "of"),
    [("--export-form", "packed", "--export"), ("--export-dtype", "float32", "--export"), ("--png", "a", "--predict")],
)
def test_how_without_what_is_a_mistake_and_no_training(flag: str, value: str, of: str, say: Say) -> None:
    for more in ([], ["--export" if of == "--predict" else "--predict", "x.safetensors"]):
        said = refusal(say, "--device", "cpu", flag, value, "--resume", "none.pt", *more)
        assert said == f"{flag} is for {of}, and there is no {of}; leave it away."


def test_what_a_file_says_wrong_is_no_mistake_of_the_command(runs: Callable, tmp_path: Path, say: Say) -> None:
    packed, image = tmp_path / "file.safetensors", photograph(tmp_path / "a.png")
    say("--device", "cpu", "--export", packed, "--resume", runs("none") / "last.pt")
    relabelled(packed, packed, lambda _, said: said["model"].update(img_size=10**6))
    said = refusal(say, "--device", "cpu", "--predict", image, "--resume", packed)
    assert said.startswith(f"{packed}: model.img_size is 1000000: ")


def test_nothing_is_written_over_what_it_is_made_of(runs: Callable, tmp_path: Path, say: Say) -> None:
    packed, link, cpu = tmp_path / "file.safetensors", tmp_path / "link.safetensors", ("--device", "cpu")
    say(*cpu, "--export", packed, "--resume", runs("none") / "last.pt")
    link.symlink_to(packed)
    image = photograph(tmp_path / "predictions.png")
    before = packed.read_bytes(), image.read_bytes()
    for target in (packed, link):
        said = refusal(say, *cpu, "--export", target, "--export-dtype", "bfloat16", "--resume", packed)
        assert said == f"The file {target} would be written over what it is made of; give another name."
    for target in (image, packed):
        said = refusal(say, *cpu, "--predict", image, "--resume", packed, "--png", target)
        assert said == f"The picture {target} would be written over what it is made of; give another name."
    assert before == (packed.read_bytes(), image.read_bytes())


def test_a_file_does_not_claim_the_accuracy_of_other_quantizers(runs: Callable, tmp_path: Path, say: Say) -> None:
    run, path, other = runs("qema") / "last.pt", tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    say("--device", "cpu", "--export", path, "--resume", run)
    assert read_info(path).trained.top1 is not None
    for flags in (["--quant.scale_rule", "floor"], ["--quant.active", "q2"], ["--data.mean", "0", "0", "0"]):
        mx = MX if flags[0].startswith("--quant") else []
        say("--device", "cpu", "--export", other, "--resume", run, *mx, *flags)
        trained = read_info(other).trained
        assert (trained.top1, trained.data_set) == (None, None) and trained.commit == read_info(path).trained.commit
        if "floor" not in flags:  # of a packed file nothing changes
            said = refusal(
                say, "--device", "cpu", "--export", tmp_path / "x.safetensors", "--resume", path, *mx, *flags
            )
            assert said == f"{path} is packed and written again as it is; leave flags that change its model away."


def relabelled(source: Path, target: Path, change: Callable) -> Path:
    """A packed file of which somebody has changed tensors and what it says."""
    with safetensors.safe_open(source, framework="pt") as file:
        said = json.loads(file.metadata()[KEY])
    tensors = safetensors.torch.load_file(source)
    change(tensors, said)
    safetensors.torch.save_file(tensors, target, {KEY: json.dumps(said)})
    return target


@pytest.mark.parametrize(
    "name", ["\ud800", "\x1b[31mred\r\nerror: x", "$\\frac{$", "", "漢字🐶", "a" * 3000], ids=ascii
)
def test_any_name_of_a_class_or_an_image_is_printed_on_one_line(
    name: str, runs: Callable, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, out = tmp_path / "file.safetensors", io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    say("--device", "cpu", "--export", packed, "--resume", runs("none") / "last.pt")
    relabelled(packed, packed, lambda _, said: said.update(classes=[name] * 4))
    image = photograph(tmp_path / "gl\u00fcck.png").rename(tmp_path / os.fsdecode(b"photo \xff.png"))
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(sys, "stdout", out)
        words = ["--device", "cpu", "--predict", image, "--resume", packed, "--png", tmp_path / "p.png"]
        assert exit_code([str(word) for word in words]) == 0
    lines = out.buffer.getvalue().decode().splitlines()
    assert len(lines) == 2 and "\\udcff.png: " in lines[0] and lines[0].isprintable() and len(lines[0]) < 1200


def test_logits_that_are_no_numbers_are_one_sentence(runs: Callable, tmp_path: Path, say: Say) -> None:
    packed, image = tmp_path / "file.safetensors", photograph(tmp_path / "a.png")
    say("--device", "cpu", "--export", packed, "--resume", runs("none") / "last.pt")
    relabelled(packed, packed, lambda tensors, _: [tensors[f"norm.{n}"].fill_(3e38) for n in ("weight", "bias")])
    assert f"says of the image {image} is no number" in refusal(
        say, "--device", "cpu", "--predict", image, "--resume", packed
    )


def test_large_photographs_are_read_and_larger_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 40 - 1)  # Pillow warns, of more than twice as many it raises
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _read(image).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 20 - 1)
    with pytest.raises(UserError, match=r"exceeds limit of 1198 pixels, could be .* attack\.$"):
        _read(image)


def test_a_pipe_is_no_photograph(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(UserError, match="cannot be read: It is no ordinary file"):
            _read(path)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_levels_of_16_bits_are_turned_upright_too(kind: str, tmp_path: Path) -> None:
    levels, path, seen = np.random.default_rng(0).integers(0, 65536, (30, 40), dtype=np.uint16), tmp_path / "a", []
    for orientation, stored in ((1, levels), (6, np.rot90(levels))):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(stored.copy()).save(path, kind, exif=exif)
        seen.append(np.asarray(_read(path)))
    assert seen[0].shape == (30, 40, 3) and np.array_equal(*seen)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_photograph_is_seen_as_its_camera_was_held(kind: str, runs: Callable, tmp_path: Path, say: Say) -> None:
    upright = Image.open(photograph(tmp_path / "a.png")).convert("L").convert("RGB")
    seen = []
    for mode in ("RGB", "L"):
        for orientation, image in ((1, upright), (6, upright.transpose(Image.Transpose.ROTATE_90))):
            path = tmp_path / f"{orientation}.{kind.lower()}"
            exif = Image.Exif()
            exif[274] = orientation
            image.convert(mode).save(path, kind, exif=exif)
            seen.append(np.asarray(_read(path), dtype=int))
            assert seen[-1].shape == (30, 40, 3)
    assert all(np.abs(other - seen[0]).mean() < (40 if kind == "JPEG" else 0.01) for other in seen)
    out, _ = say(
        "--device", "cpu", "--predict", path, "--resume", runs("none") / "last.pt", "--png", tmp_path / "p.png"
    )
    assert out.startswith(f"{path}: ")
