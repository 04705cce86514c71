"""Kernels as functions of arrays: each one has an XLA reference and GPU or TPU versions.

This package imports jax and never sanawm_jax. `README.md` says what is tested where.
"""
