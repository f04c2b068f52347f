"""The one style of all figures, saving them, and placing things in millimetres.

Positions and sizes are in millimetres from the top left corner, so that type and lines have the size in which they are printed.
"""

from functools import wraps
from pathlib import Path

from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMNS = 89.0, 183.0  # mm, widths of journals
MM_PER_INCH = 25.4
POINTS_PER_MM = 72 / MM_PER_INCH

# Colours of Okabe and Ito, which the colour-blind tell apart. Storing is blue and recall is vermilion throughout.
BLACK, GREY, LIGHT_GREY = "#000000", "#6E6E6E", "#BBBBBB"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)

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
    "lines.linewidth": 0.8,
    "image.cmap": "magma_r",
    "pdf.fonttype": 42,  # TrueType: text stays text
    "svg.fonttype": "path",  # an SVG file cannot carry its font
    "svg.hashsalt": "memorizing associations",  # the same identifiers each time
}

# Format -> dots per inch (in vector files only rasters have any), and metadata: a date would make each file another one.
FORMATS = {"png": (300, {}), "pdf": (600, {"CreationDate": None}), "svg": (600, {"Date": None})}


def style():
    """The style of all figures as a context, whatever the user's own settings are; it leaves no trace outside."""
    return matplotlib_style.context(["default", STYLE])


def styled(draw):
    """Decorator: a function that draws in the style."""

    @wraps(draw)
    def wrapper(*args, **kwargs):
        with style():
            return draw(*args, **kwargs)

    return wrapper


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file name ends in, one of FORMATS; the same bytes each time.

    Raises:
        OSError: the file cannot be written.
    """
    dpi, metadata = FORMATS[path.suffix[1:].lower()]
    figure.savefig(path, dpi=dpi, metadata=metadata)


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width / MM_PER_INCH, height / MM_PER_INCH))


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    full_width, full_height = figure.get_size_inches() * MM_PER_INCH
    return figure.add_axes((left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height))


def add_text(figure: Figure, x: float, y: float, words: str, **look) -> None:
    """Text whose baseline (or what `va` says) is `y` below the top."""
    width, height = figure.get_size_inches() * MM_PER_INCH
    figure.text(x / width, 1 - y / height, words, **look)


def add_heading(figure: Figure, x: float, y: float, letter: str, words: str, indent: float = 0.0) -> None:
    """The letter of a panel, and its title `indent` to the right of it."""
    add_text(figure, x, y, letter, weight="bold", size=8)
    add_text(figure, x + indent, y, words, weight="bold")
