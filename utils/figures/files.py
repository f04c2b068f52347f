"""Figure files: where they go, their formats, and how they are saved."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from utils.errors import UsageError, UserError, reason
from utils.figures.animation import save_animation
from utils.figures.style import styled

# Format -> dots per inch (in vector files: of rasters) and metadata, without a date: the same figure gives the same file.
FORMATS = {"png": (300, {}), "pdf": (600, {"CreationDate": None}), "svg": (600, {"Date": None})}


def choose_file(figure: str, output: str, kind: str, sources: Sequence[str]) -> Path:
    """The file of a figure: `output` itself, or in the folder `output`, or beside its source and named after the source.

    A path with a suffix is a file, unless it is an existing folder or ends in a slash. Raises UsageError.
    """
    kinds = ["gif"] if figure == "animation" else list(FORMATS)
    name = f"{figure}.{kind if kind in kinds else kinds[0]}"
    path = Path(output or os.path.commonpath([os.path.abspath(source) for source in sources]))
    if path.is_dir() or (output and (output.endswith("/") or not path.suffix)):
        return path / name
    if not output:
        return path.with_name(f"{Path(path.name.removesuffix('.tar')).stem}.{name}")
    if path.suffix[1:].lower() not in kinds:
        raise UsageError(f"--output {output}: {figure} needs a file that ends in .{', .'.join(kinds)}, or a folder (FOLDER/)")
    return path


def check_writable(path: Path) -> None:
    """Raises UserError if a file cannot be written, before anything is computed for it."""
    try:
        tempfile.TemporaryFile(dir=next(parent for parent in path.absolute().parents if parent.exists())).close()
    except OSError as failure:
        where = "choose another place (--output, --save_data)"
        raise UserError(f"{path}: cannot be written ({reason(failure, path)}); {where}") from failure


@styled
def save(drawing: Figure | list, path: Path) -> None:
    """Write a figure or an animation in the format that the file name ends in, the same bytes each time. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(drawing, list):
            save_animation(drawing, path)
        else:
            dpi, metadata = FORMATS[path.suffix[1:].lower()]
            drawing.savefig(path, dpi=dpi, metadata=metadata)
    except OSError as failure:
        raise UserError(f"{path}: cannot be written ({reason(failure, path)}); choose another place") from failure
