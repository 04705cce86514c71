"""The keys and values that a block attends to: its own, the sink's and recent history's.

The window's shape never changes. A layer's frames lie in one buffer, [active block | sink |
history]. History is a ring of frames: it fills from its first slot, then the newest frames take the
oldest's slots. Attention does not care for the order of keys, and keys of history already carry
their rotation, so nothing is ever moved, and the valid slots always come first: their count is all
the mask that there is. A block that is shorter than its slots takes the last of them, and those
before are cut off.

Separate layers (`core.stack.Layers`) write a block's keys into the buffer, in place where the
window is donated. Stacked layers, whose buffers a scan would copy as a whole, have no slots for it:
each puts the block's keys before the rest for as long as it runs.

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


def _put(buffer: jax.Array, part: jax.Array, first: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(buffer, part, first, _FRAMES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVWindow:
    """All that the refinement of the next block needs of what came before."""

    sink: Layers  # Y B F P N D, keys before rotation: the sink moves along with the window
    keys: KeyValue  # Y B F P N D, rotated; the module's docstring has the slots
    refined: jax.Array  # () int32, frames refined so far
    active_slots: int = dataclasses.field(metadata={"static": True})  # 0 of stacked layers

    @property
    def sink_frames(self) -> int:
        return _frames(self.sink)

    @property
    def history_slots(self) -> int:
        """Frames of history that the window holds when it is full."""
        return _frames(self.keys) - self.active_slots - self.sink_frames

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

    def before_block(self, frames: int) -> KeyValue:
        """What `after_block` takes before a block of so many frames was ever written."""
        if self.active_slots:
            return self.keys

        def empty(a: jax.Array) -> jax.Array:
            return jnp.zeros((*a.shape[:_FRAMES], frames, *a.shape[_FRAMES + 1 :]), a.dtype)

        return jax.tree.map(empty, self.keys)

    def after_block(self, written: KeyValue) -> KVWindow:
        """The window to run the block again, which overwrites what `with_block` has written."""
        return dataclasses.replace(self, keys=written) if self.active_slots else self


def open_window(
    sink: KeyValue, turn: Callable[[Any], Any], *, history_slots: int, active_slots: int
) -> KVWindow:
    """A window with a sink and no history yet.

    Args:
      sink: (Y, B, F, P, N, D), keys before rotation.
      turn: rotates such keys of one leaf to where the sink sits, its own place at first.
      history_slots: frames of history that it can hold.
      active_slots: frames of the longest block.
    """
    if not isinstance(sink.k, tuple):
        active_slots = 0
    slots = ((active_slots, history_slots),)

    def widen(a: jax.Array) -> jax.Array:
        tokens = ((0, 0),) * (-_FRAMES - 1)
        return jnp.pad(a, ((0, 0),) * (a.ndim + _FRAMES) + slots + tokens)

    keys = KeyValue(jax.tree.map(lambda k: widen(turn(k)), sink.k), jax.tree.map(widen, sink.v))
    return KVWindow(sink.k, keys, jnp.int32(0), active_slots)


def with_block(keys: KeyValue, block: KeyValue, active_slots: int) -> tuple[KeyValue, KeyValue]:
    """One layer's window and the active block's keys in it.

    Args:
      keys: (B, F, P, N, D) of that layer, see `KVWindow.keys`.
      block: (B, F, P, N, D), rotated.

    Returns:
      what the layer leaves, for `append_block`: its window with the block in its slots, or the
      block alone if it has none; and all keys and values that the block attends to, valid first.
    """
    if not active_slots:
        return block, jax.tree.map(lambda *a: jnp.concatenate(a, _FRAMES), block, keys)
    first = active_slots - _frames(block)
    keys = jax.tree.map(lambda a, new: _put(a, new, first), keys, block)
    return keys, jax.tree.map(lambda a: a[:, first:], keys)


def append_block(
    window: KVWindow, written: KeyValue, frames: int, turn: Callable[[Any, jax.Array], Any]
) -> KVWindow:
    """The window after a refined block: its keys are history, and the sink has moved.

    Args:
      written: what `with_block` left in every layer.
      frames: of the block, at most the history's slots.
      turn: (k, start) rotates keys of the sink, one leaf, to where it now starts.
    """
    active, sink = window.active_slots, window.sink_frames
    keys, block = window.keys, written
    if active:
        keys, block = written, jax.tree.map(lambda a: a[:, active - frames : active], written)
    slots = (window.refined + jnp.arange(frames)) % window.history_slots + active + sink
    keys = jax.tree.map(lambda a, new: a.at[..., slots, :, :, :].set(new), keys, block)
    moved = dataclasses.replace(window, refined=window.refined + frames)
    k = jax.tree.map(lambda a, k: _put(a, turn(k, moved.sink_start), active), keys.k, window.sink)
    return dataclasses.replace(moved, keys=KeyValue(k, keys.v))
