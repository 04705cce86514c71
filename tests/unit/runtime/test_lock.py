"""One program at a time in a folder, also after a program was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.lock import only_run_in

HOLD = """
import sys, time
from pathlib import Path
from sanawm_jax.runtime.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_program_is_refused(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another run .* \(process {other.pid} on "):
            with only_run_in(tmp_path):
                pass
        other.kill()
        other.wait()
    with only_run_in(tmp_path), pytest.raises(InputError, match="another run"):
        with only_run_in(tmp_path):
            pass
    with only_run_in(tmp_path):
        pass
