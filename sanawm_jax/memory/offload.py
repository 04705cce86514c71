"""`--offload`: which weights stay on the accelerator.

`none`: within a stage, every network stays after its first use.
`model`: only the network that runs is on the device. It is read again when it is needed again.
`block`: only two layers of that network are on the device, one that runs and one that is being
  copied. The other layers are in host memory. The first call (one step, or one block of frames)
  measures how much memory remains, and from then on as many layers as fit stay on the device. A
  text encoder runs only once or twice, so its layers never stay. Embeddings, heads and the VAE are
  always on the device as a whole.
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
    """Returns the name if it is one of `OFFLOADS`.

    Raises:
      InputError: the name is unknown.
    """
    if name not in OFFLOADS:
        raise InputError(f"--offload={name} is unknown; use one of {', '.join(OFFLOADS)}")
    return name


def streaming_of(
    offload: str, *, separate: bool = False, stays: bool = True
) -> tuple[Place | None, Runner]:
    """Returns how to place the parameters of one network, and how to call its functions.

    Args:
      offload: one of `OFFLOADS`.
      separate: whether layers with one stacked axis become separate arrays; see
        `core.stack.over_layers`.
      stays: see `Streamer`.
    """
    if offload == "block":
        return keep_separate_layers if separate else keep_layers, Streamer(stays=stays)
    return separate_layers if separate else None, call


def frame_mesh(devices: int, offload: str) -> Mesh | None:
    """Returns the mesh that divides the latent frames of stage 1 over `--devices` devices.

    It is None for one device.

    Raises:
      InputError: the machine has fewer devices, or `offload` is "block".
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
    """Returns a function that copies every leaf to every device of a mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda path, array: jax.device_put(array, whole)
