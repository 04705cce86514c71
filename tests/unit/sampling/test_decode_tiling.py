"""The tiles in which a video is decoded, and the frames that are dropped at its start."""

from __future__ import annotations

import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.command import _drop_frames
from sanawm_jax.sampling.decode import decode_tiling
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.tiling import LONG_VIDEO, Tiling, decode_windows

CFG = VAEConfig(spatial_compression_ratio=32, temporal_compression_ratio=8)


def calls(tiling: str | Tiling, frames: int, height: int, width: int) -> list[tuple[int, ...]]:
    """Returns the latent sizes (f, h, w) of the decoder's calls for a video of this size."""
    seen = []

    def decode(z):
        f, h, w = z.shape[1:4]
        seen.append((f, h, w))
        return np.zeros((1, 8 * (f - 1) + 1, 32 * h, 32 * w, 1), np.float16)

    latents = np.zeros((1, (frames - 1) // 8 + 1, height // 32, width // 32, 1), np.float16)
    windows = list(decode_windows(decode, latents, CFG, decode_tiling(tiling, frames)))
    assert sum(w.shape[1] for w in windows) == frames
    return seen


@pytest.mark.parametrize("size", [(97, 512, 512), (1, 64, 96), (49, 128, 512)])
def test_auto_leaves_what_fits_in_one_tile(size):
    frames, height, width = size
    assert calls("auto", *size) == [((frames - 1) // 8 + 1, height // 32, width // 32)]


def test_auto_tiles_what_is_larger():
    assert len(calls("auto", 105, 64, 64)) == 2
    assert len(calls("auto", 97, 544, 512)) == 4  # short tiles on both sides, as the reference has
    assert calls("auto", 97, 704, 1280)[0] == (13, 16, 16)


def test_none_and_always():
    assert calls("none", 161, 704, 1280) == [(21, 22, 40)]
    assert decode_tiling("always", 97) == LONG_VIDEO
    assert len(calls("always", 97, 64, 64)) == 2
    assert len(calls("always", 89, 64, 64)) == 1


def test_given_tiles_and_unknown_names():
    given = Tiling(tile_sample_min_height=64)
    assert decode_tiling(given, 200) is given
    with pytest.raises(InputError, match="'sometimes' is unknown; use auto, none or always"):
        decode_tiling("sometimes", 9)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 9])
def test_first_frames_are_dropped_across_windows(count):
    video = np.arange(9)[:, None]
    windows = list(_drop_frames((video[:3], video[3:4], video[4:]), count))
    assert all(len(w) for w in windows)
    np.testing.assert_array_equal(np.concatenate([*windows, video[:0]]), video[count:])
