"""Errors the user can fix: reported in one line, without a traceback."""

import io
import os
import sys
import warnings


class UserError(Exception):
    """Something outside the program is wrong. The message is one line naming the file or option, and the remedy."""


class UsageError(UserError):
    """Options that cannot be meant."""


def warn_in_one_line() -> None:
    """Show warnings without the place in the source."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


class _Output(io.FileIO):
    """Standard output that may be lost: its reader may go, as in `... | head`, or the disk of a log be full."""

    lost = False

    def write(self, text) -> int:
        try:
            return len(text) if self.lost else super().write(text)
        except OSError as failure:
            self.lost = True
            if not isinstance(failure, BrokenPipeError):
                warnings.warn(f"standard output cannot be written ({failure.strerror}); continuing without it", stacklevel=1)
            return len(text)


def outlive_output() -> None:
    """Continue when standard output is lost or cannot spell a name: a training must not be lost with it."""
    if sys.stdout is None:  # closed from the start
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
    elif sys.stdout is sys.__stdout__:
        raw = _Output(sys.stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), sys.stdout.encoding, "backslashreplace", line_buffering=True)
