"""Writes samples as a raw zip, a latent zip and their sidecars. Uses numpy only.

Source of the layout: NVlabs/Sana `sana_wm_zip_latent_data.py`, which can read these files.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.data.zip_index import CAMERA_SUFFIX, PROMPT, SCALE_SUFFIX
from sanawm_jax.runtime.atomic import atomic_write

RAW, LATENTS = "raw", "latents"


@dataclasses.dataclass(frozen=True)
class ZipSample:
    """One sample to write.

    Attributes:
      key: its name, with characters that a file name can have.
      latents: (F, H, W, C) normalised latents, the bytes that `pack_latents` makes of them, or a
        function that returns one of the two. With functions, the latents of only one sample are in
        memory at a time.
      c2w: (N, 4, 4) camera-to-world, OpenCV axes.
      intrinsics: (N, 4) [fx, fy, cx, cy] in pixels of a video of width x height.
      width, height: size of the video in pixels.
      prompt: the caption.
      captions: further captions by sidecar suffix.
      scores: numbers for filters by sidecar suffix.
      metric_scale: factor that converts the translations to metres.
    """

    key: str
    latents: np.ndarray | bytes | Callable[[], np.ndarray | bytes]
    c2w: np.ndarray
    intrinsics: np.ndarray
    width: int
    height: int
    prompt: str = ""
    captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metric_scale: float = 1.0


def pack_latents(latents: np.ndarray) -> bytes:
    """Converts (F, H, W, C) to the bytes of a `.npz` file with z (C, F, H, W) in the same dtype."""
    buffer = io.BytesIO()
    np.savez(buffer, z=np.ascontiguousarray(np.moveaxis(latents, -1, 0)))
    return buffer.getvalue()


def write_zip_latents(folder: str | Path, stem: str, samples: Sequence[ZipSample]) -> Path:
    """Writes the two zips of some samples and their sidecars, to `folder`/raw and `folder`/latents.

    The raw zip is written last, so if it exists, the other files are complete.

    Args:
      folder: it is made if it does not exist.
      stem: name of the zips without `.zip`.
      samples: samples with distinct keys.

    Returns:
      The path of the raw zip.

    Raises:
      ValueError: there are no samples, or two samples have the same key.
    """
    keys = [sample.key for sample in samples]
    if not keys or len(set(keys)) < len(keys):
        raise ValueError("give samples with distinct keys")
    raw, latents = Path(folder) / RAW, Path(folder) / LATENTS
    for place in (raw, latents):
        place.mkdir(parents=True, exist_ok=True)
    # Compression does not make latents smaller, and files that are only stored are read faster.
    with (
        atomic_write(latents / f"{stem}.zip") as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        for sample in samples:
            read = sample.latents() if callable(sample.latents) else sample.latents
            content = read if isinstance(read, bytes) else pack_latents(read)
            archive.writestr(f"{sample.key}.npz", content)

    counts = np.array([len(sample.c2w) for sample in samples])
    with atomic_write(raw / f"{stem}{CAMERA_SUFFIX}.npz") as partial:
        np.savez(
            partial,
            ids=np.array(keys),
            ranges=np.stack([np.cumsum(counts) - counts, counts], axis=1),
            pose=np.concatenate([s.c2w for s in samples]).astype(np.float32),
            intrinsics=np.concatenate([s.intrinsics for s in samples]).astype(np.float32),
        )
    sidecars: dict[str, dict[str, Any]] = {}
    for sample in samples:
        for suffix, value in {**sample.captions, **sample.scores}.items():
            sidecars.setdefault(suffix, {})[sample.key] = value
        if sample.metric_scale != 1.0:
            sidecars.setdefault(SCALE_SUFFIX, {})[sample.key] = sample.metric_scale
    for suffix, values in sidecars.items():
        with atomic_write(raw / f"{stem}{suffix}.json") as partial:
            partial.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

    about = {s.key: {"width": s.width, "height": s.height, PROMPT: s.prompt} for s in samples}
    with atomic_write(raw / f"{stem}.zip") as partial, zipfile.ZipFile(partial, "w") as archive:
        for key, record in about.items():
            archive.writestr(f"{key}.json", json.dumps(record, ensure_ascii=False))
    return raw / f"{stem}.zip"
