"""Packed checkpoints that are broken, lie, or are hostile: one sentence each."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packed_models import packed_file, trained_model
from safetensors import safe_open
from script_helpers import ROOT
from torch import Tensor

import models
from config import UserError
from models import load_packed, save_packed
from record.packed import KEY

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
LAYER = "blocks.*.attn.qkv"


def scale_255(tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    tensors[f"{LAYER}.scales"][1, 1, 1] = 255


def huge(tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    tensors[f"{LAYER}.scales"][0, 1] = 254
    tensors[f"{LAYER}.codes"][0, 1] = 0x77


LIES: dict[str, tuple[Change, str]] = {
    "scale 255": (scale_255, "blocks.1.attn.qkv has a block whose scale is no number of e8m0 (code 255)"),
    "beyond float32": (huge, "blocks.0.attn.qkv has numbers beyond float32's largest"),
    "short codes": (
        lambda t, s: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"][:-1].clone()}),
        "codes is 1x192x32 in",
    ),
    "scales missing": (lambda t, s: t.pop(f"{LAYER}.scales"), "scales is missing"),
    "more": (lambda t, s: t.update(extra=torch.zeros(1)), "extra has no place in"),
    "codes as numbers": (
        lambda t, s: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].float()}),
        "codes holds float32, and uint8 is expected",
    ),
    "signed codes": (lambda t, s: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].char()}), "codes holds int8"),
    "not finite": (lambda t, s: t["norm.weight"].fill_(torch.nan), "norm.weight holds values that are not finite"),
    "another dtype": (lambda t, s: t.update({"norm.weight": t["norm.weight"].half()}), "norm.weight is float16"),
    "another model": (
        lambda t, s: s["model"].update(name="deit_small_patch16_224", kwargs={}),
        "in deit_small_patch16_224",
    ),
    "another depth": (lambda t, s: s["model"]["kwargs"].update(depth=3), "blocks.2.norm1.weight is missing"),
    "no such model": (lambda t, s: s["model"].update(name="no_such_model"), "There is no model no_such_model"),
    "from the network": (
        lambda t, s: s["model"]["kwargs"].update(pretrained=True),
        "pretrained is no argument",
    ),
    "another file": (
        lambda t, s: s["model"]["kwargs"].update(checkpoint_path="/x.pth"),
        "checkpoint_path is no argument",
    ),
    "a million blocks": (
        lambda t, s: s["model"]["kwargs"].update(depth=10**6),
        "more blocks than the file has tensors",
    ),
    "a huge width": (lambda t, s: s["model"]["kwargs"].update(embed_dim=2**16), "in deit_tiny_patch16_224"),
    "an odd argument": (lambda t, s: s["model"]["kwargs"].update(no_such=1), "no_such"),
    "no argument, of a warning": (lambda t, s: s["model"]["kwargs"].update(embed_dim=0), "ZeroDivisionError"),
    "a billion registers": (lambda t, s: s["model"]["kwargs"].update(reg_tokens=10**9), "reg_token is missing"),
    "an output a token": (
        lambda t, s: s["model"]["kwargs"].update(global_pool=""),
        "a score for each of 3 classes was expected",
    ),
    "less than no heads": (lambda t, s: s["model"]["kwargs"].update(num_heads=-1), "num_heads is -1"),
    "classes": (lambda t, s: s.update(classes=["a"]), "it names 1 classes for a model of 3"),
    "top-1": (lambda t, s: s["trained"].update(top1=1000.0), "trained.top1 is 1000.0"),
    "top-1 that is none": (lambda t, s: s["trained"].update(top1=float("nan")), "trained.top1 is nan"),
    "deviation of 0": (lambda t, s: s["images"].update(std=[0.0, 1.0, 1.0]), "images.std.0 is 0.0"),
    "deviation beside float32": (lambda t, s: s["images"].update(std=[1e-300, 1.0, 1.0]), "images.std.0 is 1e-300"),
    "mean beyond float32": (lambda t, s: s["images"].update(mean=[0.5, 1e300, 0.5]), "images.mean.1 is 1e+300"),
    "an element": (lambda t, s: s["quant"]["element"].update(activation_weight="e9m9"), "activation_weight"),
    "a block size": (lambda t, s: s["quant"].update(block_size=9999999), "block_size"),
    "other blocks": (
        lambda t, s: s["quant"].update(block_size=16),
        f"{LAYER}.scales is 2x192x2 in the file, and 2x192x4",
    ),
    "other scales": (lambda t, s: s["quant"].update(scale_format="fp32"), "scales holds uint8, and int32 is expected"),
    "an outer scale": (lambda t, s: s["quant"].update(scale_format="e4m3", outer="pow2"), "outer is missing"),
    "square blocks": (lambda t, s: s["quant"].update(quantizers={"q2": {"block_rows": 32}}), "and 2x6x2 in"),
    "what does not fit together": (
        lambda t, s: s["quant"].update(outer="pow2"),
        "does not fit together: outer pow2 needs",
    ),
    "stochastic": (
        lambda t, s: s["quant"]["rounding"].update(forward="stochastic"),
        "no packed form, its forward pass",
    ),
    "fresh signs": (
        lambda t, s: s["quant"].update(rotation={"output": {"signs": "fresh"}}),
        "no packed form, its output",
    ),
    "weights left alone": (
        lambda t, s: s["quant"].update(active=["q1"]),
        "no packed form, its weights are not quantized",
    ),
    "all left alone": (lambda t, s: s["quant"].update(active=["q3"]), "by its section quant no weight is in"),
    "blocks left alone": (lambda t, s: s["quant"].update(policy={"last": 1}), "blocks.1.attn.qkv.weight is missing"),
    "too many left alone": (
        lambda t, s: s["quant"].update(policy={"last": 3}),
        "policy spares the first 0 and the last 3",
    ),
    "layers that are not there": (
        lambda t, s: s["quant"].update(policy={"spare": {"x": ["output"]}}),
        "policy.spare names",
    ),
    "another scheme": (lambda t, s: s.update(quant={"scheme": "int4"}), "its quant.scheme is not mx"),
    "no such scheme": (lambda t, s: s.update(quant={"scheme": "x"}), "its quant.scheme is not mx"),
    "a block too few": (
        lambda t, s: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:1].clone()}),
        "scales is 1x192x2",
    ),
    "an unknown key": (lambda t, s: s.update(code="import os"), "code is 'import os'"),
    "a later format": (lambda t, s: s.update(format=3), "has the packed format 3, and this version reads 2; update"),
    "a far later format": (lambda t, s: s.update(format=10**4000), "(4001 characters), and this version reads 2"),
    "an earlier format": (lambda t, s: s.update(format=1), "has the packed format 1, and this version reads 2; export"),
    "nothing said": (lambda t, s: s.clear(), "model is missing"),
}


def changed(source: Path, target: Path, change: Change) -> Path:
    """The file with tensors and metadata that somebody has changed."""
    with safe_open(source, framework="pt") as file:
        said = json.loads(file.metadata()[KEY])
    tensors = safetensors.torch.load_file(source)
    change(tensors, said)
    safetensors.torch.save_file(tensors, target, {KEY: json.dumps(said)})
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_file(tmp_path_factory.mktemp("packed") / "small.safetensors", *trained_model())


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_gets_one_sentence(lie: str, small: Path, tmp_path: Path) -> None:
    change, said = LIES[lie]
    path = changed(small, tmp_path / "lie.safetensors", change)
    assert said in sentence_of(path)


# What a layer's tensors may hold, of the method ue5m3 (squares of 16, a delayed outer scale) and of other formats.
FORMATS = {
    "ue5m3": ("scales", 255, "scale is no number of ue5m3 (code 255)"),
    "e4m3": ("scales", 127, "scale is no number of e4m3 (code 127)"),
    "e4m3 of a sign": ("scales", 128, "scale is no number of e4m3 (code 128)"),
    "ue5m3_61440": ("scales", 248, "scale is no number of ue5m3_61440 (code 248)"),
    "e8m3 infinite": ("scales", 0x7F80, "scale is no number of e8m3 (code 32640)"),
    "e8m3 of more bits": ("scales", 0x3F81, "scale is no number of e8m3 (code 16257)"),
    "e8m3 below the normal ones": ("scales", 0x0010, "scale is no number of e8m3 (code 16)"),
    "e8m3 of a sign": ("scales", -1, "scale is no number of e8m3 (code -1)"),
    "fp32 infinite": ("scales", 0x7F800000, "scale is no number of fp32"),
    "fp32 of a sign": ("scales", -(2**31), "scale is no number of fp32"),
    "an outer scale of no number": ("outer", 0x7FC00000, "has an outer scale that is no positive number"),
    "an outer scale of 0": ("outer", 0, "has an outer scale that is no positive number"),
    "a negative outer scale": ("outer", -(2**31) + 2**29, "has an outer scale that is no positive number"),
    "an outer scale of 3": ("outer", 0x40400000, "has an outer scale that is no power of two"),
    "a huge outer scale": ("outer", 0x7F000000, "has numbers beyond float32's largest"),
    "an activation of no number": ("held", 0x7FC00000, "has a largest activation that is no number"),
    "a negative activation": ("held", -(2**31) + 2**29, "has a largest activation that is no number"),
}
TINY = "{name: deit_tiny_patch16_224, img_size: 32, kwargs: {embed_dim: 32, depth: 1, num_heads: 2}}"


@pytest.fixture(scope="module")
def of_formats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a small model by the format of its scales, ue5m3 by that method; made once."""
    made: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in made:
            config = ROOT / "configs/methods/deit_tiny_ue5m3.yaml" if name == "ue5m3" else None
            changes = [] if config else [f"quant.scale_format={name}"]
            path = tmp_path_factory.mktemp("packed") / "file.safetensors"
            made[name] = packed_file(path, *trained_model(TINY, *changes, config=config))
        return made[name]

    return file


