"""How a long video changes: windows of 10 s against the first one, and times against the truth.

A small change alone proves nothing, since a video can be constantly bad. Every figure comes with
its mean and its worst value.

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sanawm_jax.eval.metrics import by_frame, gradient_energy, gradient_ratio, psnr, ssim
from sanawm_jax.media.video import as_float

FPS = 16.0
WINDOW_SECONDS = 10.0
TIMES = (1.0, 3.0, 10.0, 30.0, 60.0)  # seconds
_AROUND = 0.25  # seconds before and after a time whose frames are averaged
_BINS = 8  # per channel of the colour histogram


def sharpness(video: np.ndarray) -> np.ndarray:
    """Variance of the Laplacian of each frame's brightness: (N, H, W, 3) -> (N,)."""
    from scipy.ndimage import laplace

    return by_frame(lambda x: laplace(x @ (0.299, 0.587, 0.114)).var(), video)


def saturation(video: np.ndarray) -> np.ndarray:
    """Mean saturation of each frame, the S of HSV in [0, 1]: (N, H, W, 3) -> (N,)."""

    def one(x: np.ndarray) -> float:
        high, low = x.max(-1), x.min(-1)
        return ((high - low) / np.maximum(high, 1e-6)).mean()

    return by_frame(one, video)


def color_histogram(video: np.ndarray) -> np.ndarray:
    """Shares of the 8x8x8 colours over all frames: (N, H, W, 3) -> (512,)."""
    counts = np.zeros(_BINS**3)
    for frame in video:
        bins = np.minimum((as_float(frame) * _BINS).astype(int), _BINS - 1).reshape(-1, 3)
        counts += np.bincount(bins @ (_BINS**2, _BINS, 1), minlength=_BINS**3)
    return counts / counts.sum()


def histogram_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the pixels that would have to change colour: (512,) each -> 0 to 1."""
    return float(np.abs(a - b).sum() / 2)


def windows(frames: int, fps: float = FPS) -> list[slice]:
    """Windows of 10 s. A rest of less than half a window joins the one before it."""
    size = round(WINDOW_SECONDS * fps)
    starts = [s for s in range(0, frames, size) if s == 0 or frames - s >= size / 2]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], frames], strict=True)]


def drift(video: np.ndarray, fps: float = FPS) -> dict[str, Any]:
    """Change of a video from window to window; needs no truth.

    Args:
      video: (N, H, W, 3).
      fps: frames per second.

    Returns:
      windows: their number. For each of gradient_ratio, sharpness_ratio, saturation_ratio (of a
      window to the first) and color_distance (to the first): a list with one value per window under
      NAME_by_window, and NAME_mean and NAME_worst over the windows after the first, or over the
      only one. sharpness_mean and sharpness_min, saturation_mean and saturation_min: over windows,
      as they are.
    """
    parts = [video[window] for window in windows(len(video), fps)]
    values = {
        "gradient": [by_frame(gradient_energy, part).mean() for part in parts],
        "sharpness": [sharpness(part).mean() for part in parts],
        "saturation": [saturation(part).mean() for part in parts],
    }
    histograms = [color_histogram(part) for part in parts]
    found: dict[str, Any] = {"windows": len(parts)}
    series = {
        f"{name}_ratio": [float(v / max(row[0], 1e-9)) for v in row] for name, row in values.items()
    }
    series["color_distance"] = [histogram_distance(h, histograms[0]) for h in histograms]
    for name, row in series.items():
        later = row[1:] or row
        found[f"{name}_by_window"] = row
        found[f"{name}_mean"] = float(np.mean(later))
        found[f"{name}_worst"] = max(later) if name == "color_distance" else min(later)
    for name in ("sharpness", "saturation"):
        found[f"{name}_mean"] = float(np.mean(values[name]))
        found[f"{name}_min"] = float(np.min(values[name]))
    return found


def against_truth(
    video: np.ndarray, truth: np.ndarray, fps: float = FPS, times: tuple[float, ...] = TIMES
) -> dict[str, dict[str, float]]:
    """PSNR, SSIM and gradient-energy ratio to the true video at some times.

    Args:
      video, truth: (N, H, W, 3).
      fps: frames per second.
      times: seconds; those after the end of the video are left out.

    Returns:
      Under the name of each time, such as "10s": mean `psnr`, `ssim` and `gradient_ratio` of the
      frames within a quarter of a second, and their worst values under NAME_min.
    """
    found = {}
    for time in times:
        middle, reach = round(time * fps), round(_AROUND * fps)
        if middle >= len(video):
            continue
        near = slice(max(middle - reach, 0), middle + reach + 1)
        row = {}
        for name, metric in (("psnr", psnr), ("ssim", ssim), ("gradient_ratio", gradient_ratio)):
            values = metric(video[near], truth[near])
            row[name], row[f"{name}_min"] = float(values.mean()), float(values.min())
        found[f"{time:g}s"] = row
    return found
