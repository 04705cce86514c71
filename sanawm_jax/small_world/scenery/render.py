"""Pictures and depth of small-world scenes, in jax.numpy under jit; one code for CPU and GPU.

Pixel convention, the ray map's of the model: the integer coordinate x is the centre of pixel
column x, so its ray is ((x - cx) / fx, (y - cy) / fy, 1) in the camera's OpenCV axes, scaled to
z = 1: a ray parameter t is therefore the depth along the optical axis. Each pixel averages two
rays at (-1/4, -1/4) and (+1/4, +1/4), or four; then a lens spreads it over its neighbours.

A picture is cut into tiles. Each tile lists the bodies that it can meet; a GPU works on all tiles
of many pictures at once, a CPU on one after the other, which then stays in its cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.small_world.scenery import scene as world
from sanawm_jax.small_world.scenery.shading import resolve, shade
from sanawm_jax.small_world.scenery.tiles import body_table, bounding_radius, cone_mask, nearest

HEIGHT, WIDTH = 96, 160
# Standard deviation of the lens's Gaussian point spread, in pixels. Edges that are sharper than a
# camera makes them cost a small autoencoder most of its numbers.
LENS = 0.6
_SUBPIXELS = {
    1: ((0.0, 0.0),),
    2: ((-0.25, -0.25), (0.25, 0.25)),
    4: ((-0.25, -0.25), (-0.25, 0.25), (0.25, -0.25), (0.25, 0.25)),
}


def _tile_shape(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile: the picture in 4 by 4 tiles where that divides."""
    rows = next(n for n in (4, 3, 2, 1) if height % n == 0)
    columns = next(n for n in (4, 3, 2, 1) if width % n == 0)
    return height // rows, width // columns


def _tile_rays(pose, intrinsics, corner, shape, samples):
    """Rays of a tile, and the cone around them.

    Returns:
      direction: three arrays (R,), world axes; axis (3,), cos, sin of the cone.
    """
    rows, columns = shape
    y = jnp.arange(rows, dtype=jnp.float32)[:, None, None] + corner[0]
    x = jnp.arange(columns, dtype=jnp.float32)[None, :, None] + corner[1]
    shift = np.asarray(_SUBPIXELS[samples], np.float32)
    fx, fy, cx, cy = (intrinsics[i] for i in range(4))
    full = (rows, columns, samples)
    ray_y = jnp.broadcast_to((y + shift[:, 0] - cy) / fy, full).ravel()
    ray_x = jnp.broadcast_to((x + shift[:, 1] - cx) / fx, full).ravel()
    direction = [pose[i, 0] * ray_x + pose[i, 1] * ray_y + pose[i, 2] for i in range(3)]
    ends_x = (corner[1] + jnp.array([-0.5, columns - 0.5]) - cx) / fx
    ends_y = (corner[0] + jnp.array([-0.5, rows - 0.5]) - cy) / fy
    ends = jnp.stack([jnp.stack((a, b, jnp.float32(1.0))) for a in ends_x for b in ends_y])
    ends = ends / jnp.linalg.norm(ends, axis=-1, keepdims=True)
    axis = ends.mean(0) / jnp.linalg.norm(ends.mean(0))
    cos = (ends @ axis).min()
    return direction, pose[:3, :3] @ axis, cos, jnp.sqrt(jnp.maximum(1.0 - cos * cos, 0.0))


def _masks(scene, radius, pose, cone):
    origin = [pose[i, 3] for i in range(3)]
    turned = jnp.array([1.0, -1.0, 1.0])
    below = (origin[0], -origin[1], origin[2])
    axis, cos, sin = cone
    return origin, (
        cone_mask(scene, radius, origin, axis, cos, sin),
        cone_mask(scene, radius, below, axis * turned, cos, sin),
    )


def _color_tile(scene, pose, intrinsics, corner, shape, samples):
    direction, *cone = _tile_rays(pose, intrinsics, corner, shape, samples)
    table, radius = body_table(scene), bounding_radius(scene)
    origin, masks = _masks(scene, radius, pose, cone)
    color = shade(scene, table, radius, masks, origin, direction, intrinsics[0])
    parts = [jnp.clip(part, 0.0, 3.0).reshape(*shape, samples).mean(-1) for part in color]
    return jnp.stack(parts, -1)


def _depth_tile(scene, pose, intrinsics, corner, shape, samples):
    direction, *cone = _tile_rays(pose, intrinsics, corner, shape, samples)
    origin, masks = _masks(scene, bounding_radius(scene), pose, cone)
    t, surface = nearest(scene, body_table(scene), masks[0], origin, direction)
    surface, _, is_sky = resolve(scene, t, surface, origin, direction)
    t = jnp.where(is_sky, jnp.inf, t).reshape(shape)
    return t, jnp.where(is_sky, world.SKY_SURFACE, surface).reshape(shape)


def _blur(image):
    """Gaussian of `LENS` pixels on (..., H, W, 3); the edge is continued outwards."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / LENS) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (-3, -2):
        size = image.shape[axis]
        widths = [(2, 2) if i == image.ndim + axis else (0, 0) for i in range(image.ndim)]
        padded = jnp.pad(image, widths, mode="edge")
        parts = [jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(5)]
        image = functools.reduce(jnp.add, [t * p for t, p in zip(taps, parts, strict=True)])
    return image


def _develop(image):
    """Linear light -> picture: a film curve with soft highlights, then the screen's gamma."""
    x = image * (2.4 * image + 0.06) / (image * (2.3 * image + 0.80) + 0.16)
    return jnp.clip(x, 0.0, 1.0) ** (1.0 / 2.2)


