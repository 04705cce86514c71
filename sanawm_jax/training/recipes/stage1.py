"""Trains stage 1: on clips encoded by a trained autoencoder, or on latents that others made.

Axis letters: B batch, F latent frames, H W latent rows and columns, L text tokens.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from sanawm_jax.checkpoints.adapters import save_adapters
from sanawm_jax.checkpoints.export import export_transformer
from sanawm_jax.checkpoints.layouts import write_index
from sanawm_jax.core.params import Params
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import key_table
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.training.engine.recipe import Recipe, one_learner
from sanawm_jax.training.objectives.stage1 import Stage1Objective
from sanawm_jax.training.recipes.cached_clips import cached_clips, text_folder
from sanawm_jax.training.recipes.clips import open_source
from sanawm_jax.training.recipes.latent_source import LatentSource, array_source
from sanawm_jax.training.recipes.samples import first_rows, stage1_samples
from sanawm_jax.training.recipes.stage1_zip import zip_source


def dit_config(config: ml_collections.ConfigDict) -> DiTConfig:
    """The network of a run; fields that `config.dit` leaves out are those of the release."""
    return DiTConfig(**config.dit.to_dict())


def dit_recipe(config: ml_collections.ConfigDict, workdir: Path) -> Recipe:
    """Trains stage 1 on clips encoded by a trained autoencoder, which all lie on the device."""
    if not config.vae_dir:
        raise InputError("vae_dir is empty; give the vae/ folder that an autoencoder run exported")
    cache = cached_clips(config, workdir, open_source(config))
    folder = workdir / "export"
    resident: dict[str, Any] = {name: np.asarray(a) for name, a in cache.items()}
    size = len(cache["latents"])
    logging.info(
        "%d clips, %.2f GiB on the device", size, sum(a.nbytes for a in resident.values()) / 2**30
    )
    model = DiTConfig(
        in_channels=cache["latents"].shape[-1],
        caption_channels=cache["text"].shape[-1],
        chunk_plucker_channels=cache["plucker"].shape[-1],
        **config.dit.to_dict(),
    )
    objective = Stage1Objective(config, model, cache["latents"].shape[1])

    def prepare(resident: dict[str, jax.Array], batch: jax.Array, key: jax.Array) -> Any:
        rows = {name: resident[name][batch] for name in ("latents", "camera", "plucker")}
        caption = resident["caption"][batch]
        text, mask = resident["text"], resident["text_mask"]
        rows = {**rows, "text": text[caption], "text_mask": mask[caption]}
        return objective.prepare(rows, (text[-1], mask[-1]), key)

    def export(params: Params) -> None:
        export_stage1(objective, model, params, config, folder)
        shutil.copytree(config.vae_dir, folder / "vae", dirs_exist_ok=True)
        text = text_folder(config, workdir)
        for part in ("tokenizer", "text_encoder") if text != folder else ():
            shutil.copytree(text / part, folder / part, dirs_exist_ok=True)
        write_index(folder, Schedule(shift=config.flow_shift))

    resident.update(objective.frozen())
    return one_learner(
        config,
        abstract=objective.abstract,
        init=objective.init,
        resident=resident,
        size=size,
        prepare=prepare,
        loss=objective.loss,
        export=export,
        flops=objective.flops(cache["latents"].shape[2:4], cache["text"].shape[1]),
        sample=stage1_samples(config, objective, functools.partial(first_rows, cache)),
    )


def stage1_recipe(config: ml_collections.ConfigDict, workdir: Path) -> Recipe:
    """Trains stage 1 on `config.data_dir`, or without one on `config.synthetic` latents."""
    model = dit_config(config)
    if config.data.format not in ("npy", "zip_latents"):
        raise InputError(f"data.format={config.data.format!r}; use npy or zip_latents")
    if config.data.format == "zip_latents":
        source = zip_source(config, workdir, model)
    else:
        source = array_source(config, model)
    objective = Stage1Objective(config, model, source.frames)
    return recipe_of_latents(config, workdir, model, objective, source)


def recipe_of_latents(
    config: ml_collections.ConfigDict,
    workdir: Path,
    model: DiTConfig,
    objective: Stage1Objective,
    source: LatentSource,
) -> Recipe:
    """Stage 1 on batches that the host reads."""

    def prepare(
        resident: dict[str, jax.Array], batch: dict[str, jax.Array], key: jax.Array
    ) -> dict[str, jax.Array]:
        return objective.prepare(batch, (resident["text"], resident["text_mask"]), key)

    def export(params: Params) -> None:
        export_stage1(objective, model, params, config, workdir / "export")

    text, text_mask = source.null
    return one_learner(
        config,
        abstract=objective.abstract,
        init=objective.init,
        resident={"text": text, "text_mask": text_mask, **objective.frozen()},
        size=source.size,
        prepare=prepare,
        loss=objective.loss,
        export=export,
        read=source.read,
        stream=source.stream,
        flops=objective.flops(source.grid, len(text)),
        sample=source.first and stage1_samples(config, objective, source.first),
    )


def export_stage1(
    objective: Stage1Objective,
    model: DiTConfig,
    params: Params,
    config: ml_collections.ConfigDict,
    folder: Path,
) -> None:
    """Writes `transformer/`, adapters merged into it, and those alone as `lora/` for PEFT."""
    if objective.lora:
        save_adapters(
            folder / "lora",
            params,
            objective.lora,
            key_table(model),
            base=config.init_weights,
            dtype=jnp.dtype(config.export_dtype),
        )
    whole = objective.merged(params)
    export_transformer(model, whole, folder / "transformer", config.export_dtype)
