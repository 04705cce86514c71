"""Softmax attention over long sequences: cuDNN's, or JAX's own kernels for Hopper and TPUs."""

from kernels_pallas.attention.api import flash_attention

__all__ = ["flash_attention"]
