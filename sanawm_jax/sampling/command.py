"""The steps of `sample.py`: check everything, make the video, write the files."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sanawm_jax.media.overlay import OverlayPainter
from sanawm_jax.media.video import check_writable, to_uint8, write_mp4
from sanawm_jax.memory.plan import Need, check_fits
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.generate import SanaWM, channels_last, read_latents
from sanawm_jax.sampling.refine import LTX2Refiner, RefineOptions
from sanawm_jax.sampling.request import Request
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
    vae_tiling: str = "auto",
    refiner_weights: str | None = None,
    refiner_latents: str | None = None,
    refine_options: dict[str, int] | None = None,
    offload: str = "none",
    devices: int = 1,
    precision: str = "bf16",
    allow_pickle: bool = False,
) -> Path:
    """Runs one command line; the flags are described in `sample.py`.

    Args:
      vae_tiling: see `generate.decode_tiling`.
      refiner_weights: stage 2; None decodes stage 1.
      refine_options: fields of `RefineOptions`.
      offload: what stays on the accelerator, see `pipeline.offload`.
      devices: that share stage 1's frames out.
      precision: of stage 1's large matrix products, see `pipeline.precision`.
      allow_pickle: also read upstream's `model.pt`.

    Returns:
      The video's path, or with `latents_only` the latents'.

    Raises:
      InputError: one line on what is wrong.
    """
    if latents_only and not save_latents:
        raise InputError("--latents_only writes nothing without --save_latents FILE.npy")
    needs_stage1 = not (stage1_latents and latents_only)
    if not weights and needs_stage1:
        raise InputError("no weights: give --weights with a folder or a hub name")
    folder = None if latents_only else check_writable(output_dir)
    for file in (save_latents, save_frames):
        if file:
            check_writable(Path(file).parent)
    prompt = read_prompt(prompt) if prompt else None
    refiner, dropped = None, 0
    if refiner_weights:
        refiner = LTX2Refiner.from_pretrained(
            refiner_weights,
            dtype=dtype,
            options=RefineOptions(**refine_options or {}),
            offload=offload,
        )
        dropped = refiner.options.sink_size  # pixel frames before the first refined one
    model = None
    if needs_stage1:
        model = SanaWM.from_pretrained(
            str(weights),
            dtype=dtype,
            tiling=vae_tiling,
            offload=offload,
            devices=devices,
            precision=precision,
            allow_pickle=allow_pickle,
        )
    refiner_noise = c2w = held_keys = kept = None
    if stage1_latents:
        final = read_latents(stage1_latents, None)
        if model:
            _check_channels(model, final, stage1_latents)
            model.check("decoder")
        if refiner:
            refiner_noise = refiner.check(final.shape, prompt, refiner_latents)
        decoded = None if latents_only else model
        check_fits(lambda: _later_needs(refiner, decoded, final.shape), offload)
    else:
        assert model is not None
        if not image:
            raise InputError("no image: give --image with the first frame")
        if not prompt:
            raise InputError("no prompt: give --prompt with a text or the path of a text file")
        request = model.request(
            image,
            camera=camera,
            action=action,
            action_mapping=action_mapping,
            intrinsics=intrinsics,
            num_frames=num_frames,
            height=height,
            width=width,
        )
        if refiner:
            refiner_noise = refiner.check(model.latent_shape(request), prompt, refiner_latents)
        if not latents_only:
            model.check("decoder")
        check_fits(
            lambda: _needs(model, refiner, request, text_length, cfg_scale > 1, not latents_only),
            offload,
        )
        final = model(
            request,
            prompt,
            negative_prompt=read_prompt(negative_prompt) if negative_prompt else "",
            steps=step,
            cfg_scale=cfg_scale,
            flow_shift=flow_shift or None,
            seed=seed,
            latents=latents,
            text_length=text_length,
            decode=False,
        ).latents
        c2w, held_keys = request.c2w, request.held_keys
        if refiner or not latents_only:
            kept = (folder or Path(str(save_latents)).parent) / f"{name}_stage1_latents.npy"
            kept = _keep(kept, final)
    with _going_on_from(kept):
        if refiner:
            if model:
                model.release()
            final = refiner(final, str(prompt), fps=fps, noise=refiner_noise)
        if save_latents:
            write_npy(save_latents, final)
        if folder is None or model is None:
            return Path(str(save_latents))
        # the sink stays unrefined: it steers the refiner and is not part of the video
        windows = model.decode_stream(jnp.asarray(channels_last(final)))
        windows = _drop_frames(windows, dropped)
        if save_frames:
            frames = np.concatenate(list(windows))
            write_npy(save_frames, frames)
            windows = iter([frames])
        # frame by frame from here on: the video is never whole in memory
        pictures = itertools.chain.from_iterable(map(to_uint8, windows))
        if overlay and c2w is not None:
            held_keys = held_keys[dropped:] if held_keys else held_keys
            painter = OverlayPainter(c2w[dropped:], held_keys, height, width, action_mapping)
            pictures = painter.paint_all(pictures)
        return write_mp4(folder / f"{name}_generated.mp4", pictures, fps)


def _needs(
    model: SanaWM,
    refiner: LTX2Refiner | None,
    request: Request,
    text_length: int,
    has_guidance: bool,
    decode: bool,
) -> list[list[Need]]:
    """What a run from an image needs; a refiner finds stage 1's networks gone."""
    shape = model.latent_shape(request)
    needs = model.needs(
        shape, text_length=text_length, has_guidance=has_guidance, decode=decode and not refiner
    )
    return [needs, *_later_needs(refiner, model if decode else None, shape)]


def _later_needs(
    refiner: LTX2Refiner | None, model: SanaWM | None, shape: tuple[int, ...]
) -> list[list[Need]]:
    """What comes after stage 1, each network alone on the device."""
    needs = refiner.needs(shape) if refiner else []
    return [[need] for need in (*needs, *([model.decoder_need(shape)] if model else []))]


def _keep(file: Path, latents: np.ndarray) -> Path | None:
    """Writes stage 1's latents for a run that fails later; not being able to is no failure."""
    try:
        write_npy(file, latents)
    except OSError as error:
        warnings.warn(f"stage 1 is not kept: {file} cannot be written ({error})", stacklevel=2)
        return None
    warnings.warn(
        f"stage 1 is kept: --stage1_latents={file} refines or decodes it again", stacklevel=2
    )
    return file


@contextlib.contextmanager
def _going_on_from(kept: Path | None) -> Iterator[None]:
    """Adds to whatever fails how to go on."""
    try:
        yield
    except BaseException as error:
        if kept is not None:
            error.add_note(f"--stage1_latents={kept} goes on from the end of stage 1")
        raise


def _drop_frames(windows: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The windows without the first `count` frames of them all."""
    for window in windows:
        if len(window) > count:
            yield window[count:]
        count = max(0, count - len(window))


def _check_channels(model: SanaWM, latents: np.ndarray, file: str) -> None:
    channels = model.vae_config.latent_channels
    if latents.shape[1] != channels:
        raise InputError(f"{file} has {latents.shape[1]} channels, the VAE takes {channels}")


def write_npy(file: str | os.PathLike, array: Any) -> Path:
    """Writes an array whole or not at all."""
    # through a stream, since `np.save` would add .npy to a name without it
    with atomic_write(file) as partial, partial.open("wb") as stream:
        np.save(stream, array)
    return Path(file)
