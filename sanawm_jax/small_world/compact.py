"""Training states in few bytes: six per weight instead of twelve or more.

A state is written as numbered safetensors files of bounded size, so that a run can stop, be carried
in pieces and go on elsewhere. Weights stay float32. First moments are float8 with one scale per
array, and so is the difference of the average to the weights: it is small, so its rounding is below
that of a bfloat16 weight.
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
_FLOAT8 = ml_dtypes.float8_e4m3fn
_LARGEST = float(ml_dtypes.finfo(_FLOAT8).max)


def _is_large(value: Any) -> bool:
    return value.dtype == jnp.float32 and value.ndim > 1


def _packed(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Flat arrays by name, as they are written."""
    flat: dict[str, np.ndarray] = {}
    params = [np.asarray(a) for a in jax.tree.leaves(state["params"])]
    for name, tree in state.items():
        for index, leaf in enumerate(jax.tree.leaves(tree)):
            value = np.asarray(leaf)
            key = f"{name}.{index:04d}"
            if name == "average":
                value = value - params[index]
            if name in ("average", "moments") and _is_large(value):
                scale = max(float(np.abs(value).max()), 1e-30) / _LARGEST
                value = (value / scale).astype(_FLOAT8).view(np.uint8)
                flat[f"{key}.scale"] = np.array([scale], np.float32)
            flat[key] = np.ascontiguousarray(value).reshape(-1)
    return flat


def save_compact(folder: str | Path, state: dict[str, Any], part_bytes: int = PART_BYTES) -> None:
    """Writes a state: `params`, `average`, `moments` (any pytree) and what else is small.

    Arrays of `average` and `moments` with two axes or more are rounded, see the head of the module.
    An array that is larger than a file is cut along its flat order.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("state_*.safetensors"):
        old.unlink()
    files: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, flat in _packed(state).items():
        start, part = 0, 0
        while start < max(flat.size, 1):
            room = (part_bytes - size) // flat.dtype.itemsize
            if room < 1:
                files.append({})
                size = 0
                continue
            piece = flat[start : start + room]
            files[-1][f"{name}.part{part:02d}"] = piece
            start, part, size = start + max(room, 1), part + 1, size + piece.nbytes
    for index, tensors in enumerate(files):
        save_file(tensors, folder / f"state_{index:03d}.safetensors")


def load_compact(folder: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """Reads what `save_compact` wrote into the shapes and types of `like`.

    Raises:
      InputError: files or arrays are missing, or they are of another network.
    """
    from safetensors.numpy import load_file

    pieces: dict[str, list[tuple[str, np.ndarray]]] = {}
    for file in sorted(Path(folder).glob("state_*.safetensors")):
        for name, piece in load_file(file).items():
            whole, _, part = name.rpartition(".")
            pieces.setdefault(whole, []).append((part, piece))
    found = {name: np.concatenate([p for _, p in sorted(parts)]) for name, parts in pieces.items()}
    out: dict[str, Any] = {}
    for name in sorted(like, key=lambda n: n != "params"):  # an average is read after the weights
        values, structure = jax.tree.flatten(like[name])
        for index, leaf in enumerate(values):
            key = f"{name}.{index:04d}"
            flat = found.get(key, np.zeros(0))
            if flat.size != np.size(leaf):
                raise InputError(f"{folder} holds no state of this network: {name} {index} differs")
            if f"{key}.scale" in found:
                flat = flat.view(_FLOAT8).astype(np.float32) * found[f"{key}.scale"]
            value = flat.astype(leaf.dtype).reshape(np.shape(leaf))
            if name == "average":
                value = value + np.asarray(jax.tree.leaves(out["params"])[index])
            values[index] = jnp.asarray(value)
        out[name] = jax.tree.unflatten(structure, values)
    return out
