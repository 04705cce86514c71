"""Compiled programs kept from run to run, so that only the first run waits for the compiler."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SANAWM_COMPILATION_CACHE"  # a folder, or off
_MIN_SECONDS = 0.0  # a run's two dozen small programs together take a second to compile


def cache_folder() -> Path | None:
    """The folder that the environment asks for; None if it asks for none."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "0", "none", "false"):
        return None
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sanawm_jax" / "xla"


def use_compilation_cache() -> Path | None:
    """Switches JAX's persistent cache on, unless JAX was told where to keep it already.

    Returns:
      The folder, or None: it is off, JAX has its own, or it cannot be written. No run fails for
      want of a cache.
    """
    import jax

    from sanawm_jax.runtime import kept_programs

    folder = cache_folder()
    if folder is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    kept_programs.keep_in(folder / "programs")
    return folder
