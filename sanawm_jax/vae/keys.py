"""The published tensor names of `AutoencoderKLLTX2Video` for our parameter tree."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.core.params import Params, build
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoDecoder, VideoEncoder, VideoVAE

_RENAMED = {
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".time_embedder.": ".time_embedder.timestep_embedder.",
}
_NOISE_SCALE = keymap.Layout((2, 0, 1))  # (1, 1, C) <-> (C, 1, 1)


def key_table(cfg: VAEConfig, module: type[VideoVAE] = VideoVAE) -> list[keymap.Entry]:
    """Returns the entries that load and export a `VideoVAE`, or one half of it."""
    _, abstract = build(module, cfg)
    return keymap.table(abstract, _name, layout=_layout)


def check_vae(folder: str | Path, module: type[VideoVAE] = VideoVAE) -> None:
    """Compares names and shapes of tensors with the file headers of a `vae/` folder.

    Args:
      module: `VideoEncoder` or `VideoDecoder` ignore the tensors of the other half.

    Raises:
      InputError: a file is absent or broken, or a tensor is missing, unexpected or has the wrong
        shape.
    """
    config = VAEConfig.from_json(read_config(folder))
    keymap.check(
        key_table(config, module),
        build(module, config)[1],
        SafetensorsFolder(folder),
        what=str(folder),
        ignore=functools.partial(_is_other_half, module),
    )


def load_vae(
    folder: str | Path, *, dtype: Any = None, module: type[VideoVAE] = VideoVAE
) -> tuple[VAEConfig, Params]:
    """Reads a `vae/` folder: config.json and safetensors.

    Args:
      dtype: dtype of the parameters; None keeps that of the file.
      module: `VideoEncoder` or `VideoDecoder` read only that half.

    Raises:
      InputError: a file is absent or broken, or the tensors do not fit the configuration.
    """
    config = VAEConfig.from_json(read_config(folder))
    params = keymap.load(
        key_table(config, module),
        build(module, config)[1],
        SafetensorsFolder(folder),
        what=str(folder),
        dtype=dtype,
        ignore=functools.partial(_is_other_half, module),
    )
    return config, params


def _is_other_half(module: type[VideoVAE], key: str) -> bool:
    return key.startswith({VideoEncoder: "decoder.", VideoDecoder: "encoder."}.get(module, " "))


def _name(path: str, index: tuple[int, ...]) -> str:
    del index
    for ours, theirs in _RENAMED.items():
        path = path.replace(ours, theirs)
    return keymap.default_name(path)


def _layout(path: str, ndim: int) -> keymap.Layout:
    leaf = path.rpartition(".")[2]
    if leaf.startswith("per_channel_scale"):
        return _NOISE_SCALE
    return keymap.default_layout(leaf, ndim)
