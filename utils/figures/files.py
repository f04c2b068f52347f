"""The files of figures: where they go, in which formats, and saving them."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from utils.errors import UsageError, UserError
from utils.figures.animation import save_animation
from utils.figures.style import styled

# Format -> dots per inch (in vector files only rasters have any), and metadata: a date would make each file another one.
FORMATS = {"png": (300, {}), "pdf": (600, {"CreationDate": None}), "svg": (600, {"Date": None})}
ALIKE = {"gif", "mp4", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "eps", "ps", "pgf", "avi", "mov", "mkv", "webm", "npz"}


def choose_files(figures: dict[str, Sequence[str]], output: str, kind: str) -> dict[Path, str]:
    """The files to write, and the figure in each: a file or in a folder that is asked for, or beside what is drawn.

    Args:
        figures: name -> paths of what it is drawn from.
        output: `--output`: file, folder, or empty.
        kind: the format in a folder.

    Raises:
        UsageError: `output` cannot hold these figures, or not here.
    """
    target, files = Path(output), {}
    is_file = output and not target.is_dir() and target.suffix[1:].lower() in {*FORMATS, *ALIKE}
    if is_file and len(figures) > 1:
        raise UsageError(f"--output {output}: a file holds one figure; choose with --figure {', '.join(figures)}")
    for name, sources in figures.items():
        kinds = ("gif",) if name == "animation" else tuple(FORMATS)
        if is_file:
            if target.suffix[1:].lower() not in kinds:
                raise UsageError(f"--output {output}: must be a folder or end in {', '.join(f'.{k}' for k in kinds)}")
            files[target] = name
            continue
        folder, prefix = (target, "") if output else beside(sources)
        files |= {folder / f"{prefix}{name}.{k}": name for k in (kinds if name == "animation" else (kind,))}
    return files


def beside(sources: Sequence[str]) -> tuple[Path, str]:
    """Where to write what is drawn from these files: the folder, and how names begin. Of one file, it is its own name."""
    relative = not any(map(os.path.isabs, sources))
    common = Path(os.path.commonpath(sources if relative else [os.path.abspath(source) for source in sources]))
    return (common, "") if common.is_dir() else (common.parent, Path(common.name.removesuffix(".tar")).stem + ".")


def check_writable(path: Path) -> None:
    """Raises UserError where a file cannot be written, before anything is computed for it."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as failure:
        where = "choose another place (--output, --save_data)"
        raise UserError(f"{path}: cannot be written ({failure.strerror}); {where}") from failure


@styled
def save(drawing: Figure | list, path: Path) -> None:
    """Write a figure or the frames of an animation in the format that the file name ends in; the same bytes each time.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(drawing, list):
            save_animation(drawing, path)
        else:
            dpi, metadata = FORMATS[path.suffix[1:].lower()]
            drawing.savefig(path, dpi=dpi, metadata=metadata)
    except OSError as failure:
        raise UserError(f"{path}: cannot be written ({failure.strerror or failure}); choose another place") from failure


def show(drawn: Sequence[Figure]) -> None:
    """Open a window for each figure and wait until they are closed. Raises UserError where there is no display."""
    import matplotlib.pyplot as plt

    for figure in drawn:
        canvas = plt.figure(figsize=figure.get_size_inches()).canvas
        canvas.figure = figure
        figure.set_canvas(canvas)
    if plt.get_backend().lower() == "agg":
        raise UserError("--show: there is no display here; look at the files")
    plt.show()
