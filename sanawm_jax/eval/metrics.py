"""Picture and video metrics on numpy arrays.

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame in dB: (N, H, W, 3) in [0, 1] -> (N,).

    Equal frames give 100 dB.
    """
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3))
    return -10.0 * np.log10(np.maximum(error, 1e-10))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame: (N, H, W, 3) in [0, 1] -> (N,).

    Gaussian window of sigma 1.5 on 11x11 pixels, K1 = 0.01, K2 = 0.03, mean over the pixels whose
    window lies inside the picture and over channels (Wang et al. 2004).
    """
    from scipy.ndimage import gaussian_filter

    def blur(x: np.ndarray) -> np.ndarray:
        inner = gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=3.5)
        return inner[:, 5:-5, 5:-5]

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return score.mean(axis=(1, 2, 3))


def detail(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean size of a frame's horizontal gradient over b's: (N, H, W, 3) -> (N,).

    Below 1, a is more blurred than b; above 1, it has edges or noise that b does not have.
    """

    def gradient(x: np.ndarray) -> np.ndarray:
        return np.abs(np.diff(x.astype(np.float64), axis=2)).mean(axis=(1, 2, 3))

    return gradient(a) / np.maximum(gradient(b), 1e-10)


def by_quarter(values: np.ndarray) -> np.ndarray:
    """Means over the four quarters of the last axis: (..., N) -> (..., 4)."""
    return np.stack([part.mean(-1) for part in np.array_split(values, 4, axis=-1)], -1)
