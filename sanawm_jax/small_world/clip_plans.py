"""Plans of training clips, made by processes beside a run: all of a clip but its video.

Numpy only. Axis letters: f pixel frames, F latent frames, H W latent rows and columns.
"""

from __future__ import annotations

import collections
import multiprocessing
from typing import Any, NamedTuple

import numpy as np

from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.data.views import ALL_VIEWS, view_clip
from sanawm_jax.small_world.scenery.clip import HELD_OUT_SEED, describe
from sanawm_jax.small_world.scenery.scene import Scene

STRIDE = 8  # pixels and frames per latent


class Plan(NamedTuple):
    """A clip that waits for its pixels.

    Attributes:
      scene: what the renderer takes.
      c2w, intrinsics: (f, 4, 4) and (4,).
      caption: of what is in sight.
      camera, plucker: (views, F, 20) float32 and (views, F, H, W, 48) float16 of the clip's
        versions, `data.views.ALL_VIEWS`.
    """

    scene: Scene
    c2w: np.ndarray
    intrinsics: np.ndarray
    caption: str
    camera: np.ndarray
    plucker: np.ndarray


def plan_clip(seed: int, num_frames: int, height: int, width: int) -> Plan:
    """The plan of a seed; see `scenery.clip.describe`."""
    scene, clip = describe(seed, num_frames, height, width)
    # only the shape of the video decides what mirrored and reversed cameras are
    clip["video"] = np.broadcast_to(np.uint8(0), (num_frames, height, width, 3))
    cameras, rays = [], []
    for view in ALL_VIEWS:
        seen = view_clip(clip, view)
        intrinsics = np.broadcast_to(seen["intrinsics"], (num_frames, 4))
        camera, plucker = camera_conditions(
            seen["c2w"], intrinsics, height, width, vae_temporal=STRIDE, vae_spatial=STRIDE
        )
        cameras.append(camera)
        rays.append(plucker.astype(np.float16))
    c2w = np.asarray(clip["c2w"], np.float32)
    facts = np.asarray(clip["intrinsics"], np.float32), clip["caption"]
    return Plan(scene, c2w, *facts, np.stack(cameras), np.stack(rays))


class Planner:
    """Plans clips of new seeds, ahead of their use.

    Args:
      workers: processes; 0 plans when asked.
      first_seed: of the training clips.
      ahead: clips of each length that are kept ready.
      height, width: pixels.
    """

    def __init__(self, workers: int, first_seed: int, ahead: int, height: int, width: int):
        self._size = height, width
        self._ahead = ahead
        self._seed = first_seed
        self._waiting: dict[int, collections.deque] = collections.defaultdict(collections.deque)
        self._pool: Any = None
        if workers:
            self._pool = multiprocessing.get_context("spawn").Pool(workers)

    def _next(self) -> int:
        self._seed += 1
        return (self._seed - 1) % HELD_OUT_SEED

    def expect(self, num_frames: int) -> None:
        """Begins to plan clips of this length."""
        waiting = self._waiting[num_frames]
        while self._pool is not None and len(waiting) < self._ahead:
            task = (self._next(), num_frames, *self._size)
            waiting.append(self._pool.apply_async(plan_clip, task))

    def is_ready(self, num_frames: int, count: int) -> bool:
        """Whether `take` returns at once."""
        if self._pool is None:
            return True
        waiting = self._waiting[num_frames]
        return len(waiting) >= count and all(waiting[i].ready() for i in range(count))

    def take(self, num_frames: int, count: int) -> list[Plan]:
        """Plans of `count` clips."""
        if self._pool is None:
            return [plan_clip(self._next(), num_frames, *self._size) for _ in range(count)]
        self.expect(num_frames)
        waiting = self._waiting[num_frames]
        found = [waiting.popleft().get() for _ in range(count)]
        self.expect(num_frames)
        return found

    def held_out(self, num_frames: int, count: int) -> list[Plan]:
        """Plans of the first `count` held-out clips, which no training reads."""
        tasks = [(HELD_OUT_SEED + i, num_frames, *self._size) for i in range(count)]
        if self._pool is None:
            return [plan_clip(*task) for task in tasks]
        return self._pool.starmap(plan_clip, tasks, chunksize=1)

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.terminate()
