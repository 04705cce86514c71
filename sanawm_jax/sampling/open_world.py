"""Opens a world: checks everything, loads the networks, reads the image and the prompt."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sanawm_jax.camera.mapping import get_mapping
from sanawm_jax.dit.state import Window
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.latents import channels_last, read_latents
from sanawm_jax.sampling.options import StreamOptions
from sanawm_jax.sampling.request import Request, check_size, read_picture
from sanawm_jax.sampling.world import Settings, World
from sanawm_jax.text.prompts import MAX_LENGTH

if TYPE_CHECKING:
    from sanawm_jax.sampling.generate import SanaWM
    from sanawm_jax.sampling.refine import LTX2Refiner


def open_world(
    model: SanaWM,
    image: Any,
    prompt: str,
    *,
    height: int = 704,
    width: int = 1280,
    intrinsics: str | os.PathLike | np.ndarray | None = None,
    options: StreamOptions | None = None,
    frames: int | None = None,
    action_mapping: str = "sana",
    cfg_scale: float = 1.0,
    negative_prompt: str = "",
    seed: int = 42,
    latents: str | os.PathLike | np.ndarray | None = None,
    refiner: LTX2Refiner | None = None,
    refiner_noise: np.ndarray | None = None,
    fps: float = 16.0,
    text_length: int = MAX_LENGTH,
    changes_prompt: bool = True,
    decode: bool = True,
) -> World:
    """Opens a world at an image; `World.step` goes on from there.

    Args:
      model: the stage-1 model.
      image: path or PIL image of the first frame, or a `Request` with a size and intrinsics.
      prompt: what is in the scene.
      height, width, intrinsics: see `request.make_request`; not read with a `Request`.
      options: chunks and noise levels; None takes what the weights say.
      frames: latent frames, if the length is known; needed to cache all chunks.
      action_mapping: what the keys do, see `camera.actions`.
      cfg_scale, negative_prompt: classifier-free guidance, switched off by a scale of 1.
      seed: of the noise; each latent frame has its own.
      latents: noise (1, C, F, h, w) that replaces the seed's, for F latent frames.
      refiner: stage 2; it keeps its layers on the device as long as the world lasts.
      refiner_noise: (1, C, F - sink, h, w), see `LTX2Refiner.check`.
      fps: pixel frames per second.
      text_length: text tokens.
      changes_prompt: whether `set_prompt` will be called; False saves memory with a refiner.
      decode: whether steps give frames, or `World.latents` alone.

    Raises:
      InputError: one line on what is wrong, before anything is compiled.
    """
    options = options or StreamOptions(**model.folder.stream_options())
    config = model.vae_config
    if model.offload != "none" or model.devices > 1:
        raise InputError("a stream runs on one device that holds all layers: use --offload=none")
    if decode:
        check_causal(model)
    model.folder.dit_config().numerics.check_stream()
    if isinstance(image, Request):
        pixels, rows = image.pixels, image.intrinsics
        height, width = image.height, image.width
    else:
        check_size(height, width, config.spatial_ratio)
        pixels, rows = read_picture(image, intrinsics, 1, height, width)
    noise = None
    if latents is not None:
        grid = (height // config.spatial_ratio, width // config.spatial_ratio)
        wanted = None if frames is None else (1, config.latent_channels, frames, *grid)
        noise = jax.device_put(channels_last(read_latents(latents, wanted)))
    settings = Settings(
        window=window_of(options, frames),
        sigmas=options.sigmas,
        height=height,
        width=width,
        intrinsics=rows[0],
        rule=get_mapping(action_mapping),
        seed=seed,
        noise=noise,
        guidance=cfg_scale,
        negative_prompt=negative_prompt,
        text_length=text_length,
        decode=decode,
    )
    model.check("transformer", "text_encoder", "encoder", *(["decoder"] if decode else []))
    stream = read = None
    if refiner is not None:  # its text encoder is the largest network, and alone on the device
        stream, read = refiner.open_stream(
            prompt, fps=fps, noise=refiner_noise, changes=changes_prompt
        )
    world = World(model, model.encode_image(pixels), prompt, settings, stream, read)
    if refiner is not None:
        for name in ("text", "encoder"):  # they run seldom
            model.drop(name)
    return world


def check_causal(model: SanaWM) -> None:
    """Refuses a VAE that cannot decode a stream.

    Raises:
      InputError: its decoder sees later frames.
    """
    if not model.vae_config.decoder_causal:
        raise InputError(
            f"the VAE of {model.folder.path} is not causal, so it cannot decode a stream; "
            "--streaming needs a folder with a causal VAE"
        )


def window_of(options: StreamOptions, frames: int | None) -> Window:
    """The window of a stream whose first chunk is the given image and a chunk.

    Chunks of one frame begin with the image alone, as their teacher is trained.

    Args:
      frames: latent frames of the stream; None if it has no end.

    Raises:
      InputError: the frames are no whole chunks, or all chunks of an endless stream are cached.
    """
    size, cached = options.num_frame_per_block, options.num_cached_blocks
    if frames is not None and (frames <= size or (frames - 1) % size):
        raise InputError(
            f"{frames} latent frames are not one frame and whole chunks of {size}; "
            "change --num_frames or --num_frame_per_block"
        )
    if cached == -1:
        if frames is None:
            raise InputError("--num_cached_blocks=-1 needs a stream of a known length")
        cached = max((frames - 1) // size - (size > 1), 1)
    return Window(size + 1 if size > 1 else 1, size, cached, not options.no_sink_token)
