"""Rotary embedding and UCPE ray transforms of heads, each in one pass over the tokens."""

from kernels_pallas.ucpe.api import apply_ucpe, to_ray_space
from kernels_pallas.ucpe.gpu import Tiles
from kernels_pallas.ucpe.reference import apply_rope

__all__ = ["Tiles", "apply_rope", "apply_ucpe", "to_ray_space"]
