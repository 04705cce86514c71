"""What `sample.py` refines with when no flag says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# the command itself only says what it was asked for
CODE = """
import runpy, sys
from sanawm_jax.sampling import command
command.sample = lambda **options: (options["weights"], options["refiner_weights"])
sys.argv = ["sample.py", *sys.argv[1:]]
runpy.run_path("sample.py", run_name="__main__")
"""
SMALL, REFINER = "small_world", "small_world_refiner"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (SMALL, REFINER)),
        (["--stage1_latents=x.npy"], (SMALL, REFINER)),
        (["--refiner_weights", REFINER], (SMALL, REFINER)),
        (["--refiner_weights", ""], (SMALL, None)),
        (["--no_refiner"], (SMALL, None)),
        # who names stage 1 also names stage 2
        (["--weights", SMALL], (SMALL, None)),
        (["--weights", SMALL, "--refiner_weights", "mine"], (SMALL, "mine")),
        (["--weights", "other"], ("other", None)),
        (["--config=configs/sample_small_world.py", "--weights", "other"], ("other", None)),
        (["--config.weights=other"], ("other", None)),
        (["--weights", "other", "--refiner_weights", REFINER], ("other", REFINER)),
    ],
)
def test_refiner(words: list[str], expected: tuple[str, str | None]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(expected)
