"""The steps of `sample.py`: check everything, make the video, write the files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from sanawm_jax.atomic import atomic_write
from sanawm_jax.errors import InputError
from sanawm_jax.media.overlay import draw_overlay
from sanawm_jax.media.video import check_writable, to_uint8, write_mp4
from sanawm_jax.pipeline.generate import SanaWM, read_latents
from sanawm_jax.text.prompts import read_prompt


def sample(
    *,
    weights: str | None,
    image: str | None,
    prompt: str | None,
    negative_prompt: str | None,
    camera: str | None,
    action: str | None,
    action_mapping: str,
    intrinsics: str | None,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    step: int,
    cfg_scale: float,
    flow_shift: float | None,
    seed: int,
    text_length: int,
    dtype: str,
    latents: str | None,
    stage1_latents: str | None,
    save_latents: str | None,
    save_frames: str | None,
    latents_only: bool,
    output_dir: str,
    name: str,
    overlay: bool,
) -> Path:
    """Runs one command line; the flags are described in `sample.py`.

    Returns:
      The video's path, or with `latents_only` the latents'.

    Raises:
      InputError: one line on what is wrong.
    """
    if latents_only and not save_latents:
        raise InputError("--latents_only writes nothing without --save_latents FILE.npy")
    if not weights:
        raise InputError("no weights: give --weights with a folder or a hub name")
    folder = None if latents_only else check_writable(output_dir)
    for file in (save_latents, save_frames):
        if file:
            check_writable(Path(file).parent)
    model = SanaWM.from_pretrained(weights, dtype=dtype)
    if stage1_latents:
        made, c2w, held_keys = _decoded(model, stage1_latents, latents_only), None, None
    else:
        if not image:
            raise InputError("no image: give --image with the first frame")
        if not prompt:
            raise InputError("no prompt: give --prompt with a text or the path of a text file")
        video = model(
            image,
            read_prompt(prompt),
            negative_prompt=read_prompt(negative_prompt) if negative_prompt else "",
            camera=camera,
            action=action,
            action_mapping=action_mapping,
            intrinsics=intrinsics,
            num_frames=num_frames,
            height=height,
            width=width,
            steps=step,
            cfg_scale=cfg_scale,
            flow_shift=flow_shift or None,
            seed=seed,
            latents=latents,
            text_length=text_length,
            decode=not latents_only,
        )
        made = (video.latents, video.frames)
        c2w, held_keys = video.request.c2w, video.request.held_keys
    final, frames = made
    if save_latents:
        write_npy(save_latents, final)
    if frames is None or folder is None:
        return Path(str(save_latents))
    if save_frames:
        write_npy(save_frames, frames)
    pictures = to_uint8(frames)
    if overlay and c2w is not None:
        pictures = draw_overlay(pictures, c2w, held_keys, mapping=action_mapping)
    return write_mp4(folder / f"{name}_generated.mp4", pictures, fps)


def _decoded(model: SanaWM, file: str, latents_only: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Latents of an earlier run and, unless only they are wanted, their frames."""
    import jax.numpy as jnp

    latents = read_latents(file, None)
    channels = model.vae_config.latent_channels
    if latents.shape[1] != channels:
        raise InputError(f"{file} has {latents.shape[1]} channels, the VAE takes {channels}")
    if latents_only:
        return latents, None
    return latents, model.decode(jnp.asarray(rearrange(latents, "B C F H W -> B F H W C")))


def write_npy(file: str | os.PathLike, array: Any) -> Path:
    """Writes an array whole or not at all."""
    # through a stream, since `np.save` would add .npy to a name without it
    with atomic_write(file) as partial, partial.open("wb") as stream:
        np.save(stream, array)
    return Path(file)
