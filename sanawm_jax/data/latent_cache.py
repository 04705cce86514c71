"""Stores clips in the form that stage 1 reads. They are encoded once, into `.npy` files.

Axis letters: n clips, F latent frames, H W latent rows and columns, c latent channels, U distinct
captions, L text tokens, C text width.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.core.params import Params, apply, build
from sanawm_jax.data.views import View, view_clip
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.json_file import read_note
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE

TextEncoder = Callable[[Sequence[str]], tuple[jax.Array, jax.Array]]
_PER_CLIP = ("latents", "camera", "plucker")
_ALL = (*_PER_CLIP, "caption", "text", "text_mask")
SAVE_EVERY = 32  # batches between two updates of the progress file
_READERS = 8  # threads that read clips and prepare their conditions
# In units of the standard deviation, which normalised latents bring to 1. TF32 must stay below it.
_FIRST_FRAME_TOLERANCE = 5e-2


@functools.cache
def clip_encoder(config: VAEConfig) -> Callable[[Params, jax.Array], jax.Array]:
    """Compiles (params, video (B, N, h, w, 3) uint8) -> normalised latents (B, F, H, W, c)."""
    graphdef, _ = build(VideoVAE, config)

    @jax.jit
    def encode(params: Params, video: jax.Array) -> jax.Array:
        return apply(graphdef, params, to_signed(video), method="encode_normalised")

    return encode


def to_signed(video: jax.Array) -> jax.Array:
    """Converts uint8 pixels to float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def read_clips(clips: Sequence, indices: Iterable[int], pool: ThreadPoolExecutor) -> list[dict]:
    """Reads clips in parallel."""
    return list(pool.map(clips.__getitem__, indices))


def build_cache(
    folder: str | Path,
    clips: Sequence,
    vae_config: VAEConfig,
    vae_params: Params,
    encode_captions: TextEncoder,
    *,
    fingerprint: str,
    batch_size: int = 16,
    views: Sequence[View] = (View(),),
) -> dict[str, np.ndarray]:
    """Encodes all clips, or continues where an interrupted call stopped, and opens the result.

    Args:
      folder: where the arrays are written.
      clips: random access to dicts with video, c2w, intrinsics and caption.
      vae_config, vae_params: the trained autoencoder.
      encode_captions: texts -> hidden states (B, L, C) and mask (B, L); the empty text is encoded
        as the null caption.
      fingerprint: identifies clips and weights. A cache with another fingerprint is made again.
      batch_size: clips per call of the encoder.
      views: versions of every clip. The n clips below are all clips in the first version, then all
        clips in the second version, and so on.

    Returns:
      Memory maps: latents (n, F, H, W, c) float16, camera (n, F, 20) float32, plucker
      (n, F, H, W, 48) float16, text (U + 1, L, C) float16 and text_mask (U + 1, L) bool, and
      caption (n,) int32, the row of `text` that belongs to a clip. The last row is the null
      caption.

    Raises:
      InputError: there are no clips; or the VAE is not causal, so that the first latent frame of a
        clip differs from that of the first pixel frame alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not len(clips):
        raise InputError("there are no clips to encode")
    progress = _read_progress(folder, fingerprint)
    if progress["done"] < len(clips):
        _encode_clips(folder, clips, vae_config, vae_params, progress, batch_size, views)
    if not progress.get("text"):
        _encode_texts(folder, len(views) * progress["captions"], encode_captions)
        _write_progress(folder, {**progress, "text": True})
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ALL}


def open_latents(folder: str | Path) -> dict[str, np.ndarray]:
    """Returns memory maps of a folder that `build_cache` wrote.

    Raises:
      InputError: a file is missing, or the arrays are not of one set of clips.
    """
    folder = Path(folder)
    missing = [name for name in _ALL if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise InputError(f"data_dir={folder} lacks {', '.join(f'{name}.npy' for name in missing)}")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ALL}
    lengths = {len(arrays[name]) for name in (*_PER_CLIP, "caption")}
    if len(lengths) > 1 or arrays["caption"].max(initial=0) >= len(arrays["text"]):
        raise InputError(f"data_dir={folder} holds arrays of different sets of clips")
    return arrays


def read_rows(arrays: dict[str, np.ndarray], indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns clips of a cache as training reads them, each with the text of its caption.

    Args:
      arrays: what `build_cache` returns.
      indices: numbers of the clips, an array of any shape (...).

    Returns:
      latents (..., F, H, W, c), camera (..., F, 20), plucker (..., F, H, W, 48), text (..., L, C)
      and text_mask (..., L).
    """
    flat = indices.ravel()
    caption = arrays["caption"][flat]
    rows = {name: arrays[name][flat] for name in _PER_CLIP}
    rows.update({name: arrays[name][caption] for name in ("text", "text_mask")})
    return {name: a.reshape(*indices.shape, *a.shape[1:]) for name, a in rows.items()}


def cache_facts(folder: str | Path) -> tuple[str, list[str]]:
    """Returns a complete cache's fingerprint and distinct captions, in the order of their rows."""
    progress = json.loads((Path(folder) / "progress.json").read_text(encoding="utf-8"))
    return progress["fingerprint"], sorted(set(progress["captions"]))


