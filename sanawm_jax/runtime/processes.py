"""Several processes of one run: joining them, and what only the first one does."""

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
    """Calls `jax.distributed.initialize` if the run was started as one of several processes.

    It must be called before anything asks for devices. Arguments that are None are read from the
    environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      coordinator: host:port of the first process.
      num_processes, process_id: how many there are, and which this one is.
      detect: ask the scheduler (Slurm, Open MPI, Kubernetes, a TPU pod), as far as JAX knows it.

    Returns:
      Whether there are several processes; without arguments and variables nothing is tried.

    Raises:
      InputError: a part is missing or is no number, or the others cannot be reached.
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
        # with all three nothing is left to detect
        jax.distributed.initialize(
            **options, cluster_detection_method=None if missing else "deactivate"
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"cannot join the processes of the run ({str(error).splitlines()[0][:200]})"
        ) from error
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until all processes are here; `what` names the barrier in messages."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def to_first(tree: Any) -> Any:
    """Gathers a tree that is distributed over all processes into host arrays of the first one.

    It gathers leaf by leaf, so that no device holds more than one whole leaf. All processes have to
    call it; the others get None in place of the leaves.
    """

    def one(a: jax.Array) -> np.ndarray | None:
        whole = NamedSharding(a.sharding.mesh, PartitionSpec())  # pyright: ignore
        gathered = jax.jit(lambda x: x, out_shardings=whole)(a)
        return np.asarray(gathered) if is_first() else None

    return tree if jax.process_count() == 1 else jax.tree.map(one, tree)
