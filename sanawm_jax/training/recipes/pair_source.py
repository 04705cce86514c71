"""Where ODE regression reads its trajectories.

Axis letters: K levels, F latent frames, H W latent rows and columns, c latent channels, L text
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sanawm_jax.data.ode_store import OdePairs
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.recipes.latent_source import LatentSource, check_channels
from sanawm_jax.training.recipes.stage1_zip import encoded_captions


def pair_source(
    config: ConfigDict, workdir: Path, model: DiTConfig, steps: Sequence[float]
) -> LatentSource:
    """The trajectories of `config.data_dir`; their last states are the latents.

    Captions whose hidden states the files do not have are encoded first, see `data.text_dir`.

    Raises:
      InputError: see `data.ode_store.OdePairs`; or the arrays have other channels than the network.
    """
    if not config.data_dir:
        raise InputError("data.format=ode_lmdb needs data_dir, a store of data/ode_pairs.py")
    pairs = OdePairs(config.data_dir, steps)
    _, frames, channels, height, width = pairs.shape
    known = pairs.captions()
    if known is None:
        texts = encoded_captions(config, workdir, sorted(set(pairs.prompts)))
        order = {caption: i for i, caption in enumerate([*sorted(set(pairs.prompts)), ""])}
        found = [texts(caption) for caption in order]
        known = np.stack([f[0] for f in found]), np.stack([f[1] for f in found])
        caption = np.array([order[prompt] for prompt in pairs.prompts])
    else:
        caption = None
    text, mask = known

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = pairs.rows(indices)
        own = rows.pop("caption") if caption is None else caption[indices]
        return {
            **rows,
            "latents": rows["trajectory"][..., -1, :, :, :, :],
            "text": text[own],
            "text_mask": mask[own],
        }

    first = pairs.row(0)
    plucker = first["plucker"].shape[-1]
    check_channels(model, {"latents": channels, "plucker": plucker, "text": text.shape[-1]})
    return LatentSource(
        size=len(pairs),
        frames=frames,
        grid=(height, width),
        null=(text[-1], mask[-1]),
        read=read,
    )
