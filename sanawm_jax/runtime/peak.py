"""The peak speed of a device, and the share of it that a program reaches."""

from __future__ import annotations

from typing import Any

import jax

# (part of `Device.device_kind`, dense bfloat16 FLOP/s of one device), from data sheets; the
# first name that is found counts
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("TPU7x", 2307e12),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


def peak_flops(device: Any = None) -> float | None:
    """Dense bfloat16 FLOP/s of a device, by default the first; None for a CPU or an unknown one."""
    kind = (jax.devices()[0] if device is None else device).device_kind
    return next((peak for name, peak in PEAK_FLOPS if name.lower() in kind.lower()), None)


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, a share of 1: arXiv 2204.02311, appendix B.

    Args:
      flops: operations of the model on all devices together, without recomputed ones.
      seconds: the time that they took.
      peak: FLOP/s of one device; None gives None.
    """
    return flops / seconds / devices / peak if peak and seconds > 0 else None
