"""Reads a numeric array that the user gave, from a `.npy` file or from memory."""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Float32, Num
from numpy.typing import ArrayLike

from sanawm_jax.runtime.errors import InputError


def load_array(value: str | os.PathLike | ArrayLike, name: str) -> Num[np.ndarray, "..."]:
    """Returns `value` as a real array, reading it first if it is a path.

    Pickles are never opened: only plain `.npy` files are read.

    Args:
      value: a path to a `.npy` file, or anything that `np.asarray` takes.
      name: the name of the array, with which an error line begins.

    Returns:
      An array of any shape and of an integer or floating dtype.

    Raises:
      InputError: the file does not exist, is not a `.npy` file, is truncated or pickled, or the
        values are not real numbers.
    """
    if isinstance(value, (str, os.PathLike)):
        array = _read(os.fspath(value), name)
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise InputError(f"{name}: the rows have unequal lengths; give a full array") from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return array


def to_finite_float32(array: Num[np.ndarray, "*rest"], name: str) -> Float32[np.ndarray, "*rest"]:
    """Casts to float32; raises `InputError` for NaN, infinity and values that overflow float32.

    The error names the first bad index along the leading axis.
    """
    with np.errstate(over="ignore"):
        cast = np.asarray(array, dtype=np.float32)
    finite = np.isfinite(cast)
    if not finite.all():
        frame = int(np.argwhere(~finite)[0, 0])
        raise InputError(
            f"{name}: row {frame} holds NaN, infinity or a value too large for float32"
        )
    return cast


def _read(path: str, name: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        reason = error.strerror or "not readable"
        raise InputError(f"{name}: cannot open {path}: {reason}") from error
    # A damaged header can make numpy's parser raise almost any exception.
    except Exception as error:
        raise InputError(
            f"{name}: {path} is not a plain .npy file (pickled, cut short or another format); "
            "write it with np.save"
        ) from error
