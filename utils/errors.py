"""Errors the user can fix: reported in one line, without a traceback."""

import contextlib
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch

import models


class UserError(Exception):
    """Something outside the program is wrong. The message is one line naming the file or option, and the remedy."""


class UsageError(UserError):
    """Invalid options."""


def in_one_line(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorator of a program's `main`: an error that the user can fix prints one line on stderr, without a traceback.

    The exit status is 2 for invalid options, 130 after Ctrl-C (a run saves first), else 1.
    """

    @functools.wraps(main)
    def reporting(argv=None) -> int:
        prepare_output()
        try:
            return main(argv) or 0
        except UsageError as error:
            print(f"{os.path.basename(sys.argv[0])}: error: {error} (--help lists the options)", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (UserError, models.BackendError) as error:
            message = str(error)
        except OSError as failure:
            message = f"{failure.filename}: {failure.strerror}" if failure.filename else str(failure)
        print(f"error: {message}", file=sys.stderr)
        return 1

    return reporting


def shown(text: object) -> str:
    """Text of a file or a user, for a message: one printable line of about 600 characters at most."""
    line = " ".join(str(text).split())
    line = line if line.isprintable() else line.encode("unicode_escape").decode()
    return line if len(line) < 600 else line[:600] + " ..."


def reason(failure: OSError, path: Path) -> str:
    """Why a path cannot be used. For a broken link, the system's own text can be misleading."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a broken link"
    return failure.strerror or str(failure)


def not_finite(where: str, what: str, dynamics: models.Dynamics) -> UserError:
    """The error for numbers that are not finite. The remedy names the constants that are not at their defaults, if any."""
    of_parts = [(part, field) for part in (dynamics.rule, dynamics, dynamics.neuron) for field in fields(part)]
    values = {field.name: (getattr(part, field.name), field.default) for part, field in of_parts}
    changed = [f"--{n} {value}" for n, (value, usual) in values.items() if isinstance(usual, float) and value != usual]
    nearer = f"values of {', '.join(changed)} nearer to the defaults, or " if changed else ""
    remedy = f"Try {nearer}a lower --learning_rate or --max_grad_norm"
    return UserError(f"{where}: not finite: {what}; the last checkpoint stays. {remedy}")


@contextlib.contextmanager
def out_of_memory_in_one_line(batch_size: int) -> Iterator[None]:
    """If the CPU's or the GPU's memory runs out, raise a UserError that names a smaller batch (1 or 0: a smaller network)."""
    try:
        yield
    except (MemoryError, RuntimeError) as failure:
        on_cpu = isinstance(failure, MemoryError) or "can't allocate memory" in str(failure)
        if not (on_cpu or isinstance(failure, torch.OutOfMemoryError)):
            raise
        remedy = f"try --batch_size {batch_size // 2}" if batch_size > 1 else "choose a smaller --memory_size"
        raise UserError(f"out of memory; {remedy}") from failure


class _Output(io.FileIO):
    """Standard output or standard error. It may be lost: its reader ends, as in `... | head`, or the disk is full."""

    lost = False

    def write(self, text) -> int:
        try:
            return len(text) if self.lost else super().write(text)
        except OSError as failure:
            self.lost = True
            if self.fileno() == 1 and not isinstance(failure, BrokenPipeError):
                warnings.warn(f"standard output cannot be written ({failure.strerror}); continuing without it", stacklevel=1)
            return len(text)


def prepare_output() -> None:
    """Show warnings in one line, and continue if an output is closed, is lost or cannot encode a character."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start: without a substitute, libraries would print into the next opened file
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
            os.set_inheritable(getattr(sys, name).fileno(), True)  # also for the processes that this one starts
        elif stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True))
