"""A file of JSON lines that a killed run, a full disk and a resumed run leave in order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from absl import logging


class LineFile:
    """Appends JSON objects, each with a `step`; a disk that is full never ends the run.

    Lines that cannot be written wait in memory, and go out when there is room again.

    Args:
      path: the file.
      step: of the restored checkpoint; lines of later steps are cut off.
    """

    def __init__(self, path: Path, step: int):
        truncate(path, step)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = b""
        self._warned = False

    def add(self, row: dict[str, Any]) -> None:
        """Queues a line."""
        self._waiting += json.dumps(row).encode() + b"\n"

    def flush(self, *, sync: bool = False) -> None:
        """Hands all lines to the system; with `sync` to the disk."""
        try:
            while self._waiting:
                # what was written of a line is not written again
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
            if sync:
                os.fsync(self._file)
        except OSError as error:
            if not self._warned:
                logging.warning(
                    "cannot write %s (%s); its lines wait in memory, free some space",
                    self._path,
                    error.strerror,
                )
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        """Writes what can be written."""
        self.flush()
        os.close(self._file)


def truncate(path: Path, step: int) -> None:
    """Cuts off lines later than `step`, and everything from the first damaged line on.

    A killed run leaves an unfinished line, and a power cut can leave zeros.
    """
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                # decoded here: `json.loads` takes bytes with zeros for UTF-16 or UTF-32
                is_later = json.loads(line.decode())["step"] > step
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            if is_later or not line.endswith(b"\n"):
                break
            kept += len(line)
    # one call of the system: a run killed here has the file before or after
    os.truncate(path, kept)
