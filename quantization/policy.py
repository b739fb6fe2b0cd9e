"""Policy: which layers of a model a recipe is for, and which of their products stay in high precision."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantization.words import PRODUCTS, expect, expect_whole

BLOCK = re.compile(r"^(.*?\bblocks\.\d+)\.")  # the transformer block that a layer belongs to


@dataclass(frozen=True)
class Policy:
    """Which products of which layers stay in high precision. Raises ValueError for what is no such thing.

    Args:
        first, last: so many transformer blocks at the beginning and at the end of the model, whole.
        spare: (pattern, products): the products (output, grad_input, grad_weight) of the layers whose qualified names
            the pattern fits, as file names do: ("blocks.*.mlp.fc2", ("grad_weight",)).
    """

    first: int = 0
    last: int = 0
    spare: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            expect_whole(name, getattr(self, name), 0)
        for pair in self.spare if isinstance(self.spare, tuple) else [self.spare]:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], tuple):
                raise ValueError(f'spare must be a tuple of pairs such as ("*.fc2", ("grad_weight",)); got {pair!r}')
            pattern, products = pair
            if not isinstance(pattern, str) or not pattern:
                raise ValueError(f"spare names layers by a pattern; got {pattern!r}")
            if not products:
                raise ValueError(f"spare names no product of the layers {pattern}, of {', '.join(PRODUCTS)}")
            for product in products:
                expect("every product of spare", product, PRODUCTS)

    def products_off(self, name: str) -> frozenset[str]:
        """The products that are off by `spare` in the layer of a name."""
        return frozenset(p for pattern, products in self.spare if fnmatch.fnmatchcase(name, pattern) for p in products)

    def spared(self, names: Iterable[str]) -> dict[str, frozenset[str]]:
        """The products that are off in each of the layers `names`, given in the model's order. Layers outside of
        transformer blocks are in none of the first and the last.

        Raises ValueError for a pattern that fits no layer and where more blocks are spared than there are.
        """
        names = list(names)
        for pattern, _ in self.spare:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"policy.spare names layers {pattern}, and none of those to quantize is called so")
        places = {name: found.group(1) for name in names if (found := BLOCK.search(name))}
        blocks = list(dict.fromkeys(places.values()))
        if blocks and self.first + self.last > len(blocks):
            raise ValueError(
                f"policy spares the first {self.first} and the last {self.last} blocks, and there are {len(blocks)}"
            )
        whole = {*blocks[: self.first], *blocks[len(blocks) - self.last :]}
        return {name: frozenset(PRODUCTS) if places.get(name) in whole else self.products_off(name) for name in names}

    def __str__(self) -> str:
        blocks = [f"{name} {n}" for name, n in (("first", self.first), ("last", self.last)) if n]
        return ", ".join([*blocks, *(f"{pattern}: {' '.join(products)}" for pattern, products in self.spare)]) or "all"
