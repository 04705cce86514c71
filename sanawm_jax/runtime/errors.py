"""The exception that the command lines print as one line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: one line that says what is wrong and what to do.

    The command lines print it without a traceback and exit with status 2.
    """

    def __init__(self, line: object = ""):
        # names in a user's files may hold line breaks, and characters that no terminal can print
        text = str(line)
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
