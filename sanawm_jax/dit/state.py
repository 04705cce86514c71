"""What a stream of the DiT carries from one chunk to the next: a pytree of fixed shapes.

A Gated DeltaNet layer carries its recurrent states and the last frames that its short convolutions
saw. A softmax layer carries the keys and values of some earlier chunks. Both carry the last frames
of the feed-forward's convolution. The size does not grow with the stream's age, and a state is a
value: it can be kept, saved to disk, and continued more than once.

Axis letters: B batch, F latent frames, E latent frames that a cache has room for, P tokens per
frame, C width, N heads, D head size, V value size of the recurrence, X frames that a convolution
needs from the chunk before. In a `DiTState`, arrays have the axes of the stacked layers in front.
Reference: upstream's `forward_long` and its `kv_cache` of ten slots per block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from sanawm_jax.core.frame_attention import KeyValueCache
from sanawm_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Window:
    """How a stream is cut into chunks, and which chunks the softmax layers see.

    The recurrent layers always see the whole past. The softmax layers see the chunk itself and
    `cached` earlier chunks: the last ones or, with a sink, the first chunk and the last
    `cached - 1`.

    Attributes:
      first: latent frames of the first chunk.
      size: latent frames of every later chunk.
      cached: earlier chunks that stay in the cache.
      sink: whether the first chunk stays there for good.

    Raises:
      InputError: a chunk without frames, a first chunk that is shorter than the others, or a
        cache without chunks.
    """

    first: int
    size: int
    cached: int
    sink: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.first < self.size:
            raise InputError(
                f"chunks of {self.first} and then {self.size} frames: use at least one frame, and "
                "a first chunk that is no shorter than the others"
            )
        if self.cached < 1:
            raise InputError(f"num_cached_blocks={self.cached} must be at least 1")

    @classmethod
    def of_clip(cls, frames: int, size: int = 3, cached: int = 2, *, sink: bool = True) -> Window:
        """The window of a clip of known length, as upstream's sampler cuts it.

        What is left of the division into chunks joins the first one.

        Args:
          frames: latent frames of the clip, more than `size`.
          size: latent frames per chunk.
          cached: see the class; -1 keeps all chunks.
          sink: see the class.

        Raises:
          InputError: the clip is too short for a chunk and the given frame.
        """
        if size < 1 or frames <= size:
            raise InputError(
                f"{frames} latent frames are too few for chunks of {size}; give more frames or a "
                "smaller --num_frame_per_block"
            )
        if cached == -1:
            cached = max(frames // size - 1, 1)
        return cls(size + frames % size, size, cached, sink)

    @property
    def sink_frames(self) -> int:
        """Frames at the start of a cache that are never replaced."""
        return self.first if self.sink else 0

    @property
    def slots(self) -> int:
        """E, the frames that a cache has room for."""
        return self.first + (self.cached - 1) * self.size

    def frames(self, chunks: Int[Array, ""]) -> Int[Array, ""]:
        """Latent frames of the first `chunks` chunks."""
        return jnp.where(chunks > 0, self.first + (chunks - 1) * self.size, 0)

    def valid(self, chunks: Int[Array, ""]) -> Int[Array, ""]:
        """Valid frames of a cache that was written by `chunks` chunks, at least 1."""
        held = jnp.minimum(chunks, self.cached)
        has_first = self.sink | (chunks <= self.cached)
        return held * self.size + jnp.where(has_first, self.first - self.size, 0)

    def dropped(self, chunks: Int[Array, ""]) -> Int[Array, ""]:
        """The oldest frames that make room for the chunk after `chunks` others."""
        oldest = self.size if self.sink else jnp.where(chunks == self.cached, self.first, self.size)
        return jnp.where(chunks >= self.cached, oldest, 0)

    def write(
        self,
        cache: KeyValueCache | None,
        k: Float[Array, "B F P N D"],
        v: Float[Array, "B F P N D"],
        chunks: Int[Array, ""],
    ) -> KeyValueCache:
        """A cache with the keys and values of one more chunk.

        Args:
          cache: of `chunks` chunks; None before the first.
          k, v: those of the chunk.
        """

        def first(new: jax.Array) -> jax.Array:
            return jnp.pad(new, ((0, 0), (0, self.slots - self.first), (0, 0), (0, 0), (0, 0)))

        def later(old: jax.Array, new: jax.Array) -> jax.Array:
            sink, recent = jnp.split(old, [self.sink_frames], axis=1)
            if not recent.shape[1]:
                return old
            # room for the new chunk, and for the longest one that is dropped
            wide = jnp.pad(recent, ((0, 0), (0, self.first), (0, 0), (0, 0), (0, 0)))
            place = self.valid(chunks) - self.sink_frames
            wide = lax.dynamic_update_slice_in_dim(wide, new, place, 1)
            recent = lax.dynamic_slice_in_dim(wide, self.dropped(chunks), recent.shape[1], 1)
            return jnp.concatenate([sink, recent], 1)

        if cache is None:
            return KeyValueCache(first(k), first(v))
        return KeyValueCache(later(cache.k, k), later(cache.v, v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCarry:
    """What the self-attention of a Gated DeltaNet layer carries."""

    main: Float32[Array, "*rest B N V D"]
    normaliser: Float32[Array, "*rest B N 1 D"]
    camera: Float32[Array, "*rest B N V D"] | None  # None where the stream has no camera
    inputs: dict[str, Float[Array, "*rest B X P C"]]  # by convolution, the last frames that it saw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxCarry:
    """What the self-attention of a softmax layer carries."""

    main: KeyValueCache
    camera: KeyValueCache | None  # None where the stream has no camera


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCarry:
    """What one layer carries."""

    attention: RecurrentCarry | SoftmaxCarry
    ffn: Float[Array, "*rest B X P C"] | None  # last frames that its convolution over frames saw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiTState:
    """What a stream carries after some chunks.

    Attributes:
      layers: by segment and run of the network, `LayerCarry`s stacked like the run's parameters.
      chunks: chunks so far.
      window: of the stream.
    """

    layers: tuple[tuple[LayerCarry, ...], ...]
    chunks: Int[Array, ""]
    window: Window = dataclasses.field(metadata={"static": True})

    @property
    def frame(self) -> Int[Array, ""]:
        """Absolute number of the next latent frame."""
        return self.window.frames(self.chunks)
