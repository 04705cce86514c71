"""What stays on the accelerator between uses, `--offload`.

`none`: every network that was used once, within a stage.
`model`: the network that runs; it is read again when it is needed again.
`block`: of that network, two layers: the one that runs and the next one, whose copy runs beside it.
  The others wait in host memory. Embeddings, heads and the VAE are on the device whole.
"""

from __future__ import annotations

from sanawm_jax.core.streaming import Runner, Streamer, call, keep_layers
from sanawm_jax.errors import InputError
from sanawm_jax.pipeline.folder import Place

OFFLOADS = ("none", "model", "block")


def check_offload(name: str) -> str:
    """The name itself.

    Raises:
      InputError: it is unknown.
    """
    if name not in OFFLOADS:
        raise InputError(f"--offload={name} is unknown; use one of {', '.join(OFFLOADS)}")
    return name


def streaming_of(offload: str) -> tuple[Place | None, Runner]:
    """How one network's leaves are placed, and how its functions are called."""
    return (keep_layers, Streamer()) if offload == "block" else (None, call)
