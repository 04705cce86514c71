"""What stays on the accelerator between uses, `--offload`.

`none`: every network that was used once, within a stage.
`model`: the network that runs; it is read again when it is needed again.
`block`: of that network, two layers: one that runs and one whose copy runs beside it. The others
  wait in host memory, but for those that the device has room for once a first call (a step, or a
  block of frames) has shown what it needs: they stay. A text tower runs once or twice, and none
  stay. Embeddings, heads and the VAE are on the device whole.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sanawm_jax.checkpoints.folder import Place
from sanawm_jax.core.sharding import make_mesh
from sanawm_jax.memory.streaming import (
    Runner,
    Streamer,
    call,
    keep_layers,
    keep_separate_layers,
    separate_layers,
)
from sanawm_jax.runtime.errors import InputError

OFFLOADS = ("none", "model", "block")


def check_offload(name: str) -> str:
    """The name itself.

    Raises:
      InputError: it is unknown.
    """
    if name not in OFFLOADS:
        raise InputError(f"--offload={name} is unknown; use one of {', '.join(OFFLOADS)}")
    return name


def streaming_of(
    offload: str, *, separate: bool = False, stays: bool = True
) -> tuple[Place | None, Runner]:
    """How one network's leaves are placed, and how its functions are called.

    Args:
      separate: its layers, of one stacked axis, are to be separate; see `core.stack.over_layers`.
      stays: see `Streamer`.
    """
    if offload == "block":
        return keep_separate_layers if separate else keep_layers, Streamer(stays=stays)
    return separate_layers if separate else None, call


def frame_mesh(devices: int, offload: str) -> Mesh | None:
    """The mesh over which stage 1 shares its latent frames out, `--devices`; None for one device.

    Raises:
      InputError: fewer devices are here, or the layers are to wait in host memory.
    """
    if devices == 1:
        return None
    if devices < 1:
        raise InputError(f"--devices={devices} must be 1 or more")
    if offload == "block":
        raise InputError("--offload=block runs on one device; use --offload=model with --devices")
    if devices > jax.local_device_count():
        raise InputError(
            f"--devices={devices}, and there are {jax.local_device_count()} on this machine"
        )
    return make_mesh(context=devices)


def on_all_devices(mesh: Mesh) -> Place:
    """Puts every leaf whole on every device of a mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda path, array: jax.device_put(array, whole)
