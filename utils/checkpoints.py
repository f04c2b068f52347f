"""Checkpoints: written whole or not at all, read without running anything they hold. The file format stands here.

A checkpoint is a `torch.save` dictionary of plain values and tensors, under the keys of the published program:

    epoch        the epoch to go on with (so many are finished)
    sample       training samples of that epoch already used (an interruption inside an epoch), else 0
    state_dict   parameter name -> tensor
    best_acc     highest validation accuracy so far, percent, a tensor
    optimizer    state of Adam
    params       option name -> value
    history      one dictionary an epoch, the lines of the metrics file
    running      sums over the samples of the unfinished epoch
    time_stamp, log_dir
    digest       SHA-256 over all the others; it is verified where there is one

Published checkpoints lack `sample`, `history`, `running` and `digest`; their `params` is an `argparse.Namespace`, their
parameter names may carry the prefix `module.`, and they hold `encoding_layer.encoding`, a matrix of ones which is not learned.
"""

import argparse
import contextlib
import io
import os
import pickle
import stat
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.checkpoint_contents import KEYS, checked, digest
from utils.errors import UserError

LAST = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"

_BEFORE_ZIP = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # opens the files of PyTorch before 1.6, which were no archives


# Writing


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` holds, at any moment, the old one or the new one, whole.

    Args:
        checkpoint: a value for every one of KEYS.

    Raises:
        UserError: the file cannot be written; what stood there stays.
    """
    content = {key: checkpoint[key] for key in KEYS}
    archive = io.BytesIO()
    torch.save(content | {"digest": digest(content)}, archive)
    write_atomically(path, lambda file: file.write(archive.getbuffer()))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file by what `write(binary file)` writes: a temporary file in the same folder, fsync, rename.

    Raises:
        UserError: it cannot be written; what stood there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as failure:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path}: cannot be written ({failure.strerror}); make room or choose another --output_dir"
        ) from failure


def remove_left_behind(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed. Nobody may be writing it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


# Reading


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this program or of the published one, as described above, published ones brought to our form.

    Nothing in the file is executed: only tensors and plain values are unpickled. What is returned has the types, the shapes (as
    its own `params` say) and the finite numbers of a checkpoint, and is what was written.

    Raises:
        UserError: no such file, damaged, or not such a checkpoint.
    """
    path = Path(path)
    try:
        return checked(_read(path))
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror or failure}") from failure
    except ValueError as failure:
        raise UserError(f"{path}: {failure}") from failure


def find(folder: Path, names: tuple[str, ...] = (LAST, BEST)) -> tuple[Path, dict[str, Any]] | None:
    """The first whole checkpoint of these names in a run folder and its path, or None. What is damaged is reported.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    failures = []
    for path in (folder / name for name in names):
        if not path.exists():
            continue
        try:
            checkpoint = load(path)
        except UserError as failure:
            failures.append(str(failure))
        else:
            for failure in failures:
                print(f"warning: {failure}; going back to {path}, of epoch {checkpoint['epoch']}", flush=True)
            return path, checkpoint
    if failures:
        raise UserError("; ".join(failures))
    return None


def _read(path: Path) -> Any:
    """What a `torch.save` file holds. Raises OSError, or ValueError saying what is wrong with it."""
    if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
        raise ValueError("not a file")
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError("empty")
    if _BEFORE_ZIP in start:
        raise ValueError("a file of PyTorch before 1.6, which nothing protects; load it there and save it with a newer PyTorch")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("not written by PyTorch, or damaged: its archive is compressed")
            if damaged := archive.testzip():
                raise ValueError(f"damaged in {damaged!r}; use another checkpoint")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as failure:
        raise ValueError("refused, it holds more than tensors and plain values") from failure
    except (OSError, ValueError):
        raise
    except Exception as failure:  # there is no telling what a damaged archive or pickle raises
        raise ValueError("damaged, or not a checkpoint; use another one") from failure


def time_stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
