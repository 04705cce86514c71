"""A message for a user is one line that every terminal can print."""

from __future__ import annotations

import pickle

from sanawm_jax.runtime.errors import InputError


def test_a_message_is_one_printable_line() -> None:
    error = InputError("no file a\nb\r\u2028c\ud800 in café")
    assert str(error) == "no file a\\nb\\r\\u2028c\\ud800 in café"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
