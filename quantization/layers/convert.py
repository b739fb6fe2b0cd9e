"""convert_linears: quantized layers take the place of a model's linears."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quantization.layers.clock import NoiseClock, clock_of
from quantization.layers.int4 import Int4Linear
from quantization.layers.linear import QuantLinear
from quantization.recipes import as_recipe
from quantization.spec import Int4Recipe, LinearRecipe

# qkv, proj, fc1 and fc2 of every transformer block, as timm names them (paper, section 7.1).
BLOCK_LINEARS = re.compile(r"(^|\.)blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))$")
IN_BLOCKS = re.compile(r"(^|\.)blocks\.\d+\.")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOKS += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
_HOOKS += ("_is_full_backward_hook",)


def convert_linears(
    model: nn.Module,
    recipe: LinearRecipe | Int4Recipe | str,
    names: Iterable[str] | None = None,
    *,
    seed: int | None = None,
) -> list[str]:
    """Replace linear layers of `model` in place by quantized layers that keep their parameters and hooks.

    Args:
        recipe: a LinearRecipe makes QuantLinear layers, an Int4Recipe makes Int4Linear layers; or the name of a preset.
            Layers that its policy spares altogether stay as they are, others have those products in high precision.
        names: qualified names of the layers; None takes qkv, proj, fc1 and fc2 of every transformer block and leaves
            patch embedding, patch merging, norms and head in full precision. A layer that several places of the model
            share is replaced in all of them.
        seed: of the noise of stochastic rounding, from 0 to 2^32 - 1; None draws one from torch's default generator, so
            that no two models, or parts of one converted in two calls, share their noise.

    Returns the names of the converted layers in the model's order. Warns where it cannot see that the model calls them.
    Raises ValueError where there is nothing to convert, a name is not that of a linear layer in the model, a layer is
    of a class of its own that would be lost, or the model would never call it.
    """
    recipe, kind_of_model = as_recipe(recipe), type(model).__name__
    places = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    if names is None:
        wanted = {name for name in places if BLOCK_LINEARS.search(name)}
        if not wanted:
            raise ValueError(
                f"{kind_of_model} has no transformer blocks with qkv, proj, fc1 and fc2; pass the names of the "
                "linear layers to convert"
            )
    else:
        wanted = {names} if isinstance(names, str) else set(names)
    for name in sorted(wanted - places.keys()):
        near = difflib.get_close_matches(name, places, n=1)
        raise ValueError(
            f"{name} is not a linear layer of {kind_of_model}" + (f"; did you mean {near[0]}?" if near else "")
        )
    if "" in wanted:
        raise ValueError("the model is itself a linear layer; use QuantLinear.from_linear")
    ids = {id(places[name]) for name in wanted}
    converted = [name for name, module in places.items() if id(module) in ids]
    recipes = dict.fromkeys(converted, recipe)
    if isinstance(recipe, LinearRecipe):
        spared = recipe.policy.spared(converted)
        recipes = {name: recipe.without(off) if off else recipe for name, off in spared.items()}
        converted = [name for name in converted if recipes[name].active or recipes[name].rotated or not recipe.active]
        if not converted:
            raise ValueError("policy spares every layer")
    for name in converted:
        _refuse_own_class(name, places[name])
    if (unused := _unused(model, converted, None)) is None:
        warnings.warn(
            f"{kind_of_model} cannot be run on shapes alone, so nobody has seen that it calls the layers which are "
            "converted: one whose weight it reads itself would not be quantized",
            stacklevel=2,
        )
    elif unused:
        raise ValueError(
            f"{kind_of_model} never calls {_listed(unused)}: it reads their weights itself, so quantizers there would "
            "do nothing; pass the names of other layers"
        )

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    clock = clock_of(model)
    if clock is None:
        clock = NoiseClock.unlike_others() if seed is None else NoiseClock(seed)
        clock.to(linears[0].weight.device)
        clock.attach(model)
    kind = Int4Linear if isinstance(recipe, Int4Recipe) else QuantLinear
    made: dict[int, nn.Module] = {}
    for name in converted:
        linear = places[name]
        if id(linear) not in made:
            quant = made[id(linear)] = kind._take_over(linear, recipes[name])
            for hooks in _HOOKS:
                setattr(quant, hooks, getattr(linear, hooks))
            # The number of a layer is its place among all linear layers, so it does not depend on which are converted.
            quant.join(clock, next(number for number, other in enumerate(linears) if other is linear))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(linear)])
    _leave_fast_paths(model)
    return converted


def _leave_fast_paths(model: nn.Module) -> None:
    """Let torch's own encoder layers call their linears in evaluation too, where a fast path would read the weights."""
    layers = {m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)}
    changed = {m for m in layers if any(isinstance(child, QuantLinear | Int4Linear) for child in m.children())}
    for layer in changed:
        layer.activation_relu_or_gelu = 0  # a condition of the fast path, and of nothing else
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and changed & {*encoder.layers}:
            encoder.use_nested_tensor = False  # which the fast path alone can take


