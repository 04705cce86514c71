"""A second run of `sample.py` finds the programs of the first, and makes the same latents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.environment import users_environment

ROOT = Path(__file__).parents[2]
CODE = """
import logging, runpy, sys
logging.getLogger("sanawm_jax.runtime.kept_programs").setLevel(logging.DEBUG)
sys.argv = ["sample.py", *sys.argv[1:]]
runpy.run_path("sample.py", run_name="__main__")
"""


def run(folder: Path, name: str) -> tuple[str, np.ndarray]:
    """What a run says, and its latents."""
    latents = folder / f"{name}.npy"
    words = ["--step=1", "--no_refiner", "--latents_only", f"--save_latents={latents}"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words, f"--output_dir={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**users_environment(), "SANAWM_COMPILATION_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, np.load(latents)


def test_nothing_is_traced_twice(tmp_path: Path) -> None:
    first, latents = run(tmp_path, "first")
    assert "Resetting" not in first
    files = sorted((tmp_path / "cache" / "programs").iterdir())
    names = [file.name.split("-")[0] for file in files]
    # two lengths of text
    assert names == ["_encode", "_noise", "_rows", "_run", "_run", "_start", "denoise_step"]
    assert (first.count(": kept"), first.count(": loaded")) == (7, 0)
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    second, again = run(tmp_path, "second")
    assert (second.count(": kept"), second.count(": loaded")) == (1, 6)  # one was damaged
    third, and_again = run(tmp_path, "third")
    assert (third.count(": kept"), third.count(": loaded")) == (0, 7)
    np.testing.assert_array_equal(latents, again)
    np.testing.assert_array_equal(latents, and_again)
