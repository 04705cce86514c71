"""Clips for training without a data set: planned on the CPU, rendered on the accelerator.

Planning (scene, path, caption) is numpy and takes about 50 ms of one core per clip, so processes
share it; rendering is jitted and batched over clips and frames.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.scenery.clip import describe
from sanawm_jax.small_world.scenery.scene import Scene, stack_scenes

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh


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


def clip_renderer(mesh: Mesh, height: int, width: int) -> Callable[[Scene, Any, Any], jax.Array]:
    """A compiled renderer of batches of clips, which the ranks of a mesh share.

    Returns:
      (scenes, c2w (B, F, 4, 4), intrinsics (B, 4)) -> video (ranks, B / ranks, F, H, W * 3 / 4)
      uint32, four bytes per number as in `training.recipes`, so that 2^31 elements hold more clips.
    """
    import jax
    import jax.numpy as jnp

    from sanawm_jax.core.sharding import logical_spec
    from sanawm_jax.small_world.scenery.render import render_batch

    def one(scenes: Scene, c2w: jax.Array, intrinsics: jax.Array) -> jax.Array:
        video = render_batch(scenes, c2w, intrinsics, height, width)
        packed = video.reshape(*video.shape[:3], -1, 4)
        return jax.lax.bitcast_convert_type(packed, jnp.uint32)[None]

    rows = logical_spec("B")
    # each rank renders on its own: a loop over all clips would wait for the slowest one
    shared = jax.shard_map(one, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return jax.jit(shared)


def render_pool(
    seeds: Sequence[int],
    num_frames: int,
    height: int,
    width: int,
    mesh: Mesh,
    *,
    workers: int = 0,
    batch: int = 32,
) -> jax.Array:
    """Clips of many seeds on the devices of a mesh.

    Args:
      seeds: a multiple of `batch` of them.
      workers: processes that plan.
      batch: clips per call of the renderer, a multiple of the ranks.

    Returns:
      video (ranks, n / ranks, F, H, W * 3 / 4) uint32, see `clip_renderer`.

    Raises:
      InputError: the numbers do not divide.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from sanawm_jax.core.sharding import logical_spec

    ranks = mesh.size
    if len(seeds) % batch or batch % ranks:
        raise InputError(
            f"{len(seeds)} clips must be a multiple of --render={batch}, which must be a multiple "
            f"of {ranks} devices"
        )
    rows = logical_spec("B")

    def write(whole: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part, (0, at, 0, 0, 0))

    put = jax.jit(
        jax.shard_map(write, mesh=mesh, in_specs=(rows, rows, P()), out_specs=rows),
        donate_argnums=0,
    )
    render = clip_renderer(mesh, height, width)
    shape = (ranks, len(seeds) // ranks, num_frames, height, width * 3 // 4)
    whole = jnp.zeros(shape, jnp.uint32, device=NamedSharding(mesh, rows))
    plans = plan_clips(seeds, num_frames, height, width, workers, batch)
    for index, (scenes, clips) in enumerate(plans):
        c2w = np.stack([c["c2w"] for c in clips])
        intrinsics = np.stack([c["intrinsics"] for c in clips])
        whole = put(whole, render(scenes, c2w, intrinsics), index * batch // ranks)
    return whole
