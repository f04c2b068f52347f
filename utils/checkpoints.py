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

Published checkpoints lack `sample`, `history` and `running`; their `params` is an `argparse.Namespace`, their parameter names may
carry the prefix `module.`, and they hold `encoding_layer.encoding`, a matrix of ones which is not learned.
"""

import argparse
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError

LAST = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"

_NOT_LEARNED = "encoding_layer.encoding"


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` holds, at any moment, the old one or the new one, whole.

    Raises:
        UserError: the file cannot be written; what stood there stays.
    """
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def write_atomically(path: Path, write) -> None:
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
    except (OSError, RuntimeError) as failure:  # torch.save raises RuntimeError where a write falls short
        temporary.unlink(missing_ok=True)
        reason = getattr(failure, "strerror", None) or str(failure).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); make room or choose another --output_dir") from failure


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this program or of the published one, as described above, published ones brought to our form.

    Nothing in the file is executed: only tensors and plain values are unpickled.

    Raises:
        UserError: no such file, damaged, or not such a checkpoint.
    """
    path = Path(path)
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or not {"epoch", "state_dict", "params"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint of this program or of the published one")
    params = checkpoint["params"]
    checkpoint["params"] = dict(vars(params) if isinstance(params, argparse.Namespace) else params)
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    published = state.pop(_NOT_LEARNED, None) is not None
    checkpoint["state_dict"] = state
    if published and "optimizer" in checkpoint:
        checkpoint["optimizer"] = _without_third_parameter(checkpoint["optimizer"])
    checkpoint["best_acc"] = torch.as_tensor(checkpoint.get("best_acc", 0.0))
    return {"sample": 0, "history": [], "running": {}} | checkpoint


def _read(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path}: damaged ({damaged}); use another checkpoint")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror or failure}") from failure
    except pickle.UnpicklingError as failure:
        raise UserError(f"{path}: refused, it holds more than tensors and plain values") from failure
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError) as failure:
        raise UserError(f"{path}: damaged, or not a checkpoint; use another one") from failure


def _without_third_parameter(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Adam's state of a published checkpoint, which counts the constant encoding matrix as its third parameter."""
    number = {0: 0, 1: 1, 3: 2, 4: 3, 5: 4}
    (group,) = optimizer["param_groups"]
    return {
        "state": {number[old]: value for old, value in optimizer["state"].items() if old in number},
        "param_groups": [group | {"params": sorted(number.values())}],
    }


def find(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run folder, or None where there is none; what is damaged is told on the way.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    present = [folder / name for name in (LAST, BEST) if (folder / name).exists()]
    failures = []
    for path in present:
        try:
            checkpoint = load(path)
        except UserError as failure:
            failures.append(str(failure))
        else:
            for failure in failures:
                print(f"warning: {failure}; going back to {path}", flush=True)
            return checkpoint
    if failures:
        raise UserError("; ".join(failures))
    return None


def time_stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
