"""The exception that a user sees as one line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user. The message is one line that says what is wrong and what to do.

    The commands print it without a traceback and exit with status 2.
    """
