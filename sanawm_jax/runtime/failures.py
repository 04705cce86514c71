"""The line that a user sees when a run fails: what happened, and what to try."""

from __future__ import annotations

import errno

INTERRUPTED = 130  # the exit status that shells use after Ctrl-C


def explain(error: BaseException) -> str | None:
    """Returns one line for a failure that is not a defect of the program, else None.

    Args:
      error: the exception that ended the run. The line also contains its notes, see
        `BaseException.add_note`.
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
