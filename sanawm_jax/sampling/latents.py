"""Latents as arrays and files, and the initial noise.

Axis letters: B batch, C channels, F latent frames, H W (in files h w) latent rows and columns.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sanawm_jax.camera.npy import load_array
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError


def read_latents(
    value: str | os.PathLike | np.ndarray, shape: tuple[int, ...] | None, name: str = "latents"
) -> np.ndarray:
    """Latents (1, C, F, h, w) from an array or a .npy file, as float32.

    Args:
      value: the array or the file.
      shape: the shape that it must have; None accepts one clip of any size.
      name: what messages call the array.

    Raises:
      InputError: the array cannot be read, is not finite, or has another shape.
    """
    array = load_array(value, name)
    if shape is None and (array.ndim != 5 or array.shape[0] != 1):
        raise InputError(f"{name} have shape {array.shape}, expected (1, C, T, h, w)")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} have shape {array.shape}, this video needs {shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{name} hold NaN or infinity")
    return array


def check_finite(latents: np.ndarray, what: str) -> None:
    """Raises `InputError` if a result holds NaN or infinity, which is seen before it is decoded."""
    if not np.isfinite(latents).all():
        raise InputError(
            f"{what} gave NaN or infinity: its weights or adapters are damaged, or --dtype is too "
            "narrow for them"
        )


def write_npy(file: str | os.PathLike, array: Any) -> Path:
    """Writes an array whole or not at all."""
    # through a stream, since `np.save` would add .npy to a name without it
    with atomic_write(file) as partial, partial.open("wb") as stream:
        np.save(stream, array)
    return Path(file)


def channels_last(latents: Any) -> Any:
    """Latents or noise as files have them, (B, C, F, H, W), to the networks' (B, F, H, W, C)."""
    return rearrange(latents, "B C F H W -> B F H W C")


def channels_first(latents: Any) -> Any:
    """The inverse of `channels_last`."""
    return rearrange(latents, "B F H W C -> B C F H W")


@jax.jit(static_argnames="shape")
def draw_noise(seed: np.uint32 | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal (B, F, H, W, C) of a seed, drawn as (B, C, F, H, W): `shape`."""
    return channels_last(jax.random.normal(jax.random.key(seed), shape, jnp.float32))
