"""Rows of clips become the figures of a run: means, drift from quarter to quarter, tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from sanawm_jax.eval.metrics import finite_mean
from sanawm_jax.eval.runner import Row, plain


class Shown(NamedTuple):
    """How a figure by quarter is shown."""

    label: str
    digits: int  # in JSON
    shown_digits: int


BY_QUARTER = {
    "psnr": Shown("PSNR, dB", 3, 2),
    "ssim": Shown("SSIM", 4, 4),
    "gradient_ratio": Shown("gradient energy over the truth's", 4, 2),
    "psnr_seen": Shown("PSNR of seen pixels, dB", 3, 2),
    "psnr_unseen": Shown("PSNR of unseen pixels, dB", 3, 2),
}
CAMERA = {
    "rot_err_deg": "RotErr, degrees",
    "trans_err": "TransErr, units",
    "cam_mc": "CamMC",
    "estimator_rot_err_deg": "RotErr of the pose search itself, degrees",
}


def summary(rows: list[Row]) -> dict[str, Any]:
    """Means over clips; drift is the first quarter's minus the last one's, positive is worse.

    Args:
      rows: figures of one stage, one row per clip: `key` and `nearest` of every clip; under
        NAME_by_quarter its four means; and the camera errors.
    """
    confused = [f"{row['key']}->{row['nearest']}" for row in rows if row["key"] != row["nearest"]]
    found: dict[str, Any] = {
        "camera_following": 1 - len(confused) / len(rows),
        "confused": confused,
    }
    for name, (_, digits, _) in BY_QUARTER.items():
        values = [row.get(f"{name}_by_quarter", [None] * 4) for row in rows]
        quarters = finite_mean(np.array(values, np.float64), 0)
        found[name] = np.round(finite_mean(quarters), digits)
        found[f"{name}_by_quarter"] = quarters.round(digits)
        found[f"{name}_drift"] = np.round(quarters[0] - quarters[-1], digits)
    for name in CAMERA:
        found[name] = mean(row.get(name) for row in rows)
    return plain(found)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there, rounded to 5 digits; None if there is none."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 5) if known else None


def show(value: float | None, digits: int) -> str:
    """A figure as tables show it."""
    return "-" if value is None else f"{value:.{digits}f}"
