"""Compiled programs are kept by default, and no run fails for want of a place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sanawm_jax.runtime.compilation_cache import VARIABLE, cache_folder

CODE = """
import jax, jax.numpy as jnp
from sanawm_jax.runtime import compilation_cache
compilation_cache._MIN_SECONDS = 0.0
print(compilation_cache.use_compilation_cache())
print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((3, 3)))))
"""


def run(**environment: str) -> tuple[str, str]:
    others = (VARIABLE, "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in others}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**kept, **environment}
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert float(second) == pytest.approx(8.955, abs=1e-3)
    return first, done.stderr


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sanawm_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "sanawm_jax" / "xla"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "y"))
    assert cache_folder() == tmp_path / "y"
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_folder() is None


def test_programs_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "sanawm_jax" / "xla"
    assert run(XDG_CACHE_HOME=str(tmp_path))[0] == str(folder)
    assert any(file.name.endswith("-cache") for file in folder.iterdir())


def test_off_and_unwritable(tmp_path: Path) -> None:
    assert run(**{VARIABLE: "off", "XDG_CACHE_HOME": str(tmp_path)})[0] == "None"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    assert run(**{VARIABLE: str(tmp_path / "file" / "under")})[0] == "None"
