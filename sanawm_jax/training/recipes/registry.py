"""Which function makes the recipe that `config.task` names; its module is imported only then."""

from __future__ import annotations

import importlib
from pathlib import Path

from ml_collections import ConfigDict

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.recipe import Recipe

# name -> module:function of (config, workdir)
RECIPES = {
    "vae": "vae:vae_recipe",
    "dit": "stage1:dit_recipe",
    "stage1": "stage1:stage1_recipe",
    "refiner": "refiner:refiner_recipe",
}


def make_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """The recipe that `config.task` names; see `configs/`.

    Raises:
      InputError: no recipe has this name, or its data or weights are missing.
    """
    if config.task not in RECIPES:
        raise InputError(f"task={config.task!r}; use one of {', '.join(RECIPES)}")
    module, function = RECIPES[config.task].split(":")
    recipes = importlib.import_module(f"sanawm_jax.training.recipes.{module}")
    return getattr(recipes, function)(config, workdir)
