"""Where stage 1 reads latents, cameras and captions: a folder of arrays, or made-up examples.

Axis letters: n clips, F latent frames, H W latent rows and columns, c latent channels, U captions,
L text tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.data.latent_cache import open_latents, read_rows
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.recipes.samples import first_rows

if TYPE_CHECKING:  # it imports grain
    from sanawm_jax.data.zip_stream import ZipStream


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Examples of stage 1, wherever they are read from.

    Attributes:
      size: number of examples.
      frames: F of every example.
      grid: H and W.
      null: text (L, width) and mask (L,) of the empty caption.
      read, stream: see `Recipe`; one of them is None.
      first: number of clips -> rows of the first ones, see `samples.stage1_samples`.
      arrays: all examples as `open_latents` gives them; None if they are read from zips.
    """

    size: int
    frames: int
    grid: tuple[int, ...]
    null: tuple[np.ndarray, np.ndarray]
    read: Callable[[np.ndarray], Any] | None = None
    stream: Callable[[np.ndarray, int], ZipStream] | None = None
    first: Callable[[int], dict[str, np.ndarray]] | None = None
    arrays: dict[str, np.ndarray] | None = None


def array_source(config: ConfigDict, model: DiTConfig) -> LatentSource:
    """The arrays of `config.data_dir`, or without one `config.synthetic` examples.

    Raises:
      InputError: see `open_latents`; or the arrays have other channels than the network.
    """
    if config.data_dir:
        arrays = open_latents(config.data_dir)
    else:
        logging.warning("no data_dir is given: training on latents that are made up")
        arrays = synthetic_latents(
            **config.synthetic.to_dict(), channels=model.in_channels, text=model.caption_channels
        )
    check_channels(model, {n: arrays[n].shape[-1] for n in ("latents", "plucker", "text")})
    latents = arrays["latents"]
    return LatentSource(
        size=len(latents),
        frames=latents.shape[1],
        grid=latents.shape[2:4],
        null=(np.asarray(arrays["text"][-1]), np.asarray(arrays["text_mask"][-1])),
        read=functools.partial(read_rows, arrays),
        first=functools.partial(first_rows, arrays),
        arrays=arrays,
    )


def synthetic_latents(
    clips: int, latent_frames: int, height: int, width: int, channels: int, text: int, captions: int
) -> dict[str, np.ndarray]:
    """Smooth random latents with cameras that turn, in the layout of `open_latents`.

    A clip pans over a random picture as its camera turns, so that past frames, camera and caption
    help to predict the next frame, and a loss on them goes down.

    Args:
      clips, latent_frames, height, width, channels: n, F, H, W, c.
      text: width of the text's hidden states.
      captions: how many distinct ones; a caption decides the picture's mean colour.
    """
    rng = np.random.default_rng(0)
    frames = 8 * (latent_frames - 1) + 1
    hidden = rng.normal(size=(captions + 1, 8, text)).astype(np.float32)
    hidden[-1] = 0.0  # the empty caption
    mask = np.ones((captions + 1, 8), bool)
    mask[-1, 1:] = False
    colours = rng.normal(size=(captions, channels))
    caption = rng.integers(0, captions, clips).astype(np.int32)
    rows: dict[str, list[np.ndarray]] = {"latents": [], "camera": [], "plucker": []}
    size = 8.0 * max(height, width)
    for clip in range(clips):
        speed = rng.uniform(-0.01, 0.01)
        c2w = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
        yaw = speed * np.arange(frames)
        c2w[:, 0, 0], c2w[:, 0, 2] = np.cos(yaw), np.sin(yaw)
        c2w[:, 2, 0], c2w[:, 2, 2] = -np.sin(yaw), np.cos(yaw)
        centre = np.array([size, size, 4.0 * width, 4.0 * height], np.float32)
        intrinsics = np.broadcast_to(centre, (frames, 4))
        camera, plucker = camera_conditions(c2w, intrinsics, 8 * height, 8 * width, 8, 8)
        phase = rng.uniform(0, 2 * np.pi, channels) + np.arange(width)[:, None]
        pan = (8 * speed * np.arange(latent_frames) * size / 8)[:, None, None, None]
        picture = np.sin(phase + pan) * np.cos(np.arange(height))[:, None, None]
        rows["latents"].append(picture + 0.5 * colours[caption[clip]])
        rows["camera"].append(camera)
        rows["plucker"].append(plucker)
    stacked = {name: np.stack(value).astype(np.float32) for name, value in rows.items()}
    return {**stacked, "caption": caption, "text": hidden, "text_mask": mask}


def check_channels(model: DiTConfig, found: dict[str, int]) -> None:
    """Compares the channels of latents, plucker and text with the network's.

    Raises:
      InputError: they differ.
    """
    for axis, name, expected in (
        ("in_channels", "latents", model.in_channels),
        ("chunk_plucker_channels", "plucker", model.chunk_plucker_channels),
        ("caption_channels", "text", model.caption_channels),
    ):
        if found[name] != expected:
            raise InputError(
                f"{name} of data_dir has {found[name]} channels and dit.{axis} is {expected}"
            )
