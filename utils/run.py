"""The folder of a run, and the checkpoint that a run continues.

options.yaml         the options, which --config reads, below an entry for every start of the run
checkpoint.pth.tar   all that an exact continuation needs (see utils/checkpoints.py)
model_best.pth.tar   the same, after the epoch with the highest validation accuracy
metrics.jsonl        one JSON object per epoch; a repeated run gives the same bits, except for `seconds` (wall time)
tensorboard/         with --logging
.lock                held by the process that writes into the folder

One rule: a new run needs a folder without a run, and --resume auto continues the run in a folder.
"""

import contextlib
import itertools
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from errno import ENOLCK, ENOSYS, ENOTSUP
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from utils import checkpoints
from utils.errors import UserError, reason
from utils.metrics import write_metrics

OPTIONS = "options.yaml"
METRICS = "metrics.jsonl"
TABLE = "accuracy_by_length.csv"
LOCK = ".lock"


def find_checkpoint(resume: str, output_dir: str, evaluate: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint of --resume and its path; None for a new run.

    Raises:
        UserError: there is no such checkpoint.
    """
    if not resume:
        if evaluate:
            raise UserError("--evaluate needs a checkpoint: --resume PATH")
        return None, None
    if resume == "auto" and not output_dir:
        raise UserError("--resume auto needs the folder of the run: --output_dir FOLDER")
    path = Path(output_dir if resume == "auto" else resume)
    if resume != "auto" and not path.is_dir():
        return path, checkpoints.load(path)
    order = (checkpoints.LAST, checkpoints.BEST)
    if found := checkpoints.find(path, order[::-1] if evaluate else order):
        return found
    if evaluate or resume != "auto":
        raise UserError(f"--resume {resume}: no checkpoint in {path}")
    if standing := [name for name in (OPTIONS, METRICS) if (path / name).exists()]:
        raise UserError(
            f"--output_dir {path}: holds {' and '.join(standing)} of a run, but no checkpoint to continue; "
            "put the checkpoint back or choose another folder"
        )
    print(f"--resume auto: no checkpoint in {path}, a new run begins", file=sys.stderr)
    return None, None


@contextlib.contextmanager
def folder(output_dir: str, resume: Path | None) -> Iterator[Path]:
    """The folder of a run, locked: --output_dir, or the checkpoint's folder, or a new folder in runs/.

    Raises:
        UserError: the folder cannot be used, another process writes into it, or it holds another run or a later checkpoint.
    """
    if output_dir:
        path = Path(output_dir)
    elif resume and any(resume.with_name(name).exists() for name in (OPTIONS, LOCK)):  # the lock exists before the options
        path = resume.parent
    else:
        names = (f"{time.strftime('%Y%m%d-%H%M%S')}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
        path = next(path for name in names if not (path := Path("runs") / name).exists())
    with locked(path):
        for name in (OPTIONS, METRICS, checkpoints.LAST, checkpoints.BEST):
            checkpoints.remove_left_behind(path / name)
        _check_rule(path, resume)
        yield path


def means_no_locks(failure: Exception) -> bool:
    """Whether a lock failed because its file system has none: filelock raises NotImplementedError for ENOSYS only."""
    return isinstance(failure, NotImplementedError) or getattr(failure, "errno", None) in (ENOLCK, ENOSYS, ENOTSUP)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it. The system releases the lock even if this process is killed.

    Raises:
        UserError: the folder cannot be made or written to, or another process holds its lock.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--output_dir {folder}: another process is writing into it; wait until that process ends or choose another folder"
        ) from None
    except (NotImplementedError, OSError) as failure:
        if isinstance(failure, OSError) and not means_no_locks(failure):
            where = reason(failure, folder)
            raise UserError(f"--output_dir {folder}: cannot be used ({where}); choose another folder") from failure
        print(f"warning: --output_dir {folder}: no file locks there; make sure no other run uses it", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def _check_rule(folder: Path, resume: Path | None) -> None:
    here = resume if resume and resume.parent.resolve() == folder.resolve() else None  # the checkpoint itself may be a link
    standing = [name for name in (OPTIONS, METRICS, checkpoints.LAST, checkpoints.BEST) if (folder / name).exists()]
    if standing and not here:
        raise UserError(f"--output_dir {folder}: holds a run already; --resume auto continues it, or choose another folder")
    if here and here.name != checkpoints.LAST and checkpoints.find(folder, (checkpoints.LAST,), quiet=True):
        raise UserError(
            f"--resume {resume}: {folder / checkpoints.LAST} is the last checkpoint of this run; resume it, "
            "or choose another --output_dir"
        )


def save(folder: Path, checkpoint: dict[str, Any], is_best: bool) -> None:
    """Write the metrics file from the checkpoint's history, then the checkpoint.

    A run that is killed in between resumes from the previous checkpoint and writes both again, so no line is ever missing.
    The metrics file appears after the first epoch.
    """
    if is_best:
        checkpoints.save(folder / checkpoints.BEST, checkpoint)
    if checkpoint["history"]:
        write_metrics(folder / METRICS, checkpoint["history"])
    checkpoints.save(folder / checkpoints.LAST, checkpoint)


def record(folder: Path, options: str, resume: Path | None, how: str) -> None:
    """Write the options (YAML) below one entry for each start of the run, the last of which is this start.

    Args:
        how: text of this entry: where the run starts, on what, and which options changed.
    """
    entries = []
    if resume:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # the original implementation's, or a copied checkpoint
            lines = resume.with_name(OPTIONS).read_text(encoding="utf-8").splitlines()
            entries = list(itertools.takewhile(lambda line: line.startswith(("# started", "# resumed", "#   ")), lines))
    at, command = time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(["python", *sys.argv])
    program = f"commit {commit()}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    entries.append(f"# {'resumed' if resume else 'started'} {at} {how}; host {socket.gethostname()}, {program}")
    entries.append(f"#   {''.join(c if c.isprintable() else '?' for c in command)}")
    text = "\n".join(entries) + "\n\n" + options
    checkpoints.write_atomically(folder / OPTIONS, lambda file: file.write(text.encode(errors="replace")))


def commit() -> str:
    """The commit of the program, marked if files differ from it; "unknown" for a copy without its repository."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    command += ["describe", "--always", "--dirty=+changes", "--abbrev=10", "--exclude=*"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's name another repository
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=own).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
