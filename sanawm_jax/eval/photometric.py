"""Camera poses of a video of a known scene, by comparing it with renders of that scene.

The search starts at the known pose of the first frame and goes on frame after frame. It looks for
the pose whose render is nearest to the frame: it renders a guess, computes from the gradients and
the depth of the render how the picture would change with the pose, solves for the small motion that
explains the difference (a step of Gauss and Newton), and repeats this from the new pose.

Numpy only: whoever calls it brings the renderer.

Axis letters: N frames, H W rows and columns, P pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sanawm_jax.media.video import as_float

# (H, W, 3) in [0, 1] and depth (H, W), inf for the sky, at a pose (4, 4)
View = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

_LEVELS = ((4.0, 4, 5), (2.0, 2, 4), (1.0, 1, 3))  # blur in pixels, stride, largest number of steps
_MAX_PIXELS = 4000  # of a level: those with the strongest gradients
_CONVERGED = 1e-3  # radians, and units of the scene
# How large a step may be, as standard deviations of a prior: without it, a picture of the sky alone
# would leave the position free.
_PRIOR = np.array((0.1, 0.1, 0.1, 0.3, 0.3, 0.3))
_COLOR_PRIOR = 0.5  # of the gain and the offset of each channel


class Level(NamedTuple):
    """One resolution of the search."""

    blur: float
    stride: int
    steps: int

    def of(self, picture: np.ndarray) -> np.ndarray:
        """A picture (H, W, ...) at this resolution."""
        from scipy.ndimage import gaussian_filter

        smooth = gaussian_filter(picture, self.blur, axes=(0, 1), mode="nearest")
        return smooth[self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]


def small_motion(motion: np.ndarray) -> np.ndarray:
    """Pose (4, 4) of a motion: rotation vector in radians, then translation, (6,)."""
    from scipy.spatial.transform import Rotation

    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(motion[:3]).as_matrix()
    pose[:3, 3] = motion[3:]
    return pose


def estimate_poses(
    video: np.ndarray,
    view: View,
    start: np.ndarray,
    intrinsics: np.ndarray,
    frames: np.ndarray,
    commanded: np.ndarray | None = None,
) -> np.ndarray:
    """Searches the pose of some frames of a video.

    Args:
      video: (N, H, W, 3).
      view: renders the scene.
      start: (4, 4) pose of frame 0.
      intrinsics: (4,) fx, fy, cx, cy in pixels.
      frames: frame numbers in increasing order; the first is 0, whose pose is given.
      commanded: (N, 4, 4) poses in the same world that the video was asked to follow. The search
        for a frame begins where the render is nearest: at the last pose, at the commanded pose, or
        at the last pose moved on as commanded. Without `commanded`: at the last pose, or at the
        last pose moved on as before.

    Returns:
      (len(frames), 4, 4) camera to world.
    """
    poses = [np.asarray(start, np.float64)]
    for before, frame in itertools.pairwise(frames):
        last = poses[-1]
        guesses = [last]
        if commanded is None:
            if len(poses) > 1:
                guesses.append(last @ np.linalg.inv(poses[-2]) @ last)
        else:
            step = np.linalg.inv(commanded[before].astype(np.float64)) @ commanded[frame]
            guesses += [commanded[frame].astype(np.float64), last @ step]
        poses.append(_search(as_float(video[frame]), view, guesses, intrinsics))
    return np.stack(poses)


def _search(
    picture: np.ndarray, view: View, guesses: list[np.ndarray], intrinsics: np.ndarray
) -> np.ndarray:
    """The pose near one of the guesses whose render is nearest to the picture (H, W, 3)."""
    levels = [Level(*level) for level in _LEVELS]
    target = levels[0].of(picture)
    views = [view(guess) for guess in guesses]
    gaps = [np.abs(levels[0].of(image) - target).mean() for image, _ in views]
    best = int(np.argmin(gaps))
    pose, seen = guesses[best], views[best]
    for level in levels:
        pose, seen = _descend(picture, view, pose, seen, intrinsics, level)
    return pose


def _descend(
    picture: np.ndarray,
    view: View,
    pose: np.ndarray,
    seen: tuple[np.ndarray, np.ndarray],
    intrinsics: np.ndarray,
    level: Level,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Steps at one resolution from a pose whose render is `seen`; returns both of the end."""
    target = level.of(picture)
    system = _normal_equations(target, *seen, intrinsics, level)
    damping = 1e-3
    for _ in range(level.steps):
        motion = system.solve(damping)
        moved = pose @ small_motion(motion)
        there = view(moved)
        after = _normal_equations(target, *there, intrinsics, level)
        if after.cost < system.cost:
            pose, seen, system = moved, there, after
            damping = max(damping / 10.0, 1e-4)
        elif damping > 1.0:
            break
        else:  # the step was too long
            damping *= 30.0
        if np.abs(motion).max() < _CONVERGED:
            break
    return pose, seen


