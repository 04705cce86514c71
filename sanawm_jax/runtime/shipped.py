"""Finds the weights and configurations of this repository by their names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from sanawm_jax.runtime.errors import InputError

SMALL_WORLD = "small_world"
SMALL_WORLD_REFINER = "small_world_refiner"
SHIPPED = (SMALL_WORLD, SMALL_WORLD_REFINER)
_PACKAGE = Path(__file__).parents[1]
ASSETS = _PACKAGE / "small_world/assets"
# In a wheel, the repository's folder `configs/` is inside the package.
CONFIGS = next(f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir())


def find_shipped(name: str) -> Path:
    """Returns the folder of one of `SHIPPED`.

    Raises:
      InputError: its weights are not in this installation.
    """
    folder = ASSETS / name
    if not (folder / "model_index.json").is_file():
        raise InputError(f"the weights of {name} are not in this checkout; give a folder instead")
    return folder


def with_config_path(argv: list[str]) -> list[str]:
    """Replaces NAME in `--config NAME` by the path of the file in `CONFIGS` that has this name.

    If the user has a file with this name, NAME does not change.
    """
    argv = list(argv)
    for i, word in enumerate(argv):
        flag, is_assigned, name = word.partition("=")
        if flag not in ("-config", "--config"):
            continue
        place, before = (i, f"{flag}=") if is_assigned else (i + 1, "")
        name = name if is_assigned else "".join(argv[place : place + 1])
        file = CONFIGS / f"{name}.py"
        if name.isidentifier() and file.is_file() and not Path(name).is_file():
            argv[place] = f"{before}{file}"
    return argv


def use_shipped_configs() -> None:
    """Makes the folder `CONFIGS` the package `configs`, which our configurations import.

    A console script does not have the repository on its path, a wheel has the folder at another
    place, and the path may contain the folder `configs` of another project.
    """
    if "configs" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "configs", CONFIGS / "__init__.py", submodule_search_locations=[str(CONFIGS)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["configs"])
