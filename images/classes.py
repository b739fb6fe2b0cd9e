"""The classes of a data set: their names in the order of the labels, how many, and whether two lists are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from config import Config, UserError


def class_names(source: Any) -> tuple[str, ...]:
    """The names of a set's classes by label, under the attribute it keeps them in; empty where it knows none.

    Several names of one class (ImageNet's synonyms) are joined by commas.
    """
    reader = getattr(source, "reader", source)
    by_name = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    by_label: dict[int, list[str]] = {}
    for name, label in by_name.items():
        by_label.setdefault(int(label), []).append(str(name))
    return tuple(", ".join(by_label[label]) for label in sorted(by_label))


def count_classes(cfg: Config, names: tuple[str, ...]) -> int:
    """The number of classes. Raises UserError where set and model.num_classes disagree, and for fewer than two."""
    name, wanted = cfg.data.set, cfg.model.num_classes
    found = len(names) or (wanted or 1000 if name == "generated" else None)
    if found is None and wanted is None:
        raise UserError(f"data.set {name} does not tell how many classes it has: set model.num_classes.")
    if found and wanted and found != wanted:
        raise UserError(
            f"data.set {name} has {found} classes but model.num_classes is {wanted}: leave model.num_classes out to "
            "take the number from the data."
        )
    count = found or wanted
    if count < 2:
        what = f"1 class ({names[0]})" if names else f"{count} class"
        mend = f"check the class folders under data.path {cfg.data.path}" if names else "raise model.num_classes"
        raise UserError(f"data.set {name} has {what}, and there is nothing to tell apart with fewer than two: {mend}.")
    return count


def check_splits(cfg: Config, train: tuple[str, ...], held_out: tuple[str, ...]) -> None:
    """Raises UserError where the training and the evaluation set have other classes."""
    if train == held_out:
        return
    odd = sorted(set(train) ^ set(held_out))
    example = f"only one of them has {odd[0]}" if odd else "their order differs"
    raise UserError(
        f"Training and evaluation need the same classes, but data.set {cfg.data.set} has {len(train)} for training and "
        f"{len(held_out)} for evaluation ({example}): give both the same class folders."
    )


def class_difference(then: Sequence[str], now: Sequence[str]) -> str | None:
    """How the classes of a checkpoint (`then`) and of a run's data (`now`) differ, in words; None where they agree.

    An empty list is one that nobody knows, and agrees with every other.
    """
    then, now = tuple(then), tuple(now)
    if not then or not now or then == now:
        return None
    if len(then) != len(now):
        return f"{len(then)} classes and the data have {len(now)}"
    label = next(i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
    differing = sum(a != b for a, b in zip(then, now, strict=True))
    what = "the same classes in another order" if sorted(then) == sorted(now) else f"{differing} other classes"
    return f"{what}: label {label} is {then[label]} there and {now[label]} in the data"


def check_classes(path: object, then: Sequence[str], now: Sequence[str]) -> None:
    """Raises UserError where the checkpoint at `path` was trained on other classes (`then`) than the data's (`now`)."""
    if (difference := class_difference(then, now)) is not None:
        raise UserError(f"{path} has {difference}; give data.path the data set that it was trained on.")
