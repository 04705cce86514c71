"""The message when a run fails half-way: one line that says what to try."""

from __future__ import annotations

import errno
import os
import re
import traceback

INTERRUPTED = 130  # the shell's exit status after Ctrl-C


def device_problem(error: BaseException) -> str | None:
    """One line if JAX has no device of the kind that the environment asks for; None otherwise."""
    frames = traceback.extract_tb(error.__traceback__)
    is_of_backends = bool(frames) and "xla_bridge" in frames[-1].filename
    # JAX 0.10 raises a bare AssertionError for a platform that it does not find
    if not (is_of_backends and isinstance(error, AssertionError | RuntimeError)):
        return None
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if not wanted:
        return f"JAX cannot use this machine's devices ({_first_line(error)})"
    return (
        f"JAX has no device for JAX_PLATFORMS={wanted}; unset JAX_PLATFORMS, or install JAX for "
        "this device, such as pip install 'jax[cuda13]'"
    )


def explain(error: BaseException) -> str | None:
    """One line for a failure that is not a bug of the program; None for all others.

    Args:
      error: what ended the run. Its notes, `BaseException.add_note`, are part of the line.
    """
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        line = "interrupted"
    elif "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        line = (
            "out of device memory; try --offload=model, then --offload=block, then fewer "
            "--num_frames or --config.vae_tiling=always"
        )
    elif isinstance(error, MemoryError):
        line = "out of host memory; try fewer --num_frames, and --offload=model in place of block"
    elif isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT)
        or re.fullmatch(r"\d+ requested and \d+ written", str(error))  # NumPy's, without a number
    ):
        where = f" at {error.filename}" if error.filename else ""
        line = f"the disk is full{where}; free some space, or choose another --output_dir"
    else:
        return None
    return "; ".join([line, *getattr(error, "__notes__", [])])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
