"""The time in which a Hopper GPU only moves the data of the recurrence's kernels.

    python -m benchmarks.tiles                      # 121 latent frames, two prompts

There is one block of threads per head and frame. It copies tiles of 64 tokens and float32 matrices
to its shared memory with the copy engine, and copies others back, as the kernels of
`kernels_pallas.gdn.gpu_hopper` do. It computes nothing, so the written values have no meaning. The
script prints one JSON line per part, with the names of `benchmarks.kernels`: median ms and GB/s. A
kernel with these reads and writes cannot be faster.
"""

from __future__ import annotations

import argparse
import functools
import json
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from benchmarks.kernels import milliseconds
from kernels_pallas import choice
from kernels_pallas.gdn import gpu_hopper as hopper
from sanawm_jax.runtime.compiler_flags import use_compiler_flags

# part -> the numbers of token arrays and matrices that are read, and of those that are written
PARTS = {
    "frame maps": (2, 0, 0, 2),
    "recurrence, one direction": (0, 2, 0, 1),
    "read-out": (1, 1, 1, 0),
}


def _kernel(*refs: Any, counts: tuple[int, int, int, int], steps: int, slots: int) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tokens_in, matrices_in, tokens_out, matrices_out = (
        refs[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)
    )
    tiles, matrix, tile_full, matrix_full = refs[sum(counts) :]
    head, frame = lax.axis_index("head"), lax.axis_index("frame")

    def ask(i: Any) -> None:
        at = hopper.ring(i, slots)
        for j, ref in enumerate(tokens_in):
            source = ref.at[frame, hopper.rows(i), head]
            plgpu.copy_gmem_to_smem(source, tiles.at[j, at], tile_full.at[at])

    for ref in matrices_in:
        plgpu.copy_gmem_to_smem(ref.at[frame, head], matrix, matrix_full)
    if tokens_in:
        for i in range(min(slots - 1, steps)):
            ask(jnp.int32(i))

        def step(i: Any, carry: None) -> None:
            at = hopper.ring(i, slots)
            plgpu.barrier_wait(tile_full.at[at])
            for j, ref in enumerate(tokens_out):
                plgpu.copy_smem_to_gmem(tiles.at[j, at], ref.at[frame, hopper.rows(i), head])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            pl.when(i + slots - 1 < steps)(lambda: ask(i + slots - 1))

        lax.fori_loop(0, steps, step, None)
    if matrices_in:
        plgpu.barrier_wait(matrix_full)
    for ref in matrices_out:
        plgpu.copy_smem_to_gmem(matrix, ref.at[frame, head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def move(
    part: str,
    tokens: list[jax.Array],
    matrices: list[jax.Array],
    shape: tuple[int, int, int, int],
    *,
    slots: int = 4,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Returns the arrays that the part writes: copies of its tokens, then matrices.

    Args:
      part: a key of `PARTS`.
      tokens: the arrays (F, P, N, D) bfloat16 that the part reads.
      matrices: the arrays (F, N, D, D) float32 that it reads.
      shape: (F, P, N, D).
      slots: number of tiles in shared memory per array.
      interpret: whether and how Pallas interprets the kernel.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    frames, count, heads, size = shape
    counts = PARTS[part]
    results = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * counts[2]
    results += [jax.ShapeDtypeStruct((frames, heads, size, size), jnp.float32)] * counts[3]
    kernel = hopper.over_heads(
        functools.partial(_kernel, counts=counts, steps=pl.cdiv(count, hopper.ROWS), slots=slots),
        tuple(results),
        (
            hopper.plain_tiles(max(1, counts[0]), slots, hopper.ROWS, size),
            plgpu.SMEM((size, size), jnp.float32),
            plgpu.Barrier(num_arrivals=max(1, counts[0]), num_barriers=slots),
            plgpu.Barrier(num_arrivals=max(1, counts[1])),
        ),
        jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16),
        groups=1,
        interpret=interpret,
    )
    return kernel(*tokens, *matrices)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs one command line and returns its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent_frames", type=int, default=121)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    use_compiler_flags()
    if choice.capability() != choice.HOPPER:
        parser.error("needs a Hopper GPU (H100, H200) that JAX runs on")
    shape = frames, _, heads, size = (given.batch * given.latent_frames, 880, 20, 112)
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2]]
    matrices = [jax.random.normal(key, (frames, heads, size, size)) for key in keys[2:]]
    found = []
    for part, (tokens_in, matrices_in, tokens_out, matrices_out) in PARTS.items():
        inputs = (tokens[:tokens_in], matrices[:matrices_in])
        time_of = milliseconds(
            jax.jit(functools.partial(move, part, shape=shape)), inputs, given.repeats
        )
        moved = (tokens_in + tokens_out) * tokens[0].nbytes
        moved += (matrices_in + matrices_out) * matrices[0].nbytes
        line = {"part": part, "ms": round(time_of, 4), "gbps": round(moved / time_of * 1e-6)}
        line |= {"frames": given.latent_frames, "device": jax.devices()[0].device_kind}
        print(json.dumps(line), flush=True)
        found.append(line)
    return found


if __name__ == "__main__":
    main()
