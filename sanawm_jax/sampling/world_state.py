"""A moment of a world as a value, and as a file.

A world's state is of constant size. It can be kept, continued more than once, and saved to a file
that another process continues.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.camera.live import Motion
from sanawm_jax.dit.state import DiTState
from sanawm_jax.refiner.state import RefinerState
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.state import DecoderState

_KIND = "sanawm_jax world"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carried:
    """The arrays that the next chunk depends on; None before the first chunk, or without the part.

    Their sizes do not grow with the age of the world.
    """

    dit: DiTState | None = None
    refiner: RefinerState | None = None
    decoder: DecoderState | None = None


@dataclasses.dataclass(frozen=True)
class WorldState:
    """A moment of a world. With the same weights and the same controls, it goes on bit for bit.

    Attributes:
      carried: arrays of the networks.
      chunks: chunks so far.
      motion: pose and velocity of the camera at the last frame.
      origin: (4, 4) pose of the first frame, to which all poses are relative.
      prompt: the text that acts on the next chunk.
    """

    carried: Carried
    chunks: int
    motion: Motion
    origin: np.ndarray
    prompt: str


def check_carried(found: Carried, expected: Carried, chunks: int) -> None:
    """Compares a state with the shapes that a world leaves behind.

    Raises:
      InputError: it is of another network, size or window.
    """
    if not chunks:
        return
    theirs, ours = (a.dit and a.dit.window for a in (found, expected))
    if theirs != ours:
        raise InputError(f"the state is of a stream with {theirs}, this world has {ours}")
    for name in ("dit", "refiner", "decoder"):
        a, b = (getattr(carried, name) for carried in (found, expected))
        if name == "refiner" and a is not None and b is not None:
            a, b = a.window, b.window
        if shapes_of(a) != shapes_of(b):
            raise InputError(
                f"the state is of another network, picture size or precision: its {name} differs"
            )


def shapes_of(tree: Any) -> Any:
    """Structure, shapes and dtypes of a tree of arrays, as something that can be compared."""
    arrays, structure = jax.tree.flatten(tree)
    return structure, [(a.shape, jnp.dtype(a.dtype)) for a in arrays]


def save_state(file: str | os.PathLike, state: WorldState) -> Path:
    """Writes a state to a safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    arrays = {
        jax.tree_util.keystr(path): np.asarray(a)
        for path, a in jax.tree_util.tree_leaves_with_path(state.carried)
    }
    refiner, motion = state.carried.refiner, state.motion
    arrays |= {"c2w": motion.c2w, "velocity": motion.velocity, "origin": state.origin}
    about = {
        "kind": _KIND,
        "chunks": state.chunks,
        "prompt": state.prompt,
        "held": sorted(motion.held),
        "pitch": motion.pitch,
        "refined": refiner.frames if refiner else 0,
    }
    arrays = {name: np.array(a, order="C") for name, a in arrays.items()}
    with atomic_write(file) as partial:
        save_file(arrays, partial, {"world": json.dumps(about)})
    return Path(file)


def load_state(file: str | os.PathLike, template: Carried) -> WorldState:
    """Reads a state.

    Args:
      template: `World.template` of the world that will continue it.

    Raises:
      InputError: the file cannot be read, holds no state, or one of another kind of world.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            about = json.loads((opened.metadata() or {}).get("world", "{}"))
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} cannot be read as a saved world ({reason})") from None
    if about.get("kind") != _KIND:
        raise InputError(f"{file} is no saved world")
    motion = Motion(
        arrays.pop("c2w"), arrays.pop("velocity"), frozenset(about["held"]), about["pitch"]
    )
    origin = arrays.pop("origin")
    carried = Carried()
    if about["chunks"]:
        if template.refiner is not None:
            refiner = dataclasses.replace(template.refiner, frames=about["refined"])
            template = dataclasses.replace(template, refiner=refiner)
        places, structure = jax.tree_util.tree_flatten_with_path(template)
        names = [jax.tree_util.keystr(path) for path, _ in places]
        if set(names) != set(arrays):
            raise InputError(f"{file} is of another network, or made with another refiner")
        carried = jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in names])
        check_carried(carried, template, about["chunks"])
    return WorldState(carried, about["chunks"], motion, origin, about["prompt"])
