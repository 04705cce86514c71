"""Keys that a program has recorded: a JSON file with the keys that were held in each frame.

    ["w", "w", "wd", ""]                                   one text per frame
    [["w"], ["w"], ["w", "d"], []]                         one list per frame
    [{"w": true, "d": false}, ...]                         one object of switches per frame
    [{"keys": "w", "frames": 40}, {"keys": ["w", "d"]}]    runs; without a count, one frame
    "w-40,dw-20"                                           an action string

Each may also be the entry `actions`, `keys`, `held_keys` or `frames` of an object.
"""

from __future__ import annotations

import os
import reprlib
from typing import Any

from sanawm_jax.camera.actions import ACTION_KEYS, MAX_FRAMES, parse_actions
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.json_file import read_json

_LISTS = ("actions", "keys", "held_keys", "frames")
_COUNTS = ("frames", "num_frames", "count")
_FORMS = 'the keys of each frame such as ["w", "wd", ""], or runs: {"keys": "w", "frames": 40}'


def read_actions(text_or_path: str | os.PathLike) -> list[frozenset[str]]:
    """Reads an action string, or the JSON file of recorded keys that it names.

    Returns:
      One set of keys per frame; see `actions.parse_actions`.

    Raises:
      InputError: the string or the file is bad.
    """
    text = os.fspath(text_or_path)
    if not text.lower().endswith(".json"):
        return parse_actions(text)
    content = read_json(text)
    try:
        held = _frames(content)
    except InputError as error:
        raise InputError(f"{text}: {error}") from None
    if not held:
        raise InputError(f"{text} holds no frames; give {_FORMS}")
    return held


def _frames(content: Any) -> list[frozenset[str]]:
    if isinstance(content, dict):
        content = next((content[name] for name in _LISTS if name in content), None)
    if isinstance(content, str):
        return parse_actions(content)
    if not isinstance(content, list):
        raise InputError(f"it holds no frames; give {_FORMS}")
    held: list[frozenset[str]] = []
    for number, entry in enumerate(content):
        keys, count = _run(entry, number)
        if len(held) + count > MAX_FRAMES:
            raise InputError(f"entry {number} makes the path longer than {MAX_FRAMES} frames")
        held += [keys] * count
    return held


def _run(entry: Any, number: int) -> tuple[frozenset[str], int]:
    """Returns the keys of an entry, and for how many frames they are held."""
    count = 1
    if isinstance(entry, dict) and not entry.keys() & {"keys", "held_keys", "actions"}:
        if not all(isinstance(value, bool | int) for value in entry.values()):
            raise InputError(f"entry {number} is {reprlib.repr(entry)}; give {_FORMS}")
        entry = [name for name, is_held in entry.items() if is_held]
    elif isinstance(entry, dict):
        count = next((entry[name] for name in _COUNTS if name in entry), 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"entry {number} lasts {reprlib.repr(count)} frames; give 1 or more")
        entry = next(entry[name] for name in ("keys", "held_keys", "actions") if name in entry)
    if isinstance(entry, str):
        words = [] if entry.strip().lower() in ("", "none") else list("".join(entry.split("+")))
    elif isinstance(entry, list) and all(isinstance(word, str) for word in entry):
        words = [word for word in entry if word.strip().lower() not in ("", "none")]
    else:
        raise InputError(f"entry {number} is {reprlib.repr(entry)}; give {_FORMS}")
    # browsers call the key of a letter KeyW
    keys = frozenset(word.removeprefix("Key").strip().lower() for word in words) - {""}
    if unknown := sorted(keys - ACTION_KEYS):
        raise InputError(
            f"entry {number} has unknown keys {reprlib.repr(', '.join(unknown))}; known keys are w "
            "a s d i j k l"
        )
    return keys, count
