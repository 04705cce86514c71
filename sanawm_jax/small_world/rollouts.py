"""How videos that a causal DiT makes, frame by frame, compare with the truth of held-out clips.

Axis letters: n clips, f pixel frames, F latent frames, H W latent rows and columns, c latent
channels, h w pixel rows and columns.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sanawm_jax.core.params import Params, apply, build, cast
from sanawm_jax.dit.state import DiTState, Window
from sanawm_jax.eval.metrics import by_quarter, gradient_ratio, psnr
from sanawm_jax.sampling.rollout import denoise_chunk
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE

_BATCH = 8  # clips that are decoded at once
_SHEET_CLIPS, _SHOWN_FRAMES = 12, 6


def roll_out(
    graphdef: nnx.GraphDef,
    params: Params,
    arrays: dict[str, np.ndarray],
    *,
    window: Window,
    sigmas: np.ndarray,
    seed: int = 0,
) -> np.ndarray:
    """Latents (n, F, H, W, c) float32 of a stream that begins with the first latent frames.

    Args:
      arrays: latents, camera, plucker, text and text_mask of n clips.
      window: of the stream, with chunks of one frame.
      sigmas: noise levels from 1 to 0.
      seed: of the noise.
    """
    dtype = compute_dtype("auto")
    latents = arrays["latents"].astype(np.float32)
    noise = np.random.default_rng(seed).normal(size=latents.shape).astype(np.float32)
    text = jnp.asarray(arrays["text"], dtype), jnp.asarray(arrays["text_mask"])
    made, state = [latents[:, :1]], None
    for frame in range(latents.shape[1]):
        at = slice(frame, frame + 1)
        plucker = jnp.asarray(arrays["plucker"][:, at], dtype)
        conditions = Conditions(*text, jnp.asarray(arrays["camera"][:, at]), plucker)
        found: tuple[jax.Array, DiTState] = denoise_chunk(
            graphdef,
            params,
            state,
            jnp.asarray(noise[:, at]),
            jnp.asarray(latents[:, :1]) if frame == 0 else None,
            conditions,
            jnp.asarray(sigmas if frame else sigmas[-2:]),  # nothing is left to denoise at first
            jnp.float32(1.0),
            window=window,
            dtype=dtype,
        )
        chunk, state = found
        if frame:
            made.append(np.asarray(chunk))
    return np.concatenate(made, 1)


def decoded(vae: tuple[VAEConfig, Params], latents: np.ndarray) -> np.ndarray:
    """Video (n, f, h, w, 3) uint8 of normalised latents."""
    dtype = compute_dtype("auto")
    graphdef, _ = build(VideoVAE, vae[0])
    params = jax.device_put(cast(vae[1], dtype), jax.devices()[0])

    @jax.jit
    def decode(params: Params, latents: jax.Array) -> jax.Array:
        latents = apply(graphdef, params, latents.astype(dtype), method="denormalise")
        video = apply(graphdef, params, latents, method="decode").astype(jnp.float32)
        return jnp.round(jnp.clip(video + 1.0, 0.0, 2.0) * 127.5).astype(jnp.uint8)

    size = min(_BATCH, len(latents))
    starts = [min(i, len(latents) - size) for i in range(0, len(latents), size)]
    films = [np.asarray(decode(params, jnp.asarray(latents[i : i + size]))) for i in starts]
    out = np.empty((len(latents), *films[0].shape[1:]), np.uint8)
    for start, film in zip(starts, films, strict=True):
        out[start : start + size] = film
    return out


def _figures(video: np.ndarray, truth: np.ndarray) -> dict[str, list[float]]:
    """PSNR in dB and gradient energy over the truth's, by quarter of the frames after the first."""
    score, ratio = [], []
    for a, b in zip(video[:, 1:], truth[:, 1:], strict=True):
        a, b = a / np.float32(255), b / np.float32(255)
        score.append(by_quarter(psnr(a, b)))
        ratio.append(by_quarter(gradient_ratio(a, b)))
    return {
        "psnr_by_quarter": np.mean(score, 0).round(3).tolist(),
        "gradient_ratio_by_quarter": np.mean(ratio, 0).round(4).tolist(),
    }


def measure_rollouts(
    graphdef: nnx.GraphDef,
    params: Params,
    vae: tuple[VAEConfig, Params],
    arrays: dict[str, np.ndarray],
    truth: np.ndarray,
    *,
    cached: int,
    steps: int,
    shift: float,
) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of rollouts and of the autoencoder alone, and pictures.

    Args:
      graphdef, params, vae: the networks.
      arrays: of n held-out clips, see `roll_out`.
      truth: their video (n, f, h, w, 3) uint8.
      cached: earlier frames that the softmax layers see.
      steps: Euler steps of each frame.
      shift: of the noise levels.

    Returns:
      a report, and (clips, 2, frames, h, w, 3) in [-1, 1]: the truth and the rollout.
    """
    sigmas = Schedule(shift=shift).sigmas(steps)
    window = Window(1, 1, cached)
    made = decoded(vae, roll_out(graphdef, params, arrays, window=window, sigmas=sigmas))
    again = decoded(vae, arrays["latents"].astype(np.float32))
    report = {"clips": len(made), "frames": made.shape[1], "sample_steps": steps}
    report |= _figures(made, truth)
    report |= {f"vae_{name}": value for name, value in _figures(again, truth).items()}
    at = np.linspace(0, made.shape[1] - 1, _SHOWN_FRAMES).astype(int)
    both = np.stack([truth[:_SHEET_CLIPS, at], made[:_SHEET_CLIPS, at]], 1)
    return report, both / np.float32(127.5) - 1.0