def fingerprint_of(files: Sequence[Path], *facts: Any) -> str:
    """Returns a hash of the bytes of files and of plain values."""
    digest = hashlib.sha256(repr(facts).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _read_progress(folder: Path, fingerprint: str) -> dict[str, Any]:
    fresh = {"fingerprint": fingerprint, "done": 0, "captions": []}
    progress = read_note(folder / "progress.json")
    is_same = progress.get("fingerprint") == fingerprint and fresh.keys() <= progress.keys()
    return progress if is_same else fresh


def _write_progress(folder: Path, progress: dict[str, Any]) -> None:
    with atomic_write(folder / "progress.json") as partial:
        partial.write_text(json.dumps(progress), encoding="utf-8")


def _encode_clips(
    folder: Path,
    clips: Sequence,
    config: VAEConfig,
    params: Params,
    progress: dict[str, Any],
    batch_size: int,
    views: Sequence[View],
) -> None:
    encode = clip_encoder(config)
    arrays: dict[str, np.memmap] = {}
    starts = range(progress["done"], len(clips), batch_size)

    def prepare(start: int) -> tuple[list[str], list[tuple[np.ndarray, dict[str, np.ndarray]]]]:
        # The last batch repeats its last clip, so that all batches have one shape and one program.
        batch = [clips[min(i, len(clips) - 1)] for i in range(start, start + batch_size)]
        seen = [[view_clip(clip, view) for clip in batch] for view in views]
        return [clip["caption"] for clip in batch], [_host_arrays(c, config) for c in seen]

    def store(start: int, captions: list[str], encoded: list[dict[str, Any]]) -> None:
        stop = min(start + batch_size, len(clips))
        for v, values in enumerate(encoded):
            values["latents"] = np.asarray(values["latents"], np.float16)
            for name in _PER_CLIP:
                if name not in arrays:
                    length = len(views) * len(clips)
                    arrays[name] = _open(folder / f"{name}.npy", values[name], length, start)
                first = v * len(clips) + start
                arrays[name][first : first + stop - start] = values[name][: stop - start]
        progress["captions"] += captions[: stop - start]
        if stop == len(clips) or (stop // batch_size) % SAVE_EVERY == 0:
            for array in arrays.values():
                array.flush()
            progress["done"] = stop
            _write_progress(folder, progress)
            logging.info("encoded %d of %d clips", stop, len(clips))

    pending: tuple | None = None
    with ThreadPoolExecutor(_READERS) as pool:
        for start, (captions, prepared) in zip(starts, _ahead(pool, prepare, starts), strict=True):
            if start == progress["done"] and pending is None:
                video = prepared[0][0]
                _check_first_frame(encode(params, video[:, :1]), encode(params, video))
            encoded = [{**host, "latents": encode(params, video)} for video, host in prepared]
            if pending is not None:  # they come to the host while the device encodes the next ones
                store(*pending)
            pending = (start, captions, encoded)
        if pending is not None:
            store(*pending)


def _ahead(pool: ThreadPoolExecutor, function: Callable, items: Sequence) -> Iterator:
    """Works like `map`, but only a few items ahead, so that a large set does not fill memory."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * _READERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _host_arrays(clips: list[dict], config: VAEConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    conditions = [clip_conditions(clip, config) for clip in clips]
    return np.stack([clip["video"] for clip in clips]), {
        "camera": np.stack([camera for camera, _ in conditions]),
        "plucker": np.stack([rays for _, rays in conditions]).astype(np.float16),
    }


def _open(path: Path, like: np.ndarray, length: int, start: int) -> np.memmap:
    if start:
        return np.load(path, mmap_mode="r+")
    shape = (length, *like.shape[1:])
    return np.lib.format.open_memmap(path, mode="w+", dtype=like.dtype, shape=shape)


def clip_conditions(clip: dict, config: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the camera tokens (F, 20) and Plücker maps (F, H, W, 48) of one clip."""
    frames, height, width = clip["video"].shape[:3]
    intrinsics = np.broadcast_to(np.asarray(clip["intrinsics"], np.float32), (frames, 4))
    return camera_conditions(
        np.asarray(clip["c2w"]),
        intrinsics,
        height,
        width,
        config.temporal_ratio,
        config.spatial_ratio,
    )


def _check_first_frame(alone: jax.Array, within: jax.Array) -> None:
    """Checks that the first latent frame is that of the first image alone.

    Sampling encodes one image, and training must see the same latents.
    """
    difference = float(jnp.max(jnp.abs(alone[:, 0] - within[:, 0])))
    logging.info("first latent frame, alone against within its clip: %.2g", difference)
    if not difference < _FIRST_FRAME_TOLERANCE:
        raise InputError(
            f"the VAE encodes a first frame differently alone and within its clip (by "
            f"{difference:.2g} standard deviations); use a causal encoder"
        )


def _encode_texts(folder: Path, captions: list[str], encode: TextEncoder, batch: int = 32) -> None:
    unique = sorted(set(captions))
    order = {caption: i for i, caption in enumerate(unique)}
    hidden, masks = [], []
    for start in range(0, len(unique), batch):
        part = unique[start : start + batch]
        text, mask = encode(part + [part[-1]] * (batch - len(part)))
        hidden.append(np.asarray(text, np.float16)[: len(part)])
        masks.append(np.asarray(mask)[: len(part)] > 0)
    null, null_mask = encode([""])
    text = np.concatenate([*hidden, np.asarray(null, np.float16)])
    mask = np.concatenate([*masks, np.asarray(null_mask) > 0])
    # No caption reaches the positions after `used`. They are always masked, so they are cut off.
    used = int(np.flatnonzero(mask.any(0))[-1]) + 1
    length = min(-(-used // 8) * 8, mask.shape[1])
    np.save(folder / "text.npy", text[:, :length])
    np.save(folder / "text_mask.npy", mask[:, :length])
    np.save(folder / "caption.npy", np.array([order[c] for c in captions], np.int32))
