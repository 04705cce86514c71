"""Whole clips of the small world: scene, path, caption and frames from one seed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sanawm_jax.small_world.scenery.captions import caption
from sanawm_jax.small_world.scenery.paths import sample_intrinsics, sample_length, sample_path
from sanawm_jax.small_world.scenery.places import sample_scene
from sanawm_jax.small_world.scenery.scene import PLACES, Scene

HELD_OUT_SEED = 1_000_000  # seeds from here on are never trained on


def describe(
    seed: int, num_frames: int | None = 49, height: int = 96, width: int = 160
) -> tuple[Scene, dict]:
    """The scene of a seed and all of its clip but the video; see `make_clip`. Numpy only."""
    scene = sample_scene(seed)
    rng = np.random.default_rng([int(seed), 0xC11B])
    num_frames = sample_length(rng) if num_frames is None else num_frames
    intrinsics = sample_intrinsics(rng, height, width)
    c2w, action = sample_path(rng, scene, num_frames)
    return scene, {
        "c2w": c2w,
        "intrinsics": intrinsics,
        "caption": caption(scene, c2w, intrinsics),
        "action": action,
        "place": PLACES[int(scene.place)],
        "seed": int(seed),
    }


def make_clips(
    seeds: Iterable[int],
    num_frames: int | None = 49,
    height: int = 96,
    width: int = 160,
    samples: int = 2,
) -> Iterator[dict]:
    """Yields `make_clip` of each seed, on a CPU with one thread per core."""
    from sanawm_jax.small_world.scenery.render import render

    def make(seed: int) -> dict:
        scene, clip = describe(seed, num_frames, height, width)
        video = render(scene, clip["c2w"], clip["intrinsics"], height, width, samples)
        return {"video": video, **clip}

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(make, seeds)


def make_clip(
    seed: int,
    num_frames: int | None = 49,
    height: int = 96,
    width: int = 160,
    samples: int = 2,
) -> dict:
    """Draws and renders the clip of a seed.

    Args:
      seed: 0.. for training, `HELD_OUT_SEED`.. for held-out clips.
      num_frames: pixel frames F, 8k + 1; None draws a length from `paths.LENGTHS`.
      height, width: pixels.
      samples: rays per pixel, 1, 2 or 4.

    Returns:
      video (F, H, W, 3) uint8, c2w (F, 4, 4) float32 world poses, intrinsics (4,) float32 in
      pixels, caption str, action str ("" for a path without keys), place str, seed int.
    """
    return next(iter(make_clips([seed], num_frames, height, width, samples)))
