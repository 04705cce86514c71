"""Lowers Pallas kernels for an H100 on a machine that has none."""

from __future__ import annotations

import contextlib

import jax
from jax.sharding import AbstractMesh, AxisType


def target():
    """A context in which Pallas lowers for an H100."""
    if jax.__version_info__ < (0, 11):  # it does not ask which GPU it is for
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice

    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(function, *args):
    """Returns the text of `function`, lowered for CUDA. Raises if it cannot be lowered."""
    with target():
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def triton_kernels(function, *args):
    """Returns the names of the Triton kernels in `function`."""
    text = lowered(function, *args)
    return (
        [part.split('"')[0] for part in text.split('name = "')[1:]]
        if "xla.gpu.triton" in text
        else []
    )
