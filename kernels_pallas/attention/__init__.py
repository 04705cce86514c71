"""Softmax attention over long sequences, by cuDNN or by JAX's own kernels for Hopper and TPUs."""

from kernels_pallas.attention.api import fits_cudnn, flash_attention, flash_attention_to_both

__all__ = ["fits_cudnn", "flash_attention", "flash_attention_to_both"]
