"""Models of packed layers: made of a trained model, written to a file, and loaded from one.

    model = load_packed("deit_tiny.safetensors")                        # weights stay packed in memory
    model = load_packed("deit_tiny.safetensors", activations="plain")   # X is not quantized
    save_packed(model, "again.safetensors")                             # the same bytes

A loaded model is in evaluation mode and its parameters take no gradients; model.packed_info says what the file says.

In a file, layers that differ in the number of their block alone share a tensor, the first dimension being theirs in the
order of the blocks: `blocks.*.attn.qkv.codes` (12, 576, 96) of DeiT-T. All other tensors have timm's names and shapes.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from config import UserError, load_config
from models.zoo import create_model
from quantization import QuantLinear
from quantization.export import (
    CODES,
    HELD,
    OUTER,
    SCALES,
    PackedLinear,
    PackedWeight,
    dequantized_state,
    left_alone,
    pack_linears,
    packed_layers,
    packed_state,
    put,
    stored,
    tensors_of_layer,
    unpackable,
    weight_fault,
)
from quantization.job import Packed
from quantization.spec import LinearRecipe
from record.packed import DTYPES, Images, Info, Model, PackedFile, Trained, read_packed, write_packed, write_tensors

ACTIVATIONS = ("quantized", "plain")
_OF_TIMM = {*inspect.signature(timm.create_model).parameters} - {"kwargs"}  # which reach files and the network
_BYTES_BESIDE = 2**26  # that a model may have in buffers which its file does not hold
_TIMES_THE_FILE = 16  # a float32 weight has up to 8 times the bytes of a packed one
_LONGEST = 400  # characters of what others say of a model that cannot be made
_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.")


def stacks_of(layers: Mapping[str, tuple[LinearRecipe, tuple[int, int]]]) -> dict[str, list[str]]:
    """By its name in a file, the layers that share a tensor of codes; layers: recipes and weights' shapes by name."""
    alike: dict[str, list[str]] = {}
    for name in layers:
        alike.setdefault(_BLOCK.sub(r"\1blocks.*.", name, count=1), []).append(name)
    found: dict[str, list[str]] = {}
    for stack, names in alike.items():
        kinds = {json.dumps(tensors_of_layer(*layers[name]), default=str) for name in names}
        found |= {stack: names} if len(kinds) == 1 else {name: [name] for name in names}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A model into a file
# ---------------------------------------------------------------------------------------------------------------------


def pack_model(model: nn.Module, cfg: Any, classes: tuple[str, ...], num_classes: int, trained: Trained) -> nn.Module:
    """A trained model of the configuration `cfg`, its quantized layers packed in place.

    Raises UserError where it has layers without a packed form.
    """
    try:
        pack_linears(model)
    except ValueError as error:
        raise UserError(f"{cfg.model.name} cannot be packed: {error}.") from None
    made_of = Model(
        name=cfg.model.name,
        img_size=cfg.model.img_size,
        patch_size=cfg.model.patch_size,
        num_classes=num_classes,
        kwargs=dict(cfg.model.kwargs),
    )
    images = Images(mean=list(cfg.data.mean), std=list(cfg.data.std), crop_ratio=cfg.data.eval_crop_ratio)
    quant = cfg.quant.model_dump(mode="json")
    model.packed_info = Info(model=made_of, quant=quant, images=images, classes=list(classes), trained=trained)
    return model.eval().requires_grad_(False)


def save_packed(model: nn.Module, path: str | Path, dtype: str | None = None) -> None:
    """Write a model of packed layers (of `pack_model` or `load_packed`).

    dtype: of the tensors that are not packed, float32 or bfloat16; None: as they were in the file, or float32.
    float32 keeps every bit of what the model computes; bfloat16 rounds biases, norms, embeddings and head.
    """
    info = model.packed_info.model_copy(update={"dtype": dtype or model.packed_info.dtype})
    state = packed_state(model, DTYPES[info.dtype])
    layers = {name: (layer.recipe, layer.shape) for name, layer in packed_layers(model).items()}
    for stack, names in stacks_of(layers).items():
        for leaf in tensors_of_layer(*layers[names[0]]):
            state[f"{stack}.{leaf}"] = torch.stack([state.pop(f"{name}.{leaf}") for name in names])
    write_packed(Path(path), PackedFile(info, state))


def save_dequantized(model: nn.Module, path: str | Path, dtype: str = "bfloat16") -> None:
    """Write the weights of a model of packed layers as plain timm loads them, `timm.create_model(checkpoint_path=)`."""
    write_tensors(Path(path), dequantized_state(model, DTYPES[dtype]), {"format": "pt"})


# ---------------------------------------------------------------------------------------------------------------------
# A file into a model
# ---------------------------------------------------------------------------------------------------------------------


