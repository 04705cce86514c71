"""The keys and values of other frames that a block attends to: the sink's and recent history's.

The window's shape never changes. A layer's frames lie in one buffer, [sink | history]. History is a
ring of frames: it fills from its first slot, then the newest frames take the oldest's slots.
Attention does not care for the order of keys, and keys of history already carry their rotation, so
nothing is ever moved, and the valid slots always come first: their count is all the mask that there
is.

A block sees all of that beside its own keys, so it has no slots of its own: it takes those of the
oldest frames when its last pass is done with them. Separate layers (`core.stack.Layers`) write it
there one by one, in place where the window is donated, so that no two layers' blocks are ever held.
Stacked layers, whose buffers a scan would copy as a whole, leave their blocks to `append_block`.

Axis letters: Y layers, B batch, F latent frames, P tokens a frame, N heads, D head size.
Reference: diffusers `SanaWMRefinerKVCache`, which concatenates and trims instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sanawm_jax.core.stack import Layers

_FRAMES = -4  # the axis, of all layers and of one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys and values of some tokens, (..., N, D) each."""

    k: Any  # of all layers `Layers`, of one an array
    v: Any


def _frames(part: Any) -> int:
    return jax.tree.leaves(part)[0].shape[_FRAMES]


def _put(buffer: jax.Array, part: jax.Array, first: int | jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(buffer, part, first, _FRAMES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVWindow:
    """All that the refinement of the next block needs of what came before."""

    sink: Layers  # Y B F P N D, keys before rotation: the sink moves along with the window
    keys: KeyValue  # Y B F P N D, rotated: the sink, then slots of history
    refined: jax.Array  # () int32, frames refined so far

    @property
    def is_separate(self) -> bool:
        """Whether layers write a block's keys themselves."""
        return isinstance(self.sink, tuple)

    @property
    def sink_frames(self) -> int:
        return _frames(self.sink)

    @property
    def history_slots(self) -> int:
        """Frames of history that the window holds when it is full."""
        return _frames(self.keys) - self.sink_frames

    @property
    def history_frames(self) -> jax.Array:
        """() int32, frames of history that are valid."""
        return jnp.minimum(self.refined, self.history_slots)

    @property
    def block_start(self) -> jax.Array:
        """() int32, absolute position of the next block's first frame."""
        return self.sink_frames + self.refined

    @property
    def sink_start(self) -> jax.Array:
        """() int32, position that puts the sink just before the oldest frame of history."""
        return self.refined - self.history_frames

    def slots(self, frames: int) -> jax.Array:
        """(F,) int32, slots of a buffer that a block of so many frames takes."""
        return self.sink_frames + (self.refined + jnp.arange(frames)) % self.history_slots


def open_window(sink: KeyValue, turn: Callable[[Any], Any], *, history_slots: int) -> KVWindow:
    """A window with a sink and no history yet.

    Args:
      sink: (Y, B, F, P, N, D), keys before rotation.
      turn: rotates such keys of one leaf to where the sink sits, its own place at first.
      history_slots: frames of history that it can hold.
    """
    slots = ((0, history_slots),)

    def widen(a: jax.Array) -> jax.Array:
        tokens = ((0, 0),) * (-_FRAMES - 1)
        return jnp.pad(a, ((0, 0),) * (a.ndim + _FRAMES) + slots + tokens)

    keys = KeyValue(jax.tree.map(lambda k: widen(turn(k)), sink.k), jax.tree.map(widen, sink.v))
    return KVWindow(sink.k, keys, jnp.int32(0))


def with_block(keys: KeyValue, block: KeyValue, slots: jax.Array) -> KeyValue:
    """A window with a block's keys in these slots, of one layer or of stacked ones.

    Args:
      keys: (..., F, P, N, D), see `KVWindow.keys`.
      block: (..., F, P, N, D), rotated.
      slots: (F,) of the block, `KVWindow.slots`.
    """

    def write(a: jax.Array, new: jax.Array) -> jax.Array:
        # frame by frame, as the ring may end inside of the block; a scatter is far slower
        for i, frame in enumerate(jnp.split(new, len(slots), _FRAMES)):
            a = _put(a, frame, slots[i])
        return a

    return jax.tree.map(write, keys, block)


def append_block(
    window: KVWindow, written: KeyValue, frames: int, turn: Callable[[Any, jax.Array], Any]
) -> KVWindow:
    """The window after a refined block: its keys are history, and the sink has moved.

    Args:
      written: of `Refiner.__call__`: separate layers' windows with the block, or stacked blocks.
      frames: of the block, at most the history's slots.
      turn: (k, start) rotates keys of the sink, one leaf, to where it now starts.
    """
    keys = written
    if not window.is_separate:
        keys = with_block(window.keys, written, window.slots(frames))
    moved = dataclasses.replace(window, refined=window.refined + frames)
    k = jax.tree.map(lambda a, k: _put(a, turn(k, moved.sink_start), 0), keys.k, window.sink)
    return dataclasses.replace(moved, keys=KeyValue(k, keys.v))
