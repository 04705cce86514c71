"""A file of lines on a disk that is full for some time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from absl import logging

from sanawm_jax.training.engine.line_file import LineFile, truncate


def test_lines_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, warnings = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    room, write = [12], os.write

    def limited(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", limited)
    lines = LineFile(path, 0)
    for step in range(1, 5):
        lines.add({"step": step})
        lines.flush()
    assert len(warnings) == 1 and "No space left" in str(warnings[0])
    assert len(path.read_bytes()) == 12  # half of a line
    room[0] = 10**6
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "end",
    [
        b"\0" * 5,
        b"\0" * 4,
        b"\0" * 4096,
        b'{"step": 4',
        b"\xff\xfe\n",
        b"7\n",
        b"{}\n",
        b"[" * 9999,
    ],
)
def test_what_a_power_cut_leaves_is_cut_off(end: bytes, tmp_path: Path) -> None:
    whole = b"".join(b'{"step": %d}\n' % step for step in (1, 2, 3))
    (tmp_path / "a").write_bytes(whole + end)
    truncate(tmp_path / "a", 3)
    assert (tmp_path / "a").read_bytes() == whole
    (tmp_path / "a").write_bytes(whole + end)
    truncate(tmp_path / "a", 2)
    assert (tmp_path / "a").read_bytes() == whole[:-12]
