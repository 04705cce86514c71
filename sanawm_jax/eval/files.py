"""The JSON files that evaluations read and write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a complete JSON file, and creates its folder if necessary.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: it does not exist or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from error
