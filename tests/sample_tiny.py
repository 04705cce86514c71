"""`command.sample` at the sizes of tiny weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sanawm_jax.sampling import command
from sanawm_jax.sampling.options import SampleOptions

DEFAULTS: dict[str, Any] = dict(
    action_mapping="sana",
    intrinsics="60,60,32,32",
    num_frames=9,
    height=64,
    width=64,
    fps=16.0,
    step=1,
    cfg_scale=1.0,
    seed=0,
    text_length=12,
    dtype="float32",
    name="a",
)


def sample(**given: Any) -> Path:
    """Runs with the given options and, for the others, `DEFAULTS`."""
    return command.sample(SampleOptions(**{**DEFAULTS, **given}))
