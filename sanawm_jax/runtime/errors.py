"""The exception that the command lines print as one line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: one line that says what is wrong and what to do.

    The command lines print it without a traceback and exit with status 2.
    """