@pytest.mark.parametrize("case", FORMATS)
def test_a_value_that_no_export_writes_gets_one_sentence(case: str, of_formats: Callable, tmp_path: Path) -> None:
    (leaf, value, said), name = FORMATS[case], case.split()[0]
    source = of_formats(name if leaf == "scales" else "ue5m3")
    load_packed(source)  # the control

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["blocks.*.mlp.fc1." + leaf].view(-1)[-1] = value

    assert said in sentence_of(changed(source, tmp_path / "lie.safetensors", change))


def sentence_of(path: Path) -> str:
    """What is said of a file that cannot be used: one sentence that begins with its path, and no warning."""
    with pytest.raises(UserError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        load_packed(path)
    return checked(str(caught.value), path)


def checked(said: str, path: Path) -> str:
    assert said.startswith(str(path)) and said.endswith(".") and "\n" not in said and len(said) < 700
    return said


def test_every_tensor_is_missed_and_has_its_shape_and_dtype(of_formats: Callable, tmp_path: Path) -> None:
    source, path = of_formats("ue5m3"), tmp_path / "lie.safetensors"
    changes: dict[str, Callable[[Tensor], Tensor | None]] = {
        "missing": lambda value: None,
        "scalar": lambda value: value.flatten()[0].clone(),
        "longer": lambda value: torch.cat([value, value]) if value.dim() else value.view(1),
        "empty": lambda value: value[:0].clone() if value.dim() else value.new_zeros(0),
        "of another dtype": lambda value: value.double() if value.is_floating_point() else value.bool(),
        "of a wider dtype": lambda value: value.half() if value.is_floating_point() else value.long(),
    }
    names = safetensors.torch.load_file(source).keys()
    packed = {"blocks.*.mlp.fc1." + leaf for leaf in ("codes", "scales", "outer", "held")}
    assert packed < names
    for name in sorted({*packed, "blocks.0.mlp.fc1.bias", "cls_token", "norm.weight"}):
        for change in changes.values():

            def apply(tensors: dict[str, Tensor], _: Any, name: str = name, change: Callable = change) -> None:
                tensors[name] = change(tensors[name])
                if tensors[name] is None:
                    del tensors[name]

            assert name in sentence_of(changed(source, path, apply))


def places(said: Any, above: tuple = ()) -> Iterator[tuple]:
    """Where there is a value in the metadata."""
    for key in said if isinstance(said, dict) else range(len(said)) if isinstance(said, list) else ():
        yield (*above, key)
        yield from places(said[key], (*above, key))


OTHERS = (None, True, -1, 0, 10**30, 1.5, float("inf"), "x", "", [], [[]], {}, {"x": 1})


@pytest.mark.parametrize("kinds", [1, pytest.param(len(OTHERS), marks=pytest.mark.slow)])
def test_every_key_is_refused_in_one_sentence_or_read(kinds: int, of_formats: Callable, tmp_path: Path) -> None:
    """Left out or of another kind: whatever the reader makes of it, it is a sentence or a model."""
    source, path = of_formats("ue5m3"), tmp_path / "lie.safetensors"
    refused, read = [], []
    with safe_open(source, framework="pt") as file:
        said = json.loads(file.metadata()[KEY])
    for number, place in enumerate(places(said)):
        for other in ("left out", *(OTHERS[(number + n) % len(OTHERS)] for n in range(kinds))):

            def apply(_: Any, said: dict[str, Any], place: tuple = place, other: Any = other) -> None:
                for key in place[:-1]:
                    said = said[key]
                if other == "left out":
                    del said[place[-1]]
                else:
                    said[place[-1]] = other

            changed(source, path, apply)
            try:
                load_packed(path)
                read.append((place, other))
            except UserError as error:
                checked(str(error), path)
                refused.append((place, other))
    assert len(refused) > len(read) > 0


def test_an_unchanged_file_is_none_of_these(small: Path, tmp_path: Path) -> None:
    load_packed(changed(small, tmp_path / "true.safetensors", lambda tensors, said: None))


def test_damage_gets_one_sentence(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "broken.safetensors"
    for broken in (
        b"",
        content[:5],
        content[:1000],
        content[:-1],
        content + b"x",
        (2**62).to_bytes(8, "little") + content[8:],
        b"\xff" * 200,
        b"PK\x03\x04" + content,
        content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="is truncated, damaged or not a packed checkpoint at all; expected a file"):
            load_packed(path)
    with pytest.raises(UserError, match="There is no packed checkpoint"):
        load_packed(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("", "Is a directory"), ("pipe", "It is no ordinary file"), ("y" * 300, "File name too long")):
        with pytest.raises(UserError, match=rf"The packed checkpoint .* cannot be read: {reason}\."):
            load_packed(tmp_path / name)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is not a packed checkpoint; expected a file of main"):
        load_packed(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {KEY: "[" * 100_000})
    with pytest.raises(UserError, match="it is not valid JSON"):
        load_packed(path)


def test_only_safetensors_are_written(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give it a name that ends in \.safetensors"):
        save_packed(load_packed(small), tmp_path / "file.pt")
    with pytest.raises(UserError, match="its folder is no place for a file"):
        save_packed(load_packed(small), tmp_path / "none" / "file.safetensors")
    with pytest.raises(UserError, match=r"\(File name too long\), .*; free some space or give another name\."):
        save_packed(load_packed(small), tmp_path / f"{'y' * 300}.safetensors")
    with pytest.raises(ValueError, match="activations must be one of quantized, plain"):
        load_packed(small, activations="other")
    assert "load_packed" in models.__all__
