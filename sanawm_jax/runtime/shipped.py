"""The weights that belong to this repository, by the names that stand for their folders."""

from __future__ import annotations

from pathlib import Path

from sanawm_jax.runtime.errors import InputError

SMALL_WORLD = "small_world"
SMALL_WORLD_REFINER = "small_world_refiner"
SHIPPED = (SMALL_WORLD, SMALL_WORLD_REFINER)
_ASSETS = Path(__file__).parents[1] / "small_world/assets"


def find_shipped(name: str) -> Path:
    """The folder of one of `SHIPPED`.

    Raises:
      InputError: it has no weights here.
    """
    folder = _ASSETS / name
    if not (folder / "model_index.json").is_file():
        raise InputError(f"the weights of {name} are not in this checkout; give a folder instead")
    return folder
