"""A DiT of two blocks, a GDN and a softmax one, with random weights and inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.transform import Rotation

from sanawm_jax.core.params import Params, build, from_leaves, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT

CONFIG = DiTConfig(
    in_channels=4,
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    linear_head_dim=16,
    softmax_every_n=2,
    caption_channels=8,
    chunk_plucker_channels=6,
    mlp_ratio=1.0,
)
GRAPHDEF, ABSTRACT = build(DiT, CONFIG)


def random_params(seed: int = 0, abstract: Params = ABSTRACT) -> Params:
    """Draws every parameter; a parameter that stays zero would hide a branch of the network."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in leaves(abstract):
        noise = rng.normal(size=leaf.shape)
        if path.endswith("scale"):
            value = 1.0 + 0.1 * noise
        elif path.endswith("kernel"):
            value = noise / np.sqrt(leaf.shape[-2])
        elif path.endswith("decay_step"):
            value = noise - 3.0
        else:
            value = 0.3 * noise
        flat[path] = jnp.asarray(value, jnp.float32)
    return from_leaves(flat)


def random_inputs(batch: int, frames: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of `DiT.__call__` on a grid of 2 x 3."""
    rng = np.random.default_rng(seed)
    turns = np.cumsum(rng.normal(size=(batch, frames, 3)) * 0.3, 1)
    poses = np.zeros((batch, frames, 4, 4))
    poses[..., 3, 3] = 1.0
    poses[..., :3, :3] = (
        Rotation.from_rotvec(turns.reshape(-1, 3)).as_matrix().reshape(batch, frames, 3, 3)
    )
    poses[..., :3, 3] = np.cumsum(rng.normal(size=(batch, frames, 3)) * 0.3, 1)
    intrinsics = np.broadcast_to([2.7, 2.2, 1.5, 1.0], (batch, frames, 4))
    text_mask = np.ones((batch, 5))
    text_mask[0, 3:] = 0
    arrays = {
        "latents": rng.normal(size=(batch, frames, 2, 3, CONFIG.in_channels)),
        "timesteps": np.floor(rng.uniform(0, 1000, (batch, frames))),
        "text": rng.normal(size=(batch, 5, CONFIG.caption_channels)),
        "text_mask": text_mask,
        "camera": np.concatenate([poses.reshape(batch, frames, 16), intrinsics], -1),
        "plucker": rng.normal(size=(batch, frames, 2, 3, CONFIG.chunk_plucker_channels)),
    }
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
