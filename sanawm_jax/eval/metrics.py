"""Picture and video metrics.

Videos are (N, H, W, 3), floating point in [0, 1] or uint8. They are read frame by frame, so a long
video needs little memory beyond itself.

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sanawm_jax.media.video import as_float

LEAST_SHARE = 0.01  # a frame whose mask has a smaller share of its pixels has no figure


def by_frame(measure: Callable[..., Any], *videos: np.ndarray) -> np.ndarray:
    """`measure` of each frame of one or more videos, as float64 pictures: (N,)."""
    return np.array([measure(*map(as_float, frames)) for frames in zip(*videos, strict=True)])


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame in dB: (N,).

    Equal frames give 100 dB.

    Args:
      a, b: videos of the same shape.
      mask: (N, H, W) bool, the pixels that count; a frame with less than `LEAST_SHARE` of them has
        no figure and gives NaN.
    """

    def one(x: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None) -> float:
        error = np.square(x - y).mean(-1)
        if mask is not None:
            if mask.mean() < LEAST_SHARE:
                return np.nan
            error = error[mask]
        return -10.0 * np.log10(max(error.mean(), 1e-10))

    if mask is None:
        return by_frame(one, a, b)
    pairs = zip(a, b, mask, strict=True)
    return np.array([one(as_float(x), as_float(y), m) for x, y, m in pairs])


def ssim(a: np.ndarray, b: np.ndarray, uniform: bool = False) -> np.ndarray:
    """Structural similarity of each frame: (N,). K1 = 0.01, K2 = 0.03, mean over channels.

    Args:
      a, b: videos of the same shape.
      uniform: False takes a Gaussian window of sigma 1.5 on 11x11 pixels, and the pixels whose
        window lies inside the picture (Wang et al. 2004). True takes the window of SANA-WM-Bench:
        the mean of 11x11 pixels, and all pixels of the picture, which is mirrored at its edges.
    """
    from scipy.ndimage import gaussian_filter, uniform_filter

    def blur(x: np.ndarray) -> np.ndarray:
        if uniform:
            return uniform_filter(x, 11, axes=(0, 1))
        return gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]

    def one(x: np.ndarray, y: np.ndarray) -> float:
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        score /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
        return score.mean()

    return by_frame(one, a, b)


def gradient_energy(video: Any) -> Any:
    """Mean squared difference of neighbouring pixels, per frame: (..., H, W, 3) -> (...).

    Takes and returns a floating-point array of numpy or of jax.
    """
    across = video[..., 1:, :] - video[..., :-1, :]
    down = video[..., 1:, :, :] - video[..., :-1, :, :]
    return (across**2).mean((-3, -2, -1)) + (down**2).mean((-3, -2, -1))


def gradient_ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Gradient energy of each frame over b's: (N,).

    Below 1, a is more blurred than b; above 1, it has edges or noise that b does not have.
    """
    return by_frame(gradient_energy, a) / np.maximum(by_frame(gradient_energy, b), 1e-9)


def by_quarter(values: np.ndarray) -> np.ndarray:
    """Means over the four quarters of the last axis, without NaN: (..., N) -> (..., 4).

    A quarter of NaN alone is NaN.
    """
    return np.stack([finite_mean(part, -1) for part in np.array_split(values, 4, axis=-1)], -1)


def finite_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of the values that are not NaN; NaN where there is none."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(known.any(axis), total / np.maximum(known.sum(axis), 1), np.nan)
