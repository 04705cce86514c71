"""JAX's persistent cache of compiled programs, so that only the first run waits for the compiler.

The files in it run as machine code, so the folder must belong to the user, and nobody else may
write to it.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

VARIABLE = "SANAWM_COMPILATION_CACHE"  # the path of a folder, or "off"
_MIN_SECONDS = 0.0  # the two dozen small programs of a run take a second to compile together


def cache_folder() -> Path | None:
    """Returns the folder that the environment selects, or None if it switches the cache off."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "0", "none", "false"):
        return None
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sanawm_jax" / "xla"


def use_compilation_cache() -> Path | None:
    """Switches JAX's persistent cache on, unless JAX_COMPILATION_CACHE_DIR has done so already.

    A new folder gets mode 0700. A folder that another user owns or can write to is not used, and a
    warning says so.

    Returns:
      The folder, or None: the cache is off, JAX has its own, or the folder cannot be used. A run
      never fails because of its cache.
    """
    import jax

    folder = cache_folder()
    if folder is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    if not os.access(folder, os.W_OK):
        return None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        warnings.warn(
            f"compiled programs are not kept: other users own or can write to {folder}; "
            f"chmod 700 it, or set {VARIABLE} to a folder of your own",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    return folder
