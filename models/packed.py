"""Models of packed layers: made of a trained model, written to a file, and loaded from one.

    model = load_packed("deit_tiny.safetensors")                        # weights stay packed in memory
    model = load_packed("deit_tiny.safetensors", activations="plain")   # X is not quantized
    save_packed(model, "again.safetensors")                             # the same bytes

A loaded model is in evaluation mode and its parameters take no gradients; model.packed_info says what the file says.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from config import UserError, load_config
from models.zoo import create_model
from quantization.export import (
    CODES,
    SCALES,
    PackedLinear,
    dequantized_state,
    pack_linears,
    packed_layers,
    packed_state,
    put,
    recipe_of,
    recipe_words,
    weight_fault,
)
from quantization.job import Packed, codes_shape, scales_shape
from quantization.recipes import resolve
from quantization.spec import LinearRecipe
from record.packed import DTYPES, Images, Info, Model, PackedFile, Trained, read_packed, write_packed, write_tensors

ACTIVATIONS = ("quantized", "plain")
_OF_TIMM = {*inspect.signature(timm.create_model).parameters} - {"kwargs"}  # which reach files and the network
_BYTES_BESIDE = 2**26  # that a model may have in buffers which its file does not hold
_TIMES_THE_FILE = 16  # a float32 weight has up to 8 times the bytes of a packed one


# ---------------------------------------------------------------------------------------------------------------------
# A model into a file
# ---------------------------------------------------------------------------------------------------------------------


def describe_packed(model: nn.Module, *, made_of: Model, quant: Mapping[str, Any], images: Images) -> Info:
    """What the file of a model of packed layers says: its layers and their recipes, and what is given."""
    recipes: list[LinearRecipe] = []
    layers = {}
    for name, layer in packed_layers(model).items():
        if layer.recipe not in recipes:
            recipes.append(layer.recipe)
        layers[name] = recipes.index(layer.recipe)
    words = [recipe_words(recipe) for recipe in recipes]
    return Info(model=made_of, quant=dict(quant), recipes=words, layers=layers, images=images)


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
    info = describe_packed(model, made_of=made_of, quant=cfg.quant.model_dump(mode="json"), images=images)
    model.packed_info = info.model_copy(update={"classes": list(classes), "trained": trained})
    return model.eval().requires_grad_(False)


def save_packed(model: nn.Module, path: str | Path, dtype: str | None = None) -> None:
    """Write a model of packed layers (of `pack_model` or `load_packed`).

    dtype: of the tensors that are not packed, float32 or bfloat16; None: as they were in the file, or float32.
    float32 keeps every bit of what the model computes; bfloat16 rounds biases, norms, embeddings and head.
    """
    info = model.packed_info.model_copy(update={"dtype": dtype or model.packed_info.dtype})
    write_packed(Path(path), PackedFile(info, packed_state(model, DTYPES[info.dtype])))


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
    recipes = _recipes(info, path)
    with torch.device("meta"):  # shapes alone, before anything is made
        shell = _make(info, path, len(tensors))
    _check_shapes(shell, info, recipes, tensors, path)
    _check_size(shell, tensors, path)
    with torch.random.fork_rng(devices=[]):  # a caller's draws are not those of an initialisation
        model = _make(info, path, len(tensors))
    rest = {name: value for name, value in tensors.items() if not _is_packed(name, info)}
    for name, number in info.layers.items():
        codes, scales = tensors[f"{name}.{CODES}"], tensors[f"{name}.{SCALES}"]
        linear = model.get_submodule(name)
        packed = Packed(codes, scales.t(), recipes[number].q2, linear.in_features)
        if (fault := weight_fault(packed)) is not None:
            raise UserError(f"{path} cannot be used: {name} {fault}.")
        put(model, name, PackedLinear(packed, linear.bias, recipes[number], activations == "quantized"))
    model.load_state_dict(rest, strict=False)  # every name and shape has been compared
    model.packed_info = info
    return model.eval().requires_grad_(False).to(device)


def dequantized_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a packed checkpoint as a model of linears has them, float32. Raises UserError."""
    return dequantized_state(load_packed(path), torch.float32)


