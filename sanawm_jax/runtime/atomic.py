"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the same folder. It is renamed to `path` if the block succeeds.

    If the block raises, the temporary file is deleted, and an earlier file at `path` does not
    change. The temporary name has the same suffix and begins with a dot, so a pattern such as
    `*.npy` does not match the file that a killed process leaves behind.

    Args:
      path: the file to write; its folder must exist.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
