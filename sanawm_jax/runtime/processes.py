"""Connects the processes of one run, and lets the first process act for all of them."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sanawm_jax.runtime.errors import InputError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> bool:
    """Calls `jax.distributed.initialize` if this process is one of several processes of a run.

    Call this function before anything uses the devices. A value that is not given is read from the
    variable JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID.

    Args:
      coordinator: host:port of the first process.
      num_processes: number of processes.
      process_id: number of this process, from 0 on.
      detect: read missing values from the scheduler (Slurm, Open MPI, Kubernetes, a TPU pod), as
        JAX does.

    Returns:
      Whether the run has several processes. Without any argument or variable it is False, and
      nothing is tried.

    Raises:
      InputError: a value is missing or is not a number, or the other processes cannot be reached.
    """
    given = {
        name: os.environ.get(name) if value is None else str(value)
        for name, value in zip(_VARIABLES, (coordinator, num_processes, process_id), strict=True)
    }
    found = {name: value for name, value in given.items() if value}
    if not found and not detect:
        return False
    missing = [name for name in _VARIABLES if name not in found]
    if missing and not detect:
        raise InputError(
            f"a run of several processes lacks {', '.join(missing)}; give --coordinator, "
            "--num_processes and --process_id, or --distributed for the scheduler's"
        )
    try:
        options: dict[str, Any] = {
            "coordinator_address": found.get(_VARIABLES[0]),
            "num_processes": int(found[_VARIABLES[1]]) if _VARIABLES[1] in found else None,
            "process_id": int(found[_VARIABLES[2]]) if _VARIABLES[2] in found else None,
        }
        # If all three values are known, there is nothing to detect.
        jax.distributed.initialize(
            **options, cluster_detection_method=None if missing else "deactivate"
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"cannot join the processes of the run ({str(error).splitlines()[0][:200]})"
        ) from error
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints messages."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until all processes call this function; `what` names the barrier in error messages."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def to_first(tree: Any) -> Any:
    """Gathers a tree that is divided over all processes into host arrays of the first process.

    The leaves are gathered one after the other, so no device holds more than one whole leaf. All
    processes must call this function. In the other processes, every leaf of the result is None.
    """

    def one(a: jax.Array) -> np.ndarray | None:
        whole = NamedSharding(a.sharding.mesh, PartitionSpec())  # pyright: ignore
        gathered = jax.jit(lambda x: x, out_shardings=whole)(a)
        return np.asarray(gathered) if is_first() else None

    return tree if jax.process_count() == 1 else jax.tree.map(one, tree)
