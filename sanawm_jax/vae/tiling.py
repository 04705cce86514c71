"""Encoding and decoding in overlapping tiles, whose results are blended linearly.

Axis letters: B batch; f h w frames, rows and columns of the video; F H W latent frames, rows and
columns; C channels of the video, c of the latents. The caller gives the function that processes a
tile. Usually it is one jitted function that is compiled once per tile shape: the tiles of a long
clip have at most three lengths, and two sizes per side. Tiles run in row-major order within a
window of time, and the windows run in order. Source: `tiled_encode`, `tiled_decode`,
`_temporal_tiled_encode` and `_temporal_tiled_decode` of diffusers' `AutoencoderKLLTX2Video`. As
there, a tile is blended with neighbours that are already blended.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.config import VAEConfig

EncodeTile = Callable[[Any], tuple[jax.Array, jax.Array]]  # of an array on the host or the device
DecodeTile = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of tiles and distances between them, in pixels and pixel frames.

    Attributes:
      use_tiling: divide rows and columns into tiles if they are larger than a tile.
      use_framewise: divide time into windows, in decoding and in encoding. This is
        `use_framewise_decoding` of the reference, which never reads its `use_framewise_encoding`.
    """

    use_tiling: bool = True
    use_framewise: bool = False
    tile_sample_min_height: int = 512
    tile_sample_min_width: int = 512
    tile_sample_min_num_frames: int = 16
    tile_sample_stride_height: int = 448
    tile_sample_stride_width: int = 448
    tile_sample_stride_num_frames: int = 8


# the tiles with which the published models run at 704x1280
LONG_VIDEO = Tiling(
    use_framewise=True, tile_sample_min_num_frames=96, tile_sample_stride_num_frames=64
)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One tiled axis. `limit`, `size` and `step` count inputs; `keep` and `overlap` outputs."""

    tiled: bool  # whether this axis may be tiled
    limit: int  # the longest input that is not tiled
    size: int
    step: int
    keep: int
    overlap: int


def tiled_encode(
    encode_tile: EncodeTile,
    video: Num[Array | np.ndarray, "B f h w C"],
    cfg: VAEConfig,
    tiling: Tiling,
) -> tuple[Float[Array, "B F H W c"], Float[Array, "B F H W c"]]:
    """Encodes a video tile by tile.

    Args:
      encode_tile: `VideoVAE.encode` with its parameters bound.
      video: RGB in [-1, 1].

    Returns:
      Mean and log-variance of the latents.

    Raises:
      InputError: a tile or a stride is smaller than one latent.
    """

    def run(tile: Any) -> jax.Array:
        return jnp.concatenate(encode_tile(tile), axis=-1)

    time, rows, columns = _axes(tiling, cfg, encode=True)
    frames, height, width = video.shape[1:4]
    s, t = cfg.spatial_ratio, cfg.temporal_ratio
    windows = _windows(
        lambda x: _grid(run, x, rows, columns, (height // s, width // s)),
        video,
        time,
        (frames - 1) // t + 1,
        # The first latent of a later window is encoded without its past, so it is removed.
        trim=lambda y: y[:, 1:],
    )
    moments = jnp.concatenate(list(windows), axis=1)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, logvar


def decode_windows(
    decode_tile: DecodeTile,
    latents: Float[Array | np.ndarray, "B F H W c"],
    cfg: VAEConfig,
    tiling: Tiling,
) -> Iterator[Float[Array, "B _ h w C"]]:
    """Decodes latents window by window, for videos that do not fit in memory.

    Args:
      decode_tile: `VideoVAE.decode` with its parameters (and timesteps or noise) bound.
      latents: denormalised.

    Yields:
      The finished frames of each window in order.

    Raises:
      InputError: a tile or a stride is smaller than one latent.
    """
    time, rows, columns = _axes(tiling, cfg, encode=False)
    frames, height, width = latents.shape[1:4]
    s, t = cfg.spatial_ratio, cfg.temporal_ratio
    yield from _windows(
        lambda z: _grid(decode_tile, z, rows, columns, (height * s, width * s)),
        latents,
        time,
        (frames - 1) * t + 1,
        # As in the reference: the frame that occurs twice is the first one, but the last one is
        # removed, so later windows are one frame late.
        trim=lambda y: y[:, :-1],
        skip_single=cfg.patch_size_t == 1,
    )


def tiled_decode(
    decode_tile: DecodeTile,
    latents: Float[Array | np.ndarray, "B F H W c"],
    cfg: VAEConfig,
    tiling: Tiling,
) -> Float[Array, "B f h w C"]:
    """Returns all windows of `decode_windows` as one array."""
    return jnp.concatenate(list(decode_windows(decode_tile, latents, cfg, tiling)), axis=1)


def blend(
    before: Float[Array, "..."], after: Float[Array, "*rest"], *, axis: int, overlap: int
) -> Float[Array, "*rest"]:
    """Blends the start of `after` with the end of `before` along `axis`, and returns `after`.

    Args:
      overlap: the number of entries to blend; fewer if one of the two is shorter.
    """
    n = min(before.shape[axis], after.shape[axis], overlap)
    if n <= 0:
        return after
    tail = _end(before, axis, n).astype(jnp.float32)
    head, rest = jnp.split(after, [n], axis=axis)
    weight = (jnp.arange(n) / n).reshape(-1, *(1,) * (after.ndim - axis - 1))
    mixed = tail * (1 - weight) + head.astype(jnp.float32) * weight
    return jnp.concatenate([mixed.astype(after.dtype), rest], axis=axis)


def _end(x: jax.Array, axis: int, n: int) -> jax.Array:
    length = x.shape[axis]
    return lax.slice_in_dim(x, max(0, length - max(n, 0)), length, axis=axis)


@functools.partial(jax.jit, static_argnames=("axes", "overlaps", "keeps"))
def _settle(
    y: jax.Array,
    before: tuple[jax.Array | None, ...],
    *,
    axes: tuple[int, ...],
    overlaps: tuple[int, ...],
    keeps: tuple[int, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Blends a tile with the edges of earlier tiles; returns its final part and its own edges."""
    for edge, axis, overlap in zip(before, axes, overlaps, strict=True):
        if edge is not None:
            y = blend(edge, y, axis=axis, overlap=overlap)
    edges = tuple(_end(y, axis, n) for axis, n in zip(axes, overlaps, strict=True))
    for axis, keep in zip(axes, keeps, strict=True):
        y = lax.slice_in_dim(y, 0, min(keep, y.shape[axis]), axis=axis)
    return y, edges


