"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from sanawm_jax.runtime.errors import InputError


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
    partial = _partial(path)
    try:
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Hands a file to the disk, so that after a power cut its name never shows an empty file."""
    with contextlib.suppress(OSError):  # a file system without this operation
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_output(path: str | os.PathLike) -> Path:
    """Checks, before a long run, that `atomic_write` will be able to write a file at its end.

    Args:
      path: the file; its folder is made if it does not exist.

    Raises:
      InputError: the folder cannot be made or does not accept files, `path` is a folder, or the
        name is too long.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _partial(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", 0) == errno.ENAMETOOLONG:
            reason = "its name is too long, with the 15 characters that an unfinished file needs"
        raise InputError(f"cannot write {path}: {reason}") from error
    return path


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
