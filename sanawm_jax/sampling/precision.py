"""The number formats in which the networks compute: `--dtype` and `--precision`.

`--precision` is the format of stage 1's large matrix products:

`bf16`: they are computed in --dtype, as everything else is.
`fp8`: the linear layers that NVIDIA's release runs in FP8 store their weights in e4m3 and round
  their inputs to e4m3. Camera projections, embedders, convolutions over space and time, and the
  final layer stay in --dtype, because a rounded camera no longer follows its path.
"""

from __future__ import annotations

import contextlib
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

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PRECISIONS = ("bf16", "fp8")
FLOAT8_LAYERS = r"segments\..*\.(attn\.(qkv|out|gate)|cross_attn\.(q|kv|out)|ffn\.(up|down))"
_FIRST_CAPABILITY = 8.9  # Ada; Hopper is 9.0


def resolve_dtype(name: str) -> Any:
    """A dtype by its name.

    Raises:
      InputError: the name is unknown.
    """
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def matmul_precision(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """The context in which a network of this dtype is called.

    In float32, matrix products are computed in full float32, where a GPU would otherwise take TF32
    and a TPU bfloat16. In other dtypes the setting of the process stays.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def check_precision(name: str, dtype: Any, devices: int = 1) -> str:
    """Returns the name, and warns if this device emulates FP8.

    Args:
      dtype: the compute dtype of everything else.
      devices: the number of devices that share the frames of stage 1.

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
    if 0 < capability < _FIRST_CAPABILITY:  # 0: the GPU is not NVIDIA's
        raise InputError(
            "--precision=fp8 needs a GPU of compute capability 8.9 or more; "
            f"{device.device_kind} has {capability}"
        )
    return name


def build_dit(config: DiTConfig, precision: str) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and abstract parameters of the DiT in a checked precision."""
    return build_float8(DiT, config, FLOAT8_LAYERS) if precision == "fp8" else build(DiT, config)