def _axes(tiling: Tiling, cfg: VAEConfig, *, encode: bool) -> tuple[_Axis, _Axis, _Axis]:
    axes = []
    for name, tiled, ratio in (
        ("num_frames", tiling.use_framewise, cfg.temporal_ratio),
        ("height", tiling.use_tiling, cfg.spatial_ratio),
        ("width", tiling.use_tiling, cfg.spatial_ratio),
    ):
        size = getattr(tiling, f"tile_sample_min_{name}")
        step = getattr(tiling, f"tile_sample_stride_{name}")
        if tiled and (size < ratio or step < ratio):
            raise InputError(
                f"VAE tiles of {size} every {step} ({name}) are smaller than one latent; "
                f"use at least {ratio}"
            )
        small, short = size // ratio, step // ratio
        # a window of time has one entry more than its size: the frame from which it starts
        extra = 1 if name == "num_frames" else 0
        if encode:
            axes.append(_Axis(tiled, size, size + extra, step, short, small - short))
        else:
            axes.append(_Axis(tiled, small, small + extra, short, step, size - step))
    return tuple(axes)


def _windows(
    run: Callable[[Any], jax.Array],
    x: Array | np.ndarray,
    time: _Axis,
    total: int,
    *,
    trim: Callable[[jax.Array], jax.Array],
    skip_single: bool = True,
) -> Iterator[jax.Array]:
    frames = x.shape[1]
    if not time.tiled or frames <= time.limit:
        yield run(x)
        return
    edge = None
    for start in range(0, frames, time.step):
        if skip_single and start and start == frames - 1:
            return  # `trim` would remove its only result
        y = run(x[:, start : start + time.size])
        keep = min(time.keep + (start == 0), total)
        y = trim(y) if start else y
        y, (edge,) = _settle(y, (edge,), axes=(1,), overlaps=(time.overlap,), keeps=(keep,))
        total -= y.shape[1]
        if y.shape[1]:
            yield y


def _grid(
    run: Callable[[Any], jax.Array],
    x: Array | np.ndarray,
    rows: _Axis,
    columns: _Axis,
    size: tuple[int, int],
) -> Any:
    height, width = x.shape[2:4]
    if not rows.tiled or (height <= rows.limit and width <= columns.limit):
        return run(x)
    settle = functools.partial(
        _settle,
        axes=(2, 3),
        overlaps=(rows.overlap, columns.overlap),
        keeps=(rows.keep, columns.keep),
    )
    lefts = range(0, width, columns.step)
    above: list[jax.Array | None] = [None] * len(lefts)  # lower edges of the tiles above
    strips = []
    for top in range(0, height, rows.step):
        strip = []
        before = None  # right edge of the tile to the left
        for j, left in enumerate(lefts):
            y = run(x[:, :, top : top + rows.size, left : left + columns.size])
            y, (above[j], before) = settle(y, (above[j], before))
            strip.append(y)
        strips.append(jnp.concatenate(strip, axis=3))
    return jnp.concatenate(strips, axis=2)[:, :, : size[0], : size[1]]
