"""What a stage-1 run needs, computed from shapes: parameters, memory per device, shardings.

Axis letters: B batch, F latent frames, P tokens a frame, C width.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import ml_collections

from sanawm_jax.core.frames import chunk_starts
from sanawm_jax.core.params import Params, build, count, leaves
from sanawm_jax.core.sharding import check_batch, check_heads, plan_mesh, shardings
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.learner import update_rule
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.recipes.latent_source import open_latents
from sanawm_jax.training.recipes.stage1 import dit_config
from sanawm_jax.training.recipes.stage1_zip import open_zips

_GIB = 2**30


def describe(config: ml_collections.ConfigDict) -> str:
    """Parameter count, memory estimate and sharding table of a stage-1 run, as text.

    The state is counted exactly. Of the activations, only the input of every block is counted,
    which the backward pass keeps with `remat="full"`; the block that it recomputes is not.

    Raises:
      InputError: the task is another one, or mesh, batch or chunk layout do not fit.
    """
    if config.task != "stage1":
        raise InputError(f"dry_run describes task='stage1'; this one is {config.task!r}")
    model = dit_config(config)
    mesh = plan_mesh(**config.mesh.to_dict())
    check_batch(mesh, config.batch_size, config.accumulation)
    _, params = build(DiT, model)
    rule = update_rule(config.optimizer, config.steps, config.ema_decay)
    learner = jax.eval_shape(rule.begin, params)
    placed = shardings(learner, mesh)
    check_heads(model.num_heads, mesh.shape["tensor"])

    parts = {
        "parameters": (params, placed.params),
        "optimizer": (learner.moments, placed.moments),
        "average": (learner.average, placed.average),
        "gradients": (params, placed.params),
    }
    sizes = {name: _bytes(*part) for name, part in parts.items()}
    frames, height, width = _clip(config)
    sizes["block inputs"] = _block_inputs(config, model, frames, height, width)
    chunks = 1
    if config.chunk_size:
        chunks = len(chunk_starts(frames, config.chunk_size, config.chunk_split_strategy))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return "\n".join(
        [
            f"{count(params):,} parameters",
            f"mesh {axes}: {mesh.size} devices; {config.batch_size} clips of {frames} x {height} x "
            f"{width} latents a step in {config.accumulation} part(s); {chunks} chunk(s)",
            "memory per device, GiB:",
            *(f"  {name:<14}{size / _GIB:9.3f}" for name, size in sizes.items()),
            f"  {'sum':<14}{sum(sizes.values()) / _GIB:9.3f}",
            "shardings (parameter, shape, axes):",
            *_table(params, placed.params),
        ]
    )


def _bytes(tree: Any, placed: Any) -> int:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in pairs)


def _clip(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    if config.data.format == "zip_latents":
        source, _ = open_zips(config, dit_config(config))
        return source.latent_frames, *source.measure()[1:]
    if config.data_dir:
        return open_latents(config.data_dir)["latents"].shape[1:4]
    made = config.synthetic
    return made.latent_frames, made.height, made.width


def _block_inputs(
    config: ml_collections.ConfigDict, model: DiTConfig, frames: int, height: int, width: int
) -> int:
    mesh = config.mesh
    rows = config.batch_size // (mesh.data * mesh.fsdp * config.accumulation)
    tokens = -(-frames // mesh.context) * (height // model.patch_size[1])
    tokens *= width // model.patch_size[2]
    size = compute_dtype(config.dtype).itemsize
    return model.num_layers * rows * tokens * model.hidden_size * size


def _table(params: Params, placed: Params) -> list[str]:
    """One line for each parameter; blocks of one kind share a stacked array."""
    rows = []
    for (path, leaf), (_, sharding) in zip(leaves(params), leaves(placed), strict=True):
        name = re.sub(r"^segments\.(\d+)\.runs\.(\d+)\.layers", r"\1.\2", path)
        axes = ", ".join(axis or "-" for axis in sharding.spec) or "-"
        rows.append(f"  {name:<34} {'x'.join(map(str, leaf.shape)) or '1':<20} {axes}")
    return rows
