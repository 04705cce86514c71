"""Clips for training without a data set: planned on the CPU, rendered on the accelerator.

Planning (scene, path, caption) is numpy and takes about 50 ms of one core per clip, so processes
share it; rendering is jitted and batched over clips and frames.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sanawm_jax.small_world.scenery.clip import describe
from sanawm_jax.small_world.scenery.scene import Scene, stack_scenes

if TYPE_CHECKING:
    import jax


def plan_clips(
    seeds: Sequence[int], num_frames: int, height: int, width: int, workers: int, batch: int
) -> Iterator[tuple[Scene, list[dict[str, Any]]]]:
    """Yields (stacked scenes, descriptions) of `batch` clips at a time; see `clip.describe`.

    Args:
      workers: processes; 0 plans in this one.
    """
    plan = functools.partial(describe, num_frames=num_frames, height=height, width=width)
    if not workers:
        yield from _batches(map(plan, seeds), batch)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from _batches(pool.imap(plan, seeds, chunksize=8), batch)


def _batches(clips, batch: int) -> Iterator[tuple[Scene, list[dict[str, Any]]]]:
    scenes, facts = [], []
    for scene, clip in clips:
        scenes.append(scene)
        facts.append(clip)
        if len(facts) == batch:
            yield stack_scenes(scenes), facts
            scenes, facts = [], []
    if facts:
        yield stack_scenes(scenes), facts


def render_pool(
    seeds: Sequence[int],
    num_frames: int,
    height: int,
    width: int,
    *,
    workers: int = 0,
    batch: int = 32,
) -> tuple[jax.Array, list[dict[str, Any]]]:
    """Clips of many seeds, on the device.

    Args:
      seeds: a multiple of `batch` of them.
      workers: processes that plan.
      batch: clips per call of the renderer.

    Returns:
      video (n, F, H, W * 3 / 4) uint32, four bytes per number as in `training.recipes` (so that
      2^31 elements hold more clips), and the descriptions of `clip.describe`.
    """
    import jax
    import jax.numpy as jnp

    from sanawm_jax.small_world.scenery.render import render_batch

    pack = jax.jit(
        lambda v: jax.lax.bitcast_convert_type(v.reshape(*v.shape[:3], -1, 4), jnp.uint32)
    )
    put = jax.jit(
        lambda whole, part, at: jax.lax.dynamic_update_slice(whole, part, (at, 0, 0, 0)),
        donate_argnums=0,
    )
    whole = jnp.zeros((len(seeds), num_frames, height, width * 3 // 4), jnp.uint32)
    done, facts = 0, []
    for scenes, clips in plan_clips(seeds, num_frames, height, width, workers, batch):
        c2w = np.stack([c["c2w"] for c in clips])
        intrinsics = np.stack([c["intrinsics"] for c in clips])
        video = pack(render_batch(scenes, c2w, intrinsics, height, width))
        whole = put(whole, video, done)
        done += len(clips)
        facts += clips
    return whole, facts
