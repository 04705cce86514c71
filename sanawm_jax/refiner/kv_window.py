"""The keys and values that a block attends to besides its own: the sink and recent history.

The window's shape never changes. History is a ring of frames: it fills from slot 0, then the
newest frames take the oldest's slots. Attention does not care for the order of keys, and keys of
history already carry their rotation, so nothing is ever moved, and the valid slots always come
first: their count is all the mask that there is.

Axis letters: Y layers, B batch, F latent frames, P tokens a frame, N heads, D head size.
Reference: diffusers `SanaWMRefinerKVCache`, which concatenates and trims instead.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys and values of some tokens, (..., N, D) each."""

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVWindow:
    """All that the refinement of the next block needs of what came before."""

    sink: KeyValue  # Y B F P N D, before rotation: the sink moves along with the window
    history: KeyValue  # Y B F P N D, rotated at absolute positions; a ring over F
    refined: jax.Array  # () int32, frames refined so far

    @property
    def sink_frames(self) -> int:
        return self.sink.k.shape[2]

    @property
    def history_slots(self) -> int:
        """Frames of history that the window holds when it is full."""
        return self.history.k.shape[2]

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


def open_window(sink: KeyValue, history_slots: int) -> KVWindow:
    """A window with a sink (Y, B, F, P, N, D), before rotation, and no history yet."""
    layers, batch, _, *rest = sink.k.shape
    empty = jnp.zeros((layers, batch, history_slots, *rest), sink.k.dtype)
    return KVWindow(sink, KeyValue(empty, jnp.zeros_like(empty)), jnp.int32(0))


def append_block(window: KVWindow, block: KeyValue) -> KVWindow:
    """The window after a refined block (Y, B, F, P, N, D), rotated at its absolute positions."""
    frames = block.k.shape[2]
    slots = (window.refined + jnp.arange(frames)) % window.history_slots
    history = jax.tree.map(lambda ring, new: ring.at[:, :, slots].set(new), window.history, block)
    return KVWindow(window.sink, history, window.refined + frames)