def _over_tiles(function, poses, intrinsics, height, width, in_turn):
    """Runs a tile function on all tiles of poses (N, 4, 4) with intrinsics (N, 4)."""
    rows, columns = _tile_shape(height, width)
    grid = np.stack(
        np.meshgrid(np.arange(0, height, rows), np.arange(0, width, columns), indexing="ij"), -1
    ).reshape(-1, 2)
    frames, tiles = len(poses), len(grid)
    items = (
        jnp.repeat(poses, tiles, 0),
        jnp.repeat(intrinsics, tiles, 0),
        jnp.tile(jnp.asarray(grid, jnp.float32), (frames, 1)),
    )
    one = functools.partial(function, shape=(rows, columns))
    parts = jax.lax.map(lambda a: one(*a), items) if in_turn else jax.vmap(one)(*items)

    def join(a):
        tail = a.shape[3:]
        a = a.reshape(frames, height // rows, width // columns, rows, columns, *tail)
        return a.swapaxes(2, 3).reshape(frames, height, width, *tail)

    return jax.tree.map(join, parts)


def render_frames(scene, poses, intrinsics, height, width, samples=2, in_turn=False):
    """Pictures of one scene, for use inside a jitted function.

    Args:
      scene: a `Scene` of arrays.
      poses: (F, 4, 4) camera to world, OpenCV axes.
      intrinsics: (4,) or (F, 4), fx, fy, cx, cy in pixels.
      samples: rays per pixel, 1, 2 or 4.
      in_turn: one tile after the other, which is right for a CPU.

    Returns:
      (F, H, W, 3) float32 in [0, 1]; `jax.vmap` over scenes gives batches of clips.
    """
    intrinsics = jnp.broadcast_to(intrinsics, (len(poses), 4))

    def tile(pose, intrinsics, corner, shape):
        return _color_tile(scene, pose, intrinsics, corner, shape, samples)

    image = _over_tiles(tile, poses, intrinsics, height, width, in_turn)
    return _develop(_blur(image))


@functools.partial(jax.jit, static_argnames=("height", "width", "samples", "in_turn"))
def _render(scene, c2w, intrinsics, height, width, samples, in_turn):
    image = render_frames(scene, c2w, intrinsics, height, width, samples, in_turn)
    return jnp.round(255.0 * image).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("height", "width", "samples"))
def render_batch(scenes, c2w, intrinsics, height=HEIGHT, width=WIDTH, samples=2):
    """Pictures of many scenes at once, on an accelerator.

    Args:
      scenes: a `Scene` whose arrays have a leading axis B, see `scene.stack_scenes`.
      c2w: (B, F, 4, 4); intrinsics: (B, 4).

    Returns:
      (B, F, H, W, 3) uint8, on the device.
    """

    def one(scene, poses, intrinsics):
        image = render_frames(scene, poses, intrinsics, height, width, samples)
        return jnp.round(255.0 * image).astype(jnp.uint8)

    return jax.vmap(one)(scenes, c2w, intrinsics)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def render_async(scene, c2w, intrinsics, height=HEIGHT, width=WIDTH, samples=2) -> jax.Array:
    """Like `render`, but returns the device array without waiting for it."""
    c2w, intrinsics = np.asarray(c2w, np.float32), np.asarray(intrinsics, np.float32)
    return _render(scene, c2w, intrinsics, height, width, samples, _on_cpu())


def render(scene, c2w, intrinsics, height=HEIGHT, width=WIDTH, samples=2) -> np.ndarray:
    """Renders frames.

    Args:
      scene: the scene.
      c2w: world poses (F, 4, 4), OpenCV axes.
      intrinsics: (fx, fy, cx, cy) in pixels; see the module head for the pixel convention.
      height, width: pixels.
      samples: rays per pixel, 1, 2 or 4.

    Returns:
      (F, H, W, 3) uint8.
    """
    return np.asarray(render_async(scene, c2w, intrinsics, height, width, samples))


@functools.partial(jax.jit, static_argnames=("height", "width", "in_turn"))
def _depth(scene, c2w, intrinsics, height, width, in_turn):
    def tile(pose, intrinsics, corner, shape):
        return _depth_tile(scene, pose, intrinsics, corner, shape, 1)

    intrinsics = jnp.broadcast_to(intrinsics, (len(c2w), 4))
    return _over_tiles(tile, c2w, intrinsics, height, width, in_turn)


def depth(scene, c2w, intrinsics, height=HEIGHT, width=WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Depth along the optical axis at pixel centres, and the surface seen there.

    Returns:
      depth (F, H, W) float32 in world units, inf for the sky; surface (F, H, W) int32: a row of
      the scene's paint table, or `scene.SKY_SURFACE`.
    """
    c2w, intrinsics = np.asarray(c2w, np.float32), np.asarray(intrinsics, np.float32)
    result = _depth(scene, c2w, intrinsics, height, width, _on_cpu())
    return np.asarray(result[0]), np.asarray(result[1])
