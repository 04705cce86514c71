"""The small world's scenes as the evaluations see them, whichever set the weights were trained on.

There are two sets of scenes: those of `sanawm_jax.small_world` itself, and those of its package
`scenery`. `WORLD` says which one the shipped weights know; nothing else has to change with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from sanawm_jax.eval.photometric import View
from sanawm_jax.small_world import captions, clip, paths, render, sampler
from sanawm_jax.small_world.scenery import captions as scenery_captions
from sanawm_jax.small_world.scenery import clip as scenery_clip
from sanawm_jax.small_world.scenery import paths as scenery_paths
from sanawm_jax.small_world.scenery import places as scenery_places
from sanawm_jax.small_world.scenery import render as scenery_render


@dataclass(frozen=True)
class World:
    """A set of scenes.

    Attributes:
      height, width: size of its videos in pixels.
      held_out_seed: seeds from this one on are never trained on.
      scene: seed -> scene.
      start: random numbers, scene -> pose (4, 4) from which every single action is free.
      intrinsics: random numbers, height, width -> (4,).
      caption: scene, poses, intrinsics -> what is said about the clip.
      is_free: scene, poses -> whether the path keeps clear of all surfaces.
      render: scene, poses, intrinsics, height, width -> frames (F, H, W, 3) uint8.
      depth: the same -> depth (F, H, W) and surfaces.
      search_samples: argument `samples` of `render` for the many renders of a pose search.
    """

    height: int
    width: int
    held_out_seed: int
    scene: Callable[[int], Any]
    start: Callable[..., np.ndarray]
    intrinsics: Callable[..., np.ndarray]
    caption: Callable[..., str]
    is_free: Callable[..., bool]
    render: Callable[..., np.ndarray]
    depth: Callable[..., tuple[np.ndarray, np.ndarray]]
    search_samples: int

    def frames(
        self, scene: Any, c2w: np.ndarray, intrinsics: np.ndarray, height: int, width: int
    ) -> np.ndarray:
        """Frames (F, H, W, 3) uint8 of poses (F, 4, 4), one thread per core.

        Every pose is a call of its own, so one compiled program serves clips of all lengths.
        """
        return np.concatenate(
            in_threads(lambda pose: self.render(scene, pose[None], intrinsics, height, width), c2w)
        )

    def depths(
        self, scene: Any, c2w: np.ndarray, intrinsics: np.ndarray, height: int, width: int
    ) -> np.ndarray:
        """Depth (F, H, W) of poses (F, 4, 4), as `frames`."""

        def one(pose: np.ndarray) -> np.ndarray:
            return self.depth(scene, pose[None], intrinsics, height, width)[0]

        return np.concatenate(in_threads(one, c2w))

    def view(self, scene: Any, intrinsics: np.ndarray, height: int, width: int) -> View:
        """The picture and the depth at a pose, for `photometric.estimate_poses`."""

        def view(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            picture = (scene, pose[None], intrinsics, height, width)
            image = self.render(*picture, samples=self.search_samples)[0]
            return image, self.depth(*picture)[0][0]

        return view


def in_threads(function: Callable, items: Iterable) -> list:
    """The results for all items, in their order, computed by one thread per core."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(function, items))


OLD = World(
    height=128,
    width=128,
    held_out_seed=clip.HELD_OUT_SEED,
    scene=sampler.sample_scene,
    start=paths.sample_start,
    intrinsics=paths.sample_intrinsics,
    caption=lambda scene, c2w, intrinsics: captions.caption(scene),
    is_free=paths.is_free,
    render=render.render,
    depth=render.depth,
    search_samples=1,
)
SCENERY = World(
    height=scenery_render.HEIGHT,
    width=scenery_render.WIDTH,
    held_out_seed=scenery_clip.HELD_OUT_SEED,
    scene=scenery_places.sample_scene,
    start=scenery_paths.sample_start,
    intrinsics=scenery_paths.sample_intrinsics,
    caption=scenery_captions.caption,
    is_free=scenery_paths.is_free,
    render=scenery_render.render,
    depth=scenery_render.depth,
    search_samples=2,  # the program that renders the truth: compiling another takes longer
)
WORLD = OLD  # the set that the shipped weights were trained on
