"""Define colours for colour-blind readers: hues of Okabe and Ito, and viridis for larger numbers of colours."""

from __future__ import annotations

import matplotlib
from matplotlib.colors import to_rgb

from megatron_wallfacer.plots import INK

Colour = tuple[float, float, float]

#: Colours of Okabe and Ito (2008) without black and yellow. Yellow is invisible on white.
HUES: tuple[str, ...] = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def hues(count: int) -> list[Colour]:
    """Return colours that differ as much as possible."""
    if count <= len(HUES):
        return [to_rgb(hue) for hue in HUES[:count]]
    return ramp(count)


def ramp(count: int) -> list[Colour]:
    """Return colours from dark to light."""
    viridis = matplotlib.colormaps["viridis"]
    return [to_rgb(viridis(0.08 + 0.87 * index / max(count - 1, 1))) for index in range(count)]


def tints(colour: Colour, count: int) -> list[Colour]:
    """Return a colour and lighter tints of it."""
    red, green, blue = colour
    shares = [0.68 * index / max(count - 1, 1) for index in range(count)]
    return [(red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white) for white in shares]


def text_colour_on(colour: Colour) -> str:
    """Return the text colour, dark or white, that has the larger contrast to a background colour."""
    luminance = 0.2126 * colour[0] ** 2.2 + 0.7152 * colour[1] ** 2.2 + 0.0722 * colour[2] ** 2.2
    return "white" if luminance < 0.24 else INK
