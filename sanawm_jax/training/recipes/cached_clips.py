"""Clips that are encoded once, by a frozen autoencoder and text encoder, and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sanawm_jax.data.latent_cache import TextEncoder, build_cache, fingerprint_of, read_clips
from sanawm_jax.data.views import ALL_VIEWS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.text.gemma import Tower, text_tower
from sanawm_jax.text.keys import load_text_encoder
from sanawm_jax.text.prompts import CHI_PROMPT, encode_texts
from sanawm_jax.text.tokenizer import Tokenizer
from sanawm_jax.vae.keys import load_vae


def cache_folder(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """The folder of encoded clips; `config.cache_dir` may name the folder of another run."""
    given = config.get("cache_dir", "")
    return Path(given).expanduser().absolute() if given else workdir / "latents"


def text_folder(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """The folder that holds text_encoder/ and tokenizer/."""
    return Path(config.text_dir) if config.text_dir else workdir / "export"


def caption_encoder(tower: Tower, tokenizer: Tokenizer, length: int) -> TextEncoder:
    """Captions -> hidden states (B, length, C) and mask (B, length), as sampling reads prompts."""

    def encode(texts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        # the empty caption is what sampling gives as negative prompt: no chi prompt before it
        chi = CHI_PROMPT if any(texts) else ()
        return encode_texts(tower, tokenizer, texts, max_length=length, chi_prompt=chi)

    return encode


def cached_clips(
    config: ml_collections.ConfigDict, workdir: Path, clips: Sequence
) -> dict[str, np.ndarray]:
    """The clips as stage 1 sees them; see `data.latent_cache` for names and shapes.

    Clips that are not yet in `cache_folder` are encoded first.
    """
    vae_config, vae_params = load_vae(config.vae_dir, dtype=np.float32)
    text = text_folder(config, workdir)
    if not (text / "text_encoder" / "config.json").is_file():
        if config.text_dir:
            raise InputError(f"{text} holds no text_encoder/; leave text_dir empty to make one")
        with ThreadPoolExecutor(16) as pool:
            captions = [c["caption"] for c in read_clips(clips, range(len(clips)), pool)]
        make_small_text_encoder(sorted(set(captions)), text, hidden=config.text_width)
    tower = text_tower(*load_text_encoder(text / "text_encoder"), dtype=jnp.float32)
    encode = caption_encoder(tower, Tokenizer(text / "tokenizer"), config.text_length)
    folders = (Path(config.vae_dir), text / "text_encoder")
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    shape = clips[0]["video"].shape
    views = ALL_VIEWS[: config.views]
    facts = (config.data_dir, len(clips), shape, config.text_length, views)
    return build_cache(
        cache_folder(config, workdir),
        clips,
        vae_config,
        vae_params,
        encode,
        fingerprint=fingerprint_of(files, *facts),
        batch_size=config.cache_batch,
        views=views,
    )