def _refuse_own_class(name: str, linear: nn.Linear) -> None:
    """ValueError for a subclass of nn.Linear with a forward pass or parameters of its own, which would be lost."""
    if isinstance(linear, QuantLinear | Int4Linear):
        return
    own = [n for n, _ in linear.named_parameters() if n not in ("weight", "bias")] + [
        n for n, _ in linear.named_buffers()
    ]
    own += [n for n, _ in linear.named_children()]
    if isinstance(linear.weight, nn.UninitializedParameter):
        raise ValueError(f"{name} has no shape yet; convert after a first pass of the model, which gives it one")
    if own or type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        what = f"{', '.join(own)} of its own" if own else "a forward pass of its own"
        raise ValueError(
            f"{name} is a {type(linear).__name__} with {what}, which a quantized layer would not have; convert before "
            "such layers are put in, or pass the names of other layers"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def never_called(model: nn.Module, names: Sequence[str], shape: tuple[int, ...] | None = None) -> list[str]:
    """Those of the layers `names` whose weights the model reads itself, so that they are not called.

    Forward passes of shapes alone, without memory or arithmetic, in evaluation and in training, find them. shape: of
    its input; None asks the model's patch embedding, and then a layer that evaluation leaves out altogether is found
    too. Without one shapes are guessed. Each argument that the model must be given has that shape. Empty where the
    model cannot be run in this way.
    """
    return _unused(model, names, shape) or []


def _unused(model: nn.Module, names: Sequence[str], shape: tuple[int, ...] | None) -> list[str] | None:
    """As never_called; None where the model cannot be run."""
    known = [shape] if shape is not None else _shape_of_images(model)
    unused, ran = set(), False
    for training in (False, True):
        for given in known or _guessed_shapes(model):
            if (passed := _pass_of_shapes(model, names, given, training)) is not None:
                ran, (called, read) = True, passed
                left_out = not training and bool(known)  # training may leave blocks out at random
                unused |= {name for name in names if name not in called and (left_out or name in read)}
                break
    return [name for name in names if name in unused] if ran else None


def _shape_of_images(model: nn.Module) -> list[tuple[int, ...]]:
    """[(images, channels, height, width)] by the model's patch embedding; empty where it has none."""
    embed = getattr(model, "patch_embed", None)
    if not isinstance(size := getattr(embed, "img_size", None), tuple | list):
        return []
    channels = next((m.in_channels for m in embed.modules() if isinstance(m, nn.Conv2d)), 3)  # a backbone comes first
    return [(2, channels, *size)]


def _guessed_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes that a model or a part of one may take: images, then tokens of 7 x 7 places, of 14 x 14 and a class."""
    sizes = [getattr(module, name, None) for module in model.modules() for name in ("img_size", "image_size")]
    sides = [size[0] if isinstance(size, tuple | list) and size else size for size in sizes]
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    images = [] if channels is None else [(2, channels, side, side) for side in (*sides, 224) if isinstance(side, int)]
    width = next((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), 1)
    return [*dict.fromkeys(images), (2, 49, width), (2, 197, width), (2, 7, 7, width), (2, width)]


def _pass_of_shapes(
    model: nn.Module, names: Sequence[str], shape: tuple[int, ...], training: bool
) -> tuple[set[str], set[str]] | None:
    """(layers called, layers whose weights other functions than the layers' own were given); None if it fails.

    The pass is that of a copy on the device of shapes: models keep tables for later that they make in a pass.
    """
    try:
        held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        tensors = {id(t): t.detach().to("meta") for t in (*model.parameters(), *model.buffers(), *held)}
        for p in model.parameters():
            tensors[id(p)] = nn.Parameter(tensors[id(p)], requires_grad=p.requires_grad)
        twin = copy.deepcopy(model, dict(tensors)).train(training)
        dtype = next(p.dtype for p in twin.parameters() if p.is_floating_point())
        for module in twin.modules():
            for hooks in _HOOKS:
                if isinstance(kept := getattr(module, hooks, None), dict):
                    kept.clear()
            if type(module) is nn.Linear or isinstance(module, QuantLinear | Int4Linear):
                module.forward = functools.partial(_shape_of_product, module)
            elif isinstance(module, nn.LayerNorm | nn.GELU | nn.Dropout) and not [*module.children()]:
                module.forward = _same_shape
        called: set[str] = set()
        for name in names:
            twin.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
        reads = _Reads({id(twin.get_submodule(name).weight): name for name in names})
        needed = [p for p in inspect.signature(twin.forward).parameters.values() if p.default is p.empty]
        count = max(1, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed))
        with torch.no_grad(), reads:
            twin(*(torch.empty(shape, device="meta", dtype=dtype) for _ in range(count)))
    except Exception:  # whatever such a model raises, nothing is known of it then
        return None
    return called, reads.names


def _shape_of_product(linear: nn.Linear, x: Tensor) -> Tensor:
    if x.shape[-1] != linear.in_features:  # a shape was guessed that the model does not take
        raise ValueError("the input has another length")
    return x.new_empty((*x.shape[:-1], linear.out_features))


def _same_shape(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """What torch finds out slowly on the device of shapes."""
    return x


class _Reads(TorchFunctionMode):
    """Notes which of some tensors, given by id with a name, torch's functions are called with."""

    def __init__(self, watched: dict[int, str]) -> None:
        super().__init__()
        self.watched = watched
        self.names: set[str] = set()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = tree_leaves((args, kwargs))  # torch.cat and its like are given lists
        self.names |= {self.watched[id(value)] for value in given if id(value) in self.watched}
        return func(*args, **(kwargs or {}))


def unquantized_in_blocks(model: nn.Module) -> list[str]:
    """The linear layers of transformer blocks that are not quantized, SwiGLU's or separate q and kv, say."""
    return [
        name
        for name, module in model.named_modules()
        if IN_BLOCKS.search(name) and isinstance(module, nn.Linear) and not isinstance(module, QuantLinear | Int4Linear)
    ]
