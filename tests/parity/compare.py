"""Measures parity by the relative L2 error, with weights that our loader reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def relative(ours: Any, reference: Any) -> float:
    """||ours - reference|| / ||reference|| in float64; infinite if anything is not finite."""
    a = np.asarray(ours, np.float64)
    b = reference.detach().double().numpy() if torch.is_tensor(reference) else np.asarray(reference)
    assert a.shape == b.shape, (a.shape, b.shape)
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    return float(error) if np.isfinite(a).all() and np.isfinite(b).all() else float("inf")


def randomise(module: torch.nn.Module, seed: int, scale: float = 1.0) -> torch.nn.Module:
    """Draws every parameter with the scale of trained weights, also those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("A_log"):
                p.copy_(noise)
            elif name.endswith("dt_bias"):
                p.copy_(noise - 3.0)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1.0 + 0.1 * noise)
            elif p.ndim >= 2:
                fan_in = p[0].numel() if "table" not in name else p.shape[-1]
                p.copy_(scale * noise / fan_in**0.5)
            else:
                p.copy_(0.1 * noise)
    return module.eval()


@contextlib.contextmanager
def float32_attention() -> Iterator[None]:
    """Removes the reference's cast of float32 queries, keys and values to bfloat16."""
    original = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self, *a, **k: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = original  # type: ignore[method-assign]
