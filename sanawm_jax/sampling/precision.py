"""In what the large matrix products of stage 1 are computed, `--precision`.

`bf16`: in --dtype, as everything else.
`fp8`: the linear layers that NVIDIA's release runs in FP8 hold e4m3 weights and round their inputs
  to it. Camera projections, embedders, convolutions over space and time, and the final layer never
  do: rounding the camera's geometry loses the path.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import choice
from sanawm_jax.core.float8 import build_float8
from sanawm_jax.core.params import Params, build
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.runtime.errors import InputError

PRECISIONS = ("bf16", "fp8")
FLOAT8_LAYERS = r"segments\..*\.(attn\.(qkv|out|gate)|cross_attn\.(q|kv|out)|ffn\.(up|down))"
_FIRST_CAPABILITY = 8.9  # Ada; Hopper is 9.0


def check_precision(name: str, dtype: Any, devices: int = 1) -> str:
    """The name itself; a note where FP8 is emulated.

    Args:
      dtype: compute dtype of all else.
      devices: that share stage 1's frames out.

    Raises:
      InputError: it is unknown, or this dtype, device or number of devices cannot run it.
    """
    if name not in PRECISIONS:
        raise InputError(f"--precision={name} is unknown; use one of {', '.join(PRECISIONS)}")
    if name == "bf16":
        return name
    if dtype == jnp.float32:
        raise InputError(
            "--dtype=float32 is float32 everywhere; --precision=fp8 needs --dtype=bfloat16"
        )
    if devices > 1:
        raise InputError("--precision=fp8 runs on one device, not with --devices")
    device = jax.devices()[0]
    if device.platform != "gpu":
        warnings.warn(
            f"--precision=fp8 is emulated on a {device.platform}: slower than bf16", stacklevel=2
        )
        return name
    capability = choice.capability()
    if 0 < capability < _FIRST_CAPABILITY:  # 0 is no card of NVIDIA's
        raise InputError(
            "--precision=fp8 needs a GPU of compute capability 8.9 or more; "
            f"{device.device_kind} has {capability}"
        )
    return name


def build_dit(config: DiTConfig, precision: str) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and abstract parameters of the DiT in a checked precision."""
    return build_float8(DiT, config, FLOAT8_LAYERS) if precision == "fp8" else build(DiT, config)
