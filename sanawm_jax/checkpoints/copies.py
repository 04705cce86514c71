"""Copies of large arrays that do not block other threads."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BLOCK = 1 << 18  # elements, so that a rounded block stays in the cache of the processor


def copy_into(target: np.ndarray, value: np.ndarray) -> None:
    """`target[...] = value`, bit for bit.

    NumPy holds the interpreter lock while it copies or casts a dtype that is not its own, such as
    bfloat16. It releases the lock for integers of the same size, so threads can copy in parallel.
    """
    if value.dtype == target.dtype and value.dtype.itemsize <= 8:
        integer = np.dtype(f"u{value.dtype.itemsize}")
        target.view(integer)[...] = value.view(integer)
    elif (value.dtype, target.dtype) == (np.float32, _BFLOAT16) and value.ndim:
        _round_into(target.view(np.uint16), value)
    else:
        target[...] = value


def _round_into(target: np.ndarray, value: np.ndarray) -> None:
    """Rounds float32 to the bits of bfloat16, ties to even, in blocks along the slowest axis."""
    axis = int(np.argmax(np.abs(value.strides)))
    target, value = np.moveaxis(target, axis, 0), np.moveaxis(value, axis, 0)
    rows = max(1, _BLOCK // max(1, value[:1].size))
    for start in range(0, len(value), rows):
        block = value[start : start + rows]
        bits = block.view(np.uint32)
        rounded = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
        unknown = np.isnan(block)
        if unknown.any():  # rounding can turn a NaN into infinity
            rounded[unknown] = block[unknown].astype(_BFLOAT16).view(np.uint16)
        target[start : start + rows] = rounded
