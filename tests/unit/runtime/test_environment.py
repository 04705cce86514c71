"""What a user's environment may hold: a device that is not there, closed streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
NO_DEVICE = """
import sys
import jax
from sanawm_jax.runtime.command_line import end_with
try:
    jax.devices()
except Exception as error:
    end_with(error)
"""
CLOSED = """
import os, sys
from sanawm_jax.runtime.command_line import open_standard_streams
open_standard_streams()
file = open(sys.argv[1], "wb")
print("to nobody", file=sys.stderr, flush=True)
os.write(2, b"of a library")
file.write(b"content")
"""


def test_a_device_that_is_not_there_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_DEVICE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: JAX has no device for JAX_PLATFORMS=cuda; unset JAX_PLATFORMS")
    assert "Traceback" not in done.stderr


def test_closed_streams(tmp_path: Path) -> None:
    command = f"exec '{sys.executable}' -c '{CLOSED}' '{tmp_path / 'file'}' 2>&- <&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout == ""
    assert (tmp_path / "file").read_bytes() == b"content"
