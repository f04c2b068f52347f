"""The one style of all figures: `figures.mplstyle`, sizes in millimetres, and colours."""

from functools import wraps
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMNS = 89.0, 183.0  # mm, widths of journals

# Colours of Okabe and Ito, which the colour-blind tell apart. Storing is blue and recall is vermilion throughout.
BLACK, GREY, LIGHT_GREY = "#000000", "#6E6E6E", "#BBBBBB"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, "#882255", "#999933", "#332288")  # the last three: Paul Tol
DASHED, DOTTED = (0, (3, 1.5)), (0, (1, 1))


def styled(draw):
    """Decorator: draw in this style, whatever the user's own settings are, and leave these settings unchanged."""

    @wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.style.context(["default", Path(__file__).with_name("figures.mplstyle")]):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size (mm), to be called in a function that is `styled`."""
    return Figure(figsize=(width / 25.4, height / 25.4))


def heading(ax: Axes, letter: str, words: str, pad: float | None = None) -> None:
    """The letter and the title of a panel, on the left, `pad` points above the panel."""
    ax.set_title(f"{letter}  {words}", loc="left", pad=pad)
