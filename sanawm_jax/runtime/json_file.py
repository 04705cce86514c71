"""Reads JSON that other programs wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sanawm_jax.runtime.errors import InputError


def read_json(path: str | os.PathLike) -> Any:
    """Returns the content of a JSON file; a byte order mark, which Windows writes, is skipped.

    Raises:
      InputError: the file cannot be opened, or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror or 'not readable'}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    return parse_json(text, path)


def parse_json(text: str, path: str | os.PathLike) -> Any:
    """Returns the content of a text; the error line names `path`.

    Raises:
      InputError: it is not JSON, or an object has two entries of one name.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"has two entries {twice!r}; keep one of them")
    return found


def read_note(path: str | os.PathLike) -> dict[str, Any]:
    """Returns what a program of ours noted about its progress.

    A note that does not exist, or that a power cut has damaged, is empty: the work begins again.
    """
    try:
        note = json.loads(Path(path).read_bytes().decode())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("done", 0), int) else {}
