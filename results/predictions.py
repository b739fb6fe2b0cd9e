"""Predictions as a picture: each image beside its likeliest classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from config import UserError
from results.style import COLOURS, DPI, picture

COLUMNS = 2  # images beside each other
MOST = 24  # images of one picture
LONGEST = 28  # characters of a class's name
INCHES = (3.0, 1.7)  # of an image with its classes


class Predicted(Protocol):
    """The file of an image, the image, and its likeliest classes with their probabilities."""

    path: Path
    image: Any
    classes: tuple[tuple[str, float], ...]


def draw_predictions(predictions: Sequence[Predicted], path: Path) -> None:
    """Write the picture as a PNG; of many images the first MOST. Raises UserError where it cannot be written."""
    shown = predictions[:MOST]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    with picture() as figure:
        figure.set_size_inches(2 * INCHES[0] * columns, INCHES[1] * rows)
        axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.4] * columns)
        for axis in axes.flat:
            axis.set_axis_off()
        for number, prediction in enumerate(shown):
            row, column = divmod(number, columns)
            left, right = axes[row, 2 * column : 2 * column + 2]
            left.imshow(prediction.image)
            left.set_title(_short(prediction.path.name), parse_math=False)
            _bars(right, prediction.classes)
        try:
            with warnings.catch_warnings():  # letters that the font has not are drawn as boxes
                warnings.filterwarnings("ignore", message="Glyph ")
                figure.savefig(path, format="png", dpi=DPI)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"The picture {path} cannot be written: {reason}.") from None


def _bars(axis: Any, classes: Sequence[tuple[str, float]]) -> None:
    """The classes from above, each a bar as long as its probability."""
    axis.set_axis_on()
    places = range(len(classes))
    axis.barh(places, [share for _, share in classes], color=COLOURS[2])
    axis.set_yticks(places, [_short(name) for name, _ in classes], parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25)  # room for the figure behind a full bar
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    for place, (_, share) in zip(places, classes, strict=True):
        axis.text(share + 0.02, place, f"{100 * share:.1f} %", va="center", fontsize=8)


def _short(text: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
