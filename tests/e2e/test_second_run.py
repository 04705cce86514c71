"""A second run of `sample.py` compiles nothing, and makes the same latents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.environment import users_environment

ROOT = Path(__file__).parents[2]


def run(folder: Path, name: str) -> tuple[set[str], np.ndarray]:
    """Returns the names of the cached programs after a run, and the latents of the run."""
    latents, cache = folder / f"{name}.npy", folder / "cache"
    words = ["--step=1", "--no_refiner", "--latents_only", f"--save_latents={latents}"]
    done = subprocess.run(
        [sys.executable, "sample.py", *words, f"--output_dir={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**users_environment(), "SANAWM_COMPILATION_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    return {file.name for file in cache.glob("*-cache")}, np.load(latents)


def test_nothing_is_compiled_twice(tmp_path: Path) -> None:
    first, latents = run(tmp_path, "first")
    assert any("denoise_step" in name for name in first)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    second, again = run(tmp_path, "second")
    assert second == first
    np.testing.assert_array_equal(latents, again)
