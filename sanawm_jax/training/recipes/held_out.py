"""Measures a student on clips that it was not trained on.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.params import Params
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.processes import is_first
from sanawm_jax.training.engine.held_out import ERROR, HeldOut
from sanawm_jax.training.objectives.rollout import roll_out
from sanawm_jax.training.recipes.distill import STUDENT, Distillation, Network


def held_out_clips(run: Distillation, network: Network, workdir: Path) -> HeldOut | None:
    """The measure that `config.held_out` describes; None if it asks for none.

    The student makes the last clips of the data as sampling does, from noise that is always the
    same. `error` is the mean squared error of its latents, `error_last` that of the last chunk, and
    `saturation` the ratio of the deviations of made and real latents.

    Raises:
      InputError: no clips are held out, or the data cannot be read by number.
    """
    given = run.config.held_out
    if not given.every:
        return None
    if given.clips < 1 or run.source.arrays is None:
        raise InputError(
            f"held_out.every={given.every} needs held_out.clips above 0, and clips in .npy files"
        )
    student = dataclasses.replace(run.student, graphdef=network.graphdef)
    levels = len(run.steps) - 1
    size = min(given.batch, given.clips)
    numbers = np.arange(run.source.size - given.clips, run.source.size)

    @jax.jit
    def sums(params: Params, resident: Any, batch: Any, part: jax.Array) -> jax.Array:
        latents, conditions = run.rows(resident, batch)
        key = jax.random.fold_in(jax.random.key(run.config.seed), part)
        made = roll_out(
            student,
            network.whole(resident)(params),
            latents[:, :1],
            conditions,
            jax.random.normal(key, (1, *latents.shape)),
            jnp.int32(levels - 1),
            run.steps,
            renoise=False,
        ).made
        error = jnp.square(made - latents)[:, 1:]
        last = error[:, -run.window.size :]
        spread = [jnp.std(clip[:, 1:]) for clip in (made, latents)]
        return jnp.stack([jnp.mean(error), jnp.mean(last), spread[0] / spread[1]])

    def measure(best: dict[str, Params], resident: Any) -> dict[str, float]:
        found = []
        for part in range(len(numbers) // size):
            rows = numbers[part * size : (part + 1) * size]
            assert run.source.read is not None
            batch = rows if run.config.on_device else run.source.read(rows)
            found.append(sums(best[STUDENT], resident, batch, jnp.int32(part)))
        mean = np.mean([np.asarray(values) for values in found], 0)
        named = zip((ERROR, "error_last", "saturation"), mean, strict=True)
        return {name: float(value) for name, value in named}

    def keep(best: dict[str, Params]) -> None:
        if is_first():
            run.export(network, best[STUDENT], workdir / "best")

    return HeldOut(given.every, given.patience, measure, keep)
