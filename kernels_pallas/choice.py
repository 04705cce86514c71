"""Chooses the implementation of a kernel. After a measurement, this is the only file to change.

The choice is made in this order: the `impl` argument of the call; the context manager
`with choose(gdn="pallas"):`; the environment variable `SANAWM_KERNELS=gdn=pallas,conv_glu=xla`;
and the table `AUTO` on an NVIDIA GPU of the Ampere generation or newer. Otherwise XLA runs.

Without an `impl` argument, XLA always runs on devices that are not GPUs, and in programs whose
arrays the compiler divides over several devices, because the partitioner cannot see into a Pallas
call. (Inside `jax.shard_map` each device runs its own call, so this limit does not apply there.)
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
# What "auto" means on a GPU whose tensor cores take bfloat16. These implementations were the
# fastest ones of `benchmarks.kernels` on an H100.
AUTO: dict[str, str] = {
    "attention": "mosaic",
    "conv_glu": "pallas",
    "gdn": "pallas",
    "ucpe": "pallas",
}
# Compute capabilities: Ampere is the first with bfloat16, and Hopper is the one with wgmma.
AMPERE, HOPPER = 8.0, 9.0
# The lowest and the highest compute capability for which `AUTO` is used.
_CAPABILITIES = {"attention": (HOPPER, HOPPER)}
_BFLOAT16 = (AMPERE, float("inf"))
# The implementations of every kernel. The first one is portable.
IMPLS: dict[str, tuple[str, ...]] = {
    "attention": ("cudnn", "mosaic"),
    "conv_glu": ("xla", "xla_split", "pallas"),
    "gdn": ("xla", "pallas"),
    "ucpe": ("xla", "pallas"),
}

# This context is part of the key of jit's cache, so a change leads to a new trace.
_chosen = jax.make_user_context(default_value=())


def _checked(given: Mapping[str, str]) -> dict[str, str]:
    for kernel, impl in given.items():
        if kernel not in IMPLS:
            raise ValueError(f"unknown kernel {kernel!r}; use one of {', '.join(IMPLS)}")
        if impl not in ("auto", *IMPLS[kernel]):
            raise ValueError(f"{kernel}={impl!r}; use one of auto, {', '.join(IMPLS[kernel])}")
    return dict(given)


def parse(text: str) -> dict[str, str]:
    """Parses a text such as `"gdn=pallas,conv_glu=xla"` into a dictionary.

    Raises:
      ValueError: the text does not have this form, or names an unknown kernel or implementation.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return _checked({name.strip(): value.strip() for name, _, value in pairs})


@contextmanager
def choose(**impls: str) -> Iterator[None]:
    """Overrides the choice for everything that is traced inside `with choose(gdn="pallas"): ...`.

    Raises:
      ValueError: an unknown kernel or implementation.
    """
    merged = {**dict(_chosen.value), **_checked(impls)}
    with _chosen(tuple(sorted(merged.items()))):
        yield


def in_force() -> str:
    """Returns what the environment and `choose` request here, as part of a program's name."""
    return repr((os.environ.get(VARIABLE, ""), _chosen.value))


def is_partitioned() -> bool:
    """Whether the compiler's partitioner, and not the program, divides arrays over devices here."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and set(mesh.axis_types) != {AxisType.Manual}


def pick(kernel: str, impl: str | None = None) -> str:
    """Returns the implementation to run.

    Args:
      kernel: a key of `IMPLS`.
      impl: the implementation that the caller wants. It is used even without a GPU, where a Pallas
        kernel runs in the interpreter; tests do this. With None or "auto" the other sources decide.

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
    """Whether the Pallas implementation of a kernel that reads tokens should run; see `pick`.

    Args:
      dtype: dtype of the tokens. float32 tokens do not fit the tensor cores of a GPU, and their
        tiles do not fit its shared memory. There they always go through XLA.
    """
    is_too_wide = dtype == jnp.float32 and not interpret()
    return not is_too_wide and pick(kernel, impl) == "pallas"


def capability() -> float:
    """Returns the compute capability of the first device, 9.0 for Hopper; 0 if it is not NVIDIA."""
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", 0.0))
    except ValueError:  # on AMD it is the name of an architecture
        return 0.0


def interpret() -> bool:
    """Whether Pallas kernels must run in the interpreter, because there is no GPU."""
    return jax.default_backend() != "gpu"
