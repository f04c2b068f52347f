"""What a person can mend: told in one line, without a traceback."""

import warnings


class UserError(Exception):
    """Something outside the program is wrong. The message is one line naming the file or option, and the remedy."""


def warn_in_one_line() -> None:
    """Show warnings without the place in the source."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