class _System(NamedTuple):
    """Normal equations of one step: 6 numbers of motion, then gain and offset of 3 channels."""

    matrix: np.ndarray  # (12, 12)
    vector: np.ndarray  # (12,)
    cost: float

    def solve(self, damping: float) -> np.ndarray:
        """The motion (6,)."""
        prior = np.concatenate((1 / _PRIOR**2, np.full(6, 1 / _COLOR_PRIOR**2)))
        matrix = self.matrix + np.diag(damping * np.diag(self.matrix) + prior)
        return np.linalg.solve(matrix, self.vector)[:6]


def _normal_equations(
    target: np.ndarray,
    image: np.ndarray,
    depth: np.ndarray,
    intrinsics: np.ndarray,
    level: Level,
) -> _System:
    """Linearises the difference between the target and a render around the render's pose.

    A camera that turns by w and moves by v sees a point at X from X - w x X - v. The projection of
    this motion times the picture's gradient is the change of a pixel.
    """
    render = level.of(as_float(image))
    stride, first = level.stride, level.stride // 2
    rows, columns = target.shape[:2]
    gradient_y, gradient_x = (np.gradient(render + target, axis=axis) / 2 for axis in (0, 1))
    gradient_y, gradient_x = gradient_y / stride, gradient_x / stride  # per pixel of the picture
    strength = (gradient_x**2 + gradient_y**2).sum(-1).ravel()
    kept = np.arange(rows * columns)
    if len(kept) > _MAX_PIXELS:
        kept = np.argpartition(strength, -_MAX_PIXELS)[-_MAX_PIXELS:]
    y, x = np.divmod(kept, columns)
    fx, fy, cx, cy = np.asarray(intrinsics, np.float64)
    ray_x = (x * stride + first - cx) / fx
    ray_y = (y * stride + first - cy) / fy
    near = 1.0 / depth[first::stride, first::stride][:rows, :columns].ravel()[kept]  # 0: the sky
    # change of the ray (ray_x, ray_y, 1) per rotation and translation, projected
    zero = np.zeros_like(ray_x)
    to_x = (-ray_x * ray_y, 1 + ray_x**2, -ray_y, near, zero, -ray_x * near)
    to_y = (-1 - ray_y**2, ray_x * ray_y, ray_x, zero, near, -ray_y * near)
    flow_x, flow_y = fx * np.stack(to_x, -1), fy * np.stack(to_y, -1)  # P 6
    slope_x, slope_y = (g.reshape(-1, 3)[kept] for g in (gradient_x, gradient_y))
    motion = (
        slope_x[..., None] * flow_x[:, None] + slope_y[..., None] * flow_y[:, None]
    )  # (P, 3, 6)
    values, wanted = render.reshape(-1, 3)[kept], target.reshape(-1, 3)[kept]
    gap = wanted - values
    channels = np.eye(3)
    color = np.concatenate((channels * values[:, :, None], channels + zero[:, None, None]), -1)
    design = np.concatenate((motion, color), -1).reshape(-1, 12)
    gap = gap.ravel()
    # what a change of brightness explains is no error of the pose
    fit = design[:, 6:]
    plain = np.linalg.lstsq(fit.T @ fit + np.eye(6) * 1e-6, fit.T @ gap, rcond=None)[0]
    rest = gap - fit @ plain
    scale = max(1.4826 * float(np.median(np.abs(rest))), 4e-3)
    weight = 1.0 / (1.0 + (rest / (2.0 * scale)) ** 2)  # Cauchy: wrong pixels count little
    weighted = design * (weight / scale**2)[:, None]
    cost = float(np.minimum(np.abs(rest), 0.2).mean())
    return _System(weighted.T @ design, weighted.T @ gap, cost)
