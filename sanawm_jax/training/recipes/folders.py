"""The folders that a configuration names, found and checked before a run begins."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from sanawm_jax.checkpoints.folder import find_weights
from sanawm_jax.runtime.errors import InputError


def find_folders(config: ConfigDict) -> None:
    """Replaces the names in `vae_dir` and `text_dir` by the paths of folders.

    Both take what `init_weights` takes: a folder, `small_world` or a hub name. `vae_dir` may be a
    stage-1 folder or its `vae/`.

    Raises:
      InputError: there is no such folder, or `vae_dir` holds no autoencoder that fits its
        configuration.
    """
    if config.get("text_dir"):
        config.text_dir = str(find_weights(config.text_dir))
    if not config.get("vae_dir"):
        return
    from sanawm_jax.vae.keys import check_vae
    from sanawm_jax.vae.model import VideoDecoder

    folder = find_weights(config.vae_dir)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"vae_dir={config.vae_dir} holds no autoencoder (vae/config.json)")
    check_vae(folder, VideoDecoder)
    config.vae_dir = str(folder)