def _recipes(info: Info, path: Path) -> list[LinearRecipe]:
    what = f"{path} cannot be used, what it says of itself is wrong"
    try:
        recipes = [recipe_of(words) for words in info.recipes]
        quant = load_config(None, [f"quant={json.dumps(info.quant)}"], source="its configuration").quant
    except (ValueError, UserError) as error:
        raise UserError(f"{what}: {str(error).rstrip('.')}.") from None
    if resolve(quant) not in recipes:
        raise UserError(f"{what}: its configuration, {resolve(quant)}, is that of none of its layers.")
    return recipes


def _make(info: Info, path: Path, tensors: int) -> nn.Module:
    """The model that a file names, without quantizers. Raises UserError."""
    what = f"{path} cannot be used, what it says of itself is wrong"
    kwargs = info.model.kwargs
    if refused := _OF_TIMM & kwargs.keys():
        raise UserError(f"{what}: model.kwargs.{min(refused)} is no argument of a model.")
    for name in ("depth", "depths"):  # a block has a tensor at least
        value = kwargs.get(name, 0)
        if sum(value if isinstance(value, list) else [value] if isinstance(value, int) else []) > tensors:
            raise UserError(f"{what}: a model of more blocks than the file has tensors.")
    try:
        cfg = load_config(None, [f"model={json.dumps(info.model.model_dump(mode='json'))}", "quant={scheme: none}"])
        return create_model(cfg, info.model.num_classes)
    except UserError as error:
        raise UserError(f"{what}: {str(error).rstrip('.')}.") from None


def _is_packed(name: str, info: Info) -> bool:
    layer, _, leaf = name.rpartition(".")
    return layer in info.layers and leaf in (CODES, SCALES)


def _check_shapes(
    shell: nn.Module, info: Info, recipes: list[LinearRecipe], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Raises UserError where the tensors are not those of the model and the layers that the file names."""
    what = f"{path} is not the packed checkpoint that it says it is"
    expected = {name: (tuple(value.shape), value.is_floating_point()) for name, value in shell.state_dict().items()}
    places = dict(shell.named_modules(remove_duplicate=False))
    for name, number in info.layers.items():
        linear = places.get(name)
        if type(linear) is not nn.Linear:
            raise UserError(f"{what}: {info.model.name} has no linear layer {name[:80]}.")
        shape = linear.out_features, linear.in_features
        del expected[f"{name}.weight"]
        expected[f"{name}.{CODES}"] = codes_shape(*shape), False
        expected[f"{name}.{SCALES}"] = scales_shape(*shape, recipes[number].q2)[::-1], False
    for name, (shape, floating) in expected.items():
        value = tensors.get(name)
        if value is None:
            raise UserError(f"{what}: {name} is missing.")
        if tuple(value.shape) != shape:
            there, here = ("x".join(map(str, s)) or "a scalar" for s in (value.shape, shape))
            raise UserError(f"{what}: {name} is {there} in the file, and {here} in {info.model.name}.")
        if floating != value.is_floating_point() or (_is_packed(name, info) and value.dtype != torch.uint8):
            raise UserError(f"{what}: {name} holds {str(value.dtype).removeprefix('torch.')}.")
    for name in tensors:
        if name not in expected:
            raise UserError(f"{what}: {name[:80]} has no place in {info.model.name}.")


def _check_size(shell: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError where the model would take more memory than its file can be the reason for."""
    needed = sum(value.nbytes for value in (*shell.parameters(), *shell.buffers()))
    held = sum(value.nbytes for value in tensors.values())
    if needed > _TIMES_THE_FILE * held + _BYTES_BESIDE:
        raise UserError(f"{path} of {held} bytes names a model that needs {needed}; it was not made.")
