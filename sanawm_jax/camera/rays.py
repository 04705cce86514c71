"""The two camera inputs of stage 1: per latent frame, a pose token and a stack of Plücker maps.

Axis letters: f pixel frames; F latent frames, H W latent rows and columns; p pixel frames in the
window of one latent frame.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange
from jaxtyping import Float32, Num

from sanawm_jax.camera.poses import relative_to_first


def camera_conditions(
    c2w: Num[np.ndarray, "f 4 4"],
    intrinsics: Num[np.ndarray, "_ 4"],
    height: int,
    width: int,
    vae_temporal: int = 8,
    vae_spatial: int = 32,
) -> tuple[Float32[np.ndarray, "F 20"], Float32[np.ndarray, "F H W 6*{vae_temporal}"]]:
    """Builds the camera inputs of the stage-1 network from pixel-frame poses.

    Poses are converted to be relative to the first frame; translations are not rescaled. Intrinsics
    are scaled to the latent grid. Latent frame i > 0 covers the pixel frames 8i-7..8i. The first
    one covers 0..7, although it encodes only frame 0. A window that goes past the end of the video
    repeats the last frame.

    Args:
      c2w: camera-to-world poses.
      intrinsics: [fx, fy, cx, cy] in pixels of the height x width frames.
      height, width: frame size in pixels.
      vae_temporal, vae_spatial: pixel frames per latent frame, and pixels per latent in space.

    Returns:
      camera: the 16 numbers of the relative pose row by row, then fx, fy, cx, cy
        on the latent grid, at the pixel frames 0, 8, 16...; F = (f - 1) // vae_temporal + 1.
      plucker: the maps of the frames in the window, one after
        the other, each as in `plucker_rays`.
      Both equal `prepare_camera` of diffusers' SANA-WM pipeline, with channels last.

    Raises:
      ValueError: poses and intrinsics have different lengths.
    """
    num_frames = len(c2w)
    if intrinsics.shape != (num_frames, 4):
        raise ValueError(f"{num_frames} poses need intrinsics (f, 4), got {intrinsics.shape}")
    rows, columns = height // vae_spatial, width // vae_spatial
    poses = relative_to_first(c2w)
    to_latent = np.array([columns / width, rows / height] * 2, dtype=np.float32)
    on_grid = intrinsics.astype(np.float32) * to_latent

    last = np.arange(0, num_frames, vae_temporal)
    camera = np.concatenate([rearrange(poses[last], "F r c -> F (r c)"), on_grid[last]], axis=1)

    start = np.maximum(last - (vae_temporal - 1), 0)
    window = np.minimum(start[:, None] + np.arange(vae_temporal), num_frames - 1)  # F p
    rays = plucker_rays(poses, on_grid, rows, columns)
    return camera, rearrange(rays[window], "F p H W C -> F H W (p C)")


def plucker_rays(
    c2w: Num[np.ndarray, "f 4 4"], intrinsics: Num[np.ndarray, "f 4"], height: int, width: int
) -> Float32[np.ndarray, "f {height} {width} 6"]:
    """Returns the Plücker coordinates of every pixel's ray.

    A ray is (d, m): its unit direction d in the world, and its moment m = o x d, where o is the
    centre of the camera. Pixels have integer coordinates: the first is at (0, 0), not (0.5, 0.5).

    Args:
      c2w: camera-to-world poses.
      intrinsics: [fx, fy, cx, cy] in pixels of the height x width grid.
      height, width: rows and columns.

    Returns:
      (d, m) of every pixel.
    """
    poses = np.asarray(c2w, dtype=np.float64)
    fx, fy, cx, cy = np.asarray(intrinsics, dtype=np.float64).T[:, :, None, None]
    y, x = np.mgrid[:height, :width]
    in_camera = np.stack(np.broadcast_arrays((x - cx) / fx, (y - cy) / fy, 1.0), axis=-1)
    rotation, centre = poses[:, :3, :3], poses[:, :3, 3]
    # o x (R d) = [o x R] d, column by column, so one product gives both direction and moment
    both = np.concatenate([rotation, np.cross(centre[:, None], rotation, axisb=1, axisc=1)], axis=1)
    rays = in_camera.reshape(len(poses), -1, 3) @ both.swapaxes(1, 2)
    rays /= np.linalg.norm(rays[..., :3], axis=-1, keepdims=True)
    return rays.reshape(len(poses), height, width, 6).astype(np.float32)
