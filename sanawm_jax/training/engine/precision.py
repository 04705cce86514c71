"""In what numbers a run computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def compute_dtype(name: str) -> jnp.dtype:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
