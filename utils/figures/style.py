"""The one style of all figures. Sizes are in millimetres, so that type has the size in which it is printed."""

from functools import wraps

from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMNS = 89.0, 183.0  # mm, widths of journals

# Colours of Okabe and Ito, which the colour-blind tell apart. Storing is blue and recall is vermilion throughout.
BLACK, GREY, LIGHT_GREY = "#000000", "#6E6E6E", "#BBBBBB"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHED, DOTTED = (0, (3, 1.5)), (0, (1, 1))

STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 3,
    "axes.labelsize": 7,
    "axes.labelpad": 2,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "ytick.minor.size": 1.2,
    "xtick.major.pad": 1.5,
    "ytick.major.pad": 1.5,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0,
    "lines.linewidth": 0.8,
    "image.cmap": "magma_r",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.hspace": 0.0,
    "pdf.fonttype": 42,  # TrueType: text stays text
    "svg.fonttype": "path",  # an SVG file cannot carry its font
    "svg.hashsalt": "memorizing associations",  # the same identifiers each time
}


def styled(draw):
    """Decorator: a function that draws in the style, whatever the user's own settings are. It leaves no trace outside."""

    @wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib_style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size (mm), to be called in a function that is `styled`."""
    return Figure(figsize=(width / 25.4, height / 25.4))


def heading(ax: Axes, letter: str, words: str, pad: float | None = None) -> None:
    """The letter of a panel and its title, above it on the left; `pad` points above it."""
    ax.set_title(f"{letter}  {words}", loc="left", pad=pad)
