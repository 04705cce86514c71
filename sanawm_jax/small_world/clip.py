"""Whole clips of the small world: scene, path, caption and rendered frames from one seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from sanawm_jax.small_world.captions import caption
from sanawm_jax.small_world.paths import sample_intrinsics, sample_path
from sanawm_jax.small_world.sampler import sample_scene
from sanawm_jax.small_world.scene import FAMILIES

HELD_OUT_SEED = 1_000_000  # seeds from here on are never trained on


def _describe(seed: int, num_frames: int, height: int, width: int) -> tuple:
    """The scene and all of the clip but its video."""
    scene = sample_scene(seed)
    rng = np.random.default_rng([int(seed), 0xC11B])
    intrinsics = sample_intrinsics(rng, height, width)
    c2w, _, action = sample_path(rng, scene, num_frames)
    return scene, {
        "c2w": c2w,
        "intrinsics": intrinsics,
        "caption": caption(scene),
        "action": action,
        "family": FAMILIES[int(scene.family)],
        "seed": int(seed),
    }


def make_clips(
    seeds: Iterable[int],
    num_frames: int = 49,
    height: int = 128,
    width: int = 128,
    samples: int = 2,
) -> Iterator[dict]:
    """Yield `make_clip` of each seed; one clip renders while the next one is being planned."""
    from sanawm_jax.small_world.render import render_async

    def finish(clip, frames):
        return dict(video=np.asarray(frames), **clip)

    pending = None
    for seed in seeds:
        scene, clip = _describe(seed, num_frames, height, width)
        frames = render_async(scene, clip["c2w"], clip["intrinsics"], height, width, samples)
        if pending is not None:
            yield finish(*pending)
        pending = (clip, frames)
    if pending is not None:
        yield finish(*pending)


def make_clip(
    seed: int,
    num_frames: int = 49,
    height: int = 128,
    width: int = 128,
    samples: int = 2,
) -> dict:
    """Draw and render the clip of a seed.

    Args:
      seed: 0.. for training, `HELD_OUT_SEED`.. for held-out clips.
      num_frames: pixel frames F.
      height, width: pixels.
      samples: rays a pixel along each axis.

    Returns:
      video (F, H, W, 3) uint8, c2w (F, 4, 4) float32 world poses, intrinsics (4,) float32 in
      pixels, caption str, action str ("" for a spline path), family str, seed int.
    """
    return next(make_clips([seed], num_frames, height, width, samples))
