"""Norm, ReLU, rotary embedding and UCPE ray transform of heads, in one pass over the tokens."""

from kernels_pallas.ucpe.api import apply_ucpe, plain_and_rotated, rotate, to_ray_space
from kernels_pallas.ucpe.gpu import Tiles
from kernels_pallas.ucpe.reference import (
    Features,
    features,
    inverse_rms,
    rms_norm,
    rotate_pairs,
)

__all__ = [
    "Features",
    "Tiles",
    "apply_ucpe",
    "features",
    "inverse_rms",
    "plain_and_rotated",
    "rms_norm",
    "rotate",
    "rotate_pairs",
    "to_ray_space",
]
