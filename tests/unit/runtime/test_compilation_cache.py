"""Compiled programs are kept by default, in a safe place, and no run fails because of the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from sanawm_jax.runtime.compilation_cache import VARIABLE, cache_folder, use_compilation_cache

CODE = """
import jax, jax.numpy as jnp
from sanawm_jax.runtime import compilation_cache
print(compilation_cache.use_compilation_cache())
print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((3, 3)))))
"""
SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without settings of the cache. JAX's settings are restored after a test."""
    for name in (VARIABLE, "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sanawm_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "sanawm_jax" / "xla"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "y"))
    assert cache_folder() == tmp_path / "y"
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_folder() is None and use_compilation_cache() is None


def test_programs_are_kept(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sanawm_jax" / "xla"
    first, second = done.stdout.splitlines()
    assert first == str(folder) and float(second) == pytest.approx(8.955, abs=1e-3)
    assert any(file.name.endswith("-cache") for file in folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o700


def test_unwritable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "under"))
    assert use_compilation_cache() is None


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv(VARIABLE, str(folder))
    with pytest.warns(UserWarning, match=r"not kept: other users own or can write to .*shared"):
        assert use_compilation_cache() is None
    folder.chmod(0o755)  # others may read
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_compilation_cache() == folder


def test_a_folder_of_another_user_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "theirs"))
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.warns(UserWarning, match="chmod 700 it, or set SANAWM_COMPILATION_CACHE"):
        assert use_compilation_cache() is None
