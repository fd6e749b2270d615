"""Small bar charts, drawn pixel by pixel: coloured bars of whole heights on a baseline."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = {"red": (214, 39, 40), "blue": (31, 99, 200), "green": (44, 160, 44)}
PALETTE = ((255, 255, 255), (20, 20, 20), *COLOURS.values())  # ground, baseline, bars
SIZES = ((64, 64), (96, 64), (64, 96))  # width and height in pixels; multiples of 32, so never resized
TALLEST = 9
UNIT, BAR, BASE = 6, 12, 5  # pixels of one unit of height, of a bar's width, and below the baseline


@dataclass(frozen=True)
class Chart:
    """Bars from left to right: colour, height in units, and the left edge in pixels."""

    width: int
    height: int
    bars: tuple[tuple[str, int, int], ...]

    def value(self, colour: str) -> int:
        """The height of the bar of this colour."""
        return next(value for name, value, _ in self.bars if name == colour)

    def pixels(self) -> np.ndarray:
        """``[height, width]`` indices into PALETTE."""
        names, ground = list(COLOURS), self.height - BASE
        canvas = np.zeros((self.height, self.width), dtype=np.uint8)
        for name, value, left in self.bars:
            canvas[ground - UNIT * value : ground, left : left + BAR] = 2 + names.index(name)
        canvas[ground] = 1
        return canvas

    def png(self) -> bytes:
        """The picture as a PNG file of few colours."""
        image = Image.fromarray(self.pixels(), mode="P")
        image.putpalette([part for colour in PALETTE for part in colour])
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True, bits=4)
        return file.getvalue()


def draw_chart(rng: random.Random) -> Chart:
    """A chart with one bar of each colour, in any order, each somewhere in its third."""
    width, height = rng.choice(SIZES)
    room = width // len(COLOURS)
    names = rng.sample(list(COLOURS), len(COLOURS))
    bars = tuple((name, rng.randint(1, TALLEST), room * i + rng.randint(1, room - BAR)) for i, name in enumerate(names))
    return Chart(width, height, bars)