def load_packed(path: str | Path, *, activations: str = "quantized", device: torch.device | str = "cpu") -> nn.Module:
    """The model of a packed checkpoint, whose forward pass is that of the trained one in evaluation, bit for bit.

    activations: `quantized` by q1, as in training, or `plain`, left as they come.
    Raises UserError, one sentence, for a file that is none, is damaged or lies; ValueError for other activations.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}; got {activations!r}")
    path = Path(path)
    info, tensors = read_packed(path)
    if info.quant.get("scheme") != "mx":
        raise UserError(f"{path} cannot be used, what it says of itself is wrong: its quant.scheme is not mx.")
    with torch.device("meta"):  # shapes alone, before anything is made
        shell = _make(info, info.quant, path, len(tensors))
    layers = _layers(shell, path)
    _check_shapes(shell, layers, info, tensors, path)
    _check_size(shell, tensors, path)
    with torch.random.fork_rng(devices=[]):  # a caller's draws are not those of an initialisation
        model = _make(info, {"scheme": "none"}, path, len(tensors))
    for stack, names in stacks_of(layers).items():
        own = {leaf: tensors.pop(f"{stack}.{leaf}") for leaf in tensors_of_layer(*layers[names[0]])}
        for number, name in enumerate(names):
            parts = {leaf: value[number] for leaf, value in own.items()}
            put(model, name, _layer(model.get_submodule(name), parts, layers[name][0], name, path, activations))
    model.load_state_dict(tensors, strict=False)  # every name and shape has been compared
    model.packed_info = info
    return model.eval().requires_grad_(False).to(device)


def _layer(
    linear: nn.Linear, parts: Mapping[str, Tensor], recipe: LinearRecipe, name: str, path: Path, activations: str
) -> PackedLinear:
    """The packed layer of a file's tensors. Raises UserError where their values are none that an export writes."""
    packed = Packed(parts[CODES], parts[SCALES].t(), stored(recipe.q2), linear.in_features)
    outer, held = parts.get(OUTER), parts.get(HELD)
    weight = PackedWeight(packed, None if outer is None else outer.view(torch.float32))
    fault = weight_fault(weight, recipe.q2)
    if held is not None and not (held.view(torch.float32).isfinite() and held >= 0):
        fault = "has a largest activation that is no number"
    if fault is not None:
        raise UserError(f"{path} cannot be used: {name} {fault}.")
    return PackedLinear(weight, linear.bias, recipe, activations == "quantized", held)


def dequantized_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a packed checkpoint as a model of linears has them, float32. Raises UserError."""
    return dequantized_state(load_packed(path), torch.float32)


def _layers(shell: nn.Module, path: Path) -> dict[str, tuple[LinearRecipe, tuple[int, int]]]:
    """Recipe and shape of the weight of each layer that is packed in a file, by its name. Raises UserError."""
    what = f"{path} cannot be used, what it says of itself is wrong"
    found = {
        name: (layer.recipe, tuple(layer.weight.shape))
        for name, layer in shell.named_modules(remove_duplicate=False)
        if isinstance(layer, QuantLinear) and not left_alone(layer.recipe)
    }
    for name, (recipe, _) in found.items():
        if (reason := unpackable(recipe)) is not None:
            raise UserError(f"{what}: by its section quant {name} has no packed form, {reason}.")
    if not found:
        raise UserError(f"{what}: by its section quant no weight is in a microscaling format.")
    return found


def _make(info: Info, quant: Mapping[str, Any], path: Path, tensors: int) -> nn.Module:
    """The model that a file names, with the quantizers of a section `quant`. Raises UserError."""
    what = f"{path} cannot be used, what it says of itself is wrong"
    kwargs = info.model.kwargs
    if refused := _OF_TIMM & kwargs.keys():
        raise UserError(f"{what}: model.kwargs.{min(refused)} is no argument of a model.")
    for name in ("depth", "depths"):  # a block has a tensor at least
        value = kwargs.get(name, 0)
        if sum(value if isinstance(value, list) else [value] if isinstance(value, int) else []) > tensors:
            raise UserError(f"{what}: a model of more blocks than the file has tensors.")
    try:
        model = json.dumps(info.model.model_dump(mode="json"))
        cfg = load_config(None, [f"model={model}", f"quant={json.dumps(quant)}"])
        with warnings.catch_warnings():  # of odd arguments; the tensors say whether it is the model
            warnings.simplefilter("ignore")
            return create_model(cfg, info.model.num_classes)
    except UserError as error:
        said = str(error).rstrip(".")  # torch's part of it may name every call that there is
        raise UserError(f"{what}: {said if len(said) <= _LONGEST else said[:_LONGEST] + ' ..'}.") from None


def _check_shapes(
    shell: nn.Module,
    layers: Mapping[str, tuple[LinearRecipe, tuple[int, int]]],
    info: Info,
    tensors: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Raises UserError where the tensors are not those of the model and the layers that the file names."""
    what = f"{path} is not the packed checkpoint that it says it is"
    quantizers = {name for name, layer in shell.named_modules(remove_duplicate=False) if isinstance(layer, QuantLinear)}
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, value in shell.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer not in quantizers or (leaf != HELD and (leaf == "bias" or layer not in layers)):
            expected[name] = tuple(value.shape), DTYPES[info.dtype] if value.is_floating_point() else value.dtype
    for stack, names in stacks_of(layers).items():
        for leaf, (shape, dtype) in tensors_of_layer(*layers[names[0]]).items():
            expected[f"{stack}.{leaf}"] = (len(names), *shape), dtype
    for name, (shape, dtype) in expected.items():
        value = tensors.get(name)
        if value is None:
            raise UserError(f"{what}: {name} is missing.")
        if tuple(value.shape) != shape:
            there, here = ("x".join(map(str, s)) or "a scalar" for s in (value.shape, shape))
            raise UserError(f"{what}: {name} is {there} in the file, and {here} in {info.model.name}.")
        if value.dtype != dtype:
            holds, wanted = (str(of).removeprefix("torch.") for of in (value.dtype, dtype))
            raise UserError(f"{what}: {name} holds {holds}, and {wanted} is expected.")
    for name in tensors:
        if name not in expected:
            raise UserError(f"{what}: {name[:80]} has no place in {info.model.name}.")


def _check_size(shell: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError where the model would take more memory than its file can be the reason for."""
    needed = sum(value.nbytes for value in (*shell.parameters(), *shell.buffers()))
    held = sum(value.nbytes for value in tensors.values())
    if needed > _TIMES_THE_FILE * held + _BYTES_BESIDE:
        raise UserError(f"{path} of {held} bytes names a model that needs {needed}; it was not made.")
