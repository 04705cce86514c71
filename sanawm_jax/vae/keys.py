"""Published tensor names of `AutoencoderKLLTX2Video` for our parameter tree."""

from __future__ import annotations

from sanawm_jax.core.params import build
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE
from sanawm_jax.weights import keymap

_RENAMED = {
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".time_embedder.": ".time_embedder.timestep_embedder.",
}
_NOISE_SCALE = keymap.Layout((2, 0, 1))  # (1, 1, C) <-> (C, 1, 1)


def key_table(cfg: VAEConfig) -> list[keymap.Entry]:
    """The entries that load and export a `VideoVAE` of this configuration."""
    _, abstract = build(VideoVAE, cfg)
    return keymap.table(abstract, _name, layout=_layout)


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
