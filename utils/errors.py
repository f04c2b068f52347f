"""What a person can mend: told in one line, without a traceback."""


class UserError(Exception):
    """Something outside the program is wrong. The message is one line naming the file or option, and the remedy."""
