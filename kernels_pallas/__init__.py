"""Kernels as functions of arrays: an XLA reference each, and GPU or TPU versions of it.

Imports jax, never sanawm_jax.
"""
