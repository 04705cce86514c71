"""Which implementation of a kernel runs; the one place to change after a measurement.

In this order: the call's own `impl`, `with choose(gdn="pallas"):`, the environment variable
`SANAWM_KERNELS=gdn=pallas,conv_glu=xla`, and `AUTO` on an NVIDIA GPU of Ampere's generation or
newer, else XLA. Everything that is not a GPU, and a program whose arrays are shared out over
several devices, runs XLA whatever is asked for: a Pallas call is a black box to the partitioner.
(Inside `jax.shard_map` each device runs its own.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

VARIABLE = "SANAWM_KERNELS"
# What "auto" is where matrix units take bfloat16, the fastest of `benchmarks.kernels` on an H100.
AUTO: dict[str, str] = {
    "attention": "mosaic",
    "conv_glu": "pallas",
    "gdn": "pallas",
    "ucpe": "pallas",
}
AMPERE, HOPPER = 8.0, 9.0  # compute capabilities: the first with bfloat16, and the one with wgmma
# lowest and highest that the default needs
_CAPABILITIES = {"attention": (HOPPER, HOPPER)}
_BFLOAT16 = (AMPERE, float("inf"))
# Every kernel's implementations, its portable one first.
IMPLS: dict[str, tuple[str, ...]] = {
    "attention": ("cudnn", "mosaic"),
    "conv_glu": ("xla", "xla_split", "pallas"),
    "gdn": ("xla", "pallas"),
    "ucpe": ("xla", "pallas"),
}

# part of the key of jit's cache: a change traces anew
_chosen = jax.make_user_context(default_value=())


def _checked(given: Mapping[str, str]) -> dict[str, str]:
    for kernel, impl in given.items():
        if kernel not in IMPLS:
            raise ValueError(f"unknown kernel {kernel!r}; use one of {', '.join(IMPLS)}")
        if impl not in ("auto", *IMPLS[kernel]):
            raise ValueError(f"{kernel}={impl!r}; use one of auto, {', '.join(IMPLS[kernel])}")
    return dict(given)


def parse(text: str) -> dict[str, str]:
    """`"gdn=pallas,conv_glu=xla"` as a dictionary.

    Raises:
      ValueError: not of this form, or an unknown kernel or implementation.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return _checked({name.strip(): value.strip() for name, _, value in pairs})


@contextmanager
def choose(**impls: str) -> Iterator[None]:
    """Overrides the choice for what is traced inside: `with choose(gdn="pallas"): ...`.

    Raises:
      ValueError: an unknown kernel or implementation.
    """
    merged = {**dict(_chosen.value), **_checked(impls)}
    with _chosen(tuple(sorted(merged.items()))):
        yield


def in_force() -> str:
    """What the environment and `choose` ask for here, as part of a program's name."""
    return repr((os.environ.get(VARIABLE, ""), _chosen.value))


def is_partitioned() -> bool:
    """Whether the partitioner, and not the program, shares arrays out over devices here."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and set(mesh.axis_types) != {AxisType.Manual}


def pick(kernel: str, impl: str | None = None) -> str:
    """The implementation to run.

    Args:
      kernel: a key of `IMPLS`.
      impl: what the caller wants, even off a GPU (a Pallas kernel is then interpreted: for
        tests); None or auto to go on to the other sources.

    Raises:
      ValueError: an unknown kernel or implementation.
    """
    if impl not in (None, "auto"):
        return _checked({kernel: impl})[kernel]
    if jax.default_backend() != "gpu" or is_partitioned():
        return IMPLS[kernel][0]
    wanted = {**parse(os.environ.get(VARIABLE, "")), **dict(_chosen.value)}
    found = wanted.get(kernel, "auto")
    if found != "auto":
        return found
    lowest, highest = _CAPABILITIES.get(kernel, _BFLOAT16)
    return AUTO[kernel] if lowest <= capability() <= highest else IMPLS[kernel][0]


def is_pallas(kernel: str, impl: str | None = None, dtype: Any = None) -> bool:
    """Whether the Triton form of a kernel of tokens is to run, see `pick`.

    Args:
      dtype: of the tokens. float32 ones fit neither a GPU's matrix units nor, as tiles, its shared
        memory, and go through XLA there whatever is chosen.
    """
    is_too_wide = dtype == jnp.float32 and not interpret()
    return not is_too_wide and pick(kernel, impl) == "pallas"


def capability() -> float:
    """The first device's compute capability, 9.0 for Hopper; 0 where it is no NVIDIA GPU."""
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", 0.0))
    except ValueError:  # AMD names an architecture
        return 0.0


def interpret() -> bool:
    """Whether Pallas kernels have to be interpreted: there is no GPU to compile them for."""
    return jax.default_backend() != "gpu"
