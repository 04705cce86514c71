"""Which function makes the recipe that `config.task` names; its module is imported only then."""

from __future__ import annotations

import importlib
from pathlib import Path

from ml_collections import ConfigDict

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.recipes.folders import find_folders

# name -> module:function; the function makes a Recipe of (config, workdir)
RECIPES = {
    "vae": "sanawm_jax.training.recipes.vae:vae_recipe",
    "dit": "sanawm_jax.training.recipes.stage1:dit_recipe",
    "stage1": "sanawm_jax.training.recipes.stage1:stage1_recipe",
    "refiner": "sanawm_jax.training.recipes.refiner:refiner_recipe",
    "self_forcing": "sanawm_jax.training.recipes.self_forcing:self_forcing_recipe",
    "ode": "sanawm_jax.training.recipes.ode:ode_recipe",
    "consistency": "sanawm_jax.training.recipes.consistency:consistency_recipe",
    "self_forcing_to_truth": "sanawm_jax.training.recipes.to_truth:to_truth_recipe",
}


def make_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """The recipe that `config.task` names; see `configs/`.

    Raises:
      InputError: no recipe has this name, or its data or weights are missing.
    """
    if config.task not in RECIPES:
        raise InputError(f"task={config.task!r}; use one of {', '.join(RECIPES)}")
    find_folders(config)
    module, function = RECIPES[config.task].split(":")
    return getattr(importlib.import_module(module), function)(config, workdir)
