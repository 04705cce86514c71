"""Names of files and of zip members, as different systems write them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, TypeVar

from sanawm_jax.runtime.errors import InputError

_T = TypeVar("_T")


def one_form(name: str) -> str:
    """Returns a name in composed Unicode: macOS writes an e and an accent where others write é."""
    return unicodedata.normalize("NFC", name)


def is_companion(name: str) -> bool:
    """Whether a file, or the member of a zip, is no file of the user.

    macOS writes `._NAME` beside NAME on foreign disks, and `__MACOSX/` into zips. A name that
    begins with a dot is hidden, or is a file that a writer did not finish.
    """
    parts = PurePosixPath(name).parts
    return bool(parts) and (parts[-1].startswith(".") or "__MACOSX" in parts)


def by_name(pairs: Iterable[tuple[str, _T]], where: Any) -> dict[str, _T]:
    """Returns the values by their names in one Unicode form.

    Raises:
      InputError: two names become equal.
    """
    found: dict[str, _T] = {}
    for name, value in pairs:
        key = one_form(name)
        if key in found:
            raise InputError(f"{where} has two entries {name}; rename one of them")
        found[key] = value
    return found
