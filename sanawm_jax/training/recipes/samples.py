"""Videos that stage 1 samples while it trains, from the first clips of its training data.

Axis letters: B clips, F latent frames, H W latent rows and columns, c latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sanawm_jax.core.lora import combine
from sanawm_jax.core.params import Params, cast
from sanawm_jax.core.sharding import axis_size, place
from sanawm_jax.data.latent_cache import read_rows
from sanawm_jax.media.video import write_mp4
from sanawm_jax.runtime.processes import is_first
from sanawm_jax.sampling.schedule import Schedule, next_sigmas
from sanawm_jax.sampling.stage1 import Conditions, denoise_batch
from sanawm_jax.training.engine.precision import compute_dtype

_ENLARGED = 8  # without a decoder, a latent is shown as a square of so many pixels


def first_rows(arrays: dict[str, np.ndarray], clips: int) -> dict[str, np.ndarray]:
    """Up to `clips` first clips of `data.latent_cache.build_cache`, see `read_rows` there."""
    return read_rows(arrays, np.arange(min(clips, len(arrays["latents"]))))


def stage1_samples(
    config: ml_collections.ConfigDict,
    objective: Any,
    read: Callable[[int], dict[str, np.ndarray]],
) -> Callable[[Params, Any, Path], None]:
    """What `Recipe.sample` is for stage 1.

    Each of the first `config.samples.clips` clips starts with its own first latent frame, follows
    its own camera and caption, and gets the same noise in every call. With `config.vae_dir` the
    latents are decoded; without it, their three principal components are shown as colours.

    Args:
      objective: a `training.objectives.stage1.Stage1Objective`.
      read: number of clips -> rows of the first ones, at least one and at most that many; they are
        the same in every call and process. See `data.latent_cache.read_rows`.
    """
    dtype = compute_dtype(config.dtype)

    def sample(params: Params, resident: Any, folder: Path) -> None:
        samples = config.samples
        rows = read(samples.clips)
        # every replica needs the same number of rows
        replicas = axis_size("data") * axis_size("fsdp")
        known = len(rows["latents"])
        order = np.arange(-(-known // replicas) * replicas) % known
        sigmas = Schedule(shift=config.flow_shift).sigmas(samples.steps)
        inputs: dict[str, Any] = {
            name: np.asarray(rows[name])[order] for name in ("text", "text_mask")
        }
        for name in ("latents", "camera", "plucker"):
            inputs[name] = np.asarray(rows[name], np.float32)[order]
        latents = inputs.pop("latents")
        inputs["first"] = latents[:, :1]
        rng = np.random.default_rng(config.seed)
        inputs["noise"] = rng.normal(size=latents.shape).astype(np.float32)
        mesh = jax.sharding.get_mesh()
        whole = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
        if whole is not None:
            inputs = place(inputs, whole)
        if objective.lora:
            params = combine(resident["base"], params)
        # a network that is trained without cameras is sampled without them
        cameras: Any = (None, None)
        if config.use_camera:
            cameras = (inputs["camera"], inputs["plucker"].astype(dtype))
        conditions = Conditions(inputs["text"].astype(dtype), inputs["text_mask"], *cameras)
        made = denoise_batch(
            objective.graphdef,
            params,
            inputs["noise"],
            inputs["first"],
            conditions,
            jnp.asarray(sigmas[:-1]),
            jnp.asarray(next_sigmas(sigmas)),
            jnp.float32(1.0),
            dtype,
            objective.starts,
        )
        if whole is not None:
            made = jax.jit(lambda x: x, out_shardings=whole)(made)
        host = np.asarray(made)[:known]
        if is_first():
            _write(host, config.get("vae_dir", ""), folder, dtype)

    return sample


def _write(latents: np.ndarray, vae_dir: str, folder: Path, dtype: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    frames = _decoded(latents, vae_dir, dtype) if vae_dir else false_colours(latents)
    fps = 16.0 if vae_dir else 2.0  # a latent frame stands for eight
    for i, film in enumerate(frames):
        write_mp4(folder / f"clip_{i}.mp4", film, fps)


def false_colours(latents: np.ndarray) -> np.ndarray:
    """Three principal components as colours: (B, F, H, W, c) -> (B, F, 8 H, 8 W, 3) uint8."""
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, axes = np.linalg.svd(flat.T @ flat)
    parts = flat @ axes[: min(3, len(axes))].T
    low, high = np.percentile(parts, [1, 99], axis=0)
    shown = np.clip((parts - low) / np.maximum(high - low, 1e-9), 0, 1)
    shown = np.pad(shown, ((0, 0), (0, 3 - shown.shape[1])))
    image = (255 * shown).astype(np.uint8).reshape(*latents.shape[:-1], 3)
    return image.repeat(_ENLARGED, -3).repeat(_ENLARGED, -2)


def _decoded(latents: np.ndarray, vae_dir: str, dtype: Any) -> np.ndarray:
    from sanawm_jax.core.params import build
    from sanawm_jax.media.video import to_uint8
    from sanawm_jax.sampling.decode import decode_stream
    from sanawm_jax.vae.keys import load_vae
    from sanawm_jax.vae.model import VideoDecoder

    config, params = load_vae(vae_dir, dtype=np.float32, module=VideoDecoder)
    graphdef = build(VideoDecoder, config)[0]
    params = cast(params, dtype)
    films = []
    for clip in latents:
        windows = decode_stream(graphdef, params, jnp.asarray(clip[None]), config, "auto", dtype)
        films.append(to_uint8(np.concatenate(list(windows))))
    return np.stack(films)
