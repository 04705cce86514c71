"""Makes trajectories of a teacher, on which a student is trained by regression.

    python -m sanawm_jax.data.ode_pairs --teacher FOLDER --latents FOLDER --out STORE
        [--chunk_size 3] [--guidance 5] [--solver heun] [--solver_steps 40]

For every clip of a folder of latents the command draws noise, and follows the teacher's flow from
it down to a clean clip. The clip's first frame is given, and its camera and caption steer it. The
states at the student's levels are stored; `sanawm_jax/data/ode_store.py` describes the files. The
same command continues an interrupted run. It ends with status 0 and prints STORE as its last line.
On bad input it prints one line and ends with status 2.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, K levels.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import lax

from sanawm_jax.checkpoints.initial_weights import open_trained
from sanawm_jax.core.frames import chunk_starts
from sanawm_jax.core.params import Params
from sanawm_jax.data.latent_cache import cache_facts, open_latents
from sanawm_jax.data.ode_store import Shard
from sanawm_jax.runtime.command_line import fail, show_notes
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.lock import only_run_in
from sanawm_jax.sampling.precision import matmul_precision, resolve_dtype
from sanawm_jax.sampling.schedule import Schedule, check_steps, euler_step
from sanawm_jax.sampling.stage1 import Conditions, guided_velocity, is_condition

SOLVERS = ("euler", "heun")
_APART = 1e-3  # levels of the sampler that are closer to one of the student's are left out


def solver_grid(sigmas: np.ndarray, steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The levels of a solver that stops at every level of the student.

    Args:
      sigmas: levels of the teacher's sampler, falling to 0.
      steps: timesteps of the student's levels, and 0.

    Returns:
      All levels, falling from the first of the student's to 0, and the places of the student's.
    """
    wanted = np.asarray(steps, np.float64) / 1000
    own = [s for s in sigmas if s < wanted[0] and np.abs(wanted - s).min() > _APART]
    grid = np.array(sorted({*own, *wanted}, reverse=True))
    return grid.astype(np.float32), np.searchsorted(-grid, -wanted)


@functools.partial(jax.jit, static_argnames=("graphdef", "places", "solver", "dtype", "starts"))
def trajectory(
    graphdef: nnx.GraphDef,
    params: Params,
    noise: jax.Array,
    image: jax.Array,
    conditions: Conditions,
    grid: jax.Array,
    guidance: jax.Array,
    *,
    places: tuple[int, ...],
    solver: Literal["euler", "heun"],
    dtype: Any,
    starts: tuple[int, ...] | None,
) -> jax.Array:
    """The states of a flow at some of the levels of its solver, (K, B, F, H, W, c) float32.

    Args:
      graphdef, params: the teacher.
      noise: (B, F, H, W, c) standard normal.
      image: (B, 1, H, W, c), which stays frame 0.
      conditions: with guidance the text has batch 2 B, [negative, prompt].
      grid: levels, falling to 0.
      guidance: scale, read only with such a text.
      places: indices of the levels whose states are kept.
      solver: euler, or heun, which is of second order and runs the teacher twice per step.
      dtype: compute dtype.
      starts: first frame of every chunk of a chunk-causal teacher.
    """
    conditioned = is_condition(noise)

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return guided_velocity(
            graphdef, params, x, conditions, sigma, guidance, dtype, starts
        ).astype(jnp.float32)

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        now, following = pair
        slope = velocity(x, now)
        if solver == "heun":
            moved = euler_step(x, slope, now, following, conditioned)
            again = lax.cond(following > 0, lambda: velocity(moved, following), lambda: slope)
            slope = (slope + again) / 2
        after = euler_step(x, slope, now, following, conditioned)
        return after, after

    start = jnp.concatenate([image, noise[:, 1:]], 1).astype(jnp.float32)
    _, states = lax.scan(step, start, (grid[:-1], grid[1:]))
    return jnp.concatenate([start[None], states])[np.array(places)]


