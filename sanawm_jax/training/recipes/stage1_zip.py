"""Stage 1 reads zips of latents: examples and captions stream from disk, see `data.zip_stream`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import logging

from sanawm_jax.checkpoints.upstream_folder import open_stage1
from sanawm_jax.data.bad_samples import BadSample, BadSampleCounter
from sanawm_jax.data.latent_cache import TextEncoder
from sanawm_jax.data.text_cache import TextCache, build_text_cache
from sanawm_jax.data.zip_index import Selection, index_zips
from sanawm_jax.data.zip_latents import MEASURED, ZipLatents
from sanawm_jax.data.zip_writer import LATENTS, RAW
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.processes import is_first
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.recipes.cached_clips import caption_encoder
from sanawm_jax.training.recipes.latent_source import LatentSource, check_channels

_PLUCKER_CHANNELS = 6  # of one pixel frame


def zip_folders(data_dir: str, latent_dir: str) -> list[tuple[Path, Path]]:
    """The folders (raw, latents) of each data set.

    Args:
      data_dir: raw folders, separated by commas; without `latent_dir`, folders that hold raw/ and
        latents/.
      latent_dir: latent folders in the same order, separated by commas; or empty.

    Raises:
      InputError: a folder is missing, or the two differ in number.
    """
    first = [Path(part.strip()).expanduser() for part in data_dir.split(",") if part.strip()]
    second = [Path(part.strip()).expanduser() for part in latent_dir.split(",") if part.strip()]
    if not first:
        raise InputError("data.format=zip_latents needs data_dir; see docs/data.md")
    if second and len(first) != len(second):
        raise InputError(
            f"data_dir names {len(first)} folders and data.latent_dir {len(second)}; give as many"
        )
    if not second:
        first, second = [f / RAW for f in first], [f / LATENTS for f in first]
    for folder in (*first, *second):
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {folder}; data_dir holds {RAW}/ and {LATENTS}/, or it has the "
                "raw zips and data.latent_dir the others"
            )
    return list(zip(first, second, strict=True))


def open_zips(
    config: ml_collections.ConfigDict, model: DiTConfig
) -> tuple[ZipLatents, BadSampleCounter]:
    """The samples of `config.data_dir` without their text; see `data.zip_latents`.

    Args:
      config: of the run.
      model: of the network; its Plücker channels tell how many pixel frames a latent frame has.

    Raises:
      InputError: no usable samples, or too many bad ones.
    """
    data = config.data
    temporal = model.chunk_plucker_channels // _PLUCKER_CHANNELS
    selection = Selection(
        filters=tuple(data.filters),
        captions=tuple(data.captions),
        min_latent_file_size=data.min_latent_file_size,
    )
    counter = BadSampleCounter(data.max_bad_fraction, data.min_bad)
    index = index_zips(zip_folders(config.data_dir, data.latent_dir), selection, counter)
    logging.info(
        "%d samples in %d zips; %d filtered out, %d too small, %d bad",
        *(len(index.items), len(index.packs), index.filtered, index.small, counter.bad),
    )
    frames = (data.num_frames - 1) // temporal + 1
    source = ZipLatents(index, frames, repeat=data.repeat, temporal=temporal)
    source.measure()
    return source, counter


def zip_source(config: ml_collections.ConfigDict, workdir: Path, model: DiTConfig) -> LatentSource:
    """The zips of `config.data_dir`; `config.data` says how they are read.

    Raises:
      InputError: see `open_zips`; no text encoder; another network's channels.
    """
    from sanawm_jax.data.zip_stream import ZipStream

    source, counter = open_zips(config, model)
    text = encoded_captions(config, workdir, source.index.captions())
    source.text = text
    assert source.shape is not None
    plucker = source.temporal * _PLUCKER_CHANNELS
    check_channels(model, {"latents": source.shape[0], "plucker": plucker, "text": text.width})

    def stream(rows: np.ndarray, seed: int) -> ZipStream:
        data = config.data
        return ZipStream(
            source,
            config.batch_size,
            rows=rows,
            seed=seed,
            counter=counter,
            num_workers=data.num_workers,
            num_threads=data.num_threads,
            buffer=data.buffer,
        )

    return LatentSource(
        size=len(source),
        frames=source.latent_frames,
        grid=source.shape[1:],
        null=text(""),
        stream=stream,
        first=functools.partial(first_samples, source),
    )


def first_samples(source: ZipLatents, clips: int) -> dict[str, np.ndarray]:
    """Rows of up to `clips` first samples that can be read, always with the same captions.

    Raises:
      InputError: none of the first hundred can be read.
    """
    rows: list[dict[str, np.ndarray]] = []
    last = ""
    for number in range(min(len(source.index.items), clips + MEASURED)):
        try:
            rows.append(source[number])
        except BadSample as error:  # the stream names and counts it
            last = str(error)
        if len(rows) == clips:
            break
    if not rows:
        raise InputError(f"none of the first samples can be shown; the last one: {last}")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def encoded_captions(
    config: ml_collections.ConfigDict, workdir: Path, captions: list[str]
) -> TextCache:
    """The captions as the run's text encoder reads them; the first process encodes them.

    Raises:
      InputError: no folder with a text encoder is given.
    """
    data = config.data
    cache = Path(data.text_cache).expanduser() if data.text_cache else workdir / "text"
    name = data.text_dir or config.init_weights
    if not name:
        raise InputError(
            "no text encoder reads the captions; give a stage-1 folder as data.text_dir or "
            "init_weights"
        )
    folder = open_stage1(name)
    if is_first():
        dtype = compute_dtype(config.dtype)

        @functools.cache
        def encoder() -> TextEncoder:  # loaded only if some captions are not encoded yet
            return caption_encoder(*folder.load_text(dtype), data.text_length)

        def encode(texts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
            return encoder()(texts)

        name = f"{_digest(folder.part('text_encoder'))}-{data.text_length}-{dtype}"
        build_text_cache(cache, captions, encode, fingerprint=name)
    return TextCache(cache)


def _digest(folder: Path) -> str:
    """Names a text encoder by names, sizes and first bytes of its files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with file.open("rb") as opened:
                head = opened.read(1 << 20)
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + head)
    return digest.hexdigest()[:16]
