"""The camera poses of a chunk, from keys, from sticks and the mouse, or given.

Axis letters: n pixel frames of a chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Num

from sanawm_jax.camera.actions import ACTION_KEYS
from sanawm_jax.camera.live import Motion, Steering, walk
from sanawm_jax.camera.mapping import ActionMapping
from sanawm_jax.runtime.errors import InputError

Keys = str | frozenset[str]


def chunk_poses(
    motion: Motion, control: Any, rule: ActionMapping, count: int, *, is_start: bool
) -> tuple[Num[np.ndarray, "f 4 4"], Motion]:
    """Poses (n, 4, 4) of a chunk of n frames, and the motion at the last one.

    Args:
      motion: before the chunk.
      control: see `sampling.world.World.step`.
      rule: what the keys do.
      count: n.
      is_start: the first frame is where the camera stands already.

    Raises:
      InputError: a wrong number of frames or poses, or unknown keys.
    """
    if isinstance(control, np.ndarray):
        if control.shape != (count, 4, 4):
            raise InputError(f"poses have shape {control.shape}, this chunk takes {(count, 4, 4)}")
        return control, dataclasses.replace(motion, c2w=control[-1].astype(np.float64))
    moves, extra = count - is_start, (0.0, 0.0, 0.0, 0.0)
    if isinstance(control, Steering):
        rule, extra, control = control.faster(rule), control.extra, control.keys
    if isinstance(control, str | frozenset):
        held = [held_keys(control)] * moves
    else:
        held = [held_keys(keys) for keys in control]
        if len(held) != moves:
            raise InputError(f"keys of {len(held)} frames, this chunk takes {moves}")
    poses, after = walk(motion, held, rule, extra)
    return (np.concatenate([motion.c2w[None], poses]) if is_start else poses), after


def held_keys(keys: Keys) -> frozenset[str]:
    """A set of the action language's keys.

    Raises:
      InputError: there is another key.
    """
    found = frozenset(keys)
    if unknown := found - ACTION_KEYS:
        raise InputError(f"unknown keys {sorted(unknown)}; the keys are w a s d i j k l")
    return found
