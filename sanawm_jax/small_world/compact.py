"""Training states in few bytes: float32 weights and averages, bfloat16 moments.

A state is written as numbered safetensors files of bounded size, so that a run can stop, be carried
in pieces and go on elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sanawm_jax.runtime.errors import InputError

PART_BYTES = 15 << 20


def _is_moment(value: Any) -> bool:
    return value.dtype == jnp.float32 and value.ndim > 1


def save_compact(folder: str | Path, state: dict[str, Any], part_bytes: int = PART_BYTES) -> None:
    """Writes a state: `params`, `average`, `moments` (any pytree) and what else is small.

    Arrays of `moments` with two axes or more are rounded to bfloat16. An array that is larger than
    a file is cut along its flat order.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("state_*.safetensors"):
        old.unlink()
    pieces: list[tuple[str, np.ndarray]] = []
    for name, tree in state.items():
        for index, leaf in enumerate(jax.tree.leaves(tree)):
            value = np.asarray(leaf)
            if name == "moments" and _is_moment(value):
                value = value.astype(ml_dtypes.bfloat16)
            flat = np.ascontiguousarray(value).reshape(-1)
            step = max(part_bytes // flat.dtype.itemsize, 1)
            for part, start in enumerate(range(0, max(flat.size, 1), step)):
                pieces.append((f"{name}.{index:04d}.{part:02d}", flat[start : start + step]))
    files: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, piece in pieces:
        if size and size + piece.nbytes > part_bytes:
            files.append({})
            size = 0
        files[-1][name] = piece
        size += piece.nbytes
    for index, tensors in enumerate(files):
        save_file(tensors, folder / f"state_{index:03d}.safetensors")


def load_compact(folder: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """Reads what `save_compact` wrote into the shapes and types of `like`.

    Raises:
      InputError: files or arrays are missing, or they are of another network.
    """
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for file in sorted(Path(folder).glob("state_*.safetensors")):
        found.update(load_file(file))
    out = {}
    for name, tree in like.items():
        values, structure = jax.tree.flatten(tree)
        for index, leaf in enumerate(values):
            keys = sorted(k for k in found if k.startswith(f"{name}.{index:04d}."))
            flat = np.concatenate([found[k] for k in keys]) if keys else np.zeros(0)
            if flat.size != np.size(leaf):
                raise InputError(f"{folder} holds no state of this network: {name} {index} differs")
            values[index] = jnp.asarray(flat.astype(leaf.dtype).reshape(np.shape(leaf)))
        out[name] = jax.tree.unflatten(structure, values)
    return out
