"""The KV cache of the refiner: keys and values of the sink and of the recent history.

The shape of the cache (the "window") never changes. Each layer has one buffer of frames, [sink |
history]. The history is a ring buffer: it fills from its first slot, and then new frames replace
the oldest ones. Attention does not depend on the order of keys, and the keys of the history are
already rotated. So no frame is ever moved, and the valid slots always come first. Their count is
the only mask.

A block attends to all of this and to its own keys. It has no slots while it is refined. When its
last pass no longer needs the oldest frames, the block takes their slots. Separate layers
(`core.stack.Layers`) write the block one layer at a time, and in place if the window is donated. In
this way, the blocks of two layers are never in memory together. A scan would copy the buffers of
stacked layers as a whole; their blocks are written later, by `append_block`.

Axis letters: Y layers, B batch, F latent frames, E latent frames that the buffer has room for, P
tokens per frame, N heads, D head size.
Reference: diffusers `SanaWMRefinerKVCache`, which concatenates and truncates instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from sanawm_jax.core.stack import Layers

_FRAMES = -4  # the axis of frames, in arrays of one layer and of all layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys and values of some tokens, (..., N, D) each."""

    k: Any  # `Layers` for all layers, an array for one layer
    v: Any


def _frames(part: Any) -> int:
    return jax.tree.leaves(part)[0].shape[_FRAMES]


def _put(buffer: jax.Array, part: jax.Array, first: int | jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(buffer, part, first, _FRAMES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVWindow:
    """The state that the refinement of the next block needs from earlier blocks."""

    sink: Layers  # Y B F P N D, keys before rotation, because the sink moves with the window
    keys: KeyValue  # Y B E P N D, rotated: the sink, then the slots of the history
    refined: jax.Array  # () int32; the number of frames refined so far

    @property
    def is_separate(self) -> bool:
        """Whether the layers themselves write the keys of a block."""
        return isinstance(self.sink, tuple)

    @property
    def sink_frames(self) -> int:
        return _frames(self.sink)

    @property
    def history_slots(self) -> int:
        """Number of history frames that the window holds when it is full."""
        return _frames(self.keys) - self.sink_frames

    @property
    def history_frames(self) -> Int[Array, ""]:
        """The number of valid history frames."""
        return jnp.minimum(self.refined, self.history_slots)

    @property
    def block_start(self) -> Int[Array, ""]:
        """The absolute position of the first frame of the next block."""
        return self.sink_frames + self.refined

    @property
    def sink_start(self) -> Int[Array, ""]:
        """The position at which the sink is just before the oldest history frame."""
        return self.refined - self.history_frames

    def slots(self, frames: int) -> Int[Array, "F"]:
        """The slots of the buffer that a block of this many frames takes."""
        return self.sink_frames + (self.refined + jnp.arange(frames)) % self.history_slots


def open_window(sink: KeyValue, turn: Callable[[Any], Any], *, history_slots: int) -> KVWindow:
    """Returns a window with a sink and without history.

    Args:
      sink: (Y, B, F, P, N, D), keys before rotation.
      turn: a function that rotates the keys of one leaf to the first position of the sink.
      history_slots: number of history frames that the window can hold.
    """
    slots = ((0, history_slots),)

    def widen(a: jax.Array) -> jax.Array:
        tokens = ((0, 0),) * (-_FRAMES - 1)
        return jnp.pad(a, ((0, 0),) * (a.ndim + _FRAMES) + slots + tokens)

    keys = KeyValue(jax.tree.map(lambda k: widen(turn(k)), sink.k), jax.tree.map(widen, sink.v))
    return KVWindow(sink.k, keys, jnp.int32(0))


def with_block(keys: KeyValue, block: KeyValue, slots: Int[Array, "F"]) -> KeyValue:
    """Writes the keys and values of a block into slots, for one layer or for stacked layers.

    Args:
      keys: (..., E, P, N, D), see `KVWindow.keys`.
      block: (..., F, P, N, D), rotated.
      slots: the slots of the block from `KVWindow.slots`.
    """

    def write(a: jax.Array, new: jax.Array) -> jax.Array:
        # One frame at a time, because the end of the ring buffer may be inside the block. A scatter
        # would be far slower.
        for i, frame in enumerate(jnp.split(new, len(slots), _FRAMES)):
            a = _put(a, frame, slots[i])
        return a

    return jax.tree.map(write, keys, block)


def append_block(
    window: KVWindow, written: KeyValue, frames: int, turn: Callable[[Any, jax.Array], Any]
) -> KVWindow:
    """Returns the window after a block is refined: the block is history, and the sink has moved.

    Args:
      written: the second result of `Refiner.__call__`: windows that contain the block (separate
        layers), or the block alone (stacked layers).
      frames: number of frames of the block, at most the number of history slots.
      turn: a function (k, start) that rotates the sink's keys of one leaf to their new position.
    """
    keys = written
    if not window.is_separate:
        keys = with_block(window.keys, written, window.slots(frames))
    moved = dataclasses.replace(window, refined=window.refined + frames)
    k = jax.tree.map(lambda a, k: _put(a, turn(k, moved.sink_start), 0), keys.k, window.sink)
    return dataclasses.replace(moved, keys=KeyValue(k, keys.v))