def make_pairs(given: argparse.Namespace, dtype: Any) -> None:
    """Runs the command.

    Raises:
      InputError: folders, levels or options do not fit.
    """
    if given.solver not in SOLVERS:
        raise InputError(f"--solver {given.solver}; use one of {', '.join(SOLVERS)}")
    try:
        steps = tuple(float(part) for part in given.denoising_step_list.split(","))
    except ValueError:
        raise InputError(
            f"--denoising_step_list {given.denoising_step_list} is no list of numbers"
        ) from None
    check_steps(steps)
    folder = open_trained(given.teacher, numerics=given.numerics or None)
    arrays = open_latents(given.latents)
    count = min(given.clips or len(arrays["latents"]), len(arrays["latents"]))
    frames = given.frames or arrays["latents"].shape[1]
    starts = chunk_starts(frames, given.chunk_size) if given.chunk_size else None
    model, graphdef, params = folder.load_dit(dtype)
    if model.in_channels != arrays["latents"].shape[-1]:
        raise InputError(
            f"{given.latents} has latents of {arrays['latents'].shape[-1]} channels, the teacher "
            f"{model.in_channels}"
        )
    has_scheduler = (folder.path / "scheduler").is_dir()
    schedule = folder.schedule() if has_scheduler else Schedule()
    grid, places = solver_grid(schedule.sigmas(given.solver_steps), steps)
    run = functools.partial(
        trajectory,
        graphdef,
        params,
        grid=jnp.asarray(grid),
        guidance=jnp.float32(given.guidance),
        places=tuple(int(place) for place in places),
        solver=given.solver,
        dtype=dtype,
        starts=starts,
    )
    prompts = _prompts(Path(given.latents), arrays)
    for first in range(0, count, given.shard):
        shard = Shard(Path(given.out) / f"shard_{first // given.shard:05d}", write=True)
        try:
            if shard.shape("timesteps") is None:
                shard.put("timesteps", np.array([steps]))
                for name in ("text", "text_mask"):
                    shard.put(name, np.asarray(arrays[name]))
            elif not np.allclose(shard.read("timesteps", 0), steps):
                raise InputError(f"{shard.folder} has other levels; use another --out")
            last = min(first + given.shard, count)
            while (start := first + shard.rows) < last:
                rows = np.arange(start, min(start + given.batch, last))
                shard.append(_batch(rows, run, arrays, prompts, given, frames, dtype))
                logging.info("%d of %d clips", rows[-1] + 1, count)
        finally:
            shard.close()


def _prompts(folder: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """The caption of every clip; empty where the folder does not name them."""
    if not (folder / "progress.json").is_file():
        return [""] * len(arrays["latents"])
    captions = cache_facts(folder)[1]
    return [captions[row] for row in arrays["caption"]]


def _batch(
    rows: np.ndarray,
    run: Any,
    arrays: dict[str, np.ndarray],
    prompts: list[str],
    given: argparse.Namespace,
    frames: int,
    dtype: Any,
) -> dict[str, Any]:
    """Rows of the store; a short batch is filled up, so that all have one program."""
    padded = np.append(rows, np.repeat(rows[-1], given.batch - len(rows)))
    latents, camera, plucker = (
        np.asarray(arrays[name][padded][:, :frames]) for name in ("latents", "camera", "plucker")
    )
    caption = np.asarray(arrays["caption"])[padded]
    text, mask = (np.asarray(arrays[name])[caption] for name in ("text", "text_mask"))
    if given.guidance != 1.0:
        text, mask = (
            np.concatenate([np.broadcast_to(arrays[name][-1:], own.shape), own])
            for name, own in (("text", text), ("text_mask", mask))
        )
    key, shape = jax.random.key(given.seed), latents.shape[1:]
    noise = jax.vmap(lambda clip: jax.random.normal(jax.random.fold_in(key, clip), shape))
    conditions = Conditions(
        jnp.asarray(text).astype(dtype),
        jnp.asarray(mask),
        jnp.asarray(camera),
        jnp.asarray(plucker).astype(dtype),
    )
    states = run(noise(jnp.asarray(padded)), jnp.asarray(latents[:, :1], jnp.float32), conditions)
    count = len(rows)
    states = np.moveaxis(np.asarray(states)[:, :count], 0, 1)  # rows first
    return {
        "latents": np.moveaxis(states, -1, 3),
        "camera_conditions": camera[:count],
        "chunk_plucker": np.moveaxis(plucker[:count], -1, 1),
        "prompts": [prompts[row] for row in rows],
        "caption": caption[:count],
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", required=True, help="a run, a stage-1 folder, or a hub name")
    parser.add_argument("--latents", required=True, help="folder of latents, see docs/data.md")
    parser.add_argument("--out", required=True, help="folder of the store")
    parser.add_argument("--denoising_step_list", default="1000,967,908,764,0")
    parser.add_argument("--chunk_size", type=int, default=0, help="0: the teacher is bidirectional")
    parser.add_argument("--guidance", type=float, default=5.0, help="1: none")
    parser.add_argument("--solver", default="euler", help=" or ".join(SOLVERS))
    parser.add_argument("--solver_steps", type=int, default=60)
    parser.add_argument("--clips", type=int, default=0, help="0: all")
    parser.add_argument("--frames", type=int, default=0, help="latent frames; 0: all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shard", type=int, default=256, help="clips per shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="or float32")
    parser.add_argument("--numerics", default="", help="a preset; empty: that of the teacher")
    given = parser.parse_args(arguments)
    show_notes()
    logging.set_verbosity(logging.INFO)
    try:
        dtype = resolve_dtype(given.dtype)
        Path(given.out).mkdir(parents=True, exist_ok=True)
        with only_run_in(Path(given.out)), matmul_precision(dtype):
            make_pairs(given, dtype)
    except InputError as error:
        fail(str(error))
    print(given.out)


if __name__ == "__main__":
    main()
