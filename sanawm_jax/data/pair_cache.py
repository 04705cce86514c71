"""Stage 1's samples of the training clips, made once and stored in the folder of the true latents.

Axis letters: n clips, s seeds, B batch, F latent frames, H W latent rows and columns, c latent
channels, L text tokens, C text width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from sanawm_jax.core.params import Params
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.json_file import read_note
from sanawm_jax.sampling.schedule import next_sigmas
from sanawm_jax.sampling.stage1 import Conditions, denoise_batch

SAVE_EVERY = 16  # batches between two updates of the progress file
# (clips (B,), seeds (B,)) -> latents (B, F, H, W, c)
Sampler = Callable[[np.ndarray, np.ndarray], jax.Array]


def build_pairs(
    folder: str | Path,
    clips: int,
    seeds: int,
    sample: Sampler,
    *,
    fingerprint: str,
    batch_size: int = 16,
) -> np.ndarray:
    """Samples `seeds` versions of every clip, and continues where an interrupted call stopped.

    Args:
      folder: the folder of `data.latent_cache`. `stage1.npy` and `stage1.json` are written there.
      clips: n.
      seeds: s.
      sample: runs stage 1. Its result may depend on the clip and the seed, but not on the batch.
      fingerprint: identifies data, weights and sampler. Pairs with another fingerprint are
        discarded and sampled again.
      batch_size: clips per call of `sample`.

    Returns:
      A memory map (s n, F, H, W, c) float16; row i is clip i mod n with seed i // n.
    """
    folder, total = Path(folder), clips * seeds
    file, note = folder / "stage1.npy", folder / "stage1.json"
    done = _done(note, fingerprint)
    array = np.load(file, mmap_mode="r+") if done else None
    for count, start in enumerate(range(done, total, batch_size), 1):
        # The last batch repeats its last row, so that all batches have one shape and one program.
        rows = np.minimum(np.arange(start, start + batch_size), total - 1)
        latents = np.asarray(sample(rows % clips, rows // clips), np.float16)
        if array is None:
            shape = (total, *latents.shape[1:])
            array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
        stop = min(start + batch_size, total)
        array[start:stop] = latents[: stop - start]
        if stop == total or count % SAVE_EVERY == 0:
            array.flush()
            _write(note, {"fingerprint": fingerprint, "done": stop})
            logging.info("stage 1 sampled %d of %d clips", stop, total)
    return np.load(file, mmap_mode="r")


def build_text(
    folder: str | Path,
    captions: Sequence[str],
    encode: Callable[[Sequence[str]], jax.Array],
    *,
    fingerprint: str,
    batch_size: int = 16,
) -> np.ndarray:
    """Returns the captions as the refiner's transformer reads them, (captions, L, C) float16.

    Args:
      folder: where `refiner_text.npy` and `refiner_text.json` are written.
      captions: the texts.
      encode: texts -> (B, L, C).
      fingerprint: identifies captions and weights.
      batch_size: B.
    """
    file, note = Path(folder) / "refiner_text.npy", Path(folder) / "refiner_text.json"
    if not _done(note, fingerprint):
        parts = []
        for start in range(0, len(captions), batch_size):
            part = list(captions[start : start + batch_size])
            full = part + [part[-1]] * (batch_size - len(part))
            parts.append(np.asarray(encode(full), np.float16)[: len(part)])
        with atomic_write(file) as partial:
            np.save(partial, np.concatenate(parts))
        _write(note, {"fingerprint": fingerprint, "done": len(captions)})
    return np.load(file, mmap_mode="r")


def _done(note: Path, fingerprint: str) -> int:
    progress = read_note(note)
    return progress.get("done", 0) if progress.get("fingerprint") == fingerprint else 0


def _write(note: Path, progress: dict[str, Any]) -> None:
    with atomic_write(note) as partial:
        partial.write_text(json.dumps(progress), encoding="utf-8")


def stage1_sampler(
    graphdef: nnx.GraphDef,
    params: Params,
    cache: dict[str, np.ndarray],
    sigmas: np.ndarray,
    *,
    guidance: float = 1.0,
    seed: int = 0,
    dtype: Any,
) -> Sampler:
    """Returns a sampler of stage 1 for clips of a latent cache.

    It uses the first latent frame, the caption and the camera of a clip, and new noise.

    Args:
      graphdef, params: the DiT.
      cache: see `data.latent_cache.build_cache`.
      sigmas: noise levels down to 0, see `Schedule.sigmas`.
      guidance: scale of classifier-free guidance against the null caption; 1 or less: no guidance.
      seed: the noise of a row depends on this seed and on the row's clip and seed.
      dtype: compute dtype.
    """
    text, text_mask = jnp.asarray(cache["text"]).astype(dtype), jnp.asarray(cache["text_mask"])
    shape = cache["latents"].shape[1:]

    @jax.jit
    def noise(clips: jax.Array, seeds: jax.Array) -> jax.Array:
        key = jax.random.key(seed)

        def one(clip: jax.Array, number: jax.Array) -> jax.Array:
            return jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(key, number), clip), shape
            )

        return jax.vmap(one)(clips, seeds)

    def sample(clips: np.ndarray, seeds: np.ndarray) -> jax.Array:
        captions = np.asarray(cache["caption"])[clips]
        shown, mask = text[captions], text_mask[captions]
        camera, plucker = (jnp.asarray(cache[name][clips]) for name in ("camera", "plucker"))
        if guidance > 1:
            shown = jnp.concatenate([jnp.broadcast_to(text[-1:], shown.shape), shown])
            mask = jnp.concatenate([jnp.broadcast_to(text_mask[-1:], mask.shape), mask])
        return denoise_batch(
            graphdef,
            params,
            noise(jnp.asarray(clips), jnp.asarray(seeds)),
            jnp.asarray(cache["latents"][clips, :1], jnp.float32),
            Conditions(shown, mask, camera, plucker.astype(dtype)),
            jnp.asarray(sigmas[:-1]),
            jnp.asarray(next_sigmas(sigmas)),
            jnp.float32(guidance),
            dtype,
        )

    return sample
