"""Pictures of three dice, drawn pixel by pixel: one red, one blue, one green, somewhere on a gray table."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = {"red": (214, 30, 30), "blue": (30, 60, 220), "green": (30, 160, 30)}
PALETTE = ((128, 128, 128), (255, 255, 255), *COLOURS.values())  # table, pips, dice; the table is 0 to the models
SIZES = ((64, 64), (96, 64), (64, 96))  # width and height in pixels; multiples of 32, so never resized
CELL, DIE, PIP, SHIFT = 32, 26, 6, 4  # pixels: a die's place, its side, a pip's side, how far it may be moved
PIPS = {  # rows and columns of 3 x 3 places
    1: ((1, 1),),
    2: ((0, 0), (2, 2)),
    3: ((0, 0), (1, 1), (2, 2)),
    4: ((0, 0), (0, 2), (2, 0), (2, 2)),
    5: ((0, 0), (0, 2), (1, 1), (2, 0), (2, 2)),
    6: ((0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)),
}


@dataclass(frozen=True)
class Picture:
    """Width and height in pixels, and of each colour the pips and the top left corner of its die."""

    width: int
    height: int
    dice: tuple[tuple[str, int, int, int], ...]

    def value(self, colour: str) -> int:
        """The pips of the die of this colour."""
        return next(pips for name, pips, _, _ in self.dice if name == colour)

    def pixels(self) -> np.ndarray:
        """``[height, width]`` indices into PALETTE."""
        names = list(COLOURS)
        canvas = np.zeros((self.height, self.width), dtype=np.uint8)
        for name, pips, top, left in self.dice:
            canvas[top : top + DIE, left : left + DIE] = 2 + names.index(name)
            for row, column in PIPS[pips]:
                y, x = (place + 2 + 8 * step for place, step in ((top, row), (left, column)))
                canvas[y : y + PIP, x : x + PIP] = 1
        return canvas

    def png(self) -> bytes:
        """The picture as a PNG file of few colours."""
        image = Image.fromarray(self.pixels(), mode="P")
        image.putpalette([part for colour in PALETTE for part in colour])
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True, bits=4)
        return file.getvalue()


def throw(rng: random.Random) -> Picture:
    """Three dice, each in a cell of its own."""
    width, height = rng.choice(SIZES)
    cells = [(y, x) for y in range(0, height, CELL) for x in range(0, width, CELL)]
    places = rng.sample(cells, len(COLOURS))
    dice = tuple(
        (name, rng.randint(1, 6), y + 1 + rng.randint(0, SHIFT), x + 1 + rng.randint(0, SHIFT))
        for name, (y, x) in zip(COLOURS, places, strict=True)
    )
    return Picture(width, height, dice)
