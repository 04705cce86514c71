"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields another name in the same folder, which becomes `path` if the block ends well.

    If the block raises, an earlier file at `path` stays as it was and nothing else is left. The
    other name has the same suffix and begins with a dot, so that a pattern such as `*.npy` does not
    match the rest that a killed process leaves.

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
