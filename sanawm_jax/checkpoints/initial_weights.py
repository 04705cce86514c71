"""The weights that a stage-1 run starts from; their network may have grown since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import Tensors
from sanawm_jax.checkpoints.folder import Stage1Folder
from sanawm_jax.checkpoints.upstream_folder import UpstreamFolder, open_stage1
from sanawm_jax.core.params import Params, build
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import key_table
from sanawm_jax.dit.model import DiT
from sanawm_jax.runtime.errors import InputError


class _OneNetwork(Stage1Folder):
    """A folder with nothing but `transformer/`, as a run on given latents exports it."""

    def _read_index(self) -> dict[str, Any]:
        return {}


def open_trained(
    name: str | Path,
    *,
    allow_pickle: bool = False,
    numerics: str | None = None,
    network: str = "generator",
) -> Stage1Folder:
    """Opens what a training run exported, or any folder that `open_stage1` opens.

    Args:
      name: the folder of a run, its `export/`, or see `open_stage1`.
      allow_pickle, numerics: see `open_stage1`.
      network: which one of a distillation: generator, or critic.

    Raises:
      InputError: see `open_stage1`.
    """
    places = [Path(name) / "export", Path(name)]
    if network == "critic":
        places = [Path(name) / "export" / "critic", *places]
    for path in places:
        transformer = path / "transformer" / "config.json"
        if transformer.is_file() and not (path / "model_index.json").is_file():
            folder = _OneNetwork(path)
            folder.numerics = numerics
            return folder
        if transformer.is_file():
            return open_stage1(path, numerics=numerics)
    folder = open_stage1(name, allow_pickle=allow_pickle, numerics=numerics)
    if isinstance(folder, UpstreamFolder):
        folder.network = network
    return folder


def load_initial(
    name: str, config: DiTConfig, *, allow_pickle: bool = False, network: str = "generator"
) -> Params:
    """Float32 host arrays of `build(DiT, config)` from a folder.

    The folder's network may have softmax attention in other layers. Both kinds of attention have
    the same parameters, except for the short convolutions of the recurrence; those of a layer that
    becomes softmax attention are ignored.

    Args:
      name: a stage-1 folder in diffusers or upstream layout, `small_world`, a hub name, or the
        folder of a training run.
      config: of the run's network.
      allow_pickle, network: see `open_trained`.

    Raises:
      InputError: the folder is of another network, or see `open_stage1`.
    """
    abstract = build(DiT, config)[1]
    folder = open_trained(name, allow_pickle=allow_pickle, network=network)
    found, _, params = folder.load_dit(np.float32, place=lambda path, array: array)
    if build(DiT, found)[1] == abstract:
        return params
    tensors = Tensors(keymap.export(key_table(found), params))
    try:
        return keymap.load(
            key_table(config),
            abstract,
            tensors,
            what=name,
            place=lambda path, array: array,
            ignore=lambda key: ".attn.conv_" in key,
        )
    except InputError as error:
        raise InputError(
            f"init_weights={name} is of another network than config.dit ({error})"
        ) from None
