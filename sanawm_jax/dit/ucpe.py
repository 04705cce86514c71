"""UCPE camera geometry: a 4x4 ray-from-world transform for each token.

`kernels_pallas.ucpe` applies them to half of every head.
Axis letters: B batch, F latent frames, H W token rows and columns, P = H W, D head size.
Geometry is float32 whatever the compute dtype: poses and rays lose centimetres in bfloat16.
Reference: diffusers `_process_camera_conditions_ucpe` (with xi = 0, the pinhole case of the unified
camera model, which is all that any published model uses).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32

# geometry must not fall to TF32 or bfloat16 matrix units
_HIGHEST = jax.lax.Precision.HIGHEST


class RayTransforms(NamedTuple):
    """What the camera branch needs, shared by all blocks."""

    ray_from_world: Float32[Array, "B F P 4 4"]
    world_from_ray: Float32[Array, "B F P 4 4"]
    angles: Float32[Array, "F P D//4"] | None  # rotation of the other half of a head


def _normalise(x: jax.Array, eps: float) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), eps)


def _camera_rays(
    intrinsics: jax.Array, grid: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)
) -> jax.Array:
    """Unit rays through grid points in camera axes: intrinsics (B, F, 4) -> (B, F, H, W, 3).

    `scale` (rows, columns) divides the intrinsics: latent pixels a grid step.
    """
    fx, fy, cx, cy = (intrinsics[..., i, None, None] for i in range(4))
    x = (jnp.arange(grid[1], dtype=jnp.float32) - cx / scale[1]) / (fx / scale[1])
    y = (jnp.arange(grid[0], dtype=jnp.float32)[:, None] - cy / scale[0]) / (fy / scale[0])
    x, y = jnp.broadcast_arrays(x, y)
    rays = jnp.stack([x, y, jnp.ones_like(x)], -1)
    return rays * jax.lax.rsqrt(1.0 + x * x + y * y)[..., None]


def ray_matrices(
    camera: Float[Array, "B F 20"], grid: tuple[int, int], patch: tuple[int, int] = (1, 1)
) -> Float32[Array, "B F H W 4 4"]:
    """Computes the ray-from-world transform of every token, float32.

    The local frame of a token has z along its ray and x across the ray and the camera's down axis.

    Args:
      camera: flattened camera-to-world pose, then fx, fy, cx, cy in latent pixels.
      grid: token rows and columns.
      patch: latent pixels per token, rows and columns.
    """
    camera = camera.astype(jnp.float32)
    pose = rearrange(camera[..., :16], "B F (i j) -> B F i j", i=4)
    rotation, centre = pose[..., :3, :3], pose[..., :3, 3]
    rays = _camera_rays(camera[..., 16:], grid, patch)
    world = jnp.einsum("BFij,BFhwj->BFhwi", rotation, rays, precision=_HIGHEST)
    z = _normalise(world, 1e-6)
    down = jnp.broadcast_to(rotation[..., None, None, :, 1], z.shape)
    x = _normalise(jnp.cross(down, z), 1e-6)
    y = _normalise(jnp.cross(z, x), 1e-6)
    to_ray = jnp.stack([x, y, z], -2)
    shift = -jnp.einsum("BFhwij,BFj->BFhwi", to_ray, centre, precision=_HIGHEST)
    top = jnp.concatenate([to_ray, shift[..., None]], -1)
    bottom = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0]), (*top.shape[:-2], 1, 4))
    matrices = jnp.concatenate([top, bottom], -2)
    undefined = jnp.isnan(world).any(-1)[..., None, None]
    return jnp.where(undefined, jnp.eye(4), matrices)


def inverse_rigid(matrices: Float[Array, "*rest 4 4"]) -> Float[Array, "*rest 4 4"]:
    """Inverts rotations with translation."""
    rotation = jnp.swapaxes(matrices[..., :3, :3], -1, -2)
    shift = -jnp.einsum("...ij,...j->...i", rotation, matrices[..., :3, 3], precision=_HIGHEST)
    top = jnp.concatenate([rotation, shift[..., None]], -1)
    bottom = jnp.broadcast_to(matrices[..., 3:, :] * 0 + jnp.eye(4)[3], matrices[..., 3:, :].shape)
    return jnp.concatenate([top, bottom], -2)


def up_latitude_map(
    camera: Float[Array, "B F 20"], grid: tuple[int, int]
) -> Float32[Array, "B F H W 3"]:
    """Where up points in the picture and how far a ray looks above the horizon.

    Args:
      camera: as `ray_matrices`.
      grid: latent rows and columns.

    Returns:
      The unit direction that points up, in pixels, then latitude in radians.
    """
    camera = camera.astype(jnp.float32)
    rotation = rearrange(camera[..., :16], "B F (i j) -> B F i j", i=4)[..., :3, :3]
    rays = _camera_rays(camera[..., 16:], grid)
    world = _normalise(jnp.einsum("BFij,BFhwj->BFhwi", rotation, rays, precision=_HIGHEST), 1e-8)
    latitude = jnp.arctan2(-world[..., 1], jnp.hypot(world[..., 0], world[..., 2]))
    axis = _normalise(jnp.cross(world, jnp.array([0.0, -1.0, 0.0])), 1e-8)
    # The reference turns each ray 0.1 rad towards up; its last Rodrigues term sums the ray's own
    # components where the dot product with the axis belongs. Trained weights expect that.
    angle = jnp.float32(0.1)
    turned = (
        world * jnp.cos(angle)
        + jnp.cross(axis, world) * jnp.sin(angle)
        + axis * axis * world.sum(-1, keepdims=True) * (1 - jnp.cos(angle))
    )
    seen = jnp.einsum("BFji,BFhwj->BFhwi", rotation, turned, precision=_HIGHEST)
    fx, fy, cx, cy = (camera[..., 16 + i, None, None] for i in range(4))
    column, row = jnp.arange(grid[1]), jnp.arange(grid[0])[:, None]
    up = jnp.stack(
        [
            fx * (seen[..., 0] / seen[..., 2]) + cx - column,
            fy * (seen[..., 1] / seen[..., 2]) + cy - row,
        ],
        -1,
    )
    maps = jnp.concatenate([_normalise(up, 1e-8), latitude[..., None]], -1)
    return jnp.where(jnp.isnan(rays).any(-1, keepdims=True), 0.0, maps)
