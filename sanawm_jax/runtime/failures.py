"""The message when a run fails half-way: one line that says what to try."""

from __future__ import annotations

import errno

INTERRUPTED = 130  # the shell's exit status after Ctrl-C


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
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        line = f"the disk is full{where}; free some space, or choose another --output_dir"
    else:
        return None
    return "; ".join([line, *getattr(error, "__notes__", [])])
