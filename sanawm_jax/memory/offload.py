"""What stays on the accelerator between uses, `--offload`.

`none`: every network that has run stays until its stage ends.
`model`: only the network that is running; it is read from disk each time it is needed.
`block`: only two layers of that network: the one that is running, and the next one, which is copied
  meanwhile. The other layers wait in host memory. After the first call (a step, or a block of
  frames) has shown how much memory it needs, as many layers as fit stay on the device. No layer of
  a text encoder stays, because it runs only once or twice. Embeddings, output layers and the VAE
  are always on the device as a whole.
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
    """Returns the name.

    Raises:
      InputError: it is unknown.
    """
    if name not in OFFLOADS:
        raise InputError(f"--offload={name} is unknown; use one of {', '.join(OFFLOADS)}")
    return name


def streaming_of(
    offload: str, *, separate: bool = False, stays: bool = True
) -> tuple[Place | None, Runner]:
    """How the parameters of a network are placed, and how its functions are called.

    Args:
      separate: store its layers, which have one stacked axis, as separate arrays; see
        `core.stack.over_layers`.
      stays: see `Streamer`.
    """
    if offload == "block":
        return keep_separate_layers if separate else keep_layers, Streamer(stays=stays)
    return separate_layers if separate else None, call


def frame_mesh(devices: int, offload: str) -> Mesh | None:
    """The mesh that divides the latent frames of stage 1 (`--devices`); None for one device.

    Raises:
      InputError: the machine has fewer devices, or the layers wait in host memory.
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
    """Copies every parameter to every device of a mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda path, array: jax.device_put(array, whole)
